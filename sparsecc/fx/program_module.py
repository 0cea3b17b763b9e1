"""A captured program as a torch.fx GraphModule: what comes back where a class cannot express a plan."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

from sparsecc.fx.capture import Program
from sparsecc.fx.editor import assign
from sparsecc.fx.ops import aten_name

#: argument by which an operator is told that it trains
_MODE_ARGUMENTS = {
    "batch_norm": "training",
    "dropout": "train",
    "feature_dropout": "train",
    "alpha_dropout": "train",
    "native_dropout": "train",
    "rrelu": "training",
    "lstm": "train",
    "gru": "train",
    "rnn_tanh": "train",
    "rnn_relu": "train",
}


class ProgramModule(GraphModule):
    """Runs a program's graph, with trainable parameters under their original names.

    ``train()`` and ``eval()`` switch BatchNorm and dropout as in the original module; inputs (by
    position or by name) and the structure of the output are those of the original.
    """

    switches_modes = True

    def __deepcopy__(self, memo: dict[int, Any]) -> ProgramModule:
        out = cast(ProgramModule, super().__deepcopy__(memo))
        _keep_persistence(self, out)
        return out

    def train(self, mode: bool = True) -> ProgramModule:
        """Switch BatchNorm, dropout and recurrent dropout, and compile the graph's code again."""
        super().train(mode)
        if switch_modes(self.graph, mode):
            self.recompile()
        return self


def switch_modes(graph: Graph, training: bool) -> bool:
    """Tell every operator that has modes which one to run in; whether there is any."""
    found = [n for n in graph.nodes if n.op == "call_function" and aten_name(n.target) in _MODE_ARGUMENTS]
    for node in found:
        assign(node, _MODE_ARGUMENTS[aten_name(node.target) or ""], training)
    return bool(found)


def program_module(program: Program, *, training: bool = False) -> ProgramModule:
    """The module of a program; weights are copied."""
    holder = nn.Module()
    places = _register(holder, program)
    for node in program.graph.nodes:
        if node.op == "get_attr":  # the body of a conditional or a loop
            holder.add_module(str(node.target), getattr(program.owner, str(node.target)))
    module = ProgramModule(holder, _standalone(program, places), class_name="ProgramModule")
    _keep_persistence(holder, module)
    for alias, name in program.tied.items():
        if name in program.parameters and places[name] in dict(module.named_parameters()):
            _holder(module, alias).register_parameter(
                alias.rpartition(".")[2], module.get_parameter(places[name])
            )
    module.train(training)
    return module


def _keep_persistence(source: nn.Module, target: nn.Module) -> None:
    """Which buffers a state dict leaves out, which GraphModule forgets when it copies attributes."""
    for path, module in target.named_modules():
        left_out = source.get_submodule(path)._non_persistent_buffers_set
        module._non_persistent_buffers_set.update(left_out & module._buffers.keys())


def _holder(module: nn.Module, path: str) -> nn.Module:
    """The submodule that ``path`` is an attribute of, made where it is missing."""
    at = module
    for part in path.split(".")[:-1]:
        if not isinstance(at._modules.get(part), nn.Module):
            at.add_module(part, nn.Module())
        at = at.get_submodule(part)
    return at


def _register(module: nn.Module, program: Program) -> dict[str, str]:
    """Put every weight into nested plain modules; returns weight -> attribute path."""
    places: dict[str, str] = {}
    for name, tensor in program.weights.items():
        places[name] = path = name.replace("@", "_at_")
        at, leaf = _holder(module, path), path.rpartition(".")[2]
        data = tensor.detach().clone()
        if name in program.parameters:
            at.register_parameter(leaf, nn.Parameter(data, requires_grad=tensor.requires_grad))
        else:
            at.register_buffer(leaf, data, persistent=name in program.exported.state_dict)
    return places


def _standalone(program: Program, places: dict[str, str]) -> Graph:
    """The graph with weights as attributes, and the calling convention of the original."""
    graph = Graph()
    env: dict[Node, Node] = {}
    for node in program.graph.nodes:
        name = program.weight_of.get(node.name)
        if node.op == "placeholder" and name is not None:
            if node.users:
                env[node] = graph.get_attr(places[name])
        elif node.op == "output":
            kinds = [kind for kind, _ in program.outputs]
            values = [v for v, kind in zip(node.args[0], kinds, strict=True) if kind == "USER_OUTPUT"]
            graph.output(tuple(env[v] if isinstance(v, Node) else v for v in values))
        else:
            env[node] = graph.node_copy(node, lambda n: env[n])
    info = _PyTreeInfo(argument_names(program), program.in_spec, program.out_spec)
    graph.set_codegen(_PyTreeCodeGen(info))
    return graph


def argument_names(program: Program) -> list[str]:
    """Names of the arguments, in order: those of the original forward, where they are known."""
    signature = program.exported.module_call_graph[0].signature
    if signature is not None and signature.forward_arg_names:
        return list(signature.forward_arg_names)
    args, kwargs = program.in_spec.children()
    return [*(f"arg_{i}" for i in range(args.num_children)), *(kwargs.context or ())]


__all__ = ["ProgramModule", "program_module"]
