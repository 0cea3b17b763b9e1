"""Proof that a result computes what it should, and the certificate that records it."""

from sparsecc.verification.certificate import Certificate, Check
from sparsecc.verification.check import certify

__all__ = ["Certificate", "Check", "certify"]
