"""Targets: what a model is compiled for.

    target string = ARCH [ "-" PATTERN ] [ "-" DTYPE ]        cpu   onnx   sm80-2:4   sm90-2:4-bf16

A target is a class with data (``Capabilities``) and two methods: ``accepts`` says what in a model it
cannot run, ``build`` makes the artifact.  Targets of this distribution are listed by
``sparsecc.targets``; other distributions add theirs through the entry point group ``sparsecc.targets``.
"""

from __future__ import annotations

import abc
import difflib
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from sparsecc.errors import InvalidOption, TargetRefused, TargetUnavailable

if TYPE_CHECKING:
    import torch

    from sparsecc.artifact import Artifact
    from sparsecc.graph.view import View
    from sparsecc.onnxfile.model import OnnxFile
    from sparsecc.signature import Signature
    from sparsecc.subject import NodeCheck

ENTRY_POINTS = "sparsecc.targets"
DTYPES = ("fp64", "fp32", "fp16", "bf16", "fp8", "int8")

_ARCH = re.compile(r"[a-z][a-z0-9_]*")
_PATTERN = re.compile(r"([1-9][0-9]*):([1-9][0-9]*)")
_GRAMMAR = 'ARCH["-"PATTERN]["-"DTYPE], such as cpu, onnx, sm80-2:4 or sm90-2:4-bf16'


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """One parsed target string; ``str(spec)`` gives it back.

    ``pattern`` is N:M (N kept of M consecutive weights), ``dtype`` one of ``DTYPES``; None where the
    string leaves them out, which means "as in the model".
    """

    arch: str
    pattern: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if not _ARCH.fullmatch(self.arch):
            raise InvalidOption(f"{self.arch!r} is not an architecture name; a target is {_GRAMMAR}")
        if self.pattern is not None:
            match = _PATTERN.fullmatch(self.pattern)
            if match is None or int(match[1]) > int(match[2]):
                raise InvalidOption(
                    f"{self.pattern!r} is not a pattern N:M with 1 <= N <= M; a target is {_GRAMMAR}"
                )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise InvalidOption(f"{self.dtype!r} is not a dtype; known are {', '.join(DTYPES)}")

    @classmethod
    def parse(cls, text: str) -> TargetSpec:
        """Read a target string; letter case and surrounding space do not matter.

        >>> TargetSpec.parse("sm90-2:4-bf16")
        TargetSpec(arch='sm90', pattern='2:4', dtype='bf16')
        """
        if not isinstance(text, str):
            raise InvalidOption(f"a target is a string {_GRAMMAR}; got {type(text).__name__}")
        arch, *rest = text.strip().lower().split("-")
        pattern = rest.pop(0) if rest and ":" in rest[0] else None
        dtype = rest.pop(0) if rest else None
        if rest:
            raise InvalidOption(f"cannot read target {text!r} from '-{rest[0]}' on; a target is {_GRAMMAR}")
        return cls(arch, pattern, dtype)

    def __str__(self) -> str:
        return "-".join(part for part in (self.arch, self.pattern, self.dtype) if part is not None)


