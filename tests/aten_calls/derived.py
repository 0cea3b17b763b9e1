"""Arguments of a call from the schema of its operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    pass
from tests.aten_calls.site import Site, apart, aten, compared, operand, parts


def _dim(s: Site) -> int:
    dim = s.pick([s.channel, *range(s.x.dim())])
    return int(dim - s.x.dim() if s.pick((False, True)) else dim)


def _dims(s: Site) -> list[int]:
    rest = [d for d in range(1, s.x.dim()) if d != s.channel]
    return list(s.pick([[s.channel], [s.channel, *rest], rest or [s.channel], [s.channel - s.x.dim()]]))


def _constant(value: Any) -> Callable[[Site], Any]:
    return lambda s: value


def _options(*values: Any) -> Callable[[Site], Any]:
    return lambda s: s.pick(values)


def _words(text: str) -> list[str]:
    return text.split()


#: by name, for arguments whose type does not tell what they may be
NAMED: dict[str, Callable[[Site], Any]] = {
    "mask": compared, "condition": compared, "src": lambda s: torch.cos(s.x), "end": operand,
    "p": lambda s: 0.4 if s.dropout else s.pick((2, 1, 3, math.inf)), "lower": _constant(0.1),
    "upper": _constant(0.3), "ord": _options(2, 1, 3, math.inf, 0.5),
    "correction": _options(0, 1, None), "exponent": _options(2, 0.5, 3, 1.5), "decimals": _constant(2),
    "rounding_mode": _options(None, "floor", "trunc"), "approximate": _options("none", "tanh"),
    "unbiased": _options(False, True), "keepdim": _options(True, False), "train": _constant(False),
    "training": _constant(False), "half_to_float": _constant(False), "non_blocking": _constant(False),
    "copy": _options(False, True), "k": _constant(1), "eps": _constant(1e-3), "dim": _dim, "dims": _dims,
    "min": _constant(-0.6), "max": _constant(0.7), "size": lambda s: [int(s.x.shape[0]), *s.sizes()],
    "fill_value": _constant(0.3), "dtype": _constant(torch.float32), "value": _options(0.3, -1.5),
    "index": _options(0, -1), "n": _constant(1),
}  # fmt: skip
TYPED: dict[str, Callable[[Site], Any]] = {
    "Tensor": operand, "number": _options(0.7, 1.5, 2), "float": _constant(0.4), "int": _options(1, 2),
    "bool": _options(False, True), "Device": _constant(torch.device("cpu")),
    "List[int]": _dims,
}  # fmt: skip
#: names that mean one thing as a number and another as a tensor
_TENSOR_NAMED: dict[str, Callable[[Site], Any]] = {
    "mask": compared, "condition": compared, "src": lambda s: torch.cos(s.x), "values": operand,
    "value": lambda s: s.net.weight(1)[0], "prepend": lambda s: torch.cos(s.x),
    "append": lambda s: torch.sin(s.x),
}  # fmt: skip
#: left at their default, which says: as the operand
_LEFT = frozenset(
    _words("dtype layout device pin_memory memory_format generator stable size stride non_blocking")
)

#: operators that are defined, or well conditioned, on a part of the numbers alone; ``special_`` is left out
DOMAINS: dict[str, str] = dict.fromkeys(
    _words(
        """
        acos arccos asin arcsin atanh arctanh erfinv ndtri logit log log10 log1p log2 pow reciprocal rsqrt
        sqrt xlogy div divide true_divide floor_divide fmod remainder tan addcdiv prod cumprod norm
        linalg_vector_norm
        """
    ),
    "unit",
) | {"acosh": "above one", "arccosh": "above one"}
#: operators that jump: what they read must not be where two ways of summing differ (``apart``)
JUMPS = frozenset(
    _words(
        """
        ceil floor round trunc fix frac fmod remainder floor_divide sign sgn signbit frexp heaviside all any
        eq ne ge gt le lt not_equal greater greater_equal less less_equal isclose count_nonzero histc
        argmax argmin topk sort argsort msort kthvalue median nanmedian mode cummax cummin hardshrink
        threshold div divide logical_and logical_not logical_or logical_xor max min
        """
    )
)

VARIANTS: dict[str, Callable[[Site, Tensor], Tensor]] = {
    "plain": lambda s, x: x,
    "unit": lambda s, x: torch.sigmoid(x) * 0.8 + 0.1,
    "above one": lambda s, x: torch.sigmoid(x) + 1.1,
    "bool": lambda s, x: x > s.vector(),
    "int": lambda s, x: (x * 4).to(torch.int64),
}


def overloads(name: str) -> Iterator[Any]:
    """Overloads of an operator that make tensors of a tensor."""
    packet = getattr(aten, name, None)
    for overload in packet.overloads() if packet is not None else ():
        found = getattr(packet, overload)
        schema = found._schema
        types = [str(a.type) for a in schema.arguments]
        returned = [str(r.type) for r in schema.returns]
        if (
            any(a.is_out for a in schema.arguments)
            or "Dimname" in str(schema)
            or "prim" in schema.overload_name
        ):
            continue
        if "Tensor" in types and set(returned) == {"Tensor"} and not set(types) & {"t", "Generator"}:
            yield found


def _argument(s: Site, argument: Any) -> Any:
    kind = str(argument.type)
    kind = kind[9:-1] if kind.startswith("Optional[") else kind
    if kind == "number" and s.variant in ("bool", "int"):
        return s.pick((1, 3))
    if kind == "Tensor":
        found = _TENSOR_NAMED.get(argument.name, operand)(s)
        return found if found.dtype == torch.bool else VARIANTS[s.variant](s, found)
    if kind == "List[int]" and argument.name == "dim":
        return _dims(s)
    maker = NAMED.get(argument.name) or TYPED.get(kind)
    if maker is None:
        raise NotImplementedError(f"an argument {argument.name} of type {kind}")
    return maker(s)


def _called(overload: Any, s: Site, variant: str) -> Any:
    """The operand is the first tensor that is no mask."""
    s.variant = variant
    jumps = _plain(overload) in JUMPS or variant in ("bool", "int")
    x = VARIANTS[variant](s, apart(s) if jumps else s.x)
    s.dropout = "train" in [a.name for a in overload._schema.arguments]
    first, given, named = True, [], {}
    for argument in overload._schema.arguments:
        if str(argument.type) == "Tensor" and first and argument.name not in _TENSOR_NAMED:
            value, first = x, False
        elif argument.has_default_value() and (
            argument.name in _LEFT or (argument.name not in ("min", "max") and s.pick((False, False, True)))
        ):
            continue
        else:
            value = _argument(s, argument)
        if named or argument.kwarg_only or len(given) < overload._schema.arguments.index(argument):
            named[argument.name] = value
        else:
            given.append(value)
    return overload(*given, **named)


def _plain(overload: Any) -> str:
    """The name of an operator, which some have in two namespaces."""
    return str(overload._schema.name).removeprefix("aten::").removeprefix("special_")


def _fits(overload: Any, s: Site, variant: str) -> bool:
    """Whether a call with a variant of the operand runs, and is finite for its negative and double too."""
    try:
        for factor in (1, -1, 2):
            s.net.rewind()
            made = _called(overload, Site(s.net, s.x * factor, s._number), variant)
            if not all(bool(t.isfinite().all()) for t in parts(made)):
                return False
    except (RuntimeError, NotImplementedError, TypeError, IndexError):
        return False
    return True


def derived(overload: Any) -> Callable[[Site], Any]:
    """A step that calls an overload with arguments from its schema.

    Which variant of the operand it takes (some operators want integers) is found when the network is
    laid out, and kept.  Where none does, the operand goes on as it is; a test holds that every entry of the
    table is called somewhere.
    """
    tried = [DOMAINS.get(_plain(overload), "plain"), "unit", "above one", "bool", "int"]

    def step(s: Site) -> Any:
        choices, key = s.net.choices, s.net.place
        for variant in tried if key not in choices else ():
            choices[key] = variant
            if _fits(overload, s, variant):
                break
            del choices[key]
            s.net.rewind()
        s.net.rewind()
        variant = choices.setdefault(key, None)
        return s.x if variant is None else _called(overload, s, variant)

    return step
