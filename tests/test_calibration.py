"""Statistics of calibration data against sums over what forward hooks see."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper
from torch import nn
from torch.nn import functional as F

import sparsecc
from sparsecc.calibration import CalibrationData, Statistics
from sparsecc.cli.commands import cli
from sparsecc.errors import InvalidModel, InvalidOption
from sparsecc.pipeline import open_subject


def patches(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Rows ``[G, R, K]`` that a module's weight is multiplied with, one window after the other."""
    if isinstance(module, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    assert isinstance(module, nn.modules.conv._ConvNd)
    pads = [p for p in reversed(module.padding) for _ in range(2)]
    padded = F.pad(x, pads)
    spatial = padded.shape[2:]
    spans = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    counts = [(n - s) // t + 1 for n, s, t in zip(spatial, spans, module.stride, strict=True)]
    found = []
    for place in np.ndindex(*counts):
        window = [
            slice(p * t, p * t + s, d)
            for p, t, s, d in zip(place, module.stride, spans, module.dilation, strict=True)
        ]
        found.append(padded[(slice(None), slice(None), *window)])
    windows = torch.stack(found, 1)  # N, R, C, *k
    n, r, c = windows.shape[:3]
    grouped = windows.reshape(n * r, module.groups, c // module.groups, -1)
    return grouped.flatten(2).transpose(0, 1)


def rows_seen(net: nn.Module, data: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rows of every layer over all batches, by the weight's name."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = []
    for name, module in net.named_modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):

            def hook(m: nn.Module, args: Any, y: Any, name: str = name) -> None:
                seen.setdefault(f"{name}.weight", []).append(patches(m, args[0].detach()))

            handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        for batch in data:
            net(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts, 1) for name, parts in seen.items()}


class Grouped(nn.Module):
    """Convolutions with stride, padding, dilation, groups; one depthwise; a linear layer read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.b = nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=3, bias=False)
        self.c = nn.Conv2d(6, 6, 3, groups=6, padding=1)
        self.d = nn.Conv2d(6, 8, 1)
        self.e = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.d(self.c(self.b(self.a(x).relu()).relu()).relu())
        x = x.flatten(2).transpose(1, 2)
        return self.e(self.e(x).relu())


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), (5, 6)),
    "sequence": (lambda: nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)), (2, 7, 6)),
    "grouped": (Grouped, (3, 4, 9, 9)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 5, stride=2, padding=1), nn.ReLU()), (2, 3, 17)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 4, 2, padding=1), nn.ReLU()), (2, 2, 4, 5, 3)),
}


def made(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[torch.Tensor]]:
    """A net in evaluation mode and three batches, the last of another size."""
    make, shape = NETS[name]
    torch.manual_seed(0)
    net = make().to(dtype).eval()
    data = [torch.randn(shape, dtype=dtype) for _ in range(2)]
    return net, [*data, torch.randn(shape[0] + 1, *shape[1:], dtype=dtype)]


def statistics_of(net: Any, data: Any, example: Any = None) -> Statistics:
    """Statistics of a captured model."""
    return Statistics(open_subject(net, example), CalibrationData.of(data))


MOMENTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda r: r.sum(1),
    "absolute": lambda r: r.abs().sum(1),
    "square": lambda r: r.square().sum(1),
    "nonzero": lambda r: (r != 0).double().sum(1),
    "hessian": lambda r: r.transpose(1, 2) @ r,
}


@pytest.mark.parametrize("name", NETS)
def test_moments_are_sums_over_rows(name: str) -> None:
    """Every moment of every layer, whatever its stride, padding, dilation and groups."""
    net, data = made(name)
    found = statistics_of(net, data, (data[0],))
    for weight, rows in rows_seen(net, data).items():
        got = found.moments(weight, *MOMENTS)
        assert got is not None
        assert got.count == rows.shape[1], weight
        for moment, function in MOMENTS.items():
            torch.testing.assert_close(got.sums[moment].double(), function(rows), msg=f"{weight} {moment}")


def exported(net: nn.Module, example: torch.Tensor) -> bytes:
    """The net as an ONNX file with a dynamic batch."""
    program = torch.onnx.export(
        net, (example,), dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim.AUTO},)
    )
    assert program is not None
    stream = io.BytesIO()
    program.save(stream)
    return stream.getvalue()


@pytest.mark.parametrize("name", ["mlp", "grouped"])
def test_onnx_files_have_the_same_moments(name: str) -> None:
    """Weights are matched by value, up to the transpose that an export may do."""
    net, data = made(name, torch.float32)
    subject = open_subject(exported(net, data[0]))
    found = Statistics(subject, CalibrationData(data))
    for weight, rows in rows_seen(net, data).items():
        stored = net.get_parameter(weight)
        same = [
            n
            for n, v in subject.view.weights.items()
            for t in [subject.view.weight(n)]
            if (n in found.readings and (t.shape == stored.shape and torch.equal(t, stored)))
            or ((t.shape == stored.T.shape if stored.dim() == 2 else False) and torch.equal(t, stored.T))
        ]
        assert same, weight
        got = found.moments(same[0], "square", "hessian")
        assert got is not None
        torch.testing.assert_close(got.sums["square"].float(), rows.square().sum(1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            got.sums["hessian"].float(), rows.transpose(1, 2) @ rows, rtol=1e-4, atol=1e-3
        )


def test_a_stored_weight_and_its_matrix_are_inverse() -> None:
    """``stored(matrix(w))`` gives the weight back, in both layouts."""
    net, data = made("grouped")
    found = statistics_of(net, data, (data[0],))
    for weight, every in found.readings.of.items():
        tensor = net.get_parameter(weight).detach()
        for reading in every:
            assert torch.equal(reading.stored(reading.matrix(tensor), tensor.shape), tensor)


def test_layers_that_share_an_input_share_its_moments() -> None:
    """Three projections of one value: one second moment."""

    class Projections(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q(x) * self.k(x) + self.v(x)

    net = Projections().eval()
    data = [torch.randn(4, 6)]
    found = statistics_of(net, data, (data[0],))
    found.collect(["hessian"])
    assert len(found._moments) == 1


class Labelled(torch.utils.data.Dataset[Any]):
    """Pairs of an input and a label."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((6,), float(index)), index % 4


def test_a_data_loader_with_labels_needs_to_be_told_what_the_inputs_are() -> None:
    """A pair fits no model of one input: the error says what to give; with it, it works."""
    net, data = made("mlp", torch.float32)
    loader = torch.utils.data.DataLoader(Labelled(), batch_size=4)
    with pytest.raises(InvalidOption, match="inputs=lambda batch"):
        sparsecc.prune(net, (data[0],), saliency="wanda", calibration=loader)
    result = sparsecc.prune(
        net,
        (data[0],),
        saliency="wanda",
        calibration=CalibrationData(loader, inputs=lambda batch: (batch[0],)),
    )
    assert result.certificate.status == "VERIFIED"


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        ([], "no batches"),
        (iter([1]), "once only"),
        (3, "iterable"),
        ([torch.zeros(2, 6, dtype=torch.float64)], "float64"),
        ([torch.zeros(2, 5)], "fails|shape|size"),
    ],
)
def test_bad_data_is_one_clear_error(calibration: Any, words: str) -> None:
    """No data, data that can be read once, data that does not fit."""
    net, data = made("mlp", torch.float32)
    with pytest.raises(InvalidOption, match=words):
        sparsecc.prune(net, (data[0],), saliency="wanda", calibration=calibration)


