"""Stored kernels on the GPU at hand: which image fits, which tile for how many rows, and the launch."""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsecc.artifact import Artifact
from sparsecc.errors import InvalidModel, InvalidOption, TargetUnavailable
from sparsecc.targets.cuda.build import Kernel, Launch
from sparsecc.targets.cuda.driver import driver
from sparsecc.targets.cuda.operator import DTYPES, Operands, result_type, rounded_to
from sparsecc.targets.cuda.tiles import default_config, tile_for, turns, warpgroup_tile

#: up to how many times as many rows, or as few, what was measured holds
_ALIKE = 1.5

KERNELS = "kernels.json"
FOLDER = "kernels"


@dataclass(frozen=True, eq=False, slots=True)
class Loaded:
    """A kernel in a GPU's memory."""

    kernel: Kernel
    function: int


#: kernels by device and entry name
_loaded: dict[tuple[int, str], Loaded] = {}


def kernels_of(artifact: Artifact) -> dict[str, Kernel]:
    """The kernels that an artifact holds, by name.  Raises ``InvalidModel`` for damaged ones."""
    try:
        manifests = json.loads(artifact.read(KERNELS))
        names = [str(manifest["entry"]) for manifest in manifests]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidModel(f"the artifact's {KERNELS} cannot be read: {error}") from error
    prefix = f"{FOLDER}/"
    files = {n.removeprefix(prefix): artifact.read(n) for n in artifact.members if n.startswith(prefix)}
    return {n: Kernel.load(m, files) for n, m in zip(names, manifests, strict=True)}


def device_for(artifact: Artifact, layers: Sequence[Mapping[str, Any]]) -> torch.device:
    """The current GPU where it runs a kernel of every sparse layer, else the CPU."""
    kernels = kernels_of(artifact)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = torch.cuda.current_device()
    here = torch.cuda.get_device_capability(index)
    runs = {name for name, kernel in kernels.items() if image_for(kernel, *here) is not None}
    sparse = [layer["kernels"] for layer in layers if layer["sparse"]]
    fits = bool(sparse) and all(runs.intersection(names) for names in sparse)
    return torch.device("cuda", index) if fits else torch.device("cpu")


