"""Transformations, one a file; import them as ``sparsecc.passes``."""

if __name__ != "sparsecc.passes":
    raise ImportError(
        f"import this package as sparsecc.passes, not as {__name__}: a second copy would be another registry"
    )

import importlib.metadata
import warnings

from sparsecc.passes.block import BlockPruning
from sparsecc.passes.channel import ChannelPruning
from sparsecc.passes.dead_channels import DeadChannelElimination
from sparsecc.passes.depth import DepthPruning
from sparsecc.passes.distillation import Distillation
from sparsecc.passes.element import ElementPruning
from sparsecc.passes.expert import ExpertPruning
from sparsecc.passes.head import HeadPruning
from sparsecc.passes.kernel import KernelPruning
from sparsecc.passes.layerwise import SparseGPT, Wanda
from sparsecc.passes.nm_pattern import NMPattern
from sparsecc.passes.parameter_folding import ParameterFolding
from sparsecc.passes.reconstruction import Reconstruction
from sparsecc.passes.reestimation import BatchNormReestimation, BiasCorrection
from sparsecc.transform import Pass

#: name -> pass: what is in this folder
PASSES: dict[str, type[Pass]] = {
    p.__name__: p
    for p in (
        ChannelPruning,
        HeadPruning,
        ExpertPruning,
        DepthPruning,
        DeadChannelElimination,
        ParameterFolding,
        NMPattern,
        SparseGPT,
        Wanda,
        Reconstruction,
        Distillation,
        BatchNormReestimation,
        BiasCorrection,
        ElementPruning,
        BlockPruning,
        KernelPruning,
    )
}


def known() -> dict[str, type[Pass]]:
    """Passes that recipes may name: those of this folder, and plug-ins (entry points ``sparsecc.passes``).

    A plug-in that cannot be loaded is left out with a warning; it cannot take the place of a pass here.
    """
    found: dict[str, type[Pass]] = {}
    for entry in importlib.metadata.entry_points(group="sparsecc.passes"):
        try:
            loaded = entry.load()
        except Exception as error:  # a plug-in may fail in any way
            warnings.warn(f"pass plug-in {entry.name!r} cannot be loaded: {error}", stacklevel=2)
            continue
        if isinstance(loaded, type) and issubclass(loaded, Pass):
            found[entry.name] = loaded
        else:
            warnings.warn(f"pass plug-in {entry.name!r} is no Pass", stacklevel=2)
    return {**found, **PASSES}


__all__ = [
    "PASSES",
    "BatchNormReestimation",
    "BiasCorrection",
    "BlockPruning",
    "ChannelPruning",
    "DeadChannelElimination",
    "DepthPruning",
    "Distillation",
    "ElementPruning",
    "ExpertPruning",
    "HeadPruning",
    "KernelPruning",
    "NMPattern",
    "ParameterFolding",
    "Reconstruction",
    "SparseGPT",
    "Wanda",
    "known",
]
