"""Measures layers on the GPU at hand and remembers the times, so that the choice is of what was seen.

    sparsecc.compile(model, inputs, target="sm90-2:4", options={"choose": "measured"})

The table is JSON, ``$SPARSECC_TUNED`` or ``~/.cache/sparsecc/tuned.json``: for every GPU, product and number
of rows the microseconds of the dense product (with bias, activation and residual, as torch runs them), of
the kernel of every tile, and of cuSPARSELt where PyTorch has it.  Times are those of CUDA graphs: launching
from Python takes longer than most products.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsecc.atomic import atomic_write
from sparsecc.errors import InvalidModel, TargetRefused
from sparsecc.targets.cuda.layers import Layer
from sparsecc.targets.cuda.tiles import geometry

_ROUNDS, _REPEATS = 9, 10


@dataclass(frozen=True, slots=True)
class Times:
    """Microseconds of one layer: dense, and by tile (or ``cusparselt``)."""

    dense: float
    tiles: Mapping[str, float]

    @property
    def best(self) -> str:
        """The fastest tile; empty where no kernel could be built."""
        return min(self.tiles, key=lambda tile: self.tiles[tile], default="")

    @property
    def ratio(self) -> float:
        """Dense over the fastest kernel; 0 where there is no kernel."""
        return self.dense / self.tiles[self.best] if self.tiles else 0.0


#: measures a layer in an element type; None where there is no GPU for it
Meter = Callable[[Layer, str], "Times | None"]


class Table:
    """Times by GPU and layer, kept in a file that is written after every measurement."""

    def __init__(self, path: Path, gpu: str) -> None:
        self.path, self.gpu = path, gpu
        self._entries = _read(path)

    def get(self, layer: Layer, dtype: str) -> Times | None:
        """What was measured on this GPU."""
        entry = self._entries.get(self.gpu, {}).get(_key(layer, dtype))
        return None if entry is None else Times(**entry)

    def put(self, layer: Layer, dtype: str, times: Times) -> None:
        """Remember a measurement."""
        self._entries.setdefault(self.gpu, {})[_key(layer, dtype)] = asdict(times)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as sink:
            sink.write(json.dumps(self._entries, indent=1, sort_keys=True).encode())


def table_path() -> Path:
    """Where the table is."""
    return Path(os.environ.get("SPARSECC_TUNED", "~/.cache/sparsecc/tuned.json")).expanduser()


def meter(arch: str) -> Meter:
    """Times from the table, or else from the GPU at hand where it has the target's compute capability."""
    here = torch.cuda.is_available() and torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name() if here else ""
    fits = bool(here) and f"sm{here[0]}{here[1]}" == arch  # type: ignore[index]
    return remembered(Table(table_path(), name), on_gpu if fits else None)


def remembered(table: Table, measure: Callable[[Layer, str], Times] | None) -> Meter:
    """A meter that asks the table first, and tells it."""

    def measured(layer: Layer, dtype: str) -> Times | None:
        found = table.get(layer, dtype)
        if found is None and measure is not None:
            found = measure(layer, dtype)
            table.put(layer, dtype, found)
        return found

    return measured


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        for entries in found.values():
            for entry in entries.values():
                Times(**entry).tiles.items()
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise InvalidModel(f"the table of measurements {path} cannot be read ({error}): remove it") from error
    return dict(found)


def _key(layer: Layer, dtype: str) -> str:
    epilogue = layer.epilogue
    parts = [name for name in ("scale", "bias", "residual") if getattr(epilogue, name)]
    conv = "" if layer.conv is None else str(asdict(layer.conv))
    work = f"{dtype} {layer.out}x{layer.k} rows {layer.rows} {'+'.join([*parts, epilogue.activation])}{conv}"
    return f"{work} tiles {geometry()}"


# -- the GPU ------------------------------------------------------------------------------------------


