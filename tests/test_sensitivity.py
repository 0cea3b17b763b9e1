"""Rises of the loss by group: what really pruned models show, the best allocation, and both dialects."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsecc
from sparsecc.axes.terms import Reason
from sparsecc.calibration import CalibrationData, Statistics
from sparsecc.errors import InvalidModel, InvalidOption, PlanConflict
from sparsecc.fx.capture import capture
from sparsecc.fx.to_onnx import to_onnx
from sparsecc.lowering import lower
from sparsecc.passes import PASSES, ChannelPruning, Reconstruction
from sparsecc.pipeline import decide, open_subject
from sparsecc.probing import Line, Sensitivity, measure, tried
from sparsecc.probing.budget import Option, cheapest
from sparsecc.probing.side_by_side import Candidate, outputs_beside
from sparsecc.recipe import parse, text
from sparsecc.saliency import Saliency
from sparsecc.subject import Step
from tests.exported import UNWRITABLE, exported
from tests.exported import example as captured_example
from tests.oracles import leaves
from tests.patterns import CASES
from tests.sampling import every


class Convolutions(nn.Module):
    """A residual block with norms, and a head."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=in_place)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = self.relu(x + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Gated(nn.Module):
    """Two feed-forward parts of a language model, layer norms before them, logits at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.gates = nn.ModuleList(nn.Linear(8, 16) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(8, 16) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(16, 8) for _ in range(2))
        self.out = nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for norm, gate, up, down in zip(self.norms, self.gates, self.ups, self.downs, strict=True):
            h = norm(x)
            x = x + down(torch.nn.functional.silu(gate(h)) * up(h))
        return self.out(x)  # type: ignore[no-any-return]


def convolutions(in_place: bool = False) -> tuple[nn.Module, tuple[Tensor, ...], list[tuple[Tensor, ...]]]:
    torch.manual_seed(0)
    net = Convolutions(in_place).eval()
    for norm in (net.bn1, net.bn2):
        norm.running_mean.uniform_(-0.2, 0.2)
        norm.running_var.uniform_(0.5, 2)
    return net, (torch.randn(2, 3, 6, 6),), [(torch.randn(2, 3, 6, 6),) for _ in range(3)]


def gated() -> tuple[nn.Module, tuple[Tensor, ...], list[tuple[Tensor, ...]]]:
    torch.manual_seed(1)
    return Gated().eval(), (torch.randint(11, (2, 7)),), [(torch.randint(11, (2, 7)),) for _ in range(2)]


MODELS: dict[str, Any] = {
    "convolutions": convolutions,
    "in place": lambda: convolutions(in_place=True),
    "gated": gated,
}


def logits(model: Any, batch: tuple[Tensor, ...]) -> Tensor:
    """What a model of either dialect gives for a batch."""
    if isinstance(model, nn.Module):
        with torch.no_grad():
            return model(*batch)  # type: ignore[no-any-return]
    import onnxruntime as ort

    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    (found,) = session.run(None, {n: t.numpy() for n, t in zip(names, batch, strict=True)})
    return torch.from_numpy(found)


def error(new: Tensor, old: Tensor) -> float:
    """The loss that is measured by default."""
    return float((new.double() - old.double()).square().sum() / old.double().square().sum())


def divergence(new: Tensor, old: Tensor) -> float:
    """The loss called ``kl``."""
    p, q = old.double().softmax(-1), new.double().log_softmax(-1)
    return float((p * (p.log() - q)).sum(-1).mean())


def cross_entropy(out: Any, batch: tuple[Tensor, ...]) -> Tensor:
    """A loss of the user's own, for outputs of either dialect."""
    found = next(iter(out.values())) if isinstance(out, dict) else out
    return nn.functional.cross_entropy(found.flatten(0, -2), torch.arange(found.flatten(0, -2).shape[0]) % 5)


