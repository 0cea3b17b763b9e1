"""Orders of positions: any permutation of every group that may be permuted computes the same function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecc.axes.terms import Kept
from sparsecc.errors import InvalidOption
from sparsecc.fx.editor import edit
from sparsecc.fx.subject import TorchSubject
from sparsecc.lowering import lower, reorderable
from sparsecc.onnxfile.subject import OnnxSubject
from sparsecc.pipeline import finish
from sparsecc.plan import Plan
from sparsecc.reference.torch_run import ProgramRunner
from sparsecc.subject import Subject
from tests.exported import UNWRITABLE, example, exported
from tests.onnx_graphs import error as onnx_error
from tests.onnx_graphs import masked64 as onnx_masked64
from tests.onnx_graphs import run64
from tests.oracles import error, fingerprint, forward64, leaves, masked64, poisoned
from tests.patterns import CASES
from tests.test_onnx_property import gene, grown

BOUND = 1e-12
NIGHTLY = settings().max_examples > 500


def shuffled(subject: Subject, seed: int, share: float = 1.0) -> dict[str, Kept]:
    """A random order of every group that has one, of ``share`` of its positions."""
    generator = np.random.default_rng(seed)
    return {
        g.name: generator.permutation(g.size)[: max(2, round(g.size * share))]
        for g in subject.analysis.groups
        if reorderable(g)
    }


def program_error(subject: TorchSubject, plan: Plan) -> float:
    """The error of the edited program against masked semantics, which know of no order, in float64."""
    kept = subject.kept(plan)
    slim, worst = edit(subject.program, plan), 0.0
    for seed, variant in ((0, 0), (1, 1)):
        flat, _ = subject.inputs(seed, variant)
        ours = leaves(ProgramRunner(slim, dtype=torch.float64).run(flat)[0])
        worst = max(worst, error(ours, masked64(subject, kept, flat, poisoned(subject, plan))))
        if all(len(d.kept) == d.size for d in plan.decisions):
            worst = max(worst, error(ours, subject.original(flat, torch.float64)))
    return worst


@pytest.mark.parametrize("name", sorted(CASES))
def test_any_order_computes_the_same(name: str) -> None:
    subject = example(name).subject
    for seed, share in ((0, 1.0), (1, 1.0), (2, 0.6)):
        plan = lower(subject.analysis, shuffled(subject, seed, share))
        assert program_error(subject, plan) <= BOUND, plan


@pytest.mark.parametrize(
    "name",
    ["residual_projection", "dense_concat", "grouped_conv", "channel_shuffle", "lstm", "fused_qkv_chunk",
     "grouped_queries_repeated", "glu_fused_chunk", "vision_transformer", "tied_embedding", "rotary",
     "spatial_gate_max", "group_norm"],
)  # fmt: skip
def test_a_reordered_model_is_of_the_same_class_and_verified(name: str) -> None:
    model, inputs = CASES[name].make()
    before = fingerprint(model)
    subject = TorchSubject(model, inputs)
    plan = lower(subject.analysis, shuffled(subject, 3))
    assert plan.decisions
    result = finish(subject, Plan.from_parts(*plan.to_parts()))
    assert result.certificate.status == "VERIFIED", str(result.certificate)
    assert type(result.model) is type(model)
    assert fingerprint(model) == before
    assert error(forward64(result.model, inputs), forward64(model, inputs)) <= BOUND


#: exporting takes seconds, so these stand for the rest, all of which run in the nightly tests
IN_ONNX = (
    "residual_projection", "dense_concat", "grouped_conv", "channel_shuffle",
    "lstm_two_layers_bidirectional", "attention_written_out", "grouped_queries_expanded", "fused_qkv_chunk",
    "swin_window", "squeeze_excitation", "group_norm", "rotary", "relative_positions", "pixel_shuffle",
    "cut_through_a_shuffle", "spatial_gate_max",
)  # fmt: skip


@pytest.mark.parametrize("name", [n for n in CASES if n not in UNWRITABLE] if NIGHTLY else IN_ONNX)
def test_any_order_computes_the_same_in_onnx(name: str) -> None:
    subject = OnnxSubject(exported(name))
    for seed, share in ((0, 1.0), (2, 0.6)):
        plan = lower(subject.analysis, shuffled(subject, seed, share))
        check_onnx(subject, plan)


def check_onnx(subject: OnnxSubject, plan: Plan) -> None:
    """The edited file computes masked semantics in float64."""
    kept = subject.kept(plan)
    applied = subject.apply(plan, kept)
    assert applied.file is not None
    for seed, variant in ((0, 0), (1, 1)):
        feeds, _ = subject.inputs(seed, variant)
        reference = onnx_masked64(subject, plan, kept, feeds, garbage=True)
        assert onnx_error(run64(applied.file, feeds), reference) <= BOUND, plan


@given(st.lists(gene, min_size=1, max_size=8), st.integers(0, 99))
@settings(max_examples=settings().max_examples if NIGHTLY else 30)
def test_any_order_of_any_onnx_graph_computes_the_same(genes: list[tuple[str, int]], seed: int) -> None:
    subject = OnnxSubject(grown(genes, 18, seed, False))
    check_onnx(subject, lower(subject.analysis, shuffled(subject, seed)))


def test_an_order_must_hold_every_kept_position_once() -> None:
    model, inputs = CASES["conv_bn_relu"].make()
    analysis = TorchSubject(model, inputs).analysis
    group = analysis.groups[0]
    for wrong in (np.array([1, 0, 1]), np.array([group.size, 0]), np.array([1, -1])):
        with pytest.raises(InvalidOption, match="holds every kept position"):
            lower(analysis, {group.name: wrong})


def test_positions_that_operators_pick_by_number_keep_their_order() -> None:
    model, inputs = CASES["cut_through_a_shuffle"].make()
    analysis = TorchSubject(model, inputs).analysis
    fixed = [g for g in analysis.groups if not reorderable(g)]
    assert fixed
    with pytest.raises(InvalidOption, match="keep their order"):
        lower(analysis, {fixed[0].name: np.arange(fixed[0].size)[::-1]})
