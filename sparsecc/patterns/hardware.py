"""What the targets here can make of zeros that weights hold, by the pattern that they are in."""

from __future__ import annotations

from sparsecc.errors import InvalidOption
from sparsecc.patterns.nm import NM

_TWO_OF_FOUR = (
    "sparse tensor cores can compute faster with it (targets sm80-2:4 and later, tensorrt-2:4; not measured "
    "on hardware here); "
    "other targets store the zeros in dense weights"
)
_NONE = "no target here computes faster with it; files are smaller when compressed"
_REMOVED = (
    "no target here computes faster with zeros in place; {} removes whole ones, which all are faster with"
)

#: names of patterns that are no N:M -> what uses them, where that is not nothing
_USES: dict[str, str] = {
    "rows": _REMOVED.format("ChannelPruning"),
    "columns": _REMOVED.format("ChannelPruning"),
}


def as_nm(pattern: str) -> NM | None:
    """The N:M pattern of that text, or None where it names other zeros."""
    try:
        return NM.parse(pattern)
    except InvalidOption:
        return None


def use(pattern: str) -> str:
    """What uses a pattern.

    >>> use("unstructured")
    'no target here computes faster with it; files are smaller when compressed'
    """
    found = as_nm(pattern)
    return _TWO_OF_FOUR if found is not None and _is_two_of_four(found) else _USES.get(pattern, _NONE)


def _is_two_of_four(pattern: NM) -> bool:
    """Whether weights with the pattern have 2:4 as well."""
    n, m = pattern.n, pattern.m
    return (m % 4 == 0 and n <= 2) or (4 % m == 0 and n * (4 // m) <= 2)
