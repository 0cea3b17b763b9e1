"""What a pass decided, as plain data: it can be printed, compared, stored and applied anywhere."""

from __future__ import annotations

import hashlib
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from sparsecc.atomic import atomic_write
from sparsecc.errors import InvalidModel, PlanConflict

if TYPE_CHECKING:
    import torch

Indices = npt.NDArray[np.int64]
Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False, slots=True)
class Take:
    """Keep ``indices`` (in this order) of ``axis`` of a weight of ``size`` positions there.

    ``use`` restricts it to one use of a constant that several nodes share: ``(node, operand)``.
    """

    weight: str
    axis: int
    size: int
    indices: Indices
    use: tuple[str, int] | None = None
    arrays: ClassVar[tuple[str, ...]] = ("indices",)


@dataclass(frozen=True, eq=False, slots=True)
class Mask:
    """Zero the positions of a weight where ``keep`` is False; shape of the weight."""

    weight: str
    keep: npt.NDArray[np.bool_]
    arrays: ClassVar[tuple[str, ...]] = ("keep",)


@dataclass(frozen=True, eq=False, slots=True)
class Write:
    """Replace the values of a weight before anything is taken from it; shape of the weight."""

    weight: str
    values: Array
    arrays: ClassVar[tuple[str, ...]] = ("values",)


@dataclass(frozen=True, eq=False, slots=True)
class Renumber:
    """New numbers in a constant that holds positions of an axis which shrinks; shape of the constant.

    It is taken from afterwards.  ``use`` restricts it to one use of a constant that several nodes share:
    ``(node, operand)``.
    """

    weight: str
    values: Indices
    use: tuple[str, int] | None = None
    arrays: ClassVar[tuple[str, ...]] = ("values",)


@dataclass(frozen=True, slots=True)
class SetShape:
    """New sizes where a node spells a shape out; None leaves an entry, -1 infers it."""

    node: str
    sizes: tuple[int | None, ...]
    arrays: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True, slots=True)
class SetAttr:
    """A new value for an attribute of a node (groups, split sizes, slice bounds, a pinned scale)."""

    node: str
    name: str
    value: Any
    arrays: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True, slots=True)
class SetModule:
    """A new value for a Python attribute of a module (``out_channels``, ``config.hidden_size``, ...)."""

    module: str
    name: str
    value: Any
    arrays: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True, slots=True)
class Bypass:
    """Replace the value ``output`` by the value ``source``: the branch between them adds nothing.

    ``weights`` are those that go with the branch.
    """

    block: str
    output: str
    source: str
    weights: tuple[str, ...] = ()
    arrays: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True, eq=False, slots=True)
class Fold:
    """Store the value ``output``, which is computed from parameters alone, as the parameter ``parameter``.

    ``values``: what the model computes in its own dtype (bfloat16 as float32).  ``exact``: what it would
    compute in float64, which checks in float64 need and nothing else.
    """

    output: str
    parameter: str
    values: Array
    exact: Array
    arrays: ClassVar[tuple[str, ...]] = ("values", "exact")


@dataclass(frozen=True, slots=True)
class Replace:
    """Put ``identity`` or ``relu`` in the place of a module, or ``nothing``: then it leaves its list."""

    module: str
    by: Literal["identity", "relu", "nothing"]
    arrays: ClassVar[tuple[str, ...]] = ()


Action = Take | Mask | Write | Renumber | SetShape | SetAttr | SetModule | Bypass | Fold | Replace
_ACTIONS: dict[str, type[Any]] = {
    t.__name__: t for t in (Take, Mask, Write, Renumber, SetShape, SetAttr, SetModule, Bypass, Fold, Replace)
}


@dataclass(frozen=True, eq=False, slots=True)
class Decision:
    """What a pass kept of a group, and who decided: kept index -> original index, in the new order."""

    group: str
    size: int
    kept: Indices
    by: str


@dataclass(frozen=True, slots=True)
class Skip:
    """Something a pass left alone, and why."""

    where: str
    reason: str


