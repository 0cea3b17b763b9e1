"""Optimisation profiles: smallest, usual and largest size of each dynamic dimension, tried abstractly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sparsecc.errors import InvalidOption
from sparsecc.onnxfile.model import OnnxFile
from sparsecc.onnxfile.shapes import DimKey, dim_key, infer
from sparsecc.targets.tensorrt.build_engine import Range, overridden

#: sizes worth trying, by what the dimension seems to be; the first that the model runs with is taken
_BATCH = ((1, 8, 32), (1, 4, 8))
_LENGTH = ((1, 128, 512), (8, 128, 512), (1, 64, 256), (1, 32, 128), (1, 16, 32))
_PIXELS = ((224, 224, 512), (96, 224, 512), (64, 224, 640))


@dataclass(frozen=True, slots=True)
class Profiles:
    """``ranges`` by input; ``places`` says where each dynamic size occurs, by its name."""

    ranges: Mapping[str, Range]
    places: Mapping[str, list[tuple[str, int]]]


def profiles(file: OnnxFile, asked: str = "") -> Profiles:
    """Profiles for every input with dynamic sizes; ``asked``: ``batch=1:8:64, seq=1:128:512``.

    A dimension without a name is called by input and axis (``x.0``).  Sizes that were not asked for are such
    that all operators fit, as far as abstract execution can tell.  Raises ``InvalidOption`` for names that
    the model lacks and sizes that do not ascend.
    """
    places = _places(file)
    names = {text: where for text, (_, where) in places.items()}
    given = [part.strip() for part in asked.split(",") if part.strip()]
    chosen = _sizes(file, places) if names else {}
    ranges = {
        name: (_shape(file, name, chosen, 0), _shape(file, name, chosen, 1), _shape(file, name, chosen, 2))
        for name in dict.fromkeys(name for where in names.values() for name, _ in where)
    }
    try:
        return Profiles(overridden(ranges, names, given), names)
    except ValueError as error:
        raise InvalidOption(f"profile: {error}") from error


def _dims(file: OnnxFile) -> Iterator[tuple[str, int, DimKey]]:
    for value in file.inputs:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_value <= 0:
                yield value.name, axis, dim_key(value.name, axis, dim.dim_param)


def _places(file: OnnxFile) -> dict[str, tuple[DimKey, list[tuple[str, int]]]]:
    """Dynamic sizes by name, with their keys and all the places where they occur."""
    found: dict[str, tuple[DimKey, list[tuple[str, int]]]] = {}
    for name, axis, key in _dims(file):
        text = key if isinstance(key, str) else f"{name}.{axis}"
        found.setdefault(text, (key, []))[1].append((name, axis))
    return found


def _sizes(
    file: OnnxFile, places: Mapping[str, tuple[DimKey, list[tuple[str, int]]]]
) -> dict[DimKey, tuple[int, ...]]:
    """Three sizes for every dimension, starting from ones that fit."""
    start = infer(file)
    chosen = {key: (size, size, size) for key, size in start.dims.items()}
    for key, where in places.values():
        for candidate in _candidates(file, *where[0]):
            trial = {**chosen, key: candidate}
            if start.failed or _fit(file, trial):
                chosen = trial
                break
    return {key: tuple(sizes) for key, sizes in chosen.items()}


def _candidates(file: OnnxFile, name: str, axis: int) -> tuple[tuple[int, int, int], ...]:
    value = next(value for value in file.inputs if value.name == name)
    if axis == 0:
        return _BATCH
    return _PIXELS if len(value.type.tensor_type.shape.dim) >= 4 and axis >= 2 else _LENGTH


def _fit(file: OnnxFile, chosen: Mapping[DimKey, tuple[int, int, int]]) -> bool:
    """Whether every operator fits all three sizes of every dimension."""
    trials = ({key: sizes[place] for key, sizes in chosen.items()} for place in (2, 0, 1))
    return not any(infer(file, trial).failed for trial in trials)


def _shape(
    file: OnnxFile, name: str, chosen: Mapping[DimKey, tuple[int, ...]], place: int
) -> tuple[int, ...]:
    value = next(value for value in file.inputs if value.name == name)
    return tuple(
        dim.dim_value if dim.dim_value > 0 else chosen[dim_key(name, axis, dim.dim_param)][place]
        for axis, dim in enumerate(value.type.tensor_type.shape.dim)
    )
