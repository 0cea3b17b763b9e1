"""2:4 weights in somebody else's TVM pipeline: ``python -m examples.relax_pipeline`` (half a minute).

A model is pruned to 2:4, imported into Relax with a batch that stays open, and built for this machine's
processor, once as it is and once with the pass in the pipeline.  Both results are compared with PyTorch.
With ``--cuda sm_80`` the module is compiled for that architecture instead, which needs no GPU, and not run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

import sparsecc
from sparsecc.targets.relax import Sparse24

try:
    import tvm
    from tvm import relax
    from tvm.relax.frontend.torch import from_exported_program
except ImportError as error:
    raise SystemExit(f"this example needs TVM ({error}): pip install 'sparsecc[cuda]'") from error

Array: TypeAlias = npt.NDArray[Any]


def model() -> nn.Module:
    """A small network with two-of-four weights, in the class that it had."""
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    pruned: nn.Module = sparsecc.prune(dense.eval(), (torch.randn(8, 256),), recipe="NMPattern()").model
    return pruned.eval()


def imported(module: nn.Module) -> Any:
    """The model as a Relax module whose batch may be anything from 1 to 256."""
    batch = torch.export.Dim("batch", min=1, max=256)
    program = torch.export.export(module, (torch.randn(8, 256),), dynamic_shapes=({0: batch},))
    return from_exported_program(program)


def pipeline(*first: Any) -> Any:
    """What a deployment compiler may do with a module; ``first`` are passes that come before the rest."""
    return tvm.ir.transform.Sequential([relax.transform.FoldConstant(), *first, relax.get_pipeline("zero")])


def on_processor(module: Any) -> Callable[[Array], Array]:
    """The module's main function, built for the processor."""
    machine = relax.VirtualMachine(tvm.compile(module, target="llvm"), tvm.cpu())
    return lambda x: np.asarray(machine["main"](tvm.runtime.tensor(x))[0].numpy())


def milliseconds(run: Callable[[Array], Array], x: Array) -> float:
    """The fastest of three runs."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run(x)
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def run_on_processor() -> None:
    """Rewrite, build and compare."""
    network = model()
    module = imported(network)
    sparse = Sparse24("llvm")
    before, after = on_processor(pipeline()(module)), on_processor(pipeline(sparse)(module))
    print(*sparse.choices, sep="\n")
    for batch in (1, 37):
        x = torch.randn(batch, 256)
        exact = network.double()(x.double()).detach().numpy()
        errors = [np.abs(run(x.numpy()) - exact).max() for run in (before, after)]
        times = [milliseconds(run, x.numpy()) for run in (before, after)]
        print(
            f"batch {batch}: largest error {errors[0]:.1e} dense, {errors[1]:.1e} 2:4; "
            f"{times[0]:.2f} ms dense (TVM's default, not tuned), {times[1]:.2f} ms 2:4"
        )
        assert errors[1] <= 4 * errors[0] + 1e-6, "the rewritten module differs"


def compile_for(arch: str) -> None:
    """Rewrite and compile for a GPU; products of this float32 model are rounded to fp16 on request."""
    target = tvm.target.Target({"kind": "cuda", "arch": arch}, host="llvm")
    sparse = Sparse24(target, product="fp16", choose="always")
    built = tvm.compile(sparse(imported(model())), target=target)
    print(*sparse.choices, sep="\n")
    source = built.mod.imports[0].imports[0].inspect_source("cuda")
    print(f"{source.count('__global__') // 2} kernels; mma.sp: {'mma.sp::ordered_metadata' in source}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--cuda", metavar="ARCH", help="compile for a GPU architecture instead, such as sm_80"
    )
    arch = parser.parse_args().cuda
    compile_for(arch) if arch else run_on_processor()


if __name__ == "__main__":
    main()
