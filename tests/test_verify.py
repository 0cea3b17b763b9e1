"""Verification catches planted defects, and says VACUOUS where nothing could have shown one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsecc
from sparsecc.axes import RULES
from sparsecc.axes.terms import Keep
from sparsecc.errors import InvalidModel, UnsupportedModel, VerificationFailed
from sparsecc.fx.capture import Program
from sparsecc.fx.editor import edit
from sparsecc.fx.program_module import program_module
from sparsecc.fx.subject import AppliedTorch, TorchSubject
from sparsecc.lowering import lower
from sparsecc.passes import ChannelPruning, HeadPruning
from sparsecc.pipeline import decide, finish, run
from sparsecc.plan import Plan, SetAttr, SetShape, Take
from sparsecc.verification import Certificate, Check, certify
from tests.patterns import CASES
from tests.patterns.base import Apply, image, tokens

PASSES = (ChannelPruning(sparsity=0.5), HeadPruning(sparsity=0.5, head_dims=True))


class Subject(TorchSubject):
    """Applies a plan as a careless tool would: no class, no acceptance, and ``damage`` done to it."""

    damage: Callable[[Program], Program] = staticmethod(lambda program: program)

    def apply(self, plan: Plan, kept: Mapping[str, Keep]) -> AppliedTorch:
        slim = self.damage(edit(self.program, plan))
        return AppliedTorch(program_module(slim), plan, [], slim)


def planned(name: str) -> tuple[Subject, Plan]:
    model, inputs = CASES[name].make()
    subject = Subject(model, inputs)
    return subject, decide(subject.analysis, PASSES)


def with_weight(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Program], Program]:
    """A program in which one weight is another."""

    def damage(program: Program) -> Program:
        weights = {**program.weights, name: change(program.weights[name].detach().clone())}
        return replace(program, weights=weights)

    return damage


def nudged(w: Tensor) -> Tensor:
    w.view(-1)[0] += 1e-3 * w.abs().max()
    return w


NAMES = ("conv_bn_relu", "grouped_conv", "attention_default_scale", "lstm", "fused_qkv_chunk", "rms_norm")


@pytest.mark.parametrize("name", NAMES)
def test_the_undamaged_program_is_verified(name: str) -> None:
    subject, plan = planned(name)
    assert finish(subject, plan).certificate.status == "VERIFIED"


# -- damage to what was kept ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_corrupt_weight_is_caught(name: str) -> None:
    subject, plan = planned(name)
    read = {v.weight for c in subject.view.calls for v in c.inputs if v is not None and v.weight is not None}
    for weight in sorted(read & subject.program.weights.keys()):
        if not subject.program.weights[weight].is_floating_point():
            continue
        subject.damage = with_weight(weight, nudged)  # type: ignore[method-assign]
        with pytest.raises(VerificationFailed, match="checks failed"):
            finish(subject, plan)


@pytest.mark.parametrize("name", NAMES)
def test_kept_positions_in_another_order_are_caught(name: str) -> None:
    """Two kept indices change places in one weight only."""
    subject, plan = planned(name)
    for action in plan.actions:
        if not isinstance(action, Take) or len(action.indices) < 2 or _symmetric(subject, action):
            continue
        swapped = action.indices.copy()
        swapped[:2] = swapped[1::-1]
        wrong = [replace(a, indices=swapped) if a is action else a for a in plan.actions]
        with pytest.raises(VerificationFailed):
            finish(subject, replace(plan, actions=tuple(wrong)))


def _symmetric(subject: TorchSubject, take: Take) -> bool:
    """Both positions hold the same values."""
    w = subject.program.weights[take.weight].index_select(take.axis, torch.from_numpy(take.indices[:2]))
    first, second = w.unbind(take.axis)
    return torch.equal(first, second)


@pytest.mark.parametrize("name", NAMES)
def test_other_positions_than_the_decision_says_are_caught(name: str) -> None:
    subject, plan = planned(name)
    for decision in plan.decisions:
        other = np.setdiff1d(np.arange(decision.size), decision.kept)[: len(decision.kept)]
        kept = subject.kept(plan)
        kept[decision.group] = np.isin(np.arange(decision.size), other)
        wrong = replace(lower(subject.analysis, kept), decisions=plan.decisions)
        certificate = certify(subject, subject.apply(wrong, subject.kept(plan)), subject.kept(plan))
        assert certificate.status == "FAILED"


# -- damage to the graph -------------------------------------------------------------------------------


def without(plan: Plan, dropped: Callable[[Any], bool]) -> Plan:
    actions = tuple(a for a in plan.actions if not dropped(a))
    assert len(actions) < len(plan.actions)
    return replace(plan, actions=actions)


def fails(subject: TorchSubject, plan: Plan) -> None:
    with pytest.raises(VerificationFailed, match="nothing was written"):
        finish(subject, plan)


def test_a_scale_that_is_not_pinned_is_caught() -> None:
    subject, plan = planned("attention_default_scale")
    bad = without(plan, lambda a: isinstance(a, SetAttr) and a.name == "scale")
    with pytest.raises(VerificationFailed, match=r"attention|output"):
        finish(subject, bad)


@pytest.mark.parametrize("name", ["grouped_conv", "group_norm", "depthwise"])
def test_groups_that_are_not_updated_are_caught(name: str) -> None:
    subject, plan = planned(name)
    fails(subject, without(plan, lambda a: isinstance(a, SetAttr) and a.name == "groups"))


def test_a_group_norm_with_other_groups_is_caught() -> None:
    subject, plan = planned("group_norm")
    actions = tuple(
        replace(a, value=a.value * 2 if a.value == 1 else 1)
        if isinstance(a, SetAttr) and a.name == "groups"
        else a
        for a in plan.actions
    )
    assert actions != plan.actions
    fails(subject, replace(plan, actions=actions))


def test_a_shape_that_regroups_heads_is_caught() -> None:
    subject, plan = planned("attention_einsum")
    shaped = [a for a in plan.actions if isinstance(a, SetShape)]
    assert shaped
    bad = tuple(
        replace(a, sizes=tuple(reversed(a.sizes))) if isinstance(a, SetShape) and a is shaped[0] else a
        for a in plan.actions
    )
    fails(subject, replace(plan, actions=bad))


def test_slices_that_start_elsewhere_are_caught() -> None:
    subject, plan = planned("slices")
    starts = [a for a in plan.actions if isinstance(a, SetAttr) and a.name.startswith("start")]
    assert starts
    for start in starts:
        moved = tuple(
            replace(a, value=a.value - 1)
            if isinstance(a, SetAttr) and a.node == start.node and a.name in ("start1", "stop1")
            else a
            for a in plan.actions
        )
        fails(subject, replace(plan, actions=moved))


# -- wrong rules ---------------------------------------------------------------------------------------


def relaxed(monkeypatch: pytest.MonkeyPatch, op: str, rule: Any) -> None:
    monkeypatch.setitem(RULES, op, rule)


def refused(model: nn.Module, inputs: Any) -> None:
    with pytest.raises(VerificationFailed):
        run(model, inputs, PASSES)


def test_a_rule_that_forgets_that_order_matters_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    relaxed(monkeypatch, "ordered", lambda s, c: [list(s.of(c, 0)) for _ in c.outputs])
    model = nn.Sequential(nn.Linear(6, 8), Apply(lambda x: x.cumsum(-1)), nn.Linear(8, 3))
    refused(model, (tokens(6),))


def test_a_rule_that_forgets_a_reduction_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    relaxed(monkeypatch, "softmax", lambda s, c: list(s.of(c, 0)))
    refused(*CASES["softmax_over_channels"].make())


def test_a_rule_that_forgets_positions_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    relaxed(monkeypatch, "positions", lambda s, c: [list(s._fresh(v)) for v in c.outputs])
    model = nn.Sequential(nn.Linear(6, 8), Apply(lambda x: x * torch.arange(8)), nn.Linear(8, 3))
    refused(model, (tokens(6),))


def test_a_rule_that_forgets_neighbours_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    relaxed(monkeypatch, "mixed", lambda s, c: [list(s.of(c, 0))])
    model = nn.Sequential(nn.Linear(6, 8), Apply(lambda x: F.avg_pool1d(x, 3, 1, 1)), nn.Linear(8, 3))
    refused(model, (tokens(6),))


def test_a_rule_that_forgets_the_order_of_positions_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    relaxed(monkeypatch, "roll", lambda s, c: list(s.of(c, 0)))
    model = nn.Sequential(nn.Linear(6, 8), Apply(lambda x: x.roll(1, -1)), nn.Linear(8, 3))
    refused(model, (tokens(6),))


def test_a_rule_that_does_not_fit_the_shapes_freezes_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    relaxed(monkeypatch, "elementwise", lambda s, c: list(s.of(c, 0))[:-1])
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    result = run(model, (tokens(6),), PASSES)
    assert not result.plan.decisions
    assert "rule failed" in {f.reason.kind for f in result.subject.analysis.frozen}


def test_a_rule_that_raises_freezes_and_names_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(s: Any, c: Any) -> Any:
        raise ValueError("three is too many")

    relaxed(monkeypatch, "elementwise", broken)
    result = run(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (tokens(6),), PASSES)
    assert any("three is too many" in f.reason.text for f in result.subject.analysis.frozen)


# -- nothing could have shown an error -----------------------------------------------------------------


def test_a_model_that_ignores_what_was_removed_is_vacuous() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.arange(3.0))
    certificate = run(model, (tokens(6),), PASSES).certificate
    assert certificate.status == "VACUOUS"
    assert "agree exactly" in certificate.why


def test_constant_outputs_are_vacuous_and_named() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.b(F.relu(self.a(x)))
            return {"logits": y, "nothing": torch.zeros_like(y)}

    certificate = run(Two(), (tokens(6),), PASSES).certificate
    assert certificate.status == "VACUOUS"
    assert "nothing" in certificate.why
    assert "logits" not in certificate.why


def test_zero_gammas_hide_no_error() -> None:
    """What a residual branch that adds zero computes cannot be told from its sum: its operators tell."""
    model, inputs = CASES["residual_projection"].make()
    branch = model[1].branches[1]  # type: ignore[index, union-attr]
    with torch.no_grad():
        branch[1].weight.zero_()
        branch[1].bias.zero_()
    subject = Subject(model, inputs)
    plan = decide(subject.analysis, PASSES)
    subject.damage = with_weight("1.branches.1.0.0.weight", nudged)  # type: ignore[method-assign]
    with pytest.raises(VerificationFailed, match="each operator alone at conv"):
        finish(subject, plan)


def test_an_empty_plan_is_verified() -> None:
    model, inputs = CASES["conv_bn_relu"].make()
    result = run(model, inputs, (ChannelPruning(sparsity=0.0),))
    assert result.certificate.status == "VERIFIED"
    assert not result.plan.decisions


def test_infinities_are_compared_like_numbers() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3), Apply(lambda x: x / (x > 0)))
    assert run(model, (tokens(6),), PASSES).certificate.status == "VERIFIED"


# -- certificates --------------------------------------------------------------------------------------


def test_a_certificate_says_what_was_checked() -> None:
    model, inputs = CASES["conv_bn_relu"].make()
    result = run(model, inputs, PASSES)
    certificate = result.certificate
    assert certificate.claim == "pruned(x) = masked(x)"
    assert {c.what for c in certificate.checks} == {"float64", "float32", "each operator alone"}
    assert len({c.inputs for c in certificate.checks if c.what == "float64"}) == 3
    assert any("[3, 3, 8, 8]" in c.inputs for c in certificate.checks)
    assert all(c.passed for c in certificate.checks)
    assert certificate.plan == result.plan.fingerprint()
    assert certificate.model == result.subject.fingerprint()
    assert certificate.versions is not None
    assert certificate.versions["torch"] == torch.__version__
    assert Certificate.from_json(certificate.to_json()) == certificate
    assert certificate == run(model, inputs, PASSES).certificate


def test_a_damaged_certificate_is_refused() -> None:
    with pytest.raises(InvalidModel):
        Certificate.from_json({"checks": [{"what": "x"}]})
    with pytest.raises(InvalidModel):
        Certificate.from_json({})


@pytest.mark.parametrize("error", [float("nan"), float("inf"), 2.0])
def test_a_check_passes_only_within_its_bound(error: float) -> None:
    check = Check("float64", "relative error", error, 1.0, "inputs")
    assert not check.passed
    with pytest.raises(VerificationFailed, match="1 of 1 checks failed"):
        Certificate("FAILED", "claim", (check,)).require()


def test_a_failure_leaves_the_model_alone() -> None:
    subject, plan = planned("conv_bn_relu")
    before = copy.deepcopy(subject.program.module).state_dict()  # type: ignore[union-attr]
    subject.damage = with_weight("0.0.weight", nudged)  # type: ignore[method-assign]
    with pytest.raises(VerificationFailed, match="nothing was written"):
        finish(subject, plan)
    after = subject.program.module.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(after[n], t) for n, t in before.items())


def test_a_failure_names_the_operator() -> None:
    subject, plan = planned("conv_bn_relu")
    subject.damage = with_weight("1.0.weight", nudged)  # type: ignore[method-assign]
    kept = subject.kept(plan)
    certificate = certify(subject, subject.apply(plan, kept), kept)
    failed = [c.where for c in certificate.checks if not c.passed and c.what == "each operator alone"]
    assert len(failed) == 1
    assert "conv2d_1" in failed[0]


def test_images_of_the_examples_are_drawn_alike() -> None:
    """Seeds give other inputs, the same seed the same ones."""
    subject, _ = planned("conv_bn_relu")
    first, words = subject.inputs(1, 0)
    again, _ = subject.inputs(1, 0)
    assert torch.equal(first[0], again[0])
    assert "seed 1" in words
    assert not torch.equal(first[0], subject.inputs(2, 0)[0][0])
    assert subject.inputs(1, 1)[0][0].shape[0] == image().shape[0] + 1


class Steep(nn.Module):
    """Outputs that differ by orders of magnitude between inputs, so that rounding does, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(64, 256), nn.Linear(256, 256), nn.Linear(256, 1)
        for parameter in self.parameters():
            parameter.data.mul_(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(6 * self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))).mean(0)


