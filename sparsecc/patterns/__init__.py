"""Patterns of zeros inside weights: which weights can have them, and which elements to keep."""
