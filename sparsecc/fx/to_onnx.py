"""An exported PyTorch program as an ONNX model.

PyTorch's own exporter translates the operators.  What is added: it is silent, repeatable and quick,
leaves no trace of the machine in the file, keeps every parameter under its own name, and names the
operator when it fails.

Most of the exporter's time goes into tracing the whole program again, to decompose a handful of
operators, and into some seventy rewrite rules that are tried on every node.  Here the first is left
out where each of those operators has a one-for-one replacement, and of the second only what the
operator translations rely on is kept: constant folding, removal of unused nodes, merging of equal
ones.  BatchNorm is not folded into convolutions: runtimes do that, and parameters stay recognisable.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import logging
import operator
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind

from sparsecc.errors import InvalidOption, UnsupportedModel
from sparsecc.fx.attention_ranks import has_another_rank, make_rank_four
from sparsecc.fx.translations import translations_kept
from sparsecc.signature import Signature, TensorSpec, argument_paths, describe_result, onnx_signature

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

OPSET = 20
_SMALL = 1024
"""Bytes up to which equal constants are merged."""

_aten = torch.ops.aten
_LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "torch.fx")


def to_onnx(
    program: ExportedProgram,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
) -> onnx.ModelProto:
    """Translate ``program`` to ONNX (opset 20), weights inside the proto.

    ``input_names`` and ``output_names`` are all names, in order; the default are those of the program.
    ``dynamic`` names dynamic dimensions, as in ``{"x": {0: "batch"}}``; those that it leaves out get
    the name of the first input and dimension that they are the size of.  The same program gives the
    same bytes.  The program is not modified.  A model above 2 GB comes as a proto that
    ``OnnxFile(proto).save(path)`` can write, with external data.

    Raises ``UnsupportedModel`` with the operator and the source line where a translation is missing.
    """
    _check_names(program, input_names, output_names)
    with _silence(), translations_kept():
        try:
            exported = torch.onnx.export(
                _without_tracing(program),
                dynamo=True,
                verbose=False,
                optimize=False,
                opset_version=OPSET,
            )
        except Exception as error:
            raise _failure(program, error) from error
        assert exported is not None
        model = exported.model
        _tidy(model, _parameters(program))
        inputs = {value.name: value for value in model.graph.inputs}
        _rename(model, input_names, output_names)
        _fix_dimensions(model)
        _rename_dimensions(model, inputs, dynamic or {})
        _strip(model)
        return exported.model_proto


def torch_signature(program: ExportedProgram, proto: onnx.ModelProto) -> Signature:
    """How ``program`` is called and what it returns, in terms of the inputs and outputs of ``proto``.

    ``proto`` is what ``to_onnx`` made of the program.  A result of a class that cannot be described
    (it needs user code to be built) is returned as a flat tuple instead.
    """
    plain = onnx_signature(proto)
    inputs = iter(plain.inputs)
    arguments = _arguments(program)
    found: list[TensorSpec] = []
    constants: list[tuple[tuple[str | int, ...], Any]] = []
    specs = [spec for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    paths = dict(_paths(arguments))
    for leaf, spec in enumerate(specs):
        path = paths.get(leaf, (spec.arg.name,))
        if isinstance(spec.arg, ConstantArgument):
            constants.append((path, spec.arg.value))
        else:
            found.append(replace(next(inputs), path=path))
    return Signature(tuple(found), plain.outputs, tuple(arguments), tuple(constants), _result(program, plain))


def _arguments(program: ExportedProgram) -> dict[str, Any]:
    """The structure of the arguments by parameter name; leaves are numbers in order."""
    spec = program.call_spec.in_spec
    args, kwargs = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    signature = program.module_call_graph[0].signature
    names = list((signature.forward_arg_names if signature is not None else None) or ())
    names += [f"arg{place}" for place in range(len(names), len(args))]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _paths(arguments: Mapping[str, Any]) -> Iterator[tuple[int, tuple[str | int, ...]]]:
    for name, value in arguments.items():
        try:
            for path, leaf in argument_paths(value, (name,)):
                if leaf is not None:
                    yield leaf, path
        except TypeError:  # an argument class of the user's: its tensors are given by input name
            continue


def _result(program: ExportedProgram, plain: Signature) -> dict[str, Any] | None:
    outputs = iter(plain.outputs)
    leaves: dict[int, dict[str, Any]] = {}
    specs = [spec for spec in program.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    for leaf, spec in enumerate(specs):
        if isinstance(spec.arg, ConstantArgument):
            leaves[leaf] = {"kind": "constant", "value": spec.arg.value}
        else:
            leaves[leaf] = {"kind": "leaf", "output": next(outputs).name}
    try:
        return describe_result(pytree.tree_unflatten(list(leaves), program.call_spec.out_spec), leaves)
    except Exception:  # rebuilding a class of the user's may fail in any way
        return None


# ---------------------------------------------------------------------- decomposition

_TRANSLATED = {
    _aten.reshape.default,
    _aten.contiguous.default,
    _aten.flatten.using_ints,
    _aten.unflatten.int,
    _aten.expand_as.default,
    _aten.type_as.default,
}
"""Operators that tracing takes apart although the exporter translates them as they are."""

_SAME = {
    _aten.__and__.Tensor: _aten.bitwise_and.Tensor,
    _aten.__or__.Tensor: _aten.bitwise_or.Tensor,
    _aten.__xor__.Tensor: _aten.bitwise_xor.Tensor,
}
"""Operators that have another name which the exporter knows."""

_HIDDEN_ALIASES = frozenset({_aten.dropout.default})
"""Operators that may return their input without saying so in their schema."""

_CASTS = {_aten.to.dtype, _aten.to.dtype_layout, _aten.to.device, _aten.to.other}


def _without_tracing(program: ExportedProgram) -> ExportedProgram:
    """The program with a ``run_decompositions`` that replaces operators where that is enough."""
    quick = copy.copy(program)

    def run_decompositions(table: Mapping[Any, Callable[..., Any]] | None = None) -> ExportedProgram:
        table = {} if table is None else table
        graph_module = program.graph_module
        one_graph = len(list(graph_module.modules())) == 1
        if one_graph and all(_simple(node, table) for node in graph_module.graph.nodes):
            result = copy.copy(program)
            result._graph_module = _replaced(graph_module)
        else:
            # the exporter keeps dropout whole, and would take its result for new memory
            result = copy.copy(program)
            result._graph_module = _replaced(graph_module, only=_HIDDEN_ALIASES)
            result = result.run_decompositions(dict(table))
        output = result.graph.output_node()
        # the exporter reads constant results from the signature and stumbles over them here
        output.args = (tuple(arg if isinstance(arg, torch.fx.Node) else None for arg in output.args[0]),)
        return result

    quick.run_decompositions = run_decompositions
    return quick


def _simple(node: torch.fx.Node, table: Mapping[Any, Any]) -> bool:
    """Whether a node can stay, or has a replacement, without tracing the program again."""
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    if node.target is _aten.batch_norm.default:
        return len(node.args) > 7 and node.args[5] is False
    replacement = _replacement(node)
    op = node.target if replacement is None else replacement[0]
    if not isinstance(op, torch._ops.OpOverload):
        return callable(op) and getattr(op, "__module__", "") == "_operator"
    if op in _TRANSLATED:
        return True
    if op in table or op._schema.is_mutable or torch.Tag.maybe_aliasing_or_mutating in op.tags:
        return False
    composite = op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    return not (composite and any(argument.alias_info is not None for argument in op._schema.arguments))


def _replaced(graph_module: torch.fx.GraphModule, only: frozenset[Any] | None = None) -> torch.fx.GraphModule:
    """A copy of the graph in which nodes (those of the operators in ``only``) have their replacements."""
    graph = torch.fx.Graph()
    copied: dict[torch.fx.Node, torch.fx.Node] = {}
    graph.output(graph.graph_copy(graph_module.graph, copied))
    for original, node in copied.items():
        node.name = original.name  # the signature refers to nodes by name, whatever fx thinks of it
        if has_another_rank(original):
            make_rank_four(node)
        if only is not None and original.target not in only:
            continue
        if original.target is _aten.batch_norm.default:
            _split_batch_norm(node)
        elif (replacement := _replacement(original)) is not None:
            node.target = replacement[0]
            node.args, node.kwargs = torch.fx.node.map_arg(replacement[1:], copied.__getitem__)
    return torch.fx.GraphModule(graph_module, graph)


def _replacement(node: torch.fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """One operator that does what ``node`` does and that the exporter translates; None if there is none."""
    op, args = node.target, node.args
    if op in _SAME:
        return _SAME[op], args, dict(node.kwargs)
    if op in _CASTS:
        dtype = node.meta["val"].dtype
        if dtype == _source(node).meta["val"].dtype:
            return _aten.alias.default, args[:1], {}
        return _aten._to_copy.default, args[:1], {"dtype": dtype}
    if op is _aten.dropout.default and len(args) == 3 and args[2] is False:
        return _aten.alias.default, args[:1], {}
    if op is _aten.chunk.default and not node.kwargs:
        dim = args[2] if len(args) > 2 else 0
        size = _source(node).meta["val"].shape[dim]
        if isinstance(size, int) and size % args[1] == 0:  # type: ignore[operator]
            return _aten.split.Tensor, (args[0], size // args[1], dim), {}  # type: ignore[operator]
    if op is _aten.adaptive_avg_pool2d.default and tuple(args[1]) == (1, 1):  # type: ignore[arg-type]
        return _aten.mean.dim, (args[0], [-1, -2], True), {}
    if isinstance(op, torch._ops.OpOverload) and op._schema.name.endswith("_") and _in_place_of_nothing(node):
        functional = getattr(getattr(_aten, op._schema.name[6:-1], None), op._overloadname, None)
        return None if functional is None else (functional, args, dict(node.kwargs))
    return None


def _in_place_of_nothing(node: torch.fx.Node) -> bool:
    """Whether an operator writes into a tensor that nobody else can see, so that it may make a new one."""
    target = node.args[0] if node.args else None
    if not node.target._schema.name.startswith("aten::") or not isinstance(target, torch.fx.Node):  # type: ignore[union-attr]
        return False
    tensors = [n.meta.get("val") for n in node.all_input_nodes]
    same = all(isinstance(t, torch.Tensor) and t.dtype == node.meta["val"].dtype for t in tensors)
    return same and list(target.users) == [node] and _is_fresh(target)


def _is_fresh(node: torch.fx.Node) -> bool:
    """Whether a node makes a tensor of its own."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target in _TRANSLATED | _CASTS:
        return False
    if node.target._schema.name.endswith("_"):
        return _in_place_of_nothing(node)
    if node.target in _HIDDEN_ALIASES:
        return False
    if node.target is _aten.batch_norm.default:
        return True
    results = node.target._schema.returns
    hidden = torch.Tag.maybe_aliasing_or_mutating in node.target.tags
    return not hidden and all(result.alias_info is None for result in results)


