"""The two steps of building a kernel, each taken once on a machine: source by TVM, machine code by NVRTC.

What an earlier process made is read from the ``Store``, so that neither TVM nor NVRTC is loaded.  A source is
kept by its configuration, its sizes, and the text of this package; machine code by its source, architecture
and flags; both by the versions of the packages that make them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import cache
from importlib import metadata, resources
from typing import Any

from sparsecc.targets.cuda.config import KernelConfig
from sparsecc.targets.cuda.generate import gemm_source
from sparsecc.targets.cuda.nvrtc import Compiled, compile_source, flags
from sparsecc.targets.cuda.problem import Problem
from sparsecc.targets.cuda.store import Store
from sparsecc.targets.cuda.tvm_build import Source

_GENERATORS = ("sparsecc", "apache-tvm", "apache-tvm-ffi")
_COMPILERS = ("nvidia-cuda-nvrtc", "nvidia-cuda-runtime", "nvidia-cuda-cccl")
_TEXT, _CUBIN, _PTX, _FACTS = "kernel.cu", "kernel.cubin", "kernel.ptx", "facts.json"


@cache
def source(config: KernelConfig, problem: Problem, name: str) -> Source:
    """The CUDA source of a kernel.  Raises ``TargetUnavailable`` where it is not kept and TVM is missing."""
    key = {
        "config": config.as_dict(),
        "problem": problem.as_dict(),
        "name": name,
        "generator": _package_digest(),
        "versions": _versions(*_GENERATORS),
    }
    store = Store.default()
    files = store.get(key) if store else None
    if files is not None and (kept := _source(files)) is not None:
        return kept
    made = gemm_source(config, problem, name=name)
    if store:
        facts = {"entry": made.entry, "parameters": list(made.parameters)}
        store.put(key, {_TEXT: made.text.encode(), _FACTS: json.dumps(facts).encode()})
    return made


@cache
def compiled(text: str, arch: str) -> Compiled:
    """Machine code of a source.  Raises ``TargetUnavailable`` where it is not kept and NVRTC is missing."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    key = {"source": digest, "flags": flags(arch), "versions": _versions(*_COMPILERS)}
    store = Store.default()
    files = store.get(key) if store else None
    if files is not None and (kept := _compiled(files)) is not None:
        return kept
    made = compile_source(text, arch)
    if store:
        facts = {name: value for name, value in asdict(made).items() if name not in ("cubin", "ptx")}
        put = {_CUBIN: made.cubin, _PTX: made.ptx.encode(), _FACTS: json.dumps(facts).encode()}
        store.put(key, put)
    return made


def _source(files: Mapping[str, bytes]) -> Source | None:
    """A source as it was kept; None where something is missing."""
    try:
        facts = json.loads(files[_FACTS])
        return Source(files[_TEXT].decode(), str(facts["entry"]), tuple(map(str, facts["parameters"])))
    except (KeyError, TypeError, ValueError):
        return None


def _compiled(files: Mapping[str, bytes]) -> Compiled | None:
    """Machine code as it was kept; None where something is missing or of another type."""
    try:
        facts: dict[str, Any] = json.loads(files[_FACTS])
        kept = Compiled(cubin=files[_CUBIN], ptx=files[_PTX].decode(), **facts)
    except (KeyError, TypeError, ValueError):
        return None
    typed = all(type(getattr(kept, one.name)).__name__ == one.type for one in fields(Compiled))
    return kept if typed else None


@cache
def _package_digest() -> str:
    """A digest of this package's text: whatever changes the generator changes it."""
    digest = hashlib.sha256()
    here = resources.files(__package__)
    for file in sorted((file for file in here.iterdir() if file.name.endswith(".py")), key=lambda f: f.name):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


@cache
def _versions(*distributions: str) -> dict[str, str]:
    """Installed versions; empty for what is not installed."""
    return {name: _version(name) for name in distributions}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
