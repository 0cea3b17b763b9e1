"""Makes the configuration of a Hugging Face model describe the narrowed model, where it can.

Fields are found by what the graph says about their values: a field that holds 64 may have to hold
what is kept of some axis, or of some factors of one, that had 64 positions.  What is found is tried: the
class is built from the changed configuration without memory for weights, and its parameters must have
the shapes of the narrowed ones.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import itertools
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from sparsecc.axes.analysis import Keeps
from sparsecc.axes.terms import Term, factors
from sparsecc.blocks import dropped
from sparsecc.fx.capture import Program
from sparsecc.fx.module import Diverged, assign
from sparsecc.graph import Value, View
from sparsecc.plan import Plan, SetModule

#: a field of a configuration: names from the root inwards, list places among them
Path = tuple[str | int, ...]
Assignment = dict[Path, int]

TRIES = 32
"""Configurations that classes are built from at most."""

LOADS = 6
"""Configurations whose models are loaded and run at most."""

_WIDTH = re.compile(r"inner|intermediate|ffn|ff_dim|d_ff|hidden|dim|width|heads?$|embd|channels|size")
_FIXED = re.compile(r"^_|_ids?$|^vocab_size$|layers?$|^(architectures|transformers_version)$")


def has_config(module: nn.Module) -> bool:
    """Whether a module is one that its class builds from a configuration and that saves both."""
    config = getattr(module, "config", None)
    return hasattr(config, "to_dict") and all(
        callable(getattr(module, name, None)) for name in ("from_pretrained", "save_pretrained")
    )


def descriptions(
    module: nn.Module, program: Program, view: View, plan: Plan, keeps: Keeps
) -> Iterator[list[SetModule]]:
    """Changes of ``module.config`` with which its class makes parameters of its shapes, the fewest first.

    ``module`` is the narrowed module of ``program``; the changes are attributes of the root module.  Fields
    that no shape depends on (numbers of heads, often) are changed only where fewer changes do not do.
    """
    wanted = {name: tuple(p.shape) for name, p in module.state_dict().items()}

    def fits(assignment: Assignment) -> bool:
        try:
            config = _with(module.config, assignment)
        except Exception:  # the configuration's own code: it computes the field from others, or checks it
            return False
        return _shapes(type(module), config) == wanted

    tried = itertools.islice(_assignments(module, program, view, plan, keeps), TRIES)
    first = next((a for a in tried if fits(a)), None)
    if first is None:
        return
    needed = first
    free: list[Path] = []
    for path in first:
        fewer = {p: v for p, v in needed.items() if p != path}
        if fits(fewer):
            needed, free = fewer, [*free, path]
    subsets = itertools.chain(*(itertools.combinations(free, count) for count in range(len(free) + 1)))
    for extra in itertools.islice(subsets, LOADS):
        yield _actions(module.config, needed | {path: first[path] for path in extra})


@contextlib.contextmanager
def changed(module: nn.Module, changes: Iterable[SetModule]) -> Iterator[None]:
    """The module with changed attributes; they are put back if the block raises.

    Raises Diverged for one that cannot be set: a configuration may compute it from others.
    """
    done: list[tuple[Any, str, Any]] = []
    try:
        for action in changes:
            *outer, leaf = action.name.split(".")
            holder: Any = functools.reduce(getattr, outer, module)
            before = vars(holder).get(leaf, _ABSENT)
            try:
                assign(module, action.name, action.value)
            except Exception as error:  # a property without a setter, or one that checks what it is given
                raise Diverged(action.name, f"cannot be set: {error}") from error
            done.append((holder, leaf, before))
        yield
    except BaseException:
        for holder, leaf, value in reversed(done):
            delattr(holder, leaf) if value is _ABSENT else setattr(holder, leaf, value)
        raise


_ABSENT = object()


def rebuilt(module: nn.Module) -> nn.Module:
    """What ``from_pretrained`` makes of the module's configuration and state dict.

    Raises Diverged where it makes nothing of them.
    """
    try:
        with quiet():
            made: nn.Module = module.from_pretrained(  # type: ignore[operator]
                None, config=copy.deepcopy(module.config), state_dict=dict(module.state_dict())
            )
    except Exception as error:  # the model's own code refuses, in its own way
        raise Diverged("config", f"cannot be loaded: {type(error).__name__}: {error}") from error
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    return made.to(device).train(module.training)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, no warnings, and the state of random numbers as it was."""
    with (
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=[]),
    ):
        warnings.simplefilter("ignore")
        yield


# -- what fields may become ---------------------------------------------------------------------------


def _assignments(
    module: nn.Module, program: Program, view: View, plan: Plan, keeps: Keeps
) -> Iterator[Assignment]:
    """Combinations of what the fields may hold, the likeliest first; then with fields that it lacks."""
    gone = dropped(view, plan.actions).weights
    left = [v for name, v in view.weights.items() if name not in gone]
    pairs = _pairs(left, keeps)
    fields = dict(_fields(module.config))
    if not _uniform(left, keeps) and all(isinstance(path[-1], str) for path in fields):
        return
    named = _told(program, plan)
    choices = {path: _choices(path, value, pairs, named) for path, value in fields.items()}
    yield from _combined(module.config, choices)
    for path, values in _absent(module).items():
        for value in values:
            yield from (a | {path: value} for a in _combined(module.config, choices))


