"""The command that compiles trained models for sparse tensor cores: what it records and how it shows it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from benchmarks import builds
from benchmarks.builds import STAGES, Build, Row, compiled, main, page
from benchmarks.tasks.common import Loaded

BUILD = Build(61.25, 40.5, dict.fromkeys(STAGES, 1.25), 812.3, 1, 3.75)
ROW = Row(
    "minilm", "sm80-2:4", 37, 35, {"its weight is not 2:4": 2}, 9, "VERIFIED", "absolute error", 8.5e-5,
    1.2e-3, 46_000_000, BUILD, replace(BUILD, wall=30.5, stages=dict.fromkeys(STAGES, 0.25)),
)  # fmt: skip


def test_a_build_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage that compilation names is a column, and what is counted is what was built."""
    pytest.importorskip("tvm")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 7), nn.Linear(7, 4)).eval()
    loaded = Loaded(net, (torch.randn(3, 32),))
    monkeypatch.setattr(builds, "MODELS", {"tiny": SimpleNamespace(load=lambda: loaded)})
    found = compiled("tiny", "sm80-2:4", 1)
    assert (found["layers"], found["sparse"], found["status"]) == (3, 2, "VERIFIED")
    assert found["kernels"] >= 2
    assert sum(found["dense"].values()) == 1
    assert found["error"] <= found["bound"]
    assert found["size"] > 1000
    assert tuple(found["build"].stages) == STAGES


def test_rows_survive_the_file() -> None:
    assert Row.of(json.loads(json.dumps(asdict(ROW)))) == ROW


def test_the_page_shows_every_row() -> None:
    other = replace(ROW, target="sm90-2:4", kernels=11)
    lines = page([ROW, other]).splitlines()
    assert "| all-MiniLM-L6-v2 | sm80-2:4 | 35 of 37 | 9 | VERIFIED | 8.5e-05 | 1.2e-03 | 46.0 |" in lines
    assert "| all-MiniLM-L6-v2 | sm90-2:4 | 35 of 37 | 11 | VERIFIED | 8.5e-05 | 1.2e-03 | 46.0 |" in lines
    assert "| all-MiniLM-L6-v2 | 2 | its weight is not 2:4 |" in lines
    assert "| all-MiniLM-L6-v2 | sm80-2:4 | 61.2 | 40.5 | 30.5 | 40.5 | 3.8, 3.8 | 812 |" in lines
    assert any(
        line.startswith("| all-MiniLM-L6-v2 | sm80-2:4 | 1.2 ") and "1.2, 0.2" in line for line in lines
    )
    assert any("2 of 16 builds" in line for line in lines)


def test_the_command_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def measured(model: str, target: str, threads: int) -> Row:
        asked.append(f"{model}/{target}")
        return replace(ROW, model=model, target=target, status="VERIFIED" if model != "vgg" else "FAILED")

    monkeypatch.setattr(builds, "measured", measured)
    monkeypatch.setattr(builds, "root", lambda: tmp_path)
    monkeypatch.setattr(builds, "PAGE", tmp_path / "builds.md")
    run = CliRunner().invoke
    done = run(main, ["--only", "minilm", "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    assert [row["target"] for row in json.loads(done.stdout)] == ["sm80-2:4", "sm90-2:4"]
    assert run(main, ["--only", "minilm", "--only", "silero_vad/sm90", "--no-docs"]).exit_code == 0
    assert asked == ["minilm/sm80-2:4", "minilm/sm90-2:4", "silero_vad/sm90-2:4"]
    assert "sm90-2:4" in (tmp_path / "builds.md").read_text()
    assert "Silero" not in (tmp_path / "builds.md").read_text()
    assert run(main, ["--only", "minilm/sm80", "--fresh"]).exit_code == 0
    assert asked[3:] == ["minilm/sm80-2:4"]
    assert run(main, ["--only", "vgg/sm80"]).exit_code == 1
