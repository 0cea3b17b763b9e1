"""A sample of the zoo is pruned and proved, and loses as many parameters as it did; the zoo's own parts."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.zoo import store, table, work
from benchmarks.zoo.entry import Built, Entry
from benchmarks.zoo.entry import Path as GraphPath
from benchmarks.zoo.measure import Row, measure
from benchmarks.zoo.sample import FLOORS
from benchmarks.zoo.suites import entries, find
from benchmarks.zoo.torchvision_ops import nms
from benchmarks.zoo.weights import randomise
from sparsecc.axes.registry import RULES
from sparsecc.errors import UnsupportedModel, VerificationFailed

SAMPLE = [(key, path, floor) for path, floors in FLOORS.items() for key, floor in floors.items()]


#: the slowest of the sample, of families that others stand for
SLOW = {
    ("hf/gpt2", "onnx"),
    ("timm/test_vit", "onnx"),
    ("hf/xlstm", "torch"),
    ("hf/swinv2", "torch"),
    ("hf/t5", "torch"),
    ("timm/ghostnet_050", "torch"),
}


@pytest.mark.parametrize(
    ("key", "path", "floor"),
    [
        pytest.param(k, p, f, id=f"{k}-{p}", marks=[pytest.mark.nightly] if (k, p) in SLOW else [])
        for k, p, f in SAMPLE
    ],
)
def test_sample(key: str, path: GraphPath, floor: float) -> None:
    row = measure(find(*key.split("/")), path)
    assert row.outcome == "verified", row.message
    assert row.removed is not None
    assert row.removed >= floor, row.reasons


def test_every_entry_has_a_name_of_its_own() -> None:
    keys = [entry.key for entry in entries()]
    assert len(keys) == len(set(keys))
    assert {key for floors in FLOORS.values() for key in floors} <= set(keys)


# -- outcomes ------------------------------------------------------------------------------------


def _net(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


def _entry(module: nn.Module | None = None, *shape: int) -> Entry:
    return Entry("hf", "made-up", partial(Built, module or _net(), (torch.randn(shape or (2, 4)),)))


def test_a_row_says_what_was_removed() -> None:
    row = measure(_entry(), "torch")
    assert (row.outcome, row.form, row.groups, row.parameters) == ("verified", "class", 1, 67)
    assert row.removed == pytest.approx(1 - (4 * 4 + 4 + 3 * 4 + 3) / 67)
    assert row.prunable == pytest.approx(1 - (4 + 1 + 3 + 3) / 67)
    assert row.error64 is not None
    assert row.error64 <= 1e-12
    assert row.frozen == {"graph input": 1, "graph output": 2}


class _Broken(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no such thing")


class _Untraceable(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if float(x.sum()) > 1e9 else x


@pytest.mark.parametrize(
    ("module", "path", "outcome", "words"),
    [
        (_Broken(), "torch", "no model", "no such thing"),
        (_Untraceable(), "torch", "export failed", "torch.export cannot trace"),
        (_Untraceable(), "onnx", "export failed", "Could not"),
    ],
)
def test_what_is_not_ours(module: nn.Module, path: GraphPath, outcome: str, words: str) -> None:
    row = measure(_entry(module), path)
    assert row.outcome == outcome
    assert words in row.message


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (VerificationFailed("wrong"), "failed"),
        (UnsupportedModel("no"), "refused"),
        (KeyError("x"), "crash"),
        (MemoryError(), "memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory"),
    ],
)
def test_errors_become_outcomes(monkeypatch: pytest.MonkeyPatch, error: Exception, outcome: str) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("sparsecc.prune", fails)
    assert measure(_entry(), "torch").outcome == outcome


def test_large_models_are_skipped_by_name() -> None:
    row = measure(_entry(_net(100)), "torch", max_params=100)
    assert (row.outcome, row.message) == ("skipped (size)", "0 M parameters")


@torch.library.custom_op("sparsecc_zoo::reverse", mutates_args=())
def _reverse(x: torch.Tensor) -> torch.Tensor:
    return x.flip(1)


@_reverse.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class _Reversed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(_reverse(self.first(x)))


def test_a_wrong_rule_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that says that the operator leaves positions where they are prunes the wrong columns."""
    monkeypatch.setitem(RULES, "sparsecc_zoo.reverse", lambda solver, call: list(solver.of(call, 0)))
    row = measure(_entry(_Reversed()), "torch")
    assert row.outcome == "failed", row
    assert "float64" in row.message


# -- processes -----------------------------------------------------------------------------------


def test_a_process_that_takes_too_long_ends_as_a_row() -> None:
    deep = find("torchvision", "densenet201")  # small models end within a second on a fast machine
    rows = list(work.run([(deep, "torch")], work.Limits(seconds=1), 1))
    assert [(r.key, r.outcome) for r in rows] == [("torchvision/densenet201/torch", "timeout")]


# -- rows ----------------------------------------------------------------------------------------


def test_rows_survive_an_interrupted_run(tmp_path: Path) -> None:
    file = tmp_path / "zoo.jsonl"
    first, second = Row("hf", "a", "torch", "crash"), Row("hf", "a", "torch", "verified", removed=0.5)
    for row in (first, second, Row("hf", "b", "onnx", "refused", "why")):
        store.append(file, row)
    with file.open("a") as stream:
        stream.write('{"suite": "hf", "na')
    rows = store.load(file)
    assert [r.outcome for r in rows.values()] == ["verified", "refused"]
    assert rows["hf/a/torch"] == second


def test_the_table_holds_every_row() -> None:
    rows = [
        Row("hf", "a", "torch", "verified", removed=0.5, work=0.7, prunable=0.9, groups=3, error64=1e-15),
        Row("hf", "a", "onnx", "verified", removed=0.5, work=0.6, prunable=0.9, groups=3, error64=1e-15),
        Row("hf", "e", "torch", "verified", removed=0.5, work=0.7, prunable=0.9, groups=3, error64=1e-15),
        Row("hf", "e", "onnx", "verified", removed=0.5, work=0.7, prunable=0.9, groups=3, error64=1e-15),
        Row("hf", "b|c", "onnx", "refused", "says why"),
        Row("timm", "d", "torch", "not run"),
    ]
    text = table.markdown(rows)
    assert "| a | torch | verified |  | 50 % | 70 % | 90 % | 3 |" in text
    assert table.lost_on_the_way(rows) == [["hf/a", "70 %", "60 %"]]
    assert "| hf/a | 70 % | 60 % |" in text
    assert "says why" in text
    assert "| d | torch | not run |" in text
    assert [r["name"] for r in json.loads(table.document(rows))["rows"]] == ["a", "a", "e", "e", "b|c", "d"]


# -- weights and operators -----------------------------------------------------------------------


def test_no_weight_is_zero_or_all_alike() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.norm = nn.BatchNorm2d(4)
            self.gamma = nn.Parameter(torch.full((4,), 1e-6))
            self.embed = nn.Embedding(9, 4, padding_idx=0)
            nn.init.zeros_(self.conv.weight)

    torch.manual_seed(0)
    model = Scaled()
    randomise(model)
    assert all(bool((p != 0).all()) and p.unique().numel() > 1 for p in model.parameters())
    assert 0.3 < float(model.gamma.detach().abs().mean()) < 2
    assert model.norm.running_mean is not None
    assert bool((model.norm.running_mean != 0).all())
    torch.manual_seed(0)
    again = Scaled()
    randomise(again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_nms_keeps_the_best_of_boxes_that_overlap() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30], [0, 0, 10, 5]])
    scores = torch.tensor([0.5, 0.9, 0.1, 0.4])
    assert nms(boxes, scores, 0.7).tolist() == [1, 3, 2]
    assert nms(boxes, scores, 0.3).tolist() == [1, 2]
