"""From a PyTorch model to a program: one flat ATen graph with its weights beside it."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import os
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from sparsecc.errors import InvalidOption, UnsupportedModel
from sparsecc.fx.portable import make_portable
from sparsecc.fx.sharing import written as changed
from sparsecc.fx.stored import check_stored


@dataclass
class Program:
    """An exported graph: weights are placeholders, named in ``weight_of`` by node name.

    ``weights`` holds every parameter, buffer and lifted constant by name (canonical name for tied
    ones), without copies.  ``automatic``: the dynamic shapes are the default, a dynamic batch.  ``doubled``:
    the example was a batch of one, which is twice in ``args`` and ``kwargs``.
    ``notes`` tells the user what capture did to the model.
    """

    graph: torch.fx.Graph
    owner: torch.nn.Module
    weight_of: dict[str, str]
    weights: dict[str, torch.Tensor]
    parameters: frozenset[str]
    tied: dict[str, str]
    inputs: list[str]
    outputs: list[tuple[str, str]]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    exported: ExportedProgram
    module: torch.nn.Module | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None
    automatic: bool = False
    doubled: bool = False
    notes: list[str] = field(default_factory=list)

    def flat_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """Leaves of a call in placeholder order; raises InvalidOption where the structure differs."""
        ordered = _reorder_kwargs(dict(kwargs), self.in_spec)
        leaves, spec = pytree.tree_flatten((tuple(args), ordered))
        if spec != self.in_spec:
            raise InvalidOption(
                f"the inputs have structure {spec}, but the model was captured with {self.in_spec}; "
                "call it with inputs of the same structure as example_inputs"
            )
        return leaves


def _reorder_kwargs(kwargs: dict[str, Any], spec: pytree.TreeSpec) -> dict[str, Any]:
    names = spec.children()[1].context if spec.num_children == 2 else None
    if names and set(names) == set(kwargs):
        return {name: kwargs[name] for name in names}
    return kwargs


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as (args, kwargs): a tuple or list is positional, a mapping is by keyword."""
    if example_inputs is None:
        return (), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    raise InvalidOption(
        f"example_inputs is a {type(example_inputs).__name__}; give a tuple of positional inputs "
        "or a dict of keyword inputs"
    )


def unwrap(model: torch.nn.Module) -> tuple[torch.nn.Module, list[str]]:
    """The module inside torch.compile, DistributedDataParallel or DataParallel."""
    notes: list[str] = []
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = getattr(model, "module", None)
        if not isinstance(inner, torch.nn.Module):
            return model, notes
        notes.append(f"unwrapped {type(model).__name__}")
        model = inner


def capture(
    model: torch.nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    static: str = "",
) -> Program:
    """Capture a PyTorch model as a ``Program``; the model is left as it was.

    ``static``: why the default, a dynamic batch, is not tried.

    Raises ``InvalidOption`` where example inputs are missing or do not fit, ``UnsupportedModel``
    where torch.export cannot trace the model (its own message is attached).
    """
    if isinstance(model, ExportedProgram):
        check_stored((n, t) for n, t in model.state_dict.items() if isinstance(t, torch.Tensor))
        return _program(model, None, [])
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModel("TorchScript modules hold no Python to export; give the original nn.Module")
    if not isinstance(model, torch.nn.Module):
        raise UnsupportedModel(f"cannot capture a {type(model).__name__}; give a torch.nn.Module")
    inner, notes = unwrap(model)
    check_stored((*inner.named_parameters(), *inner.named_buffers()))
    if example_inputs is None:
        raise InvalidOption(
            f"capturing a {type(inner).__name__} needs example_inputs: a tuple of positional inputs "
            "or a dict of keyword inputs"
        )
    args, kwargs = split_inputs(example_inputs)
    given = pytree.tree_leaves((args, kwargs))
    with evaluating(inner, notes):
        try:
            exported, args, kwargs, shapes = _export(inner, args, kwargs, dynamic_shapes, notes, static)
        except UnsupportedModel:
            _check_runs(inner, args, kwargs)
            raise
    program = _program(exported, inner, notes)
    program.args, program.kwargs, program.dynamic_shapes = args, kwargs, shapes
    program.automatic = dynamic_shapes is None and shapes is not None
    program.doubled = program.automatic and _batch_size(given) == 1
    return program


