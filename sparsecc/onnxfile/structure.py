"""What can be checked of an ONNX graph without computing: names, order, operators, functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx
import onnx.defs
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto

from sparsecc.errors import InvalidModel, UnsupportedModel

MAX_DEPTH = 32
"""Subgraphs within subgraphs; what a serialised model can hold at all."""
MAX_INLINED_NODES = 100_000
"""Nodes after inlining of local functions; a few nested functions can stand for billions."""
RUNTIME_OPERATORS = frozenset({"SimplifiedLayerNormalization"})
"""Operators that onnxruntime puts into the default domain, although onnx has none of that name."""
_AGAIN = "export the model again"

FunctionKey = tuple[str, str]


def check_structure(proto: ModelProto, min_opset: int) -> None:
    """Refuse a model whose graph means nothing, or more than it can afford.

    Raises ``InvalidModel`` for malformed ones, ``UnsupportedModel`` for operator sets that are too
    old or too new and for sparse tensors.
    """
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output):
        raise InvalidModel(f"the file holds no graph; it is no ONNX model, or an empty one: {_AGAIN}")
    opsets = check_opsets(proto, min_opset)
    functions = {(_domain(f.domain), f.name): f for f in proto.functions}
    if len(functions) != len(proto.functions):
        raise InvalidModel(f"a local function is defined twice; {_AGAIN}")
    _check_functions(functions, proto.graph)
    if not proto.graph.output:
        raise InvalidModel(f"the graph has no outputs, so nothing can be computed; {_AGAIN}")
    _check_graph(proto.graph, frozenset(), opsets, frozenset(functions))
    _check_references(proto.graph)
    for function in functions.values():
        _check_function(function, opsets, frozenset(functions))


def check_opsets(proto: ModelProto, min_opset: int) -> dict[str, int]:
    """Operator set versions by domain, after refusing those that cannot be handled."""
    opsets: dict[str, int] = {}
    for entry in proto.opset_import:
        opsets[_domain(entry.domain)] = max(entry.version, opsets.get(_domain(entry.domain), 0))
    opset = opsets.get("")
    if opset is None:
        return opsets  # fine for models of other domains alone; a default operator is refused later
    if opset < min_opset:
        raise UnsupportedModel(
            f"the model uses opset {opset}, and {min_opset} or newer is needed; convert it: "
            f"onnx.version_converter.convert_version(onnx.load(path), {max(min_opset, 17)})"
        )
    newest = onnx.defs.onnx_opset_version()
    if opset > newest:
        raise UnsupportedModel(
            f"the model uses opset {opset}, and the installed onnx {onnx.__version__} knows up to {newest}; "
            "upgrade onnx, or export with an older opset_version"
        )
    return opsets


def execution_order(graph: GraphProto) -> list[int]:
    """Indices of the nodes so that every value is made before it is used; file order if that works.

    Raises ``InvalidModel`` for cycles, naming the nodes.
    """
    producer = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    needs = [{producer[name] for name in uses(node) if name in producer} for node in graph.node]
    if all(source < index for index, sources in enumerate(needs) for source in sources):
        return list(range(len(graph.node)))
    order: list[int] = []
    done = [0] * len(graph.node)  # 1: being visited, 2: placed
    for start in range(len(graph.node)):
        stack = [(start, iter(sorted(needs[start])))] if not done[start] else []
        done[start] = done[start] or 1
        while stack:
            index, rest = stack[-1]
            following = next((source for source in rest if done[source] < 2), None)
            if following is None:
                stack.pop()
                done[index] = 2
                order.append(index)
            elif done[following] == 1:
                names = [describe(graph.node[i], i) for i, _ in stack]
                raise InvalidModel(f"the graph has a cycle through {', '.join(names[-5:])}; {_AGAIN}")
            else:
                done[following] = 1
                stack.append((following, iter(sorted(needs[following]))))
    return order


def describe(node: NodeProto, index: int) -> str:
    """How messages name a node: ``Conv 'layer1/conv' (node 12)``."""
    name = node.name or (node.output[0] if node.output else "")
    return f"{node.op_type} {name!r} (node {index})"


def uses(node: NodeProto) -> set[str]:
    """Names that a node reads, also from within its subgraphs."""
    names = {name for name in node.input if name}
    for graph in _subgraphs(node):
        names |= free_names(graph)
    return names


def free_names(graph: GraphProto) -> set[str]:
    """Names that a subgraph takes from the graphs around it."""
    own = {value.name for value in graph.input} | {t.name for t in graph.initializer}
    own |= {t.values.name for t in graph.sparse_initializer}
    own |= {name for node in graph.node for name in node.output}
    used = {value.name for value in graph.output}
    for node in graph.node:
        used |= uses(node)
    return {name for name in used - own if name}


def _subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def _check_graph(
    graph: GraphProto,
    outer: frozenset[str],
    opsets: Mapping[str, int],
    functions: frozenset[FunctionKey],
    depth: int = 0,
) -> None:
    if depth > MAX_DEPTH:
        raise InvalidModel(f"subgraphs are nested more than {MAX_DEPTH} deep; the file is damaged, {_AGAIN}")
    if graph.sparse_initializer:
        name = graph.sparse_initializer[0].values.name
        raise UnsupportedModel(
            f"initializer {name!r} is a SparseTensor, which is not supported; store it dense "
            "(sparsity patterns are recognised from the zeros of a dense tensor)"
        )
    where = f"graph {graph.name!r}"
    inputs = _unique((value.name for value in graph.input), f"{where}: input")
    initializers = _unique((t.name for t in graph.initializer), f"{where}: initializer")
    produced = _unique((n for node in graph.node for n in node.output if n), f"{where}: value")
    for name in produced & (inputs | initializers):
        raise InvalidModel(f"{where}: {name!r} is defined twice, by a node and outside; {_AGAIN}")
    if "" in initializers:
        raise InvalidModel(f"{where}: an initializer has no name; {_AGAIN}")
    visible = outer | inputs | initializers | produced
    _check_nodes(graph.node, visible, opsets, functions, depth)
    for value in graph.output:
        if value.name not in visible:
            raise InvalidModel(f"{where}: output {value.name!r} is never computed; {_AGAIN}")
    execution_order(graph)


def _check_references(graph: GraphProto) -> None:
    """Only nodes of functions may take an attribute of the call."""
    for index, node in enumerate(graph.node):
        for attribute in node.attribute:
            if attribute.ref_attr_name:
                raise InvalidModel(
                    f"{describe(node, index)}: its attribute {attribute.name!r} refers to one of a function, "
                    f"but the node is in none; {_AGAIN}"
                )
        for subgraph in _subgraphs(node):
            _check_references(subgraph)


def _check_nodes(
    nodes: Sequence[NodeProto],
    visible: frozenset[str],
    opsets: Mapping[str, int],
    functions: frozenset[FunctionKey],
    depth: int,
) -> None:
    for index, node in enumerate(nodes):
        texts = (node.op_type, node.domain, node.name, *node.input, *node.output)
        if not all(isinstance(text, str) for text in (*texts, *(a.name for a in node.attribute))):
            raise InvalidModel(f"node {index} has a name that is no text; the file is damaged, {_AGAIN}")
        for name in node.input:
            if name and name not in visible:
                raise InvalidModel(
                    f"{describe(node, index)} reads {name!r}, which nothing defines; "
                    f"the file is incomplete, {_AGAIN}"
                )
        _check_operator(node, index, opsets, functions)
        _unique((a.name for a in node.attribute), f"{describe(node, index)}: attribute")
        for subgraph in _subgraphs(node):
            _check_graph(subgraph, visible, opsets, functions, depth + 1)


def _check_operator(
    node: NodeProto, index: int, opsets: Mapping[str, int], functions: frozenset[FunctionKey]
) -> None:
    domain = _domain(node.domain)
    if (domain, node.op_type) in functions:
        return
    if domain not in opsets:
        name = domain or "ai.onnx"
        raise InvalidModel(
            f"{describe(node, index)} is of domain {name!r}, which the model does not import; {_AGAIN}"
        )
    if domain != "" or node.op_type in RUNTIME_OPERATORS:
        return
    try:
        schema = onnx.defs.get_schema(node.op_type, opsets[""], "")
    except onnx.defs.SchemaError as error:
        raise InvalidModel(
            f"{describe(node, index)}: opset {opsets['']} has no operator {node.op_type!r}; {_AGAIN}"
        ) from error
    for what, found, low, high in (
        ("inputs", len(node.input), schema.min_input, schema.max_input),
        ("outputs", len(node.output), schema.min_output, schema.max_output),
    ):
        if not low <= found <= high:
            raise InvalidModel(f"{describe(node, index)} has {found} {what}, not {low} to {high}; {_AGAIN}")
    given = {attribute.name for attribute in node.attribute}
    for name, attribute in schema.attributes.items():
        if attribute.required and name not in given:
            raise InvalidModel(f"{describe(node, index)} lacks its attribute {name!r}; {_AGAIN}")


def _check_functions(functions: Mapping[FunctionKey, FunctionProto], graph: GraphProto) -> None:
    """No function may call itself, nor may calls multiply beyond what fits in memory."""
    sizes: dict[FunctionKey, int] = {}

    def size(key: FunctionKey, path: tuple[FunctionKey, ...]) -> int:
        if key in path:
            raise InvalidModel(f"local function {key[1]!r} calls itself; {_AGAIN}")
        if len(path) > 200:
            raise InvalidModel(f"local functions are nested more than 200 deep; {_AGAIN}")
        if key not in sizes:
            sizes[key] = nodes_of(functions[key].node, (*path, key))
        return sizes[key]

    def nodes_of(nodes: Sequence[NodeProto], path: tuple[FunctionKey, ...], depth: int = 0) -> int:
        if depth > MAX_DEPTH:
            raise InvalidModel(
                f"subgraphs are nested more than {MAX_DEPTH} deep; the file is damaged, {_AGAIN}"
            )
        total = 0
        for node in nodes:
            key = (_domain(node.domain), node.op_type)
            total += size(key, path) if key in functions else 1
            total += sum(nodes_of(sub.node, path, depth + 1) for sub in _subgraphs(node))
            if total > MAX_INLINED_NODES:
                raise InvalidModel(f"local functions expand to more than {MAX_INLINED_NODES} nodes; {_AGAIN}")
        return total

    for key in functions:
        size(key, ())
    nodes_of(graph.node, ())


def _check_function(
    function: FunctionProto, opsets: Mapping[str, int], functions: frozenset[FunctionKey]
) -> None:
    own = {**opsets, **{_domain(entry.domain): entry.version for entry in function.opset_import}}
    where = f"local function {function.name!r}"
    inputs = _unique(iter(function.input), f"{where}: input")
    produced = _unique((n for node in function.node for n in node.output if n), f"{where}: value")
    for name in produced & inputs:
        raise InvalidModel(f"{where}: {name!r} is defined twice; {_AGAIN}")
    visible = inputs | produced
    _check_nodes(function.node, visible, own, functions, 0)
    for name in function.output:
        if name not in visible:
            raise InvalidModel(f"{where}: output {name!r} is never computed; {_AGAIN}")


def _unique(names: Iterator[str], what: str) -> frozenset[str]:
    seen: set[str] = set()
    for name in names:
        if not isinstance(name, str):
            raise InvalidModel(f"{what} {name!r} is no text; the file is damaged, {_AGAIN}")
        if name in seen:
            raise InvalidModel(f"{what} {name!r} is defined twice; {_AGAIN}")
        seen.add(name)
    return frozenset(seen)


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain
