"""``sparsecc.quantize_program``: a PyTorch model through PyTorch's own quantisers (torchao's PT2E).

PT2E: https://docs.pytorch.org/ao/stable/pt2e_quantization/index.html (a graph of ``torch.export`` gets
observers, sees data, and then has quantize and dequantize operators and integer weights).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from sparsecc.calibration import CalibrationData
from sparsecc.errors import InvalidOption, UnsupportedModel, summary
from sparsecc.fx.capture import Program
from sparsecc.fx.ops import aten_name
from sparsecc.fx.subject import AppliedTorch, TorchSubject
from sparsecc.memory import within_memory
from sparsecc.patterns.layers import layers
from sparsecc.pipeline import Progress, Pruned, silent
from sparsecc.plan import Pattern
from sparsecc.quantization.measure import Sums
from sparsecc.quantization.quantise import floats_left, split
from sparsecc.quantization.result import Error, Layer, QuantisedReport
from sparsecc.quantization.source import as_pruned
from sparsecc.quantization.zeros import compared
from sparsecc.subject import Arguments

_QUANTIZE = "quantized_decomposed.quantize_"
_DEQUANTIZE = "quantized_decomposed.dequantize_"


@dataclass(frozen=True, eq=False)
class QuantisedProgram:
    """A quantised model, ``model``, as PT2E gives it (a GraphModule), and the ``report``.

    That zeros and patterns are there is checked.  That it computes about what the float model computes is
    measured, and no certificate.
    """

    model: GraphModule
    report: QuantisedReport
    example_inputs: Arguments = field(repr=False)


@within_memory()
def quantize_program(
    model: Any,
    example_inputs: Any = None,
    *,
    quantizer: Any,
    calibration: Any,
    evaluation: Any = None,
    dynamic_shapes: Any = None,
    progress: Progress = silent,
) -> QuantisedProgram:
    """A PyTorch model with int8 weights and activations, made by one of PyTorch's own quantisers.

    ``model``: a module, an ExportedProgram or a ``Pruned`` of one.  ``quantizer``: a ``Quantizer`` of
    torchao's PT2E, for example an ``X86InductorQuantizer``; it says what is quantised and how.
    ``calibration``: batches of inputs or ``CalibrationData``, which observers see; without ``evaluation``
    every fourth batch is held out to measure errors on, one at least.

    The result says which zeros and patterns are still there, all that were promised, or VerificationFailed is
    raised, and how far outputs are from those of the float model.  The float weights that PT2E leaves behind
    unread are taken out.  Raises InvalidOption for ONNX models, for unfit batches and without torchao,
    UnsupportedModel where the quantiser does not take the model.
    """
    if calibration is None:
        raise InvalidOption(
            "calibration: give batches of inputs, or CalibrationData: ranges follow from them"
        )
    prepare, convert = _torchao()
    progress("capture")
    pruned = as_pruned(model, example_inputs, dynamic_shapes)
    subject, applied = pruned.subject, pruned.applied
    if not isinstance(subject, TorchSubject) or not isinstance(applied, AppliedTorch):
        raise InvalidOption(
            "quantize_program takes PyTorch models; sparsecc.quantize takes ONNX models as well"
        )
    assert applied.program is not None
    data = CalibrationData.of(calibration)
    ranging, held = split(data, evaluation, calibrates=True)
    whole: Any = applied.program.exported.module()
    given = _read(whole)
    progress("quantise")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            observed = prepare(copy.deepcopy(whole), quantizer)
            for args, kwargs in _calls(subject, data, ranging):
                observed(*args, **kwargs)
            quantised: GraphModule = convert(observed)
        except InvalidOption:
            raise
        except Exception as error:  # whatever a quantiser raises
            name = type(quantizer).__name__
            raise UnsupportedModel(f"{name} does not quantise this model: {summary(error)}") from error
    _drop_unread(quantised)
    progress("check")
    lines, lost = _checked(pruned, applied.program, given, quantised)
    progress("measure")
    other = data if evaluation is None else CalibrationData.of(evaluation)
    errors = _measured(whole, quantised, _calls(subject, other, held))
    report = QuantisedReport(
        ", ".join(sorted({line.dtype for line in lines})) or "none",
        _activations(quantised),
        lines,
        errors,
        len(ranging),
        _size(whole),
        _size(quantised),
        (*floats_left(lines), *_unchecked(lost)),
    )
    return QuantisedProgram(quantised, report, subject.arguments(subject.example()))


def _torchao() -> tuple[Any, Any]:
    try:
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    except ImportError as error:
        raise InvalidOption(
            "quantizer: PyTorch's own quantisers need torchao: pip install 'sparsecc[torchao]'"
        ) from error
    return prepare_pt2e, convert_pt2e


def _calls(subject: TorchSubject, data: CalibrationData, batches: Iterable[Any]) -> Iterator[Arguments]:
    for batch in batches:
        yield subject.arguments(subject.bound(data.inputs_of(batch)))


# -- what is in a graph ------------------------------------------------------------------------------


def _read(module: GraphModule) -> dict[tuple[str, int], str]:
    """Node and place of an argument -> the stored tensor that it reads."""
    return {
        (node.name, place): str(value.target)
        for node in module.graph.nodes
        for place, value in enumerate(node.args)
        if node.op == "call_function" and isinstance(value, Node) and value.op == "get_attr"
    }


def _stored(module: GraphModule, name: str) -> Any:
    """The tensor of a qualified name."""
    *path, last = name.split(".")
    return getattr(module.get_submodule(".".join(path)), last)


def _value(module: GraphModule, node: Node) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The real numbers of a weight and the tensor that is stored; None where the model computes it."""
    if node.op == "get_attr":
        stored = _stored(module, str(node.target))
        return stored, stored
    if not (aten_name(node.target) or "").startswith((_QUANTIZE, _DEQUANTIZE)):
        return None
    found = [_value(module, a) if isinstance(a, Node) else a for a in node.args]
    if any(a is None and isinstance(given, Node) for a, given in zip(found, node.args, strict=True)):
        return None
    args = [a[0] if isinstance(a, tuple) else a for a in found]
    source = found[0]
    assert isinstance(source, tuple)
    with torch.no_grad():
        return node.target(*args, **node.kwargs), source[1]  # type: ignore[operator]