@pytest.mark.parametrize("seed", [*range(4), 17, 23])
def test_a_right_result_does_not_fail_where_the_masked_model_rounds_well_by_chance(seed: int) -> None:
    torch.manual_seed(seed)
    result = sparsecc.prune(Steep().eval(), (torch.randn(2, 64),), sparsity=0.5)
    assert result.certificate.status == "VERIFIED"


def test_a_small_error_in_a_steep_model_is_found() -> None:
    torch.manual_seed(17)
    model, inputs = Steep().eval(), (torch.randn(2, 64),)
    result = sparsecc.prune(model, inputs, sparsity=0.5)
    with torch.no_grad():
        result.model.second.bias[0] += 1e-4
    assert sparsecc.verify(model, result, inputs).status == "FAILED"


class Chaotic(nn.Module):
    """Outputs that move by some 1e7 times as much as what they are made of, or more with more ``turns``."""

    def __init__(self, turns: int = 5) -> None:
        super().__init__()
        self.turns = turns
        self.first, self.second = nn.Linear(4, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x).relu())
        for _ in range(self.turns):
            y = torch.sin(30 * y)
        return y


def test_a_right_result_does_not_fail_where_the_model_amplifies_rounding() -> None:
    """Deep networks with random weights do: EfficientNetV2, Visformer."""
    torch.manual_seed(0)
    model, inputs = Chaotic().eval(), (torch.randn(2, 4),)
    result = sparsecc.prune(model, inputs, sparsity=0.5)
    check = result.certificate.worst("float64")
    assert result.certificate.status == "VERIFIED"
    assert check is not None
    assert 1e-12 < check.error <= check.bound <= 1e-8
    with torch.no_grad():
        result.model.get_parameter("second.weight")[0, 0] *= 1 + 1e-5
    assert sparsecc.verify(model, result, inputs).status == "FAILED"


def test_a_model_of_which_rounding_leaves_nothing_is_no_defect() -> None:
    with pytest.raises(UnsupportedModel, match="the model amplifies rounding"):
        sparsecc.prune(Chaotic(12).eval(), (torch.randn(2, 4),), sparsity=0.5)
