"""Roofs: bytes and operations counted by hand, and what they say about the choice of layers."""

from __future__ import annotations

import json
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import sparsecc
from sparsecc.cli.commands import cli
from sparsecc.targets.cuda import measured
from sparsecc.targets.cuda.choice import CURVES, choose
from sparsecc.targets.cuda.layers import Layer
from sparsecc.targets.cuda.measured import FILE, gain
from sparsecc.targets.cuda.pack import pack
from sparsecc.targets.cuda.plan_kernels import IMAGES
from sparsecc.targets.cuda.problem import Conv, Problem
from sparsecc.targets.cuda.roofline import GPUS, LAUNCH, roof, traffic

TABLE = Path(measured.__file__).with_name(FILE)
HALF = {"element": 2, "output": 2, "residual": False}


def test_every_target_has_a_gpu_with_a_source() -> None:
    assert GPUS.keys() == IMAGES.keys() == CURVES.keys()
    for gpu in GPUS.values():
        assert gpu.source
        assert all(1.9 < sparse / dense < 2.1 for dense, sparse in gpu.peaks.values())


def test_a_square_product_by_hand() -> None:
    n = 4096
    found = roof(GPUS["sm80"], Problem(n, n), n, **HALF)
    assert found.bytes == n * n + n * n // 8 + 2 * 2 * n * n  # half of the weights and two bits each; x; y
    assert found.flops == 2 * n**3
    assert found.limit == "compute"
    assert found.microseconds == pytest.approx(2 * n**3 / 624e12 * 1e6)
    dense = roof(GPUS["sm80"], Problem(n, n), n, **HALF, sparse=False)
    assert dense.bytes == 3 * 2 * n * n
    assert dense.microseconds == pytest.approx(2 * found.microseconds)