@pytest.mark.parametrize("dialect", ["torch", "onnx"])
@pytest.mark.parametrize("loss", ["error", "kl", "loss", "own"])
@pytest.mark.parametrize("name", list(MODELS))
def test_rises_are_those_of_pruned_models(
    name: str, loss: str, dialect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_ABREAST", 3)
    net, example, batches = MODELS[name]()
    model: Any = net if dialect == "torch" else to_onnx(capture(net, example).exported)
    given_inputs = example if dialect == "torch" else None
    data = sparsecc.CalibrationData(batches, loss=cross_entropy)
    found = sparsecc.sensitivity(
        model,
        given_inputs,
        calibration=data,
        loss=cross_entropy if loss == "own" else loss,
        shares=(0.25, 0.5),
    )
    assert len(found.lines) >= 2
    assert found.batches == len(batches)
    before = [logits(model, batch) for batch in batches]
    for line in found.lines:
        assert line.removed == (line.size // 4, line.size // 2)
        for count, rise in zip(line.removed, line.rises, strict=True):
            step = ChannelPruning(allocation={line.group: count / line.size})
            result = sparsecc.prune(model, given_inputs, recipe=[step])
            assert [g.size - g.kept for g in result.report.groups if g.group == line.group] == [count]
            after = [logits(result.model, batch) for batch in batches]
            gone = result.report.before["parameters"] - result.report.after["parameters"]
            assert gone == count * line.parameters
            compare = {"error": error, "kl": divergence}.get(loss)
            wanted = [
                float(cross_entropy(new, b) - cross_entropy(old, b)) if compare is None else compare(new, old)
                for new, old, b in zip(after, before, batches, strict=True)
            ]
            assert rise == pytest.approx(sum(wanted) / len(wanted), rel=1e-3, abs=2e-6)


@pytest.mark.parametrize("dialect", ["torch", "onnx"])
@pytest.mark.parametrize("towards", ["own", "original"])
@pytest.mark.parametrize("name", ["convolutions", "gated"])
def test_rises_with_updates_are_those_of_reconstructed_models(name: str, towards: Any, dialect: str) -> None:
    """Moments of the original model give what ``Reconstruction`` finds by running it."""
    net, example, batches = MODELS[name]()
    model: Any = net if dialect == "torch" else to_onnx(capture(net, example).exported)
    given_inputs = example if dialect == "torch" else None
    trials = [tuple(t.flip(0) for t in batches[0])]
    found = sparsecc.sensitivity(
        model, given_inputs, calibration=batches, trials=trials, updates=True, shares=(0.5,), residual=False
    )
    assert found.batches == 1
    alone = sparsecc.sensitivity(
        model, given_inputs, calibration=batches, trials=trials, shares=(0.5,), residual=False
    )
    for line, plain in zip(found.lines, alone.lines, strict=True):
        step = ChannelPruning(allocation={line.group: 0.5})
        fit = Reconstruction(towards=towards, rows="equal", damping=0.01)
        result = sparsecc.prune(model, given_inputs, recipe=[step, fit], calibration=batches)
        wanted = error(logits(result.model, trials[0]), logits(model, trials[0]))
        assert line.rises[0] == pytest.approx(wanted, rel=2e-3)
        assert line.rises[0] != pytest.approx(plain.rises[0], rel=1e-2)


@pytest.mark.parametrize("dialect", ["torch", "onnx"])
def test_what_comes_before_a_group_runs_once(dialect: str) -> None:
    """Beside the model itself, a trial runs what depends on the group, and gives what masks give alone."""
    net, example, batches = gated()
    model: Any = net if dialect == "torch" else to_onnx(capture(net, example).exported)
    subject = open_subject(model, example if dialect == "torch" else None)
    analysis = subject.analysis
    last = [g for g in analysis.groups if g.size == 16][-1]
    mask = torch.arange(16).numpy() % 2 == 0
    candidate = Candidate(lower(analysis, {last.name: mask}), analysis.keeps({last.name: mask}))
    ran: list[str] = []
    stepping = subject.stepping

    def counted(inputs: Any, **options: Any) -> Any:
        steps = stepping(inputs, **options)

        def told(step: Step) -> Step:
            return Step(step.call, step.operands, lambda o: (ran.append(step.call.name), step.run(o))[1])

        def every() -> Any:
            step = next(steps)
            try:
                while True:
                    step = steps.send((yield told(step)))
            except StopIteration as end:
                return end.value

        return every()

    subject.stepping = counted  # type: ignore[method-assign]
    before, (after,) = outputs_beside(subject, subject.bound(batches[0]), None, [candidate])
    twice = {n for n in ran if ran.count(n) == 2}
    assert 0 < len(twice) < len(set(ran)) / 2
    assert error(before[0], logits(model, batches[0])) < 1e-10
    plan = candidate.plan
    alone = subject.masked(plan, subject.kept(plan), subject.bound(batches[0]))
    assert torch.equal(after[0], alone[0])


SUBJECTS = [
    (name, kind) for name in CASES for kind in ("torch", "onnx") if kind == "torch" or name not in UNWRITABLE
]


@pytest.mark.parametrize(("name", "dialect"), every(5, SUBJECTS))
def test_trials_side_by_side_are_masked_models(name: str, dialect: str) -> None:
    """Whatever the operators: outputs are those of each trial run alone."""
    subject = captured_example(name).subject if dialect == "torch" else open_subject(exported(name))
    analysis = subject.analysis
    choices = []
    for group in analysis.groups[:4]:
        mask = np.arange(group.size) % 2 == 0
        mask[: group.least] = True
        choices.append(analysis.feasible({group.name: mask}))
    try:
        candidates = [Candidate(lower(analysis, choice), analysis.keeps(choice)) for choice in choices]
    except PlanConflict:
        return
    inputs, _ = subject.inputs(0, 0)
    with torch.no_grad():
        before, after = outputs_beside(subject, inputs, None, candidates)
    for found, wanted in [(before, subject.original(inputs))] + [
        (outputs, subject.masked(c.plan, subject.kept(c.plan), inputs))
        for outputs, c in zip(after, candidates, strict=True)
    ]:
        for a, b in zip(leaves(found), leaves(wanted), strict=True):
            assert torch.equal(a, b) or torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


# -- the best choice ----------------------------------------------------------------------------------

LISTS = st.lists(
    st.lists(st.tuples(st.integers(1, 12), st.floats(-1, 5)), max_size=4, unique_by=lambda o: o[0]),
    min_size=1,
    max_size=4,
)


def choices(lists: list[list[Option]], budget: int) -> list[tuple[Option, ...]]:
    """All that save at most the budget, and less than it by less than the largest step."""
    savings = [sorted(o.saving for o in options) for options in lists]
    slack = max((b - a for s in savings for a, b in itertools.pairwise(s)), default=1)
    most = sum(s[-1] for s in savings)
    least = min(budget - slack + 1, most) if budget < most else most
    every = itertools.product(*lists)
    return [c for c in every if least <= sum(o.saving for o in c) <= budget]


@given(LISTS, st.integers(0, 40), st.integers(1, 7))
def test_the_cheapest_choice_is_that_of_an_exhaustive_search(
    drawn: list[list[tuple[int, float]]], budget: int, scale: int
) -> None:
    lists = [[Option(0, 0.0), *(Option(s * scale, c) for s, c in options)] for options in drawn]
    picks = cheapest(lists, budget * scale)
    chosen = [options[p] for options, p in zip(lists, picks, strict=True)]
    best = min(sum(o.cost for o in c) for c in choices(lists, budget * scale))
    assert sum(o.saving for o in chosen) <= budget * scale
    assert sum(o.cost for o in chosen) == pytest.approx(best, abs=1e-9)


@given(
    st.lists(st.tuples(st.integers(10**6, 10**7), st.floats(0, 5)), min_size=3, max_size=6), st.floats(0, 1)
)
def test_large_budgets_are_met_in_parts(drawn: list[tuple[int, float]], share: float) -> None:
    """Savings without a common divisor are rounded up, so that the budget still holds."""
    lists = [[Option(saving * k // 8, cost * k) for k in range(9)] for saving, cost in drawn]
    whole = sum(s for s, _ in drawn)
    budget = int(whole * share)
    chosen = [o[p] for o, p in zip(lists, cheapest(lists, budget), strict=True)]
    slack = max(s for s, _ in drawn) // 8 + 2 + (len(drawn) + 2) * (budget // 16384 + 1)
    assert budget - slack <= sum(o.saving for o in chosen) <= budget


def line(name: str, size: int, parameters: int, rises: list[float], least: int = 1) -> Line:
    """A line with rises for quarters up to all but a quarter."""
    removed = tuple(size * k // 4 for k in range(1, len(rises) + 1))
    return Line(f"{name}.weight[0]", "channel", size, least, parameters, removed, tuple(rises))


TABLES = st.lists(
    st.tuples(
        st.sampled_from([4, 8, 12, 16]),
        st.sampled_from([1, 3, 10]),
        st.lists(st.floats(0, 3), min_size=3, max_size=3),
    ),
    min_size=1,
    max_size=3,
)


@given(TABLES, st.floats(0, 0.7), st.sampled_from([1, 2, 4]), st.sampled_from([1, 3]))
def test_shares_are_the_best_there_are(
    drawn: list[tuple[int, int, list[float]]], sparsity: float, multiple_of: int, min_keep: int
) -> None:
    lines = [line(str(i), *d) for i, d in enumerate(drawn)]
    table = Sensitivity("error", "L2", 1, tuple(lines))
    shares = table.shares(sparsity, multiple_of=multiple_of, min_keep=min_keep)
    budget = int(sum(t.size * t.parameters for t in lines) * sparsity + 1e-6)
    gone = {t.group: round(shares[t.group] * t.size) for t in lines}
    for t in lines:
        kept = t.size - gone[t.group]
        assert kept >= min_keep
        assert kept % multiple_of == 0
    assert sum(gone[t.group] * t.parameters for t in lines) <= budget
    lists = [[Option(c * t.parameters, t.rise(c)) for c in t.counts(multiple_of, min_keep)] for t in lines]
    best = min(sum(o.cost for o in c) for c in choices(lists, budget))
    assert table.predicted(shares) == pytest.approx(best, abs=1e-9)


def test_what_matters_least_goes() -> None:
    table = Sensitivity("error", "L2", 1, (line("a", 16, 10, [9, 9, 9]), line("b", 16, 10, [0.1, 0.2, 3])))
    assert table.shares(0.25) == {"a.weight[0]": 0.0, "b.weight[0]": 0.5}
    assert table.predicted(table.shares(0.25)) == pytest.approx(0.2)
    with pytest.raises(InvalidOption, match=r"ends at 0.8\d* of the parameters"):
        table.shares(0.9)
    for options in ({"sparsity": 1.5}, {"sparsity": 0.2, "multiple_of": 0}, {"sparsity": 0.2, "min_keep": 0}):
        with pytest.raises(InvalidOption):
            table.shares(**options)  # type: ignore[arg-type]


# -- passes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["torch", "onnx"])
@pytest.mark.parametrize("allocation", ["sensitivity", "sensitivity:kl", "sensitivity:loss"])
def test_a_pass_measures_and_allocates(allocation: str, dialect: str) -> None:
    net, example, batches = gated()
    model: Any = net if dialect == "torch" else to_onnx(capture(net, example).exported)
    given_inputs = example if dialect == "torch" else None
    data = sparsecc.CalibrationData(batches, loss=cross_entropy)
    told: list[str] = []
    result = sparsecc.prune(
        model,
        given_inputs,
        recipe=[ChannelPruning(sparsity=0.25, allocation=allocation, residual=False)],
        calibration=data,
        progress=told.append,
    )
    assert result.certificate.status == "VERIFIED"
    assert any("sensitivity, trials 1 to 8 of " in stage for stage in told)
    loss = {"sensitivity": "error"}.get(allocation, allocation.partition(":")[2])
    table = sparsecc.sensitivity(
        model, given_inputs, calibration=data, loss=loss, residual=False, shares=tried(0.25)
    )
    shares = table.shares(0.25)
    for group in result.report.groups:
        assert group.size - group.kept == round(shares.get(group.group, 0) * group.size)
    gone = result.report.before["parameters"] - result.report.after["parameters"]
    whole = sum(t.size * t.parameters for t in table.lines)
    assert 0.25 * whole - max(t.parameters for t in table.lines) <= gone <= 0.25 * whole


def test_rises_are_over_what_earlier_passes_leave() -> None:
    net, example, batches = gated()
    first = "ChannelPruning(sparsity=0.5, include=('gates.0.*',), residual=False)"
    second = "ChannelPruning(sparsity=0.25, allocation='sensitivity', residual=False)"
    both = sparsecc.prune(net, example, recipe=f"{first}; {second}", calibration=batches)
    assert both.certificate.status == "VERIFIED"
    sizes = {g.group: g.kept for g in both.report.groups}
    assert sizes["gates.0.weight[0]"] == 8
    assert sizes["gates.1.weight[0]"] == 12


def test_a_plan_that_is_made_anew_does_not_measure_again() -> None:
    """Groups that turn out to have no graph are frozen, and the others planned again."""
    net, example, batches = gated()
    subject = open_subject(net, example)
    told: list[str] = []
    statistics = Statistics(
        subject, CalibrationData(batches), lambda done, count, what: told.append(f"{what}: {done} of {count}")
    )
    ranking = Saliency(subject.analysis, statistics=statistics)
    step = ChannelPruning(sparsity=0.25, allocation="sensitivity")
    first = decide(subject.analysis, [step], ranking)
    assert told
    told.clear()
    again = decide(subject.analysis, [step], ranking)
    assert again.fingerprint() == first.fingerprint()
    frozen = [g for g in subject.analysis.groups if g.residual]
    subject.analysis.freeze(frozen, Reason("no such graph", "for the test"))
    assert decide(subject.analysis, [step], ranking).decisions
    assert not told


def test_shares_by_group_are_part_of_a_recipe() -> None:
    net, example, _ = gated()
    step = ChannelPruning(allocation={"gates.0.weight[0]": 0.25, "gates.1.weight[0]": 0.5})
    (again,) = parse(text([step]), PASSES)
    assert again == step
    assert hash(again) == hash(step)
    result = sparsecc.prune(net, example, recipe=str(step))
    assert {g.group: g.kept for g in result.report.groups if g.kept < g.size} == {
        "gates.0.weight[0]": 12,
        "gates.1.weight[0]": 8,
    }
    assert ("embed.weight[1]", "the allocation does not name it") in result.report.skips


def test_errors() -> None:
    net, example, batches = gated()
    for allocation in ("sensitive", 3, {"gates.0.weight[0]": 1.5}, {1: 0.5}, [("a",)]):
        with pytest.raises(InvalidOption, match="allocation"):
            ChannelPruning(allocation=allocation)  # type: ignore[arg-type]
    with pytest.raises(
        InvalidOption, match=r"no group 'gate.0.weight\[0\]'; did you mean 'gates.0.weight\[0\]'"
    ):
        sparsecc.prune(net, example, recipe=[ChannelPruning(allocation={"gate.0.weight[0]": 0.5})])
    with pytest.raises(InvalidOption, match="needs calibration data"):
        sparsecc.prune(net, example, sparsity=0.5, allocation="sensitivity")
    with pytest.raises(InvalidOption, match="ends at"):
        sparsecc.sensitivity(net, example, calibration=batches).shares(0.9)
    for options in (
        {"loss": "mse"},
        {"shares": (0.5, 1.0)},
        {"shares": ()},
        {"batches": 0},
        {"kinds": "channel"},
    ):
        with pytest.raises(InvalidOption):
            sparsecc.sensitivity(net, example, calibration=batches, **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidOption, match="is nan"):
        sparsecc.sensitivity(net, example, calibration=batches, loss=lambda out, batch: out.sum() * torch.nan)
    with pytest.raises(InvalidOption, match="they have none"):
        sparsecc.sensitivity(net, example, calibration=batches, loss="loss")


def test_a_table_is_kept_as_json(tmp_path: Path) -> None:
    net, example, batches = gated()
    table = sparsecc.sensitivity(net, example, calibration=batches, saliency="wanda", batches=1)
    assert table.batches == 1
    assert "gates.1.weight[0]" in str(table)
    assert Sensitivity.from_json(json.loads(json.dumps(table.to_json()))) == table
    file = tmp_path / "table.json"
    table.save(file)
    assert sparsecc.Sensitivity.load(file) == table
    assert sparsecc.Sensitivity.load(file).shares(0.3) == table.shares(0.3)
    for damaged in ("", "{}", '{"loss": "error", "saliency": "", "batches": 1, "lines": [{"group": 1}]}'):
        file.write_text(damaged)
        with pytest.raises(InvalidModel, match="damaged"):
            Sensitivity.load(file)