@dataclass(frozen=True, slots=True)
class Pattern:
    """What a pattern of zeros made of a weight, whose product sums along ``axis``.

    ``pattern``: N:M, or what the zeros are (``unstructured``, ``4x4 blocks``, ``kernels``).  ``state``:
    ``pruned`` by this plan, ``there`` before it, or ``dense``: left without it (``Plan.skips`` says why).
    ``kept`` and ``total`` are sums of |w| over what the pattern leaves and over everything that no earlier
    pass removes; 0 for dense weights.  Of the ``size`` elements of the latter ``zeros`` are zero then; size 0
    where that was not counted (dense weights, plans of older versions).
    """

    weight: str
    axis: int
    pattern: str
    state: Literal["pruned", "there", "dense"]
    kept: float = 0.0
    total: float = 0.0
    zeros: int = 0
    size: int = 0


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that passes decided for one model.

    ``mode`` says what the result must equal: ``prune`` the masked original, ``slim`` the original
    itself.  ``shapes`` holds the original shape of every weight that an action names.  ``form`` says
    whether a PyTorch user got the class back, or a graph module because the class could not express it.
    """

    dialect: Literal["torch", "onnx"]
    mode: Literal["prune", "slim"] = "prune"
    actions: tuple[Action, ...] = ()
    decisions: tuple[Decision, ...] = ()
    skips: tuple[Skip, ...] = ()
    patterns: tuple[Pattern, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    recipe: str = ""
    form: Literal["", "class", "graph"] = ""

    def of(self, kind: type[Any]) -> Iterator[Any]:
        """Actions of one kind, in order."""
        return iter(self._by_kind.get(kind, ()))

    @cached_property
    def _by_kind(self) -> dict[type[Any], list[Action]]:
        found: dict[type[Any], list[Action]] = {}
        for action in self.actions:
            found.setdefault(type(action), []).append(action)
        return found

    def __bool__(self) -> bool:
        """Whether the plan changes anything."""
        return bool(self.actions)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.fingerprint() == other.fingerprint()

    def __hash__(self) -> int:
        return hash(self.fingerprint())

    def __str__(self) -> str:
        from sparsecc.report import plan_text

        return plan_text(self)

    def with_actions(self, extra: Sequence[Action]) -> Plan:
        """The plan with more actions at its end."""
        return replace(self, actions=(*self.actions, *extra))

    # -- storage ----------------------------------------------------------------------------

    def to_parts(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """The plan as a JSON value and the arrays that it names."""
        arrays: dict[str, Array] = {}

        def put(array: Array) -> str:
            key = f"a{len(arrays):06d}"
            arrays[key] = np.asarray(array, order="C")  # ascontiguousarray makes vectors of numbers
            return key

        actions = [_stored(action, put) for action in self.actions]
        decisions = [{**_plain(d), "kept": put(d.kept)} for d in self.decisions]
        document = {
            "format": 1,
            "dialect": self.dialect,
            "mode": self.mode,
            "recipe": self.recipe,
            "form": self.form,
            "actions": actions,
            "decisions": decisions,
            "skips": [asdict(s) for s in self.skips],
            "patterns": [asdict(p) for p in self.patterns],
            "shapes": {k: list(v) for k, v in self.shapes.items()},
        }
        return document, arrays

    @classmethod
    def from_parts(cls, document: Mapping[str, Any], arrays: Mapping[str, Array]) -> Plan:
        """Inverse of ``to_parts``; raises InvalidModel where the document is malformed."""
        try:
            if document["format"] != 1:
                raise InvalidModel(f"plan format {document['format']!r} is not known; this version reads 1")
            actions = tuple(_action(entry, arrays) for entry in document["actions"])
            decisions = tuple(
                Decision(d["group"], d["size"], np.asarray(arrays[d["kept"]], np.int64), d["by"])
                for d in document["decisions"]
            )
            return cls(
                dialect=_one_of(document["dialect"], "torch", "onnx"),
                mode=_one_of(document["mode"], "prune", "slim"),
                actions=actions,
                decisions=decisions,
                skips=tuple(Skip(**s) for s in document["skips"]),
                patterns=tuple(_pattern(p) for p in document.get("patterns", ())),
                shapes={k: tuple(v) for k, v in document["shapes"].items()},
                recipe=document["recipe"],
                form=document["form"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidModel(f"this is no sparsecc plan, or it is damaged: {error}") from error

    def fingerprint(self) -> str:
        """SHA-256 of the plan's contents."""
        document, arrays = self.to_parts()
        digest = hashlib.sha256(json.dumps(document, sort_keys=True, default=str).encode())
        for key in sorted(arrays):
            digest.update(f"{key}{arrays[key].dtype}{arrays[key].shape}".encode())
            digest.update(arrays[key].tobytes())
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as one stored zip of ``plan.json`` and ``plan.safetensors``, atomically."""
        with atomic_write(path) as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            for name, data in self.members().items():
                archive.writestr(zipfile.ZipInfo(name), data)

    def members(self) -> dict[str, bytes]:
        """The plan's files by name, as an artifact stores them."""
        from safetensors.numpy import save

        document, arrays = self.to_parts()
        text = json.dumps(document, indent=1, sort_keys=True)
        return {"plan.json": text.encode(), "plan.safetensors": save(arrays)}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan; raises InvalidModel with the file's name where it is none."""
        try:
            with zipfile.ZipFile(path) as archive:
                return cls.from_members({n: archive.read(n) for n in ("plan.json", "plan.safetensors")})
        except FileNotFoundError:
            raise InvalidModel(f"{os.fspath(path)}: no such file") from None
        except (zipfile.BadZipFile, KeyError, OSError) as error:
            raise InvalidModel(f"{os.fspath(path)}: not a sparsecc plan ({error})") from error

    @classmethod
    def from_members(cls, members: Mapping[str, bytes]) -> Plan:
        """Inverse of ``members``."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            return cls.from_parts(json.loads(members["plan.json"]), load(members["plan.safetensors"]))
        except (SafetensorError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise InvalidModel(f"this is no sparsecc plan, or it is damaged: {error}") from error

    # -- application ------------------------------------------------------------------------

    def apply(self, model: Any, example_inputs: Any = None) -> Any:
        """A new model of the kind that was given, edited by this plan; the input is left as it was.

        ``model`` is a fresh copy of the planned PyTorch module, a state dict, or an ONNX model.
        Raises PlanConflict where weights differ in shape from those that were planned for.
        """
        from sparsecc.apply import apply_plan

        return apply_plan(self, model, example_inputs)

    def apply_state_dict(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A new state dict with the planned weights taken, masked and written."""
        from sparsecc.fx.weights import edited_weights

        return edited_weights(self, state)

    def check_shapes(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raise PlanConflict where a model's weights are not those that were planned for."""
        wrong = []
        for name, expected in self.shapes.items():
            if name not in shapes:
                wrong.append(f"{name}: missing")
            elif tuple(shapes[name]) != tuple(expected):
                wrong.append(f"{name}: has shape {tuple(shapes[name])}, planned for {tuple(expected)}")
        if wrong:
            listed = "\n  ".join(wrong[:20])
            raise PlanConflict(
                f"the plan was made for another model; {len(wrong)} weights differ:\n  {listed}\n"
                "apply it to a fresh copy of the model that it was planned for"
            )


def _plain(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in fields(value)}


def _stored(action: Action, put: Callable[[Array], str]) -> dict[str, Any]:
    """An action as a JSON value, its arrays put away; masks take one bit an element."""
    entry: dict[str, Any] = {"kind": type(action).__name__, **_plain(action)}
    if isinstance(action, Mask):
        return {**entry, "shape": list(action.keep.shape), "keep": put(np.packbits(action.keep))}
    return {name: put(value) if name in action.arrays else value for name, value in entry.items()}


_TUPLES: dict[type[Any], str] = {Bypass: "weights", SetModule: "value"}


def _action(entry: Mapping[str, Any], arrays: Mapping[str, Array]) -> Action:
    kind = _ACTIONS[entry["kind"]]
    values = {k: v for k, v in entry.items() if k != "kind"}
    for name in kind.arrays:
        values[name] = arrays[values[name]]
    if kind is Mask:
        values["keep"] = _unpacked(values["keep"], values.pop("shape"))
    for name in ("use", "sizes", _TUPLES.get(kind, "")):
        if isinstance(values.get(name), list):
            values[name] = tuple(values[name])
    action: Action = kind(**values)
    if isinstance(action, Take):
        _check_take(action)
    return action


def _unpacked(packed: Array, shape: Sequence[int]) -> npt.NDArray[np.bool_]:
    """A mask of that shape from its bits."""
    whole = all(type(n) is int and n >= 0 for n in shape)
    if not whole or packed.dtype != np.uint8 or packed.shape != (-(-math.prod(shape) // 8),):
        raise ValueError(f"a mask of shape {shape!r} in an array of shape {packed.shape}")
    return np.unpackbits(packed, count=math.prod(shape)).astype(bool).reshape(shape)


def _pattern(entry: Mapping[str, Any]) -> Pattern:
    _one_of(entry["state"], "pruned", "there", "dense")
    return Pattern(**entry)


def _check_take(take: Take) -> None:
    whole = all(type(n) is int and n >= 0 for n in (take.axis, take.size))
    if not whole or take.indices.ndim != 1 or take.indices.dtype.kind != "i":
        raise ValueError(f"Take of {take.weight!r} has an axis, a size or indices that are none")
    if take.indices.size and not (take.indices.min() >= 0 and take.indices.max() < take.size):
        raise ValueError(f"Take of {take.weight!r} has indices outside of its {take.size} positions")


def _one_of(value: Any, *known: Any) -> Any:
    if value not in known:
        raise ValueError(f"{value!r} is none of {', '.join(known)}")
    return value
