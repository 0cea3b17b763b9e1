"""Executable references: what a model means, independently of any runtime."""