def test_a_criterion_that_needs_data_says_so() -> None:
    """Without calibration data the error names the argument."""
    net, data = made("mlp", torch.float32)
    with pytest.raises(InvalidOption, match="calibration="):
        sparsecc.prune(net, (data[0],), saliency="wanda")
    with pytest.raises(InvalidOption, match="loss="):
        sparsecc.prune(net, (data[0],), saliency="taylor", calibration=[data[0]])


def test_the_limit_bounds_the_batches() -> None:
    """Only as many batches are read as were asked for."""
    net, data = made("mlp")
    found = statistics_of(net, CalibrationData(data, limit=2), (data[0],)).moments("0.weight", "square")
    assert found is not None
    assert found.count == 10


def test_the_command_line_takes_arrays(tmp_path: Path) -> None:
    """Samples along the first axis of a file per input; a missing name or no samples is bad usage."""
    net, data = made("mlp", torch.float32)
    (tmp_path / "net.onnx").write_bytes(exported(net, data[0]))
    name = open_subject(tmp_path / "net.onnx").file.inputs[0].name  # type: ignore[attr-defined]
    np.save(tmp_path / "x.npy", torch.cat(data).numpy())
    np.save(tmp_path / "none.npy", np.zeros((0, 6), np.float32))
    arguments = ["prune", str(tmp_path / "net.onnx"), "-o", str(tmp_path / "out.onnx"), "--json"]
    run = CliRunner().invoke(
        cli,
        [*arguments, "--recipe", "SparseGPT(pattern='2:4')", "--calibration", f"{name}={tmp_path / 'x.npy'}"],
    )
    assert run.exit_code == 0, run.output
    before, after = (onnx.load(tmp_path / f) for f in ("net.onnx", "out.onnx"))
    zeros = [
        sum(int((numpy_helper.to_array(t) == 0).sum()) for t in m.graph.initializer if len(t.dims) == 2)
        for m in (before, after)
    ]
    assert zeros == [0, 8 * 4 // 2]  # the first layer sums over 6 positions and stays dense
    for file in ("none.npy", "absent.npy"):
        run = CliRunner().invoke(cli, [*arguments, "--calibration", f"{name}={tmp_path / file}"])
        assert run.exit_code == 2, run.output


def test_compiling_for_a_pattern_with_data_updates_what_stays() -> None:
    """Without a recipe, data means SparseGPT; without data, magnitude."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    mix = torch.randn(16, 16)
    data = [torch.randn(60, 16) @ mix for _ in range(2)]
    with_data = sparsecc.compile(net, (data[0],), target="onnx-2:4", calibration=data)
    without = sparsecc.compile(net, (data[0],), target="onnx-2:4")
    assert with_data.certificate.status == without.certificate.status == "VERIFIED"
    with torch.no_grad():
        want = torch.cat([net(x) for x in data])
    errors = [
        float((torch.cat([torch.as_tensor(c(x)) for x in data]) - want).square().mean())
        for c in (with_data, without)
    ]
    assert errors[0] < 0.8 * errors[1]


def test_collecting_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that are in the file are not run again, and the sums are those of one run."""
    monkeypatch.setattr("sparsecc.calibration.resume.EVERY", 0.0)
    net, data = made("mlp")
    file = tmp_path / "moments.safetensors"

    class Breaking(list[Any]):
        broken = True

        def __iter__(self) -> Any:
            for count, batch in enumerate(super().__iter__()):
                if self.broken and count == 2:
                    raise RuntimeError("the power failed")
                yield batch

    batches = Breaking([*data, data[0]])
    with pytest.raises(RuntimeError, match="power"):
        statistics_of(net, CalibrationData(batches, resume=file), (data[0],)).collect(["square", "hessian"])
    batches.broken = False
    batches[0] = batches[1] = torch.full_like(data[0], torch.nan)  # would show if they were run again
    found = statistics_of(net, CalibrationData(batches, resume=file), (data[0],)).moments(
        "2.weight", "hessian", "square"
    )
    want = statistics_of(net, [*data, data[0]], (data[0],)).moments("2.weight", "hessian", "square")
    assert found is not None
    assert want is not None
    assert found.count == want.count
    assert all(torch.equal(found.sums[n], want.sums[n]) for n in want.sums)
    other, _ = made("sequence")
    with pytest.raises(InvalidModel, match="another model"):
        statistics_of(other, CalibrationData(data, resume=file), (data[0],)).collect(["square", "hessian"])
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(InvalidModel, match="damaged"):
        statistics_of(net, CalibrationData(data, resume=file), (data[0],)).collect(["square", "hessian"])