def _drop_unread(module: GraphModule) -> None:
    """Take out parameters and buffers that no node reads."""
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name in {n for n, _ in (*module.named_parameters(), *module.named_buffers())} - read:
        *path, last = name.split(".")
        delattr(module.get_submodule(".".join(path)), last)


# -- checks ------------------------------------------------------------------------------------------


def _checked(
    pruned: Pruned, program: Program, given: Mapping[tuple[str, int], str], after: GraphModule
) -> tuple[tuple[Layer, ...], list[str]]:
    """What every product reads, before and after; and weights that nothing is known of afterwards.

    Raises VerificationFailed for zeros and patterns that are gone, UnsupportedModel for promised ones that
    cannot be found.
    """
    axes = {layer.weight: layer.axis for layer in layers(pruned.subject.analysis)}
    promised: dict[str, list[Pattern]] = {}
    for pattern in pruned.plan.patterns:
        if pattern.state != "dense":
            promised.setdefault(pattern.weight, []).append(pattern)
    nodes = {node.name: node for node in after.graph.nodes}
    lines: dict[tuple[str, int], Layer] = {}  # by weight and what is stored: products may have their own
    lost: list[str] = []
    for (name, place), attribute in given.items():
        weight = pruned.subject.view.tied.get(attribute, attribute)
        if weight not in axes:
            continue
        found = nodes.get(name)
        value = found.args[place] if found is not None and place < len(found.args) else None
        numbers = _value(after, value) if isinstance(value, Node) else None
        if numbers is None:
            lost.append(weight)
            continue
        real, stored = numbers
        before = program.weights[program.tied.get(attribute, attribute)].detach()
        lines[weight, id(stored)] = compared(
            weight,
            weight,
            _last(before, axes[weight]),
            _last(real, axes[weight]),
            str(stored.dtype).removeprefix("torch."),
            promised.get(weight, ()),
        )
    seen = {weight for weight, _ in lines}
    if unseen := [weight for weight in promised if weight not in seen or weight in lost]:
        raise UnsupportedModel(
            f"the pattern of {unseen[0]!r} cannot be checked: the quantiser changed what reads it"
        )
    return tuple(lines.values()), list(dict.fromkeys(lost))


def _unchecked(lost: Sequence[str]) -> Iterator[str]:
    """A note on weights whose zeros were not compared."""
    if lost:
        yield f"zeros of {', '.join(lost)} were not checked: the quantiser changed what reads them"


def _last(weight: torch.Tensor, axis: int) -> npt.NDArray[np.float32]:
    return np.moveaxis(weight.detach().float().numpy(), axis, -1)


def _measured(before: Any, after: GraphModule, calls: Iterable[Arguments]) -> tuple[Error, ...]:
    """Errors of every output of floats over all batches."""
    sums: list[Sums] = []
    with torch.no_grad():
        for args, kwargs in calls:
            pairs = zip(_flat(before, args, kwargs), _flat(after, args, kwargs), strict=True)
            for place, (wanted, got) in enumerate(pairs):
                if place == len(sums):
                    sums.append(Sums())
                if isinstance(wanted, torch.Tensor) and wanted.is_floating_point():
                    sums[place].add(wanted.double().numpy(), got.double().numpy())
    return tuple(s.error(f"output {place}") for place, s in enumerate(sums) if s.batches)


def _flat(module: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    return pytree.tree_leaves(module(*args, **kwargs))


def _activations(module: GraphModule) -> str | None:
    """The types that activations are rounded to; None where their ranges are found when the model runs."""
    found = set()
    for node in module.graph.nodes:
        if (aten_name(node.target) or "").startswith(_QUANTIZE) and _value(module, node) is None:
            if any(isinstance(a, Node) for a in node.args[1:]):
                return None
            found |= {str(a).removeprefix("torch.") for a in node.args if isinstance(a, torch.dtype)}
    return ", ".join(sorted(found)) or "float32"


def _size(module: Any) -> int:
    """Bytes of what is stored, each tensor once."""
    stored = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in stored.values())