def recapture(module: torch.nn.Module, like: Program, *, training: bool = False) -> Program:
    """Capture another instance of a captured model with the same inputs and dynamic shapes.

    ``training``: what it runs in training mode.
    """
    notes: list[str] = []
    with _in_mode(module, training, notes):
        shapes = _auto_batch(module, like.args, like.kwargs) if like.automatic else like.dynamic_shapes
        exported = _quiet_export(module, like.args, like.kwargs, shapes)
    program = _program(exported, module, notes)
    program.args, program.kwargs, program.dynamic_shapes = like.args, like.kwargs, like.dynamic_shapes
    program.automatic, program.doubled = like.automatic, like.doubled
    return program


@contextlib.contextmanager
def evaluating(module: torch.nn.Module, notes: list[str] | None = None) -> Iterator[None]:
    """Evaluation mode and no KV cache for the time of the block; everything is put back.

    What was switched is written to ``notes``.
    """
    notes = [] if notes is None else notes
    if module.training:
        notes.append("captured in evaluation mode (the model was in train mode)")
    with _in_mode(module, False, notes):
        yield


@contextlib.contextmanager
def _in_mode(module: torch.nn.Module, training: bool, notes: list[str]) -> Iterator[None]:
    flags = [(m, m.training) for m in module.modules()]
    config = getattr(module, "config", None)
    cached = getattr(config, "use_cache", None)
    try:
        for m, _ in flags:
            _switch(m, training)
        if cached:
            config.use_cache = False  # type: ignore[union-attr]
            notes.append("captured with config.use_cache=False")
        yield
    finally:
        for m, flag in flags:
            _switch(m, flag)
        if cached:
            config.use_cache = cached  # type: ignore[union-attr]


def _switch(module: torch.nn.Module, training: bool) -> None:
    """Set one module's mode without asking its children (a graph module has to write it into its code)."""
    if getattr(module, "switches_modes", False):
        module.train(training)
    else:
        module.training = training


def _export(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    shapes: Any,
    notes: list[str],
    static: str,
) -> tuple[ExportedProgram, tuple[Any, ...], dict[str, Any], Any]:
    if shapes is not None:
        return _quiet_export(module, args, kwargs, shapes), args, kwargs, shapes
    error: UnsupportedModel | None = None
    for wide_args, wide_kwargs in () if static else _batched(args, kwargs):
        auto = _auto_batch(module, wide_args, wide_kwargs)
        if auto is None:
            continue
        try:
            exported = _quiet_export(module, wide_args, wide_kwargs, auto)
        except UnsupportedModel as caught:
            error = caught
            continue
        if _varies(exported):
            return exported, wide_args, wide_kwargs, auto
        static = "its code depends on the size of the batch"
    try:
        exported = _quiet_export(module, args, kwargs, None)
    except UnsupportedModel as caught:
        raise caught from error
    why = static or "it could not be exported with a dynamic batch"
    notes.append(f"captured with the example's static sizes ({why})")
    return exported, args, kwargs, None


def _varies(exported: ExportedProgram) -> bool:
    """Whether a size of an input varies; torch writes some as symbols that have one value."""
    inputs = (n.meta.get("val") for n in exported.graph.nodes if n.op == "placeholder")
    sizes = (size for value in inputs if isinstance(value, torch.Tensor) for size in value.shape)
    return any(isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None for size in sizes)