def test_one_token_waits_for_the_weights() -> None:
    found = roof(GPUS["sm90"], Problem(4096, 4096), 1, **HALF)
    assert found.limit == "memory"
    assert found.microseconds == pytest.approx(found.bytes / 3350e9 * 1e6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
@pytest.mark.parametrize(("out", "k"), [(64, 64), (70, 100), (16, 4)])
def test_weights_take_what_is_packed(dtype: torch.dtype, out: int, k: int) -> None:
    packed = pack(torch.zeros(out, k, dtype=dtype))
    size = packed.values.nbytes + packed.metadata.nbytes
    assert traffic(Problem(out, k), 0, element=dtype.itemsize, output=2, residual=False) == size


@pytest.mark.parametrize(
    "conv",
    [
        Conv(8), Conv(8, (3, 3), padding=(1, 1)), Conv(4, (2, 2), (2, 2)), Conv(8, (1, 1), (2, 2)),
        Conv(8, (5, 3), padding=(2, 1)), Conv(4, (1, 2), (3, 2)),
    ],
)  # fmt: skip
def test_a_convolution_reads_every_pixel_that_it_needs_once(conv: Conv) -> None:
    """Counted one by one; these have no borders that would make a difference."""
    size = (12, 12)
    high, wide = conv.output_size(*size)
    read = {
        (place, down)
        for y, x, i, j in product(range(high), range(wide), range(conv.kernel[0]), range(conv.kernel[1]))
        if 0 <= (place := y * conv.stride[0] + i - conv.padding[0]) < size[0]
        and 0 <= (down := x * conv.stride[1] + j - conv.padding[1]) < size[1]
    }
    problem, rows = Problem(16, conv.k, conv), high * wide
    moved = traffic(problem, rows, **HALF) - traffic(problem, 0, **HALF)
    assert moved == 2 * (len(read) * conv.channels + rows * 16)


def test_a_residual_is_read_too() -> None:
    one = {"element": 2, "output": 4}
    added = traffic(Problem(8, 8), 10, **one, residual=True) - traffic(
        Problem(8, 8), 10, **one, residual=False
    )
    assert added == 10 * 8 * 4


def layer(out: int, k: int, rows: int, dtype: torch.dtype = torch.float16) -> Layer:
    return Layer("l", "w", (0,), "x", "y", "y", torch.zeros(1, 1, dtype=dtype).expand(out, k), rows)


def test_nothing_is_expected_to_gain_more_than_bytes_allow() -> None:
    for arch, gpu in GPUS.items():
        for out, k, rows in product((16, 72, 1024, 8192), (64, 72, 4096), (1, 256, 65536)):
            choice = choose(layer(out, k, rows), arch, "modelled")
            if gain(arch, "fp16", rows, out, k) is not None:
                continue  # dense products that were measured are not as fast as bytes allow
            dense, sparse = (roof(gpu, Problem(out, k), rows, **HALF, sparse=s) for s in (False, True))
            least, most = (r.microseconds + LAUNCH for r in (sparse, dense))
            assert choice.expected <= most / least
            assert choice.expected <= CURVES[arch].at(2 * out * k * rows)
            assert choice.sparse == (choice.expected > 1)


def test_what_was_measured_decides_where_it_was() -> None:
    """Rows of the table give what they say; between numbers of tokens the gain lies between theirs."""
    rows = [row for row in json.loads(TABLE.read_text())["sm90"]["rows"] if row[0] == "bf16"]
    sizes = Counter((out, k) for _, _, out, k, *_ in rows)
    seen = [row for row in rows if sizes[row[2], row[3]] >= 6]
    assert len(seen) >= 72
    for _, tokens, out, k, dense, _, ours in seen:
        choice = choose(layer(out, k, tokens), "sm90", "modelled")
        assert choice.expected == pytest.approx(dense / ours)
        assert choice.sparse == (dense > ours)
        assert "that were measured on NVIDIA H100" in choice.why
    ratios = [choose(layer(4096, 4096, n), "sm90", "modelled").expected for n in (64, 100, 256)]
    assert min(ratios[0], ratios[2]) <= ratios[1] <= max(ratios[0], ratios[2])
    assert gain("sm90", "fp16", 16, 64, 64) is None
    assert gain("sm90", "fp16", 256, 37888, 37888) is None
    assert gain("sm90", "fp16", 1 << 20, 4096, 4096) is None
    assert gain("sm80", "fp16", 16, 4096, 4096) is None


def test_a_layer_that_loses_stays_dense() -> None:
    choice = choose(layer(2048, 8192, 256), "sm90", "modelled")
    assert not choice.sparse
    assert choice.expected < 1


def test_launches_take_what_small_layers_would_gain() -> None:
    dense, sparse = (roof(GPUS["sm90"], Problem(256, 256), 16, **HALF, sparse=s) for s in (False, True))
    assert dense.microseconds > 1.3 * sparse.microseconds
    assert choose(layer(256, 256, 16), "sm90", "modelled").expected < 1.05


def test_a_layer_that_waits_for_its_activations_is_not_said_to_gain() -> None:
    choice = choose(layer(64, 64, 4_000_000), "sm80", "modelled")
    assert choice.expected < 1.01
    assert "memory limits the dense product (A100" in choice.why
    assert not choose(layer(8, 8, 10_000_000), "sm80", "modelled").sparse  # padded to 16 rows, 64 columns


def test_the_listing_names_kernels_and_roofs(tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    model, x = nn.Linear(64, 32).eval(), torch.randn(7, 64)
    compiled = sparsecc.compile(model, (x,), target="sm80-2:4", options={"choose": "always"})
    assert any("published peaks the A100 80GB PCIe needs" in note for note in compiled.report.notes)
    compiled.save(tmp_path / "a.scc")
    shown = CliRunner().invoke(cli, ["inspect", str(tmp_path / "a.scc"), "--json"])
    (row,) = json.loads(shown.output)["layers"]
    assert row["kernel"].startswith("sp24_fp16_rows_")
    assert row["tile"] in row["kernel"]
    rows = int(row["rows"])
    moved = traffic(Problem(32, 64), rows, element=2, output=4, residual=False)
    assert row["reads and writes"] == f"{moved / 1e6:.3g} MB"
    assert row["at least"] == f"{moved / 1935e3:.3g} us (memory)"


def test_tune_is_a_word_for_measuring(tmp_path: Path) -> None:
    """Where there is no GPU the choice is modelled, and says so."""
    pytest.importorskip("tvm")
    sparsecc.compile(nn.Linear(64, 32).eval(), (torch.randn(7, 64),), target="onnx").save(tmp_path / "m.onnx")
    arguments = ["compile", str(tmp_path / "m.onnx"), "--target", "sm80-2:4", "-o", str(tmp_path / "m.scc")]
    environment = {"SPARSECC_TUNED": str(tmp_path / "tuned.json")}
    done = CliRunner().invoke(cli, [*arguments, "--tune"], env=environment)
    assert done.exit_code == 0, done.output
    shown = CliRunner().invoke(cli, ["inspect", str(tmp_path / "m.scc"), "--json"])
    (row,) = json.loads(shown.output)["layers"]
    assert "not measured here" in row["why"] or "measured:" in row["why"]
    refused = CliRunner().invoke(
        cli, ["compile", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "c.scc"), "--tune"]
    )
    assert refused.exit_code == 2
    assert "no option 'choose'" in refused.output
