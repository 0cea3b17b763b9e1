"""Criteria by name."""

from __future__ import annotations

import re
from collections.abc import Callable

from sparsecc.errors import InvalidOption
from sparsecc.saliency.calibrated import OBS, Activation, APoZ, Wanda
from sparsecc.saliency.geometry import FPGM
from sparsecc.saliency.gradient import OBD, SNIP, Fisher, GraSP, SynFlow, Taylor
from sparsecc.saliency.magnitude import L1, L2, Criterion, LInf, Lp, Random
from sparsecc.saliency.scales import NormScale

#: text name -> criterion for a seed
CRITERIA: dict[str, Callable[[int], Criterion]] = {
    "l1": lambda seed: L1(),
    "l2": lambda seed: L2(),
    "linf": lambda seed: LInf(),
    "bn": lambda seed: NormScale(),
    "fpgm": lambda seed: FPGM(),
    "random": Random,
    "wanda": lambda seed: Wanda(),
    "activation": lambda seed: Activation(),
    "apoz": lambda seed: APoZ(),
    "obs": lambda seed: OBS(),
    "taylor": lambda seed: Taylor(),
    "snip": lambda seed: SNIP(),
    "fisher": lambda seed: Fisher(),
    "obd": lambda seed: OBD(),
    "grasp": lambda seed: GraSP(),
    "synflow": lambda seed: SynFlow(),
}
_LP = re.compile(r"l(\d+(?:\.\d+)?)")


def criterion(name: str | Criterion, *, seed: int = 0) -> Criterion:
    """The criterion of that name, or of ``l0.5`` and the like; InvalidOption otherwise."""
    if isinstance(name, Criterion):
        return name
    if name in CRITERIA:
        return CRITERIA[name](seed)
    match = _LP.fullmatch(name)
    if match is None:
        raise InvalidOption(
            f"saliency {name!r} is not known; there are {', '.join(CRITERIA)} and l<p>, such as l0.5"
        )
    return Lp(float(match.group(1)))
