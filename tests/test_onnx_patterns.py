"""Every graph pattern as an exporter writes it to ONNX, pruned to a half."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import onnx
import pytest
import torch

from sparsecc.errors import SparseccError
from sparsecc.onnxfile.subject import AppliedOnnx, OnnxSubject
from sparsecc.passes import ChannelPruning, HeadPruning
from sparsecc.pipeline import Pruned, run, settle
from tests.exported import UNWRITABLE, example, exported
from tests.onnx_graphs import check_value_info, difference, error, explained, masked64, ort, run64, zeroed
from tests.patterns import CASES
from tests.sampling import every

EXACT = 1e-12
SINGLE = 2e-4
PASSES = (ChannelPruning(sparsity=0.5), HeadPruning(sparsity=0.5, head_dims=True))
#: patterns of which nothing can be removed, and the kind of the reason
WHOLE = {"index_with_buffer": "indexed"}


@dataclass
class Done:
    """A pruned pattern."""

    proto: onnx.ModelProto
    pruned: Pruned
    subject: OnnxSubject
    applied: AppliedOnnx

    @property
    def result(self) -> onnx.ModelProto:
        assert self.applied.file is not None
        return self.applied.file.proto


def _prune(proto: onnx.ModelProto) -> Done:
    pruned = run(proto, None, PASSES)
    assert isinstance(pruned.subject, OnnxSubject)
    assert isinstance(pruned.applied, AppliedOnnx)
    return Done(proto, pruned, pruned.subject, pruned.applied)


@cache
def done(name: str) -> Done:
    return _prune(exported(name))


every_pattern = pytest.mark.parametrize("name", every(2, [n for n in CASES if n not in UNWRITABLE]))


@every_pattern
def test_pruned_to_a_half_is_verified(name: str) -> None:
    d = done(name)
    kinds = {f.reason.kind for f in d.subject.analysis.frozen}
    assert "rule failed" not in kinds
    if name in WHOLE:
        assert WHOLE[name] in kinds
        assert d.pruned.model is d.proto or not d.pruned.plan
        return
    assert d.pruned.certificate.status == "VERIFIED", str(d.pruned.certificate)
    assert d.pruned.report.after["parameters"] < d.pruned.report.before["parameters"]


#: patterns whose lists of positions are computed in the graph (most exporters fold that), so that they freeze
LOST = {"channels_by_index", "index_with_buffer", "reordered_channels"}


@every_pattern
def test_as_much_work_goes_as_in_pytorch(name: str) -> None:
    """An axis that is frozen in one dialect alone is one that a rule misreads."""
    here, there = done(name).pruned.report, settle(example(name).subject, PASSES, verify=False).report
    left = [r.after["macs"] / max(r.before["macs"], 1) for r in (here, there)]
    assert (left[0] <= left[1] + 1e-9) != (name in LOST), left


@every_pattern
def test_result_equals_masked_semantics_whatever_was_removed(name: str) -> None:
    d = done(name)
    kept = d.subject.kept(d.pruned.plan)
    for seed, variant in ((0, 0), (3, 1)):
        feeds, _ = d.subject.inputs(seed, variant)
        assert d.applied.file is not None
        reference = masked64(d.subject, d.pruned.plan, kept, feeds, garbage=True)
        assert error(run64(d.applied.file, feeds), reference) <= EXACT


@every_pattern
def test_result_runs_in_onnxruntime(name: str) -> None:
    d = done(name)
    feeds, _ = d.subject.inputs(5, 1)
    reference = masked64(d.subject, d.pruned.plan, d.subject.kept(d.pruned.plan), feeds, garbage=False)
    assert error(ort(d.result, feeds), reference) <= SINGLE


@every_pattern
def test_shapes_that_the_result_declares_are_right(name: str) -> None:
    d = done(name)
    assert d.subject.file.check(full=True) is None
    assert d.applied.file is not None
    assert d.applied.file.check(full=True) is None
    check_value_info(d.result, d.subject.inputs(1, 1)[0])


@every_pattern
def test_what_the_plan_does_not_name_is_untouched(name: str) -> None:
    d = done(name)
    found = difference(d.proto, d.result)
    nodes, tensors = explained(d.pruned.plan, d.subject.file)
    assert found.tensors <= tensors
    assert found.nodes <= nodes, found.nodes - nodes


@pytest.mark.parametrize("name", [c.name for c in CASES.values() if c.zeroing and c.name not in UNWRITABLE])
def test_result_equals_original_with_zeroed_consumers(name: str) -> None:
    d = done(name)
    feeds, _ = d.subject.inputs(1, 0)
    assert error(ort(d.result, feeds), ort(zeroed(d.subject.file, d.pruned.plan).proto, feeds)) <= SINGLE


@pytest.mark.parametrize("name", UNWRITABLE)
def test_patterns_that_cannot_be_written_say_so(name: str) -> None:
    with pytest.raises(SparseccError, match=UNWRITABLE[name]):
        run(exported(name), None, PASSES)


# -- files of the older, tracing exporter ------------------------------------------------------------

TRACED = (
    "conv_bn_relu", "dense_concat", "grouped_conv", "channel_shuffle", "pixel_shuffle", "lstm", "unet",
    "gru_two_layers", "attention", "fused_qkv_chunk", "squeeze_excitation", "layer_norm_channels_last",
    "group_norm", "vision_transformer", "shared_module",
)  # fmt: skip


@cache
def traced(name: str, opset: int = 17) -> Done:
    model, inputs = CASES[name].make()
    args = () if isinstance(inputs, Mapping) else inputs
    names = [f"x{i}" for i in range(len(args))]
    options: dict[str, Any] = {"input_names": names, "dynamic_axes": {n: {0: "batch"} for n in names}}
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, args, stream, dynamo=False, opset_version=opset, **options)
    proto = onnx.load_from_string(stream.getvalue())
    typed = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    return _prune(typed)


@pytest.mark.parametrize("name", TRACED)
def test_traced_exports_are_pruned_alike(name: str) -> None:
    d = traced(name)
    assert d.pruned.certificate.status == "VERIFIED", str(d.pruned.certificate)
    feeds, _ = d.subject.inputs(3, 1)
    reference = masked64(d.subject, d.pruned.plan, d.subject.kept(d.pruned.plan), feeds, garbage=True)
    assert d.applied.file is not None
    assert error(run64(d.applied.file, feeds), reference) <= EXACT
    assert error(ort(d.result, feeds), reference) <= SINGLE
    if d.subject.file.check(full=True) is None:
        assert d.applied.file.check(full=True) is None
        check_value_info(d.result, feeds)
    assert d.pruned.report.after["parameters"] <= done(name).pruned.report.after["parameters"] * 1.1


@pytest.mark.parametrize("opset", [11, 13, 18])
@pytest.mark.parametrize("name", ["grouped_conv", "swin_window", "slices"])
def test_traced_exports_of_other_opsets(name: str, opset: int) -> None:
    d = traced(name, opset)
    assert d.pruned.certificate.status == "VERIFIED", str(d.pruned.certificate)
    feeds, _ = d.subject.inputs(3, 1)
    reference = masked64(d.subject, d.pruned.plan, d.subject.kept(d.pruned.plan), feeds, garbage=True)
    assert error(ort(d.result, feeds), reference) <= SINGLE