def _split_batch_norm(node: torch.fx.Node) -> None:
    """Turn an inference BatchNorm into the form with three results, of which ``node`` is the first."""
    value = node.meta["val"]
    args = (*node.args[:5], *node.args[6:8])
    with node.graph.inserting_before(node):
        norm = node.graph.call_function(_aten._native_batch_norm_legit_no_training.default, args)
    norm.meta = {**node.meta, "val": (value, value.new_empty(0), value.new_empty(0))}
    node.target, node.args, node.kwargs = operator.getitem, (norm, 0), {}


def _source(node: torch.fx.Node) -> torch.fx.Node:
    source = node.args[0]
    assert isinstance(source, torch.fx.Node)
    return source


# ---------------------------------------------------------------------- tidying the ONNX graph


def _tidy(model: ir.Model, parameters: frozenset[str]) -> None:
    """Fold constants, drop what is unused, merge equal nodes and equal small constants."""
    import onnx_ir.passes.common as common
    from onnxscript.optimizer import fold_constants

    def should_fold(node: ir.Node) -> bool | None:
        """Whether a node may become a constant: not where a parameter would lose its name."""
        named = any(value is not None and value.name in parameters for value in node.inputs)
        return False if named else None

    common.InlinePass()(model)
    for _ in range(2):
        fold_constants(model, onnx_shape_inference=True, should_fold=should_fold)
        common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    common.RemoveUnusedOpsetsPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.LiftSubgraphInitializersToMainGraphPass()(model)
    _merge_constants(model.graph, parameters)
    common.CommonSubexpressionEliminationPass()(model)
    common.OutputFixPass()(model)
    common.NameFixPass()(model)


