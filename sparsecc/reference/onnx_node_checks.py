"""Checks every operator of an edited ONNX model, fed with the masked original's activations."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from onnx import NodeProto

from sparsecc.axes.analysis import Keeps
from sparsecc.graph import Call, View
from sparsecc.onnxfile.model import OnnxFile, subgraphs
from sparsecc.reference.masked import at_kept
from sparsecc.reference.node_checks import CONTRACTIONS, compared, largest
from sparsecc.reference.onnx_run import Hook, Runner
from sparsecc.subject import NodeCheck


def check_nodes(
    reference: Runner,
    hook: Hook,
    view: View,
    keeps: Keeps,
    edited: OnnxFile,
    inputs: Mapping[str, torch.Tensor],
    bypassed: Collection[str] = (),
) -> Iterator[NodeCheck]:
    """One check per operator that both models have; shapes and weights are the edited model's own.

    ``bypassed`` names sums that are sums no more.
    """
    want = reference.run(inputs, hook=hook, keep_values=True)
    slim = Runner(edited, cache=False)
    calls = {c.name: c for c in view.calls if c.name not in bypassed}
    found: list[NodeCheck] = []

    def compare(node: NodeProto, index: int, given: list[Any], default: Any) -> tuple[Any, ...]:
        call = calls.get(next((o for o in node.output if o), ""))
        outputs: tuple[Any, ...] = default(given)
        if call is not None and not subgraphs(node):
            found.append(_checked(call, node, given, default, want, keeps))
        return outputs

    slim.run(inputs, hook=compare)
    yield from found


def _checked(
    call: Call, node: NodeProto, given: list[Any], default: Any, want: Mapping[str, Any], keeps: Keeps
) -> NodeCheck:
    forced = list(given)
    for position, (value, ref) in enumerate(zip(call.inputs, call.refs, strict=True)):
        if value is None or ref is None or value.kind not in ("node", "input") or value.name not in want:
            continue
        tensor = want[value.name]
        if isinstance(tensor, torch.Tensor):
            forced[ref] = at_kept(tensor, keeps.operand_places(call, position, tensor.shape))
    ours = [y for y, name in zip(default(forced), node.output, strict=False) if name]
    theirs = [
        at_kept(want[v.name], keeps.value_places(v, want[v.name].shape))
        if isinstance(want.get(v.name), torch.Tensor)
        else None
        for v in call.outputs
    ]
    pairs = [
        (a, b)
        for a, b in zip(ours, theirs, strict=False)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    ]
    scales = _scales(call, forced, default, [a for a, _ in pairs])
    return compared(call, keeps, pairs, scales)


def _scales(call: Call, forced: list[Any], default: Any, ours: list[torch.Tensor]) -> list[torch.Tensor]:
    if call.op not in CONTRACTIONS:
        return [largest(y) for y in ours]
    positive = [t.abs() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in forced]
    return [y for y in default(positive) if isinstance(y, torch.Tensor)]
