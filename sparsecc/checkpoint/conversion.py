"""Weights that transformers keeps on disk under other names, or in pieces: experts one by one, old spellings.

Its own conversions are what says how (``transformers.conversion_mapping``, from version 5 on); they are run
weight by weight here, and backwards for what is written.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsecc.checkpoint.shards import DTYPES, Entry, Shards, read
from sparsecc.checkpoint.writer import ShardWriter, check_known
from sparsecc.errors import InvalidModel

#: steps that move elements whatever the widths are; others read head counts that pruning changes
_STEPS = frozenset({"Chunk", "Concatenate", "MergeModulelist", "SplitModulelist", "Transpose"})


def opened(source: str | os.PathLike[str], model: nn.Module) -> Shards:
    """The tensors of a checkpoint by the names that ``model`` has for them."""
    plain = Shards(source)
    state = model.state_dict()
    if all(key in state for key in plain) or not hasattr(model, "base_model_prefix"):
        return plain
    try:
        from transformers import conversion_mapping, core_model_loading
    except ImportError:
        return plain
    check_known(plain.entries)
    transforms = copy.deepcopy(conversion_mapping.get_model_conversion_mapping(model))
    found = Converted(source, model, transforms, core_model_loading)
    return found if found.changed else plain


@dataclass
class _Group:
    """Weights of the model that are stored together: as ``pieces``, each with the pattern that it has."""

    converter: Any
    pieces: list[tuple[str | None, str]] = field(default_factory=list)
    names: tuple[str, ...] = ()


class Converted(Shards):
    """A checkpoint whose tensors are put together as the model has them, one weight when it is asked for.

    Raises InvalidModel where a conversion depends on more than shapes, or the pieces do not fit.
    """

    def __init__(
        self, source: str | os.PathLike[str], model: nn.Module, transforms: Sequence[Any], loading: Any
    ) -> None:
        super().__init__(source)
        self.stored = self.entries
        self.model: Any = model
        self._loading = loading
        self._state = frozenset(model.state_dict())
        self._groups = self._grouped(transforms)
        self._first: dict[str, str] = {}
        self.entries = {}
        for first, group in self._groups.items():
            blank = [_blank(self.stored[key]) for _, key in group.pieces]
            made = self._converted(first, group, blank)
            group.names = tuple(made)
            at = self.stored[group.pieces[0][1]]
            for name, value in made.items():
                self.entries[name] = Entry(at.file, at.dtype, tuple(value.shape), at.metadata)
                self._first[name] = first

    @property
    def changed(self) -> bool:
        """Whether anything has another name, or is stored in pieces."""
        return self.entries.keys() != self.stored.keys()

    @property
    def groups(self) -> Iterator[tuple[str, ...]]:
        """Names of the weights that have to be written together."""
        return (group.names for group in self._groups.values())

    def reverted(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors that are stored for weights of the model."""
        known = {n: t for n, t in values.items() if n in self._state}
        others = {n: t for n, t in values.items() if n not in self._state}
        return {**self._loading.revert_weight_conversion(self.model, known), **others}

    def _grouped(self, transforms: Sequence[Any]) -> dict[str, _Group]:
        renamings = [t for t in transforms if isinstance(t, self._loading.WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, self._loading.WeightConverter)]
        state = dict.fromkeys(self._state, True)
        prefix = self.model.base_model_prefix
        of = {pattern: c for c in converters for pattern in c.source_patterns}
        groups: dict[str, _Group] = {}
        for key in sorted(self.stored, key=self._loading.dot_natural_key):
            name, pattern = self._loading.rename_source_key(key, renamings, converters, prefix, state)
            if name not in state:
                name, pattern = self._loading.rename_source_key(key, [], [], prefix, state)
            if name not in state:
                name, pattern = key, None
            group = groups.setdefault(name, _Group(of.get(pattern)))
            if group.pieces and group.converter is None:
                raise InvalidModel(f"{self.path}: {group.pieces[0][1]} and {key} both stand for {name}")
            group.pieces.append((pattern, key))
        return groups

    def _converted(
        self, first: str, group: _Group, tensors: Sequence[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        if group.converter is None:
            return {first: tensors[0]}
        odd = {type(step).__name__ for step in group.converter.operations} - _STEPS
        if odd:
            raise InvalidModel(
                f"{self.path}: {group.pieces[0][1]} is stored in a layout ({', '.join(sorted(odd))}) that "
                "depends on the number of heads; prune the model in memory"
            )
        converter = copy.deepcopy(group.converter)
        for (pattern, key), tensor in zip(group.pieces, tensors, strict=True):
            converter.add_tensor(first, key, pattern, tensor)
        try:
            made = converter.convert(first, model=self.model, config=self.model.config)
        except (RuntimeError, ValueError, LookupError) as error:
            raise InvalidModel(f"{self.path}: the pieces of {first} do not fit together ({error})") from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _tensor(self, name: str) -> torch.Tensor:
        first = self._first[name]
        group = self._groups[first]
        return self._converted(first, group, [read(self.stored[key]) for _, key in group.pieces])[name]


def writer(
    source: Shards, folder: Path, shapes: Mapping[str, tuple[int, ...]], names: Mapping[str, str]
) -> ShardWriter:
    """What writes weights of ``source`` with other shapes, under the names that they have then."""
    if isinstance(source, Converted):
        return ConvertedWriter(folder, source, shapes, names)
    return ShardWriter(folder, source.entries, shapes, names)


class ConvertedWriter(ShardWriter):
    """Writes weights of the model as transformers stores them."""

    def __init__(
        self,
        folder: Path,
        source: Converted,
        shapes: Mapping[str, tuple[int, ...]],
        names: Mapping[str, str],
    ) -> None:
        self._source = source
        self._new = dict(names)
        self._together: dict[str, tuple[str, ...]] = {}
        self._held: dict[str, torch.Tensor] = {}
        entries: dict[str, Entry] = {}
        for group in source.groups:
            kept = tuple(n for n in group if n in names)
            if not kept:
                continue
            self._together.update(dict.fromkeys(kept, kept))
            like = source.entries[kept[0]]
            blank = {names[n]: _blank(source.entries[n], shapes.get(n)) for n in kept}
            for key, value in source.reverted(blank).items():
                entries[key] = Entry(like.file, like.dtype, tuple(value.shape), like.metadata)
        super().__init__(folder, entries, {})
        self.left = set(names)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write one weight, once all that are stored together with it are there."""
        self._held[name] = tensor
        self.left.discard(name)
        together = self._together[name]
        if not self._held.keys() >= set(together):
            return
        values = {self._new[n]: self._held.pop(n) for n in together}
        for key, value in self._source.reverted(values).items():
            self._store(key, value)


def _blank(entry: Entry, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    return torch.empty(entry.shape if shape is None else shape, dtype=DTYPES[entry.dtype], device="meta")