def on_gpu(layer: Layer, dtype: str) -> Times:
    """Time one layer on the current GPU, in turn with the dense product; results must agree.

    Raises ``InvalidModel`` where a kernel's result is not the dense one.
    """
    from sparsecc.targets.cuda.operator import DTYPES

    integers = dtype == "int8"
    x = torch.randn(_input_shape(layer), device="cuda").mul(30 if integers else 1).to(DTYPES[dtype])
    dense, kernels = _dense(layer, x), dict(_kernels(layer, dtype, x))
    wanted = dense()
    unit = torch.finfo(torch.float16 if integers else x.dtype).eps
    bound = 8 * unit * float(wanted.abs().max().clamp(min=1))
    for tile, run in kernels.items():
        if float((run().float() - wanted.float()).abs().max()) > bound:
            raise InvalidModel(f"{layer.name}: the result of {tile} is wrong on this GPU: report this")
    graphs = {name: _graph(function) for name, function in {"": dense, **kernels}.items()}
    seen: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(_ROUNDS):
        for name, graph in graphs.items():
            seen[name].append(_microseconds(graph))
    medians = {name: statistics.median(times) for name, times in seen.items()}
    return Times(medians.pop(""), medians)


def _graph(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Some calls of a function that has run before, as one graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_REPEATS):
            function()
    return graph


def _microseconds(graph: torch.cuda.CUDAGraph) -> float:
    """The time of one call of a graph."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return 1000.0 * float(start.elapsed_time(end)) / _REPEATS


def _input_shape(layer: Layer) -> list[int]:
    """An input with as many rows as the layer has; images are square."""
    if layer.conv is None:
        return [max(1, layer.rows), layer.k]
    side = max(layer.conv.kernel[0], layer.conv.kernel[1], math.isqrt(max(1, layer.rows)))
    return [1, layer.conv.channels, side * layer.conv.stride[0], side * layer.conv.stride[1]]


def _arguments(layer: Layer, dtype: str, x: Tensor) -> Any:
    from sparsecc.targets.cuda.operator import Operands, output_shape, result_type
    from sparsecc.targets.cuda.pack import pack
    from sparsecc.targets.cuda.rewrite import conv_numbers

    packed = pack(layer.matrix.to(x.dtype))
    conv = [] if layer.conv is None else conv_numbers(layer.conv)

    def there(values: Any, instead: float = 0.0) -> Tensor | None:
        if values is None and layer.dynamic is not None:
            return torch.full((layer.out,), instead, device="cuda")
        return None if values is None else torch.from_numpy(values).cuda()

    shape = output_shape(x.shape, layer.out, conv)
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))  # one for all that are compared
    residual = drawn.to(x.device, result_type(x)) if layer.epilogue.residual else None
    values, metadata = (torch.from_numpy(array).cuda() for array in (packed.values, packed.metadata))
    return Operands(
        x, values, metadata, there(layer.scale, 1.0), there(layer.bias), residual, layer.out, layer.k, dtype,
        layer.epilogue.activation, conv, "",
    )  # fmt: skip


def _dense(layer: Layer, x: Tensor) -> Callable[[], Tensor]:
    from sparsecc.targets.cuda.operator import computed, result_type

    wide = result_type(x)  # products of integers that stay dense are computed in floats
    given = replace(_arguments(layer, "", x), x=x.to(wide))
    weight = layer.matrix.cuda().to(wide)
    return lambda: computed(given, weight, rounded=None, wide=wide)


def _kernels(layer: Layer, dtype: str, x: Tensor) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """The operator with the kernel of each tile that the GPU can run, and with cuSPARSELt."""
    from sparsecc.targets.cuda import cusparselt
    from sparsecc.targets.cuda.build import build_gemm
    from sparsecc.targets.cuda.launch import launched, load
    from sparsecc.targets.cuda.operator import output_shape
    from sparsecc.targets.cuda.plan_kernels import made
    from sparsecc.targets.cuda.problem import Problem
    from sparsecc.targets.cuda.tiles import TILES, WGMMA_TILES

    major, minor = torch.cuda.get_device_capability()
    given = _arguments(layer, dtype, x)
    if cusparselt.chosen(named := replace(given, kernels=cusparselt.NAME)):
        yield cusparselt.NAME, lambda: cusparselt.product(named)
    shape = output_shape(x.shape, layer.out, given.conv)
    for tile in (*TILES, *WGMMA_TILES):
        config = made(tile, layer, dtype)
        if config is None:
            continue
        arch = f"sm_{major}{minor}" + ("a" if config.instruction == "wgmma.sp" else "")
        try:
            kernel = build_gemm(config, Problem(layer.out, layer.k, conv=layer.conv), [arch])
        except TargetRefused:
            continue
        load(kernel, x.device)
        operands = replace(given, kernels=kernel.entry)
        yield tile, lambda operands=operands: launched(operands, shape)  # type: ignore[misc]
