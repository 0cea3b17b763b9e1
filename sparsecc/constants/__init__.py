"""Which positions of which axes hold the same number for every input."""

from sparsecc.constants.flow import Constants
from sparsecc.constants.known import Known
from sparsecc.constants.products import Product

__all__ = ["Constants", "Known", "Product"]
