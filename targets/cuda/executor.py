"""Runs an artifact in torch: generated kernels on a GPU that they are for, torch's operators for the rest."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from onnx import NodeProto

from sparsecc.artifact import MODEL, WEIGHTS, Artifact
from sparsecc.errors import TargetUnavailable
from sparsecc.onnxfile.model import OnnxFile, to_numpy
from sparsecc.reference.onnx_ops.registry import attributes
from sparsecc.reference.onnx_run import Default, Hook, Runner
from sparsecc.subject import NodeCheck
from sparsecc.target import Executor
from sparsecc.targets.arguments import as_torch, checked
from sparsecc.targets.cuda import cusparselt
from sparsecc.targets.cuda.listing import layers_of
from sparsecc.targets.cuda.operator import DTYPES
from sparsecc.targets.cuda.placement import Placed, moved
from sparsecc.targets.cuda.reference import DOMAIN, KIND, rounding_bound


class TorchExecutor(Executor):
    """An artifact's graph on torch: on the first GPU that can run its kernels, else on the CPU.

    ``engine`` is tried before the kernels, see ``sparsecc.targets.cuda.cusparselt``.
    """

    def __init__(self, artifact: Artifact, *, threads: int | None = None, engine: str = "generated") -> None:
        from sparsecc.targets.cuda.launch import device_for, load_kernels

        self.signature = artifact.signature
        self.layers = layers_of(artifact)
        sparse = [entry for entry in self.layers if entry["sparse"]]
        coded = [entry for entry in sparse if entry["dtype"] == "int8"]
        self.rounds = {e["product"]: DTYPES[e["dtype"]] for e in sparse if e["dtype"] != "int8"}
        self.watched = frozenset(name for e in coded for name in (e["output"], *e["reads"]))
        self.device = device_for(artifact, self.layers)
        if self.device.type == "cuda":
            load_kernels(artifact, self.device)
        elif sparse:
            self.stand_in = "the artifact's form for the CPU; no GPU here runs its kernels"
        self._folder = tempfile.TemporaryDirectory(prefix="sparsecc-")  # weights are read from it when needed
        artifact.extract(self._folder.name, *(n for n in (MODEL, WEIGHTS) if n in artifact.members))
        file = OnnxFile.load(Path(self._folder.name, MODEL))
        if engine == cusparselt.NAME:
            cusparselt.require(self.device)
            if sparse and not prefer(file, engine, self.device):
                raise TargetUnavailable(
                    f"engine {engine!r} takes none of the artifact's {len(sparse)} sparse products on this "
                    "GPU: it multiplies in fp16 (not on Hopper) and bf16, no convolutions, sizes that are "
                    "multiples of 16; load the artifact without it"
                )
        self._placed: Placed | None = None
        if self.device.type == "cuda" and not Runner(file, cache=False).program.bodies:
            self._placed = Placed(file, self.device)
        else:
            self._runner = Runner(file, device=self.device)
        self._outputs = [spec.name for spec in self.signature.outputs]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; torch tensors in, torch tensors out, else NumPy arrays.

        Raises ``InvalidOption`` for arguments that do not fit.
        """
        feeds, device = checked(self.signature, args, kwargs)
        found = self.run_named({name: as_torch(name, value) for name, value in feeds.items()})
        if device is not None:
            return self.signature.assemble({name: value.to(device) for name, value in found.items()})
        return self.signature.assemble({name: to_numpy(value) for name, value in found.items()})

    def run_named(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Outputs by their names in the graph, for inputs by theirs; on the CPU where all inputs are."""
        found = self._run(feeds)
        there = all(value.device.type == "cpu" for value in feeds.values())
        outputs = {name: found[name] for name in self._outputs}
        return {n: moved(value, torch.device("cpu")) for n, value in outputs.items()} if there else outputs

    def alone(
        self, feeds: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]
    ) -> Iterator[NodeCheck]:
        """Each product in integers by itself: exact but for the rounding of scale, bias and what follows."""
        found: list[NodeCheck] = []

        def forced(node: NodeProto, index: int, given: list[Any], default: Default) -> tuple[Any, ...]:
            pairs = zip(node.input, given, strict=True)
            given = [values[name].to(own) if name in values else own for name, own in pairs]
            outputs = default(given)
            if node.op_type == KIND and node.output[0] in values:
                wanted = values[node.output[0]].double()
                error = float((outputs[0].cpu().double() - wanted).abs().amax()) if wanted.numel() else 0.0
                found.append(NodeCheck(node.output[0], error, rounding_bound(node, given)))
            return outputs

        if self.watched:
            self._run(feeds, forced)
        yield from found

    def _run(self, feeds: Mapping[str, torch.Tensor], hook: Hook | None = None) -> dict[str, Any]:
        with torch.inference_mode():
            if self._placed is not None:
                return self._placed.run(feeds, hook)
            with self.device:
                return self._runner.run(feeds, hook=hook)


def prefer(file: OnnxFile, engine: str, device: torch.device | None = None) -> int:
    """Put ``engine`` before the kernels of every sparse product; returns how many of them it takes."""
    taken = 0
    for node in file.proto.graph.node:
        if (node.domain, node.op_type) == (DOMAIN, KIND):
            given = attributes(node)
            size, dtype = (int(given["out"]), int(given["k"])), str(given["dtype"])
            taken += cusparselt.takes(*size, dtype, convolution=bool(given.get("conv")), device=device)
            for attribute in node.attribute:
                if attribute.name == "kernels":
                    attribute.strings[:] = [engine.encode(), *attribute.strings]
    return taken