def _merge_constants(graph: ir.Graph, parameters: frozenset[str]) -> None:
    """Use one initializer for equal small constants; parameters stay apart, each with its name."""
    first: dict[tuple[Any, ...], ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or name in parameters or tensor.nbytes > _SMALL or value.is_graph_output():
            continue
        key = (tensor.dtype, tuple(tensor.shape), tensor.tobytes())
        kept = first.setdefault(key, value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            del graph.initializers[name]


def _check_names(
    program: ExportedProgram, inputs: Sequence[str] | None, outputs: Sequence[str] | None
) -> None:
    """Refuse wrong numbers of names before the work starts."""
    signature = program.graph_signature
    user_inputs = [s.arg for s in signature.input_specs if s.kind is InputKind.USER_INPUT]
    user_outputs = [s.arg for s in signature.output_specs if s.kind is OutputKind.USER_OUTPUT]
    for what, names, arguments in (("input", inputs, user_inputs), ("output", outputs, user_outputs)):
        count = sum(not isinstance(argument, ConstantArgument) for argument in arguments)
        if names is not None and (len(names) != count or not all(names)):
            raise InvalidOption(f"{what}_names must be {count} names, one for each {what}; got {list(names)}")
    given = [*(inputs or ()), *(outputs or ())]
    if len(set(given)) != len(given):
        raise InvalidOption(f"input and output names must differ from each other; got {given}")
    for name in given:
        if name in _parameters(program):
            raise InvalidOption(
                f"the name {name!r} is that of a parameter; choose another input or output name"
            )


def _rename(model: ir.Model, inputs: Sequence[str] | None, outputs: Sequence[str] | None) -> None:
    wanted: dict[ir.Value, str] = {}
    for values, names in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        if names is not None:
            wanted.update(zip(values, names, strict=True))
    kept = {value.name for value in (*model.graph.inputs, *model.graph.outputs) if value not in wanted}
    for name in wanted.values():
        if name in kept:
            raise InvalidOption(f"the name {name!r} is that of another input or output; choose another")
    by_name = {value.name: value for value in _values(model)}
    for name in wanted.values():
        if name in by_name and by_name[name] not in wanted:  # an inner value has to give way
            inner = by_name.pop(name)
            inner.name = _unused(name, by_name)
            by_name[inner.name] = inner
    for value, wish in wanted.items():
        value.name = wish


def _unused(name: str, taken: Mapping[str | None, object]) -> str:
    return next(other for k in itertools.count(1) if (other := f"{name}_{k}") not in taken)


def _fix_dimensions(model: ir.Model) -> None:
    """Sizes that the exporter wrote as symbols although they have one value (``"2"``) are numbers."""
    import onnx_ir as ir

    for value in _values(model):
        sizes = [] if value.shape is None else list(value.shape)
        texts = [size.value if isinstance(size, ir.SymbolicDim) else None for size in sizes]
        if any(text is not None and text.isdecimal() for text in texts):
            value.shape = ir.Shape(
                int(text) if text is not None and text.isdecimal() else size
                for text, size in zip(texts, sizes, strict=True)
            )


def _rename_dimensions(
    model: ir.Model, before: Mapping[str | None, ir.Value], dynamic: Mapping[str, Mapping[int, str]]
) -> None:
    """Give readable names to the symbols of torch.export, in shapes and in expressions of them.

    Inputs may be meant by the names that they had ``before`` or by those that they have.
    """
    by_name = {value.name: value for value in model.graph.inputs}
    inputs = {**before, **by_name}
    names: dict[str, str] = {}
    for input_name, dims in dynamic.items():
        if input_name not in inputs:
            raise InvalidOption(
                f"dynamic names {input_name!r}, but the inputs are {', '.join(map(str, by_name))}"
            )
        for dim, name in dims.items():
            symbol = _symbol(inputs[input_name], dim)
            if symbol is None:
                raise InvalidOption(
                    f"dimension {dim} of input {input_name!r} is not dynamic, so it cannot be {name!r}"
                )
            names[symbol] = name
    if len(set(names.values())) != len(names):
        raise InvalidOption("dynamic gives one name to dimensions that differ: " + ", ".join(names.values()))
    for label, value in by_name.items():
        for dim in range(len(value.shape or ())):
            symbol = _symbol(value, dim)
            if symbol is not None and symbol.isidentifier() and symbol not in names:
                first_batch = dim == 0 and "batch" not in names.values()
                names[symbol] = "batch" if first_batch else f"{label}_dim{dim}"
    if names:
        import onnx_ir as ir

        pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
        for value in _values(model):
            if value.shape is not None and any(not isinstance(dim, int) for dim in value.shape):
                value.shape = ir.Shape(
                    d if isinstance(d, int) else _renamed(d.value, pattern, names) for d in value.shape
                )


def _renamed(text: str | None, pattern: re.Pattern[str], names: Mapping[str, str]) -> str | None:
    return None if text is None else pattern.sub(lambda match: names[match[1]], text)


def _symbol(value: ir.Value, dim: int) -> str | None:
    if value.shape is None or not -len(value.shape) <= dim < len(value.shape):
        return None
    size = value.shape[dim]
    return None if isinstance(size, int) else size.value


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph.all_nodes():
        yield from node.outputs


def _strip(model: ir.Model) -> None:
    """Remove what the exporter notes about source files, classes and its own rules."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    for value in _values(model):
        value.metadata_props.clear()
        value.doc_string = None
        if value.const_value is not None:
            value.const_value.metadata_props.clear()
            value.const_value.doc_string = None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None


def _parameters(program: ExportedProgram) -> frozenset[str]:
    signature = program.graph_signature
    return frozenset((*signature.parameters, *signature.buffers))


# ---------------------------------------------------------------------- silence and errors


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Let nothing that the exporter prints, warns of or logs reach the user."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    sink = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


_MISSING_OP = re.compile(r"OpOverload\(op='([\w.]+)', overload='(\w+)'\)")
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


#: operators that a model can be told to do without
_OTHER_WAYS = {
    "transformers.grouped_mm_fallback.default": (
        "call model.set_experts_implementation('batched_mm') before, which computes the same"
    ),
}


def _failure(program: ExportedProgram, error: BaseException) -> UnsupportedModel:
    """The exporter's error, reduced to the operator, the place and the reason."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    for link in chain:
        match = _MISSING_OP.search(str(link))
        if match is not None and type(link).__name__ == "DispatchError":
            op = f"{match[1]}.{match[2]}"
            way = _OTHER_WAYS.get(op, "compute it with other operators, or leave this target out")
            return UnsupportedModel(
                f"ONNX has no translation for the operator {op}{_place(program, op)}: {way}"
            )
    last = (str(chain[-1]).strip() or repr(chain[-1])).splitlines()[0]
    node = next((m for link in chain if (m := _node_of(program, str(link))) is not None), None)
    where = "" if node is None else f" at operator {node.target}{_place(program, str(node.target), node)}"
    return UnsupportedModel(f"the model cannot be written as ONNX{where}: {type(chain[-1]).__name__}: {last}")


def _node_of(program: ExportedProgram, message: str) -> torch.fx.Node | None:
    match = re.search(r"translating node %(\w+)", message)
    return next((node for node in program.graph.nodes if match is not None and node.name == match[1]), None)


def _place(program: ExportedProgram, op: str, node: torch.fx.Node | None = None) -> str:
    """Node name and source line of the first node with this operator, for messages."""
    if node is None:
        node = next((n for n in program.graph.nodes if str(n.target) == op), None)
    if node is None:
        return ""
    frames = _FRAME.findall(node.stack_trace or "")
    line = f", {frames[-1][0].rsplit('/', 1)[-1]}:{frames[-1][1]}" if frames else ""
    return f" (node {node.name!r}{line})"
