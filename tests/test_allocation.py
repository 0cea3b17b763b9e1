"""Every choice that allocation can make has a consistent graph: random nets, global budgets, divisors."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import nn

from sparsecc.allocation import allocate
from sparsecc.axes.analysis import Group
from sparsecc.errors import PlanConflict
from sparsecc.fx.editor import edit
from sparsecc.fx.subject import TorchSubject
from sparsecc.passes import ChannelPruning, HeadPruning
from sparsecc.pipeline import decide, open_subject, settle
from sparsecc.reference.torch_run import ProgramRunner
from sparsecc.saliency import Saliency
from sparsecc.saliency.groups import NORMALISERS
from tests.oracles import error, leaves, masked64, poisoned
from tests.patterns import CASES
from tests.random_nets import Net
from tests.sampling import every
from tests.test_property_torch import BOUND, least, nets

CHOICES = st.fixed_dictionaries(
    {
        "sparsity": st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9, 0.99]),
        "multiple_of": st.sampled_from([1, 2, 3, 4, 8]),
        "min_keep": st.sampled_from([1, 2, 5, 100]),
    }
)


def check(subject: TorchSubject, options: dict[str, Any], normaliser: str = "none") -> int:
    """Plan globally: the edited graph computes masked semantics; how many positions are gone.

    Where the counts that come out have no graph, something stays whole, and the rest is verified.
    """
    common: dict[str, Any] = {"allocation": "global", **options}
    passes = [ChannelPruning(**common), HeadPruning(**common, head_dims=True)]
    scores = Saliency(subject.analysis, normaliser=normaliser)
    try:
        plan = decide(subject.analysis, passes, scores)
    except PlanConflict:
        result = settle(subject, passes, saliency=lambda _: scores)
        assert result.certificate.status == "VERIFIED"
        assert "no such graph" in {f.kind for f in result.report.frozen}
        plan = result.plan
    slim = edit(subject.program, plan)
    for seed, variant in ((0, 0), (1, 1)):
        flat, _ = subject.inputs(seed, variant)
        reference = masked64(subject, subject.kept(plan), flat, poisoned(subject, plan))
        assert error(leaves(ProgramRunner(slim, dtype=torch.float64).run(flat)[0]), reference) <= BOUND
    for decision in plan.decisions:
        assert len(decision.kept) >= min(options["min_keep"], decision.size)
        assert len(decision.kept) % options["multiple_of"] == 0
    return sum(d.size - len(d.kept) for d in plan.decisions)


@settings(max_examples=max(settings().max_examples // 3, 1))
@given(nets(), CHOICES, st.sampled_from(sorted(NORMALISERS)), st.integers(0, 99))
def test_random_nets_under_a_global_budget(
    net: Net, options: dict[str, Any], normaliser: str, seed: int
) -> None:
    scale_layers(net, seed)
    options = options | {"min_keep": max(options["min_keep"], least(net))}
    event("pruned" if check(TorchSubject(net, net.examples), options, normaliser) else "whole")


def scale_layers(model: nn.Module, seed: int) -> None:
    """Layers of very different magnitude, so that a global ranking empties some and spares others."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 ** float(torch.rand((), generator=random) * 2 - 1))


CONSTRAINED = (
    "grouped_", "group_norm", "lstm", "gru", "rnn", "chunk_", "fused_", "glu_", "multi",
    "depthwise_multiplier", "channel_shuffle", "c2f", "shufflenet",
)  # fmt: skip


@pytest.mark.parametrize("name", every(2, [n for n in CASES if n.startswith(CONSTRAINED)]))
def test_constrained_patterns_under_a_global_budget(name: str) -> None:
    """Grouped convolutions, group norms, heads, gates and halves keep equal counts by construction."""
    model, inputs = CASES[name].make()
    scale_layers(model, 1)
    subject = TorchSubject(model, inputs)
    gone = 0
    for sparsity, multiple_of, min_keep in ((0.5, 1, 1), (0.9, 2, 1), (0.4, 3, 2)):
        gone += check(subject, {"sparsity": sparsity, "multiple_of": multiple_of, "min_keep": min_keep})
    assert gone


# -- the counts ---------------------------------------------------------------------------------------


class Ranked(Saliency):
    """Given scores."""

    def __init__(self, scores: dict[str, Any]) -> None:
        self.scores = scores

    def of(self, group: Group) -> Any:
        return self.scores[group.name]


def groups() -> list[Group]:
    net = nn.Sequential(*(m for a, b in ((6, 9), (9, 16), (16, 3)) for m in (nn.Linear(a, b), nn.ReLU())))
    return open_subject(net, (torch.randn(2, 6),)).analysis.groups


GROUPS = groups()


@given(
    scores=st.tuples(*(st.lists(st.floats(0, 9), min_size=n, max_size=n) for n in (9, 16))),
    sparsity=st.floats(0, 0.99),
    multiple_of=st.integers(1, 20),
    min_keep=st.integers(1, 20),
)
@settings(max_examples=4 * settings().max_examples)
def test_a_global_budget_is_not_exceeded(
    scores: tuple[list[float], ...], sparsity: float, multiple_of: int, min_keep: int
) -> None:
    """No more goes than asked for; who goes is less salient than who stays, within a group."""
    given_scores = {g.name: np.array(s) for g, s in zip(GROUPS, scores, strict=True)}
    kept = allocate(
        GROUPS, Ranked(given_scores), sparsity,
        allocation="global", multiple_of=multiple_of, min_keep=min_keep,
    )  # fmt: skip
    gone = sum(int((~m).sum()) for m in kept.values())
    assert gone <= sparsity * sum(g.size for g in GROUPS) + 1e-9
    for group in GROUPS:
        mask = kept.get(group.name, np.ones(group.size, bool))
        assert mask.sum() >= min(min_keep, group.size)
        assert mask.all() or mask.sum() % multiple_of == 0
        ranks = given_scores[group.name]
        assert mask.all() or ranks[~mask].max() <= ranks[mask].min()


@pytest.mark.parametrize("name", ["vision_transformer", "transformer_encoder_layer", "residual_projection"])
def test_a_plan_of_several_passes_reads_every_weight_once(name: str) -> None:
    model, inputs = CASES[name].make()
    analysis = TorchSubject(model, inputs).analysis
    read: Counter[str] = Counter()
    weight = analysis.view.weight

    def counted(asked: str) -> torch.Tensor:
        read[asked] += 1
        return weight(asked)

    analysis.view.weight = counted
    plan = decide(analysis, [ChannelPruning(), HeadPruning(head_dims=True), ChannelPruning(sparsity=0.25)])
    assert plan
    assert set(read.values()) == {1}
