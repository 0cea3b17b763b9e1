"""Builds the view of a captured PyTorch program."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.fx import Node

from sparsecc.errors import UnsupportedModel
from sparsecc.fx.capture import Program, written
from sparsecc.fx.ops import TABLE, aten_name, bind
from sparsecc.fx.ops_frozen import FROZEN
from sparsecc.fx.real import coded, decoded
from sparsecc.fx.semantics import ProgramSemantics
from sparsecc.fx.sharing import is_list_copy, live
from sparsecc.fx.spec import NODE, Shapes, tensors
from sparsecc.graph import Call, Value, View
from sparsecc.memory import without_collecting


@without_collecting()
def read(program: Program, training: Program | None = None) -> View:
    """The view of a program; nothing of the program is copied or changed.

    ``training`` is what the same model runs in training mode.
    """
    reader = _Reader(program)
    view = reader.view()
    beside = [reader.unneeded(view)] if unread(program) else []
    if training is not None:
        beside.append(_Reader(training, view.weights).view())
    return replace(view, beside=tuple(v for v in beside if v.calls))


def unread(program: Program) -> set[str]:
    """Parameters that no output depends on."""
    return _unread(program) & program.parameters


def _unread(program: Program) -> set[str]:
    needed = live(program.graph)
    read = {
        program.weight_of.get(n.name)
        for n in program.graph.nodes
        if n.op == "placeholder" and any(user in needed or user.op == "output" for user in n.users)
    }
    return program.weights.keys() - read


class _Reader:
    def __init__(self, program: Program, weights: Mapping[str, Value] | None = None) -> None:
        self.program = program
        self.shapes = Shapes(halved=program.doubled)
        self.values: dict[Node, Value] = {}
        self.parts: dict[Node, list[Value]] = {}
        self.calls: list[Call] = []
        self.weights: dict[str, Value] = dict(weights or {})
        self.written = written(program.graph)
        self.coded = coded(program)
        self.owned = {*program.parameters, *self.coded, *_unread(program)}

    def view(self) -> View:
        inputs: list[Value] = []
        outputs: list[Value] = []
        needed = live(self.program.graph)
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                value = self._placeholder(node)
                if value is not None and value.kind == "input":
                    inputs.append(value)
            elif node.op == "call_function" and node in needed:
                self._call(node)
            elif node.op == "output":
                outputs = [self.values[n] for n in node.all_input_nodes if n in self.values]
        return View(
            dialect="torch",
            calls=self.calls,
            inputs=inputs,
            outputs=outputs,
            weights={n: v for n, v in self.weights.items() if v.kind == "weight"},
            weight=self._real,
            tied=self.program.tied,
            parameters=self.program.parameters | self.coded.keys(),
            semantics=ProgramSemantics(self.program, self.values, self._weight),
            names=self._names,
        )

    def unneeded(self, view: View) -> View:
        """What the model runs for nothing: no output depends on it."""
        needed = live(self.program.graph)
        self.calls = []
        for node in self.program.graph.nodes:
            if node.op == "call_function" and node not in needed:
                self._call(node)
        return replace(view, calls=self.calls, inputs=[], outputs=[])

    def _names(self) -> Iterator[str]:
        program, module = self.program, self.program.module
        yield from (*program.weights, *program.tied)
        if module is not None:
            yield from (*dict(module.named_modules()), *module.state_dict())

    def _weight(self, name: str) -> torch.Tensor:
        tensor = self.program.weights[self.program.tied.get(name, name)]
        if tensor.device.type == "meta":
            raise UnsupportedModel(
                f"{name!r} is on the meta device and has no values; planning by structure works, but "
                "saliency, verification and saving need the weights: load them first"
            )
        return tensor.detach()

    def _real(self, name: str) -> torch.Tensor:
        """A weight as real numbers, also where it is stored as integers."""
        decoder = self.coded.get(name)
        return self._weight(name) if decoder is None else decoded(self.program, decoder, self._weight(name))

    def _placeholder(self, node: Node) -> Value | None:
        fake = node.meta.get("val")
        if not isinstance(fake, torch.Tensor):
            return None
        name = self.program.weight_of.get(node.name)
        if name is None:
            value = self._value(node.name, fake, "input")
        elif name in self.weights:
            value = self.weights[name]
        else:
            kind = "weight" if name in self.owned or node in self.written else "const"
            value = self._value(name, fake, kind)
            value.weight = name
            self.weights[name] = value
        self.values[node] = value
        return value

    def _value(self, name: str, fake: torch.Tensor, kind: Any = "node") -> Value:
        shape = tuple(fake.shape)
        dtype = str(fake.dtype)[6:]
        for size in shape:
            if type(size) is not int:
                numbers, example, varies = zip(*map(self.shapes.size, shape), strict=True)
                return Value(name, numbers, dtype, kind, dynamic=varies, example=example)
        return Value(name, shape, dtype, kind)

    def _call(self, node: Node) -> None:
        fake = node.meta.get("val")
        if node.target is operator.getitem and node.args[0] in self.parts:
            found = self.parts[node.args[0]][node.args[1]]  # type: ignore[index]
            self.values[node] = found
            return
        results = list(fake) if isinstance(fake, (tuple, list)) else [fake]
        if not any(isinstance(r, torch.Tensor) for r in results):
            self._size(node)
            self._number(node)
            return
        name = aten_name(node.target)
        if is_list_copy(node) and self._is_stored(node.args[0]):
            self.values[node] = self.values[node.args[0]]  # type: ignore[index]
            return
        entry = TABLE.get(name) if name is not None else None
        operands: Sequence[Node | None]
        attrs: dict[str, Any]
        if entry is None:
            op = f"aten.{name}" if name is not None and "." not in name else name or str(node.target)
            operands, attrs = _every_tensor(node), {}
            if name in FROZEN:
                attrs["why"] = FROZEN[name]
            elif isinstance(node.target, HigherOrderOperator):
                attrs["why"] = "runs graphs of its own (a branch, a loop)"
        else:
            try:
                bound = bind(node)
                bound[NODE] = node
                op, operands, attrs = entry(bound, self.shapes)
            except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, StopIteration):
                op, operands, attrs = f"aten.{name} (unusual arguments)", _every_tensor(node), {}
        outputs = [
            self._value(node.name if len(results) == 1 else f"{node.name}.{i}", r)
            for i, r in enumerate(results)
            if isinstance(r, torch.Tensor)
        ]
        if isinstance(fake, (tuple, list)):
            self.parts[node] = outputs
        else:
            self.values[node] = outputs[0]
        inputs = tuple(None if o is None else self.values.get(o) for o in operands)
        beside = [n for n in node.all_input_nodes if n not in operands and n in self.values]
        if beside and op != "create":
            attrs = {**attrs, "unlisted": tuple(self.values[n] for n in beside)}
        self.calls.append(
            Call(op, node.name, inputs, tuple(outputs), attrs, where(node), node, tuple(operands))
        )

    def _is_stored(self, node: Any) -> bool:
        """Whether a node is a constant that nothing writes into."""
        value = self.values.get(node)
        return value is not None and value.kind == "const" and value.weight is not None

    def _size(self, node: Node) -> None:
        """A size that is read while the model runs and ends up in numbers stays what it was."""
        source = node.args[0] if node.args else None
        if aten_name(node.target) not in ("sym_size", "sym_numel") or source not in self.values:
            return
        value = self.values[source]  # type: ignore[index]
        if value.kind == "node" and _reaches_data(node):
            dims = [node.args[1]] if len(node.args) > 1 else list(range(len(value.shape)))
            attrs = {"dims": dims}
            self.calls.append(Call("measured", node.name, (value,), (), attrs, where(node), node, (source,)))

    def _number(self, node: Node) -> None:
        """A number that is read out of a tensor: what it holds is no longer followed."""
        source = node.args[0] if node.args else None
        if aten_name(node.target) in ("item", "_local_scalar_dense") and source in self.values:
            value = self.values[source]  # type: ignore[index]
            attrs = {"dims": list(range(len(value.shape)))}
            self.calls.append(Call("measured", node.name, (value,), (), attrs, where(node), node, (source,)))


#: arguments that tell how large a result is, not what is in it
_SIZES = frozenset({"size", "shape", "sizes", "split_size", "split_sizes", "output_size", "implicit"})


def _reaches_data(node: Node) -> bool:
    """Whether a number that is computed from sizes is more than the size of something."""
    queue, seen = [node], {node}
    while queue:
        for user in queue.pop().users:
            if user.op != "call_function" or user in seen:
                continue
            seen.add(user)
            if getattr(user.target, "_schema", None) is None or not _makes_tensors(user):
                queue.append(user)
            elif any(
                isinstance(n, Node) and n in seen
                for k, v in bind(user).items()
                if k not in _SIZES
                for n in _leaves(v)
            ):
                return True
    return False


def _makes_tensors(node: Node) -> bool:
    fake = node.meta.get("val")
    return any(isinstance(f, torch.Tensor) for f in (fake if isinstance(fake, (list, tuple)) else [fake]))


def _leaves(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _every_tensor(node: Node) -> list[Node]:
    return tensors({"args": node.all_input_nodes})


_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def where(node: Node) -> str:
    """``model.py:12``: the last line of the model's own code that led to the node."""
    return _last_line(node.meta.get("stack_trace") or "")


@lru_cache(4096)
def _last_line(trace: str) -> str:
    """Of a trace; layers of one class have equal ones."""
    last, end = "", len(trace)
    while (start := trace.rfind('File "', 0, end)) >= 0:
        frame = _FRAME.match(trace, start)
        end = start
        if frame is not None and not frame[1].startswith("<"):
            place = f"{os.path.basename(frame[1])}:{frame[2]}"
            if f"{os.sep}torch{os.sep}" not in frame[1]:
                return place
            last = last or place
    return last