def image_for(kernel: Kernel, major: int, minor: int) -> bytes | None:
    """What compute capability ``major.minor`` runs: its own image, one of its family, PTX, or None.

    A cubin runs on its own major version from its minor version on (CUDA C++ programming guide, "Binary
    compatibility"), one for ``sm_90a`` on 9.0 alone; PTX is compiled by the driver for anything later.
    """
    here = 10 * major + minor
    found: list[tuple[int, bytes]] = []
    for arch, image in kernel.images.items():
        exact = arch.endswith("a")
        number = int(arch.removeprefix("sm_").removesuffix("a"))
        if number == here or (not exact and number // 10 == major and number <= here):
            found.append((2 * number + exact, image.cubin))
    if found:
        return max(found)[1]
    number = int(kernel.ptx_arch.removeprefix("sm_").removesuffix("a"))
    later = number <= here and not kernel.ptx_arch.endswith("a")
    return kernel.ptx.encode() + b"\0" if later else None


def load_kernels(artifact: Artifact, device: torch.device) -> None:
    """Put the artifact's kernels into the memory of ``device``."""
    for kernel in kernels_of(artifact).values():
        load(kernel, device)


def load(kernel: Kernel, device: torch.device) -> None:
    """Put a kernel into the memory of ``device``, if it has code for it."""
    image = image_for(kernel, *torch.cuda.get_device_capability(device))
    if image is None:
        return  # another kernel of the layer has code for this GPU
    assert device.index is not None
    with torch.cuda.device(device):
        torch.empty(1, device=device)  # makes the context that the driver's calls need
        function = driver().function(image, kernel.entry, kernel.config.shared_bytes)
    _loaded[device.index, kernel.entry] = Loaded(kernel, function)


def chosen(kernels: Sequence[Kernel], rows: int) -> Kernel:
    """The kernel for ``rows``: a warpgroup's where these are faster, else the one with the nearest tile."""
    grouped = [kernel for kernel in kernels if kernel.config.instruction == "wgmma.sp"]
    others = [kernel for kernel in kernels if kernel.config.instruction != "wgmma.sp"]
    if grouped and (not others or warpgroup_tile(rows, grouped[0].problem.out)):
        return min(grouped, key=lambda kernel: (turns(kernel.config, rows, kernel.problem.out), kernel.entry))
    wanted = default_config(tile_for(rows, others[0].problem.out)).block_n
    return min(others, key=lambda kernel: (abs(kernel.config.block_n - wanted), kernel.entry))


def picked(names: str, loaded: Mapping[str, Kernel], rows: int, total: int) -> Kernel:
    """The kernel that was measured to be the fastest for about ``total`` rows, or else the one for ``rows``.

    ``names``: of those that a layer has, joined by commas; ``NAME@ROWS`` was measured for so many.
    """
    for name, _, measured in (text.partition("@") for text in names.split(",")):
        if name in loaded and measured and 1 / _ALIKE <= total / int(measured) <= _ALIKE:
            return loaded[name]
    return chosen(list(loaded.values()), rows)


def launched(given: Operands, shape: Sequence[int]) -> torch.Tensor:
    """Run one of the operator's kernels on the GPU that holds its input; the output has ``shape``."""
    index = given.x.device.index
    assert index is not None
    names = [name.partition("@")[0] for name in given.kernels.split(",")]
    found = {name: _loaded[index, name] for name in names if (index, name) in _loaded}
    if not found:
        raise TargetUnavailable(
            f"no kernel of this layer is loaded on cuda:{index}, which is not the GPU of the artifact"
        )
    sizes, rows = run_time_sizes(given, shape)
    total = math.prod(shape) // given.out
    kernel = picked(given.kernels, {name: one.kernel for name, one in found.items()}, rows, total)
    launch = kernel.launch(**sizes)
    wide = torch.float32 if kernel.config.out_dtype == "fp32" else DTYPES[kernel.config.out_dtype]
    result = torch.empty(list(shape), dtype=wide, device=given.x.device)
    residual = None if given.residual is None else given.residual.expand(list(shape)).to(wide).contiguous()
    tensors: Mapping[str, Any] = {
        "weight": given.values,
        "metadata": given.metadata,
        "x": rounded_to(given.x, DTYPES[given.dtype]).contiguous(),
        "d": result,
        "scale": given.scale,
        "bias": given.bias,
        "residual": residual,
    }
    with torch.cuda.device(given.x.device):
        start(found[kernel.entry].function, kernel, launch, tensors)
    return result.to(result_type(given.x))


def start(function: int, kernel: Kernel, launch: Launch, tensors: Mapping[str, torch.Tensor | None]) -> None:
    """Launch a kernel on the current device and stream, with ``tensors`` by the names of its parameters."""
    driver().launch(
        function,
        launch.grid,
        launch.block,
        launch.shared_bytes,
        torch.cuda.current_stream().cuda_stream,
        cells(kernel, launch, tensors),
    )


def cells(kernel: Kernel, launch: Launch, tensors: Mapping[str, torch.Tensor | None]) -> list[Any]:
    """The kernel's arguments in its order: int32 sizes, addresses of tensors.

    Raises ``InvalidOption`` for a tensor that is not contiguous, which a kernel would misread.
    """
    found: list[Any] = []
    for name in kernel.parameters:
        if name in launch.scalars:
            found.append(ctypes.c_int32(launch.scalars[name]))
        else:
            tensor = tensors[name]
            assert tensor is not None, name
            if not tensor.is_contiguous():
                raise InvalidOption(
                    f"{name} of kernel {kernel.entry} has strides {tensor.stride()}: it must be contiguous"
                )
            found.append(ctypes.c_void_p(tensor.data_ptr()))
    return found


def run_time_sizes(given: Operands, shape: Sequence[int]) -> tuple[dict[str, int], int]:
    """The sizes that a launch is computed from, and the rows of one grid (tokens, or pixels of an image)."""
    if not given.conv:
        tokens = given.x.numel() // given.x.shape[-1]
        return {"tokens": tokens}, tokens
    batch, _, height, width = given.x.shape
    return {"batch": batch, "height": height, "width": width}, shape[2] * shape[3]
