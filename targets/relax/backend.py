"""What the pass asks of a kind of target."""

from __future__ import annotations

from typing import Any, Protocol

from sparsecc.targets.relax.product import Product
from sparsecc.targets.relax.scope import Scope


class Backend(Protocol):
    """Functions for one target."""

    def choose(self, product: Product) -> tuple[bool, str]:
        """Whether to compute a product from packed weights, and why (not)."""

    def call(self, product: Product, x: Any, scope: Scope) -> Any:
        """The Relax expression that stands for the product of ``x``."""
