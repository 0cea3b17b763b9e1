"""The PyTorch reader and the ONNX reader couple the same positions of the same weights.

Weights are matched by their values, up to transposes and axes of size 1, because exporters rename,
transpose and fold.  Two groups are the same if every choice of kept positions has the same consequence
for every weight.
"""

from __future__ import annotations

import io
import itertools
import warnings
from dataclasses import dataclass, field

import numpy as np
import onnx
import pytest
import torch

from sparsecc.axes import Analysis
from sparsecc.axes.terms import Keep
from sparsecc.fx.capture import Program, capture
from sparsecc.fx.reader import read as read_program
from sparsecc.fx.to_onnx import to_onnx
from sparsecc.onnxfile.subject import OnnxSubject
from tests.exported import UNWRITABLE, captured, exported
from tests.patterns import CASES

Axis = tuple[str, int]
#: patterns where one reader sees more than the other, and why
DIFFERENT = {
    "index_with_buffer": "the exporter computes the indices from the buffer",
    "reordered_channels": "the exporter computes the indices from the buffer",
    "channels_by_index": "the exporter computes the indices from the buffer",
    "message_passing": "the exporter computes the positions that ScatterElements adds to",
    "stacked_experts": "positions that TopK finds are followed in PyTorch graphs only",
}


@dataclass
class Match:
    """ONNX axes by PyTorch axis; vectors that ONNX clones per use; weights that the file lacks."""

    axes: dict[Axis, Axis] = field(default_factory=dict)
    cloned: list[str] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)


def match(ours: Analysis, theirs: Analysis) -> Match:
    """Pair weights of the same values."""
    found = Match()
    arrays = {n: theirs.view.weight(n).detach().numpy() for n in theirs.view.weights}
    shared = {
        v.weight for c in theirs.view.calls for v in c.inputs if v is not None and v.kind == "const"
    } - {None}
    constants = [theirs.view.weight(str(n)).numpy() for n in shared]
    used: set[str] = set()
    for name in ours.view.weights:
        array = ours.view.weight(name).detach().numpy()
        if array.dtype.kind != "f" or array.size < 2:
            continue
        partner = next((n for n in arrays if n not in used and _pair(array, arrays[n]) is not None), None)
        if partner is None:
            there = any(_pair(array, c) is not None for c in constants)
            (found.cloned if there else found.folded).append(name)
            continue
        used.add(partner)
        pair = _pair(array, arrays[partner])
        assert pair is not None
        found.axes.update({(name, a): (partner, b) for a, b in pair.items()})
    return found


def _pair(ours: np.ndarray, theirs: np.ndarray) -> dict[int, int] | None:  # type: ignore[type-arg]
    """Which axis of one array is which of the other, if they hold the same values."""
    if ours.size != theirs.size:
        return None
    mine = [d for d, n in enumerate(ours.shape) if n > 1]
    yours = [d for d, n in enumerate(theirs.shape) if n > 1]
    a, b = ours.squeeze(), theirs.squeeze()
    for order in itertools.permutations(range(a.ndim)):
        if a.ndim == b.ndim and a.transpose(order).shape == b.shape and np.array_equal(a.transpose(order), b):
            return {mine[d]: yours[place] for place, d in enumerate(order)}
    return None


def consequences(analysis: Analysis, group: str, keep: Keep, axes: list[Axis]) -> list[bytes | None]:
    """What a choice means for axes of weights."""
    keeps = analysis.keeps({group: keep})
    values = analysis.view.weights
    masks = [keeps.mask(analysis.solver.axes[values[name]][axis]) for name, axis in axes]
    return [None if m is None else m.tobytes() for m in masks]


def differences(ours: Analysis, theirs: Analysis, matched: Match) -> list[str]:
    """Groups of either side that the other one lacks."""
    random = np.random.default_rng(0)
    mine, yours = list(matched.axes), list(matched.axes.values())
    left = {g.name: g for g in theirs.groups if any((m.weight, m.axis) in yours for m in g.members)}
    out: list[str] = []
    for group in ours.groups:
        if not any((m.weight, m.axis) in matched.axes for m in group.members):
            continue
        keep = random.random(group.size) < 0.5
        keep[0], keep[-1] = True, False
        want = consequences(ours, group.name, keep, mine)
        same = [
            n
            for n, g in left.items()
            if g.size == group.size and consequences(theirs, n, keep, yours) == want
        ]
        if same:
            partner = left.pop(same[0])
            if partner.kind != group.kind:
                out.append(f"{group} is of kind {group.kind}, and {partner.kind} in the ONNX model")
        else:
            out.append(f"PyTorch alone: {group}")
    return out + [f"ONNX alone: {g}" for g in left.values()]


def compare(program: Program, proto: onnx.ModelProto) -> tuple[list[str], Match]:
    """Differences between a program and a model, and how their weights were matched."""
    ours, theirs = Analysis(read_program(program)), OnnxSubject(proto).analysis
    matched = match(ours, theirs)
    return differences(ours, theirs, matched), matched


@pytest.mark.parametrize("name", [n for n in CASES if n not in UNWRITABLE])
def test_both_readers_give_the_same_groups(name: str) -> None:
    found, matched = compare(captured(name), exported(name))
    assert all(n.startswith("spare.") for n in matched.folded)  # modules that the forward does not call
    assert all(theirs.ndim == 1 for theirs in map(captured(name).weights.__getitem__, matched.cloned))
    if name in DIFFERENT:
        assert found != []
    else:
        assert found == []


FOLDED = (
    "conv_bn_relu",
    "residual_projection",
    "dense_concat",
    "grouped_conv",
    "unet",
    "squeeze_excitation",
    "depthwise",
)


@pytest.mark.parametrize("name", FOLDED)
def test_folded_normalisations_do_not_change_the_groups(name: str) -> None:
    """The tracing exporter folds BatchNorm into convolutions: its parameters are gone, the groups are not."""
    model, inputs = CASES[name].make()
    program = capture(model, inputs)
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, inputs, stream, dynamo=False, opset_version=17)
    found = OnnxSubject(stream.getvalue()).analysis
    ours = Analysis(read_program(program))
    matched = match(ours, found)
    norms = {n for n, m in model.named_modules() if isinstance(m, torch.nn.modules.batchnorm._NormBase)}
    folded = {n.rpartition(".")[0] for n in matched.folded}
    assert norms <= folded
    shapes = sorted(g.size for g in ours.groups)
    assert sorted(g.size for g in found.groups) == shapes


@pytest.mark.data
@pytest.mark.parametrize("name", ["resnet20", "efficientnet_lite0", "minilm"])
def test_both_readers_agree_on_trained_models(name: str) -> None:
    data = pytest.importorskip("benchmarks.data")
    from benchmarks.models import MODELS

    try:
        loaded = MODELS[name].load()
    except (data.DataError, ModuleNotFoundError) as problem:
        pytest.skip(f"run `make data`: {problem}")
    program = capture(loaded.model, loaded.example_inputs, dynamic_shapes=loaded.dynamic_shapes)
    found, matched = compare(program, to_onnx(program.exported))
    assert matched.folded == []
    assert found == []
