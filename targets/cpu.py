"""Target ``cpu``: the slimmed model on onnxruntime, on this machine's processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from sparsecc.artifact import Artifact, make_manifest
from sparsecc.signature import Signature, onnx_signature
from sparsecc.target import ANY_PATTERN, Capabilities, Refusal, Target, TargetSpec
from sparsecc.targets.onnx import onnx_members
from sparsecc.targets.ort import OrtExecutor

if TYPE_CHECKING:
    from sparsecc.graph.view import Value, View
    from sparsecc.onnxfile.model import OnnxFile

_NO_KERNELS = {"bfloat16": "float32", "complex64": "float32", "complex128": "float64"}
"""Element types for which onnxruntime's CPU provider has next to no operators, and what to use instead."""

_AS_PAIRS = frozenset({"complex64", "complex128"})
"""Those that the lowering of PyTorch writes as pairs of floats, wherever callers do not see them."""


def _name(value: Value) -> str:
    return value.dtype.lower().removeprefix("torch.")


class Cpu(Target):
    """onnxruntime's CPU provider; every model that ONNX can express in float64, float32 or float16."""

    name: ClassVar[str] = "cpu"
    capabilities: ClassVar[Capabilities] = Capabilities(
        "onnxruntime on the CPU; N:M patterns are zeros in the weights, which run as fast as dense ones",
        patterns=(ANY_PATTERN,),
        modules=("onnxruntime",),
    )

    def accepts(self, view: View) -> list[Refusal]:
        """One refusal for each element type that onnxruntime does not compute in."""
        refusals: dict[str, Refusal] = {}
        seen = {*view.inputs, *view.outputs}
        for call in view.calls:
            for value in (*(v for v in call.inputs if v in seen), *call.outputs):
                dtype = _name(value)
                if view.dialect == "torch" and dtype in _AS_PAIRS and value not in seen:
                    continue
                if dtype not in refusals and (dtype in _NO_KERNELS or dtype.startswith("float8")):
                    refusals[dtype] = Refusal(
                        where=call.describe(),
                        reason=f"onnxruntime does not compute in {dtype} on the CPU",
                        fix=f"convert the model to {_NO_KERNELS.get(dtype, 'float32')}",
                    )
        return list(refusals.values())

    def build(
        self,
        model: OnnxFile,
        spec: TargetSpec,
        *,
        signature: Signature | None = None,
        recipe: str | None = None,
        report: Mapping[str, Any] | None = None,
        certificate: Mapping[str, Any] | None = None,
        members: Mapping[str, bytes] | None = None,
        sizes: Mapping[str, Sequence[int]] | None = None,
    ) -> Artifact:
        """Pack ``model``; without ``signature`` it is called by the names of its inputs."""
        manifest = make_manifest(
            target=str(spec),
            signature=signature or onnx_signature(model.proto),
            recipe=recipe,
            report=report,
            certificate=certificate,
        )
        return Artifact(manifest, {**onnx_members(model), **(members or {})})

    def executor(self, artifact: Artifact, *, threads: int | None = None) -> OrtExecutor:
        """The model on onnxruntime, with at most ``threads`` threads within an operator."""
        return OrtExecutor(artifact, threads=threads)