def _check_runs(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise InvalidOption where it is the example inputs that do not fit, and not the export that fails."""
    try:
        with torch.no_grad():
            module(*args, **kwargs)
    except Exception as error:  # whatever the model's own code raises
        first = str(error).strip().split("\n")[0]
        raise InvalidOption(
            f"{type(module).__name__} itself fails on example_inputs: {type(error).__name__}: {first}; "
            "check their number, names, shapes and dtypes against its forward()"
        ) from error


def _batch_size(leaves: list[Any]) -> int | None:
    sizes = {leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()}
    return sizes.pop() if len(sizes) == 1 else None


def _batched(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The example, with a batch of one doubled (a batch of one would be taken for a constant)."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    size = _batch_size(leaves)
    if size == 1:
        doubled = [
            torch.cat([leaf, leaf]) if isinstance(leaf, torch.Tensor) and leaf.dim() else leaf
            for leaf in leaves
        ]
        yield pytree.tree_unflatten(doubled, spec)
    elif size is not None:
        yield args, kwargs


def _auto_batch(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def spec(leaf: Any) -> Any:
        return {0: Dim.AUTO} if isinstance(leaf, torch.Tensor) and leaf.dim() else None

    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return None
    return {name: pytree.tree_map(spec, value) for name, value in bound.arguments.items()}


def _packed(module: torch.nn.Module) -> str:
    """The first quantised module of ``torch.ao.nn`` that a module has, or ''."""
    for name, inner in module.named_modules():
        home = type(inner).__module__
        if home.startswith("torch.ao.nn.") and "quantized" in home and ".qat" not in home:
            return f"{name!r} ({type(inner).__name__})" if name else type(inner).__name__
    return ""


def _quiet_export(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any
) -> ExportedProgram:
    try:
        with warnings.catch_warnings(), _silent(), torch.no_grad(), _masks_as_given():
            warnings.simplefilter("ignore")
            return torch.export.export(module, args, kwargs or None, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises whatever the model's own code raises
        if packed := _packed(module):
            raise UnsupportedModel(
                f"{packed} holds packed weights of eager-mode quantisation, which torch.export does not "
                "take; prune the float module and quantise the result (sparsecc.quantize)"
            ) from error
        first = str(error).strip().split("\n")[0]
        raise UnsupportedModel(
            f"torch.export cannot trace {type(module).__name__}{_raised_at(error)}: "
            f"{type(error).__name__}: {first}; check that example_inputs fit its forward(), and see "
            "torch.export's documentation"
        ) from error


@contextlib.contextmanager
def _masks_as_given() -> Iterator[None]:
    """nn.Transformer asks whether a mask is the causal one, which no graph can; it serves as it is."""
    home: Any = torch.nn.modules.transformer
    look = getattr(home, "_detect_is_causal_mask", None)
    if look is None:
        yield
        return
    home._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        home._detect_is_causal_mask = look


_TALKATIVE = ("_subclasses.fake_tensor", "export", "_export", "fx.experimental.symbolic_shapes")


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """An export that fails is told by its exception; what the tracer logs and prints says it twice.

    It prints the whole graph as far as it came.
    """
    loggers = [logging.getLogger(f"torch.{name}") for name in _TALKATIVE]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _raised_at(error: BaseException) -> str:
    """`` at model.py:12``: the last line outside of torch and this package that an error came from."""
    own = os.path.dirname(os.path.dirname(__file__)) + os.sep
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        foreign = f"{os.sep}torch{os.sep}" in file or f"{os.sep}contextlib.py" in file or file.startswith(own)
        if os.path.isfile(file) and not foreign:
            place = f" at {os.path.basename(file)}:{line}"
    return place


def _program(exported: ExportedProgram, module: torch.nn.Module | None, notes: list[str]) -> Program:
    _refuse_vmap(exported.graph)
    exported = _with_casts(exported)
    signature = exported.graph_signature
    owner = torch.fx.GraphModule(exported.graph_module, inlined(exported.graph_module))
    make_portable(owner.graph)
    named = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    tensors: dict[str, torch.Tensor] = {**exported.constants, **exported.state_dict}
    if module is not None:
        tensors.update(module.state_dict(keep_vars=True))
        tensors.update(dict(module.named_buffers(remove_duplicate=False)))
    tied = find_ties({name: tensors[name] for name in named.values()})
    copied = dict(
        zip(
            (n.name for n in exported.graph.nodes if n.op == "placeholder"),
            (n.name for n in owner.graph.nodes if n.op == "placeholder"),
            strict=True,
        )
    )
    source = next((n.name for n in exported.graph.nodes if _data_decide(n.meta.get("val"))), None)
    if source is not None:
        notes.append(
            f"sizes depend on data (from {source!r} on): multiply-adds behind them are counted for sizes "
            "that stand for theirs"
        )
    return Program(
        graph=owner.graph,
        owner=owner,
        weight_of={copied[node]: tied.get(name, name) for node, name in named.items()},
        weights={name: tensors[name] for name in named.values() if name not in tied},
        parameters=frozenset(tied.get(n, n) for n in signature.inputs_to_parameters.values()),
        tied=tied,
        inputs=[copied[s.arg.name] for s in signature.input_specs if s.kind.name == "USER_INPUT"],
        outputs=[(s.kind.name, s.arg.name) for s in signature.output_specs],
        in_spec=exported.call_spec.in_spec,
        out_spec=exported.call_spec.out_spec,
        exported=exported,
        module=module,
        notes=notes,
    )


def _data_decide(value: Any) -> bool:
    """Whether a size of a value is known only when the model runs on data."""
    sizes = value.shape if isinstance(value, torch.Tensor) else ()
    return any(isinstance(size, torch.SymInt) and free_unbacked_symbols(size) for size in sizes)


def _refuse_vmap(graph: torch.fx.Graph) -> None:
    """A graph that enters and leaves vmap levels by side effect cannot be run operator by operator."""
    for node in graph.nodes:
        if node.op == "call_function" and "functorch" in (getattr(node.target, "__module__", None) or ""):
            raise UnsupportedModel(
                f"the model runs torch.vmap or torch.func ({node.name!r}), which torch.export keeps as calls "
                "with side effects; write the batch dimension out in the model"
            )


def written(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """Placeholders that an operator writes into, perhaps through views: all uses see one tensor."""
    found: set[torch.fx.Node] = set()
    sources: dict[torch.fx.Node, torch.fx.Node] = {}  # what a chain of first operands begins with
    for node in graph.nodes:
        if node.op != "call_function" or not node.args:
            continue
        first = node.args[0]
        if isinstance(first, torch.fx.Node):
            sources[node] = sources.get(first, first)
        found.update(sources.get(target, target) for target in changed(node))
    return found


def find_ties(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Aliases: name -> first name with the same object, or the same storage, offset, shape, stride."""
    first: dict[Any, str] = {}
    ties: dict[str, str] = {}
    for name, tensor in tensors.items():
        key: Any = id(tensor)
        if tensor.device.type != "meta" and tensor.numel() and type(tensor) in _PLAIN:
            pointer = tensor.untyped_storage().data_ptr()
            key = (pointer, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if first.setdefault(key, name) != name:
            ties[name] = first[key]
    return ties


_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)

_GRADIENTS, _AUTOCAST = "wrap_with_set_grad_enabled", "wrap_with_autocast"


def _with_casts(exported: ExportedProgram) -> ExportedProgram:
    """The program with the casts of its autocast regions written out; itself where none of them casts."""
    if not any(_casts(node) for node in exported.graph.nodes):
        return exported
    with warnings.catch_warnings(), _silent():
        warnings.simplefilter("ignore")
        found: ExportedProgram = exported.run_decompositions({})
        return found


def _casts(node: torch.fx.Node) -> bool:
    return _called(node) == _AUTOCAST and bool(node.args[2])


def _called(node: torch.fx.Node) -> str:
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def inlined(module: torch.fx.GraphModule) -> torch.fx.Graph:
    """A copy of the graph in which regions without gradients or without autocast are part of the whole."""
    out = torch.fx.Graph()
    env: dict[torch.fx.Node, Any] = {}

    def splice(source: torch.fx.GraphModule, env: dict[torch.fx.Node, Any]) -> Any:
        for node in source.graph.nodes:
            if node.op == "output":
                return torch.fx.map_arg(node.args[0], lambda n: env[n])
            if node in env:  # a hole of a region, which has its value from outside
                continue
            body, operands = _region(source, node)
            if body is not None:
                holes = [n for n in body.graph.nodes if n.op == "placeholder"]
                values = [env[o] if isinstance(o, torch.fx.Node) else o for o in operands]
                env[node] = splice(body, dict(zip(holes, values, strict=True)))
            elif node.op == "call_function" and _picks_inlined(node, env):
                env[node] = env[node.args[0]][node.args[1]]
            else:
                env[node] = out.node_copy(node, lambda n: env[n])
        raise UnsupportedModel("the exported graph has no output node; export the model again")

    result = splice(module, env)
    out.output(result)
    users = {n for n in out.nodes if n.op == "get_attr"}
    for node in users:
        if not node.users:
            out.erase_node(node)
    return out


def _region(
    source: torch.fx.GraphModule, node: torch.fx.Node
) -> tuple[torch.fx.GraphModule | None, list[Any]]:
    """The body and the operands of a region that computes what its operators do."""
    place = {_GRADIENTS: 1, _AUTOCAST: 4}.get(_called(node))
    if place is None or _casts(node):
        return None, []
    body = node.args[place]
    found = getattr(source, str(body.target), None) if isinstance(body, torch.fx.Node) else None
    return (found, list(node.args[place + 1 :])) if isinstance(found, torch.fx.GraphModule) else (None, [])


def _picks_inlined(node: torch.fx.Node, env: Mapping[torch.fx.Node, Any]) -> bool:
    import operator

    return (
        node.target is operator.getitem
        and isinstance(node.args[0], torch.fx.Node)
        and isinstance(env.get(node.args[0]), (tuple, list))
    )
