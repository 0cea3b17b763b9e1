"""Target ``tensorrt``: an ONNX file in which TensorRT can pick sparse kernels, and what builds its engine.

    sparsecc.compile(model, inputs, target="tensorrt-2:4")
    sparsecc.compile("model.onnx", target="tensorrt-2:4-bf16", options={"profile": "batch=1:8:64"})

Where TensorRT and a GPU are there, the artifact holds the engine; else it holds ``build_engine.py`` and the
command line of trtexec, and runs on onnxruntime.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from sparsecc.artifact import MODEL, Artifact, Member, make_manifest
from sparsecc.errors import InvalidOption
from sparsecc.signature import Signature, onnx_signature
from sparsecc.target import Capabilities, Executor, Refusal, Target, TargetSpec, refused

if TYPE_CHECKING:
    from sparsecc.onnxfile.model import OnnxFile

_CHOICES = {"linear": ("matmul", "conv"), "check": ("none", "rtx")}


class Tensorrt(Target):
    """NVIDIA TensorRT.

    ``linear``: ``matmul`` keeps products as they are, ``conv`` makes 1x1 convolutions of them where they have
    two or three axes.  ``profile``: sizes of dynamic dimensions, as ``batch=1:8:64, seq=1:128:512``.
    ``check``: ``rtx`` refuses models that TensorRT-RTX's parser and builder do not take.
    """

    name: ClassVar[str] = "tensorrt"
    capabilities: ClassVar[Capabilities] = Capabilities(
        "ONNX in which TensorRT can pick sparse kernels, with the script that builds the engine; "
        "not measured on hardware",
        patterns=("2:4",),
        dtypes=("fp16", "bf16", "int8"),
        width_multiple=4,
        extra="gs",
        build_modules=("onnx_graphsurgeon",),
    )

    def __init__(self, linear: str = "matmul", profile: str = "", check: str = "none") -> None:
        for key, value in (("linear", linear), ("check", check)):
            if value not in _CHOICES[key]:
                raise InvalidOption(f"{key} must be {' or '.join(_CHOICES[key])}; got {value!r}")
        self.linear, self.profile, self.check = linear, profile, check

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
        """Prepare the model and pack it with what builds the engine, or with the engine.

        Raises ``TargetRefused`` where int8 is asked of a model that is not quantised, and where TensorRT
        or TensorRT-RTX (``check="rtx"``) does not take the model.
        """
        from sparsecc.targets.onnx import onnx_members
        from sparsecc.targets.tensorrt.layers import LAYERS, layers
        from sparsecc.targets.tensorrt.packing import BUILD, built_here, checked, scripts
        from sparsecc.targets.tensorrt.prepare import prepare_file
        from sparsecc.targets.tensorrt.profiles import profiles

        ranges = profiles(model.inlined(), self.profile)
        prepared = prepare_file(model, _types(spec), linear=self.linear)
        entries = layers(prepared)
        if spec.dtype == "int8" and not any(entry["dtype"] == "int8" for entry in entries):
            raise refused(str(spec), [_NOT_QUANTISED])
        files: dict[str, Member] = {**onnx_members(prepared.file), **scripts(ranges)}
        accepted = checked(files, ranges, str(spec)) if self.check == "rtx" else ""
        engine, facts = built_here(files, ranges, str(spec))
        manifest = make_manifest(
            target=str(spec),
            signature=signature or onnx_signature(model.proto),
            recipe=recipe,
            report=report,
            certificate=certificate,
            main=MODEL,
        )
        return Artifact(
            manifest,
            {
                **files,
                **engine,
                LAYERS: _json(entries),
                BUILD: _json({**facts, "accepted": accepted}),
                **(members or {}),
            },
        )

    def listing(self, artifact: Artifact) -> list[dict[str, str]]:
        """Per product: whether TensorRT's rule for sparse weights holds, on which axis, and what was done."""
        from sparsecc.targets.tensorrt.layers import rows

        return rows(artifact)

    def notes(self, artifact: Artifact) -> list[str]:
        """How many products are eligible, how to build the engine, and what has not been measured."""
        from sparsecc.targets.tensorrt.layers import summary
        from sparsecc.targets.tensorrt.packing import instructions

        return [*summary(artifact), *instructions(artifact)]

    def executor(self, artifact: Artifact, *, threads: int | None = None) -> Executor:
        """The engine where there is one and a GPU for it; else the model on onnxruntime."""
        from sparsecc.targets.tensorrt.executor import executor

        return executor(artifact, threads=threads)


_NOT_QUANTISED = Refusal(
    "the model",
    "int8 needs the ranges of activations, and no product of it has QuantizeLinear and DequantizeLinear",
    "quantise it first, symmetrically and with one scale for each output channel, as onnxruntime's "
    "and NVIDIA's tools can",
)


def _types(spec: TargetSpec) -> str | None:
    """Element types to give products: as asked for, those of a quantised model, else fp16 for 2:4."""
    return {None: "auto", "int8": None}.get(spec.dtype, spec.dtype)


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=1, sort_keys=True) + "\n").encode()