#: stands in ``Capabilities.patterns`` for every pattern of N kept elements of M
ANY_PATTERN = "N:M"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a target can do, as data.

    ``patterns`` and ``dtypes`` are those that a target string may ask for (none: the target keeps
    whatever the model has; ``ANY_PATTERN``: all of them); ``width_multiple`` is the number that pruned
    widths should be divisible by (positions); ``modules`` must be importable, ``build_modules`` only where
    artifacts are built, and ``extra`` is the extra that installs both.
    """

    description: str
    patterns: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    width_multiple: int = 1
    modules: tuple[str, ...] = ()
    extra: str | None = None
    build_modules: tuple[str, ...] = ()

    def missing(self, *, to_build: bool = True) -> list[str]:
        """The needed modules that are not installed; imports nothing."""
        needed = (*self.modules, *self.build_modules) if to_build else self.modules
        return [name for name in needed if not _installed(name)]

    def install_hint(self) -> str:
        """The command that installs what the target needs."""
        needed = " ".join((*self.modules, *self.build_modules))
        return f"pip install 'sparsecc[{self.extra}]'" if self.extra else f"pip install {needed}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """One thing in a model that a target cannot run: where it is, why, and what would help."""

    where: str
    reason: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" + (f" ({self.fix})" if self.fix else "")


class Target(abc.ABC):
    """One back end.  A subclass sets ``name`` and ``capabilities`` and writes ``build`` and ``executor``."""

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]

    def accepts(self, view: View) -> list[Refusal]:
        """Everything in ``view`` that this target cannot run; empty when it can run the model."""
        return []

    @abc.abstractmethod
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
        """Lower ``model`` and pack it; ``members`` (plan.json, plan.safetensors) are stored as given.

        ``sizes`` are those of the example inputs by name, for what depends on how large dynamic ones are.
        Raises ``TargetRefused`` where the model turns out not to run on the target.
        """

    def gaining(
        self, lower: Callable[[], tuple[OnnxFile, Mapping[str, Sequence[int]]]], spec: TargetSpec
    ) -> Mapping[str, str] | None:
        """What the pattern of ``spec`` would do for a model: by weight, '' where the target would use it.

        Otherwise why not: such a weight, and one that is not named, need not be pruned.  None, the default:
        the target cannot tell.  ``lower`` makes what ``build`` takes: the model, and sizes of its inputs.
        """
        return None

    @abc.abstractmethod
    def executor(self, artifact: Artifact, *, threads: int | None = None) -> Executor:
        """What runs ``artifact``; needs nothing but the artifact."""

    def listing(self, artifact: Artifact) -> list[dict[str, str]]:
        """What was built for each layer: rows of a table, by column; empty where there is nothing to tell."""
        return []

    def notes(self, artifact: Artifact) -> list[str]:
        """What a user has to know of this artifact, one sentence each."""
        return []


class Executor(abc.ABC):
    """A compiled model: ``executor(x)``, ``executor(input_ids=x)`` or ``executor({"input_ids": x})``."""

    #: output of a product in the lowered model -> the shorter type that the artifact multiplies in
    rounds: Mapping[str, torch.dtype] = MappingProxyType({})
    #: values of the lowered model that products in integers read and give; see ``alone``
    watched: frozenset[str] = frozenset()
    #: what runs here in the place of the target's own device, whose times say nothing; '' where that runs
    stand_in: str = ""

    @abc.abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on torch tensors or numpy arrays; the outputs are of the kind that was given."""

    @abc.abstractmethod
    def run_named(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Outputs by their names in the artifact, for inputs by theirs."""

    def alone(
        self, feeds: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]
    ) -> Iterator[NodeCheck]:
        """Each product in integers by itself, on what it reads in the lowered model.

        ``values`` are the watched ones, of the lowered model in float64 on the inputs ``feeds``.
        """
        return iter(())


@dataclass(frozen=True, slots=True)
class TargetInfo:
    """One row of ``sparsecc.targets()``."""

    name: str
    available: bool
    why_not: str
    patterns: tuple[str, ...]
    dtypes: tuple[str, ...]
    description: str

    def __str__(self) -> str:
        asks = "  ".join(filter(None, [" ".join(self.patterns), " ".join(self.dtypes)]))
        state = "" if self.available else f"  [unavailable: {self.why_not}]"
        return f"{self.name:<10} {self.description}" + (f"  ({asks})" if asks else "") + state


class TargetTable(list[TargetInfo]):
    """The rows of ``sparsecc.targets()``; prints one line a target."""

    def __str__(self) -> str:
        return "\n".join(str(info) for info in self)


_table: dict[str, str | type[Target]] = {}


def register(name: str, target: str | type[Target]) -> None:
    """Add a target by name: a class, or ``"module:Class"``, which is imported when it is asked for."""
    if not _ARCH.fullmatch(name):
        raise InvalidOption(
            f"{name!r} is not a target name: lower-case letters, digits and '_', a letter first"
        )
    if _table.get(name, target) != target:
        raise InvalidOption(f"the target name {name!r} is already taken by {_table[name]}")
    _table[name] = target


def resolve(
    text: str, options: Mapping[str, Any] | None = None, *, to_build: bool = True
) -> tuple[Target, TargetSpec]:
    """The target and the parsed form of a target string; ``options`` are those of the target's class.

    With ``to_build=False`` only what running an artifact takes has to be installed.
    Raises ``InvalidOption`` for a string that the grammar does not allow, ``TargetUnavailable`` for
    an unknown or uninstalled target and for a pattern or dtype that the target does not have.
    """
    spec = TargetSpec.parse(text)
    known = _sources()
    if spec.arch not in known:
        raise TargetUnavailable(
            f"unknown target {spec.arch!r}{_closest(spec.arch, known)}; {_listing(known)}"
        )
    loaded = _load(spec.arch, known[spec.arch])
    if isinstance(loaded, str):
        raise TargetUnavailable(f"target {spec.arch!r} cannot be used: {loaded}; {_listing(known)}")
    capabilities = loaded.capabilities
    if missing := capabilities.missing(to_build=to_build):
        raise TargetUnavailable(
            f"target {spec.arch!r} needs {', '.join(missing)}, not installed here: "
            f"{capabilities.install_hint()}"
        )
    _check_offered(spec, "pattern", spec.pattern, capabilities.patterns)
    _check_offered(spec, "dtype", spec.dtype, capabilities.dtypes)
    return _made(loaded, spec.arch, options or {}), spec


def _made(target: type[Target], name: str, options: Mapping[str, Any]) -> Target:
    known = list(inspect.signature(target).parameters)
    if not isinstance(options, Mapping):
        raise InvalidOption(f"options: give a dict of the target's options by name, not {options!r}")
    if unknown := sorted(options.keys() - known):
        there = f"it has {', '.join(known)}" if known else "it has none"
        raise InvalidOption(
            f"target {name!r} has no option {unknown[0]!r}{_closest(unknown[0], known)}; {there}"
        )
    return target(**options)


def require_accepted(target: Target, spec: TargetSpec, view: View) -> None:
    """Raise one ``TargetRefused`` that lists everything in ``view`` that the target cannot run."""
    if refusals := target.accepts(view):
        raise refused(str(spec), refusals)


def refused(target: str, refusals: Sequence[Refusal]) -> TargetRefused:
    """The error that lists ``refusals``, one a line."""
    lines = "".join(f"\n  {refusal}" for refusal in refusals)
    return TargetRefused(f"target {target!r} cannot run this model:{lines}")


def targets() -> TargetTable:
    """Every known target, by name, with what it offers and whether it can be used here."""
    return TargetTable(_info(name, _load(name, source)) for name, source in sorted(_sources().items()))


def _info(name: str, loaded: type[Target] | str) -> TargetInfo:
    if isinstance(loaded, str):
        return TargetInfo(name, False, loaded, (), (), "")
    offers = loaded.capabilities
    missing = offers.missing()
    why_not = f"needs {', '.join(missing)}: {offers.install_hint()}" if missing else ""
    return TargetInfo(name, not missing, why_not, offers.patterns, offers.dtypes, offers.description)


def _sources() -> dict[str, str | type[Target] | importlib.metadata.EntryPoint]:
    """Where each target comes from; the table wins over plug-ins of the same name."""
    importlib.import_module("sparsecc.targets")  # fills the table
    plugins = {entry.name: entry for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    return {**plugins, **_table}


def _load(name: str, source: str | type[Target] | importlib.metadata.EntryPoint) -> type[Target] | str:
    """The target class, or why it cannot be had: a broken plug-in must not take the others with it."""
    try:
        if isinstance(source, str):
            module, _, attribute = source.partition(":")
            loaded: Any = getattr(importlib.import_module(module), attribute)
        else:
            loaded = source.load() if isinstance(source, importlib.metadata.EntryPoint) else source
    except Exception as error:
        return f"its plug-in does not load: {type(error).__name__}: {error}"
    if not (isinstance(loaded, type) and issubclass(loaded, Target)):
        return f"its plug-in gives {loaded!r}, which is not a Target class"
    if not isinstance(getattr(loaded, "capabilities", None), Capabilities):
        return "its plug-in sets no Capabilities"
    if loaded.__abstractmethods__:
        return f"its plug-in leaves out {', '.join(sorted(loaded.__abstractmethods__))}"
    return loaded


def _check_offered(spec: TargetSpec, what: str, asked: str | None, offered: tuple[str, ...]) -> None:
    if asked is None or asked in offered or (what == "pattern" and ANY_PATTERN in offered):
        return
    there_is = (
        f"it has {', '.join(offered)}" if offered else f"it takes no {what}: ask for {spec.arch!r} alone"
    )
    raise TargetUnavailable(
        f"target {spec.arch!r} has no {what} {asked!r}{_closest(asked, offered)}; {there_is}"
    )


def _closest(word: str, known: Sequence[str] | Mapping[str, object]) -> str:
    match = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def _listing(known: Mapping[str, object]) -> str:
    return f"targets here: {', '.join(sorted(known)) or 'none'} (see `sparsecc targets`)"


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