def _combined(config: Any, choices: Mapping[Path, list[int | None]]) -> Iterator[Assignment]:
    open_ = {path: found for path, found in choices.items() if len(found) > 1}
    for values in itertools.islice(itertools.product(*open_.values()), TRIES // 2):
        yield {
            path: value
            for path, value in zip(open_, values, strict=True)
            if value is not None and value != _get(config, path)
        }


def _uniform(weights: Iterable[Value], keeps: Keeps) -> bool:
    """Whether weights of one shape that only numbers in their names tell apart stay of one shape."""
    found: dict[tuple[str, tuple[int, ...]], set[tuple[int, ...]]] = {}
    for value in weights:
        kept = tuple(keeps.count(t) for t in keeps.analysis.solver.axes[value])
        found.setdefault((re.sub(r"\d+", "*", str(value.weight)), value.shape), set()).add(kept)
    return all(len(kept) == 1 for kept in found.values())


def _pairs(weights: Iterable[Value], keeps: Keeps) -> Counter[tuple[int, int]]:
    """(size, kept) of axes of weights, and of runs of factors and pieces of them, and how often."""
    found: Counter[tuple[int, int]] = Counter()
    for value in weights:
        for term in keeps.analysis.solver.axes[value]:
            found.update(set(_sizes(term, keeps)))
    return found


def _sizes(term: Term, keeps: Keeps) -> Iterator[tuple[int, int]]:
    parts = factors(term)
    for first, last in itertools.combinations(range(len(parts) + 1), 2):
        run = parts[first:last]
        yield math.prod(p.size for p in run), math.prod(keeps.count(p) for p in run)
    for part in parts:
        if part.kind == "concat":
            for piece in part.parts:
                yield from _sizes(piece, keeps)


def _told(program: Program, plan: Plan) -> set[tuple[str, int, int]]:
    """(name, old, new) of module attributes that the plan changes."""
    assert program.module is not None
    return {
        (a.name, getattr(program.module.get_submodule(a.module), a.name), a.value)
        for a in plan.of(SetModule)
        if isinstance(a.value, int)
    }


def _choices(
    path: Path, value: int | None, pairs: Counter[tuple[int, int]], named: set[tuple[str, int, int]]
) -> list[int | None]:
    """What a field may hold, the likeliest first; what it holds now among them."""
    if value is None:
        widths = [new for (old, new), _ in pairs.most_common() if new != old]
        return [None, *dict.fromkeys(widths)][:4]
    told = [new for name, old, new in named if name == path[-1] and old == value]
    counted = [new for (old, new), _ in pairs.most_common() if old == value]
    return list(dict.fromkeys((*told, *counted, value)))


def _fields(config: Any, at: Path = ()) -> Iterator[tuple[Path, int | None]]:
    """Integers of a configuration that may be widths, and widths that are left to a default."""
    for name, value in vars(config).items():
        if _FIXED.search(name):
            continue
        path = (*at, name)
        if _is_width(value):
            yield path, value
        elif value is None and _WIDTH.search(name):
            yield path, None
        elif isinstance(value, (list, tuple)) and value and all(map(_is_width, value)):
            yield from (((*path, place), entry) for place, entry in enumerate(value))
        elif hasattr(value, "to_dict"):
            yield from _fields(value, path)


def _is_width(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 1


def _absent(module: nn.Module) -> dict[Path, list[int]]:
    """Widths that modules hold and that the configuration has no field for (``head_dim``, mostly)."""
    known = vars(module.config)
    found: dict[Path, set[int]] = {}
    for part in module.modules():
        for name, value in vars(part).items():
            if name not in known and _is_width(value) and _WIDTH.search(name) and not _FIXED.search(name):
                found.setdefault((name,), set()).add(value)
    uniform = {path: sorted(values) for path, values in found.items() if len(values) == 1}
    return dict(sorted(uniform.items(), key=lambda item: item[0] != ("head_dim",)))


# -- trying them --------------------------------------------------------------------------------------


def _actions(config: Any, assignment: Assignment) -> list[SetModule]:
    """Changes of fields as attributes of the root module; a list is set as a whole."""
    whole: dict[tuple[str, ...], Any] = {}
    for path, value in assignment.items():
        names = tuple(p for p in path if isinstance(p, str))
        if len(names) == len(path):
            whole[names] = value
        else:
            whole.setdefault(names, list(_get(config, names)))[path[-1]] = value
    return [SetModule("", ".".join(("config", *names)), value) for names, value in whole.items()]


def _with(config: Any, assignment: Assignment) -> Any:
    holder = nn.Module()
    holder.config = copy.deepcopy(config)
    for action in _actions(config, assignment):
        assign(holder, action.name, action.value)
    return holder.config


def _get(config: Any, path: Path) -> Any:
    for name in path:
        config = config[name] if isinstance(name, int) else getattr(config, name, None)
    return config


def _shapes(kind: type[nn.Module], config: Any) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the state dict of a class built from a configuration; None where it cannot be."""
    try:
        with torch.device("meta"), quiet():
            made = kind(config)
    except Exception:  # the model's own code refuses, in its own way
        return None
    return {name: tuple(p.shape) for name, p in made.state_dict().items()}
