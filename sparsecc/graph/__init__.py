"""The read-only view of a captured graph, shared by both dialects."""

from sparsecc.graph.view import Call, Kind, Semantics, Value, View

__all__ = ["Call", "Kind", "Semantics", "Value", "View"]
