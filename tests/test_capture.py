"""Capture: inputs of every form, wrappers, train mode, dynamic sizes, ties, dtypes, and clear refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from sparsecc.api import analyze, prune
from sparsecc.errors import InvalidOption, SparseccError, UnsupportedModel
from sparsecc.fx.capture import capture
from sparsecc.fx.program_module import ProgramModule, program_module
from sparsecc.fx.subject import TorchSubject
from sparsecc.lowering import lower
from sparsecc.passes import ChannelPruning, HeadPruning
from sparsecc.pipeline import Pruned, run
from sparsecc.transform import keep_count
from tests.oracles import call, error, fingerprint, forward64, leaves, masked64, nested, poisoned
from tests.patterns import CASES
from tests.patterns.base import Apply, head, image
from tests.patterns.base import conv as conv_block

PASSES = (ChannelPruning(sparsity=0.5), HeadPruning(sparsity=0.5, head_dims=True))


class Tail(nn.Module):
    """Two linear layers around a function ``f(module, *args, **kwargs)``."""

    def __init__(self, f: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.f = f
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.f(self, *args, **kwargs)


def rows(n: int = 3) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(0))


def right(result: Pruned, tolerance: float = 1e-12) -> None:
    """The result's own forward equals masked semantics, whatever the removed entries hold."""
    subject = result.subject
    assert isinstance(subject, TorchSubject)
    for seed, variant in ((0, 0), (3, 1)):
        flat, _ = subject.inputs(seed, variant)
        reference = masked64(subject, subject.kept(result.plan), flat, poisoned(subject, result.plan))
        again = copy.deepcopy(nested(subject, flat))
        assert error(forward64(result.model, again), reference) <= tolerance


# -- forms of inputs -----------------------------------------------------------------------------------


class Named(nn.Module):
    """Two inputs, one of them by keyword only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, *, y: Tensor, scale: float = 1.0) -> dict[str, Any]:
        z = F.relu(self.a(x) + self.b(y) * scale)
        return {"z": self.out(z), "parts": (x, [y, None]), "scale": scale}


def test_keywords_in_any_order() -> None:
    model, x, y = Named(), rows(), torch.randn(3, 4)
    first = run(model, {"x": x, "y": y}, PASSES)
    second = run(model, {"y": y, "x": x}, PASSES)
    assert first.plan == second.plan
    assert first.report.after["parameters"] < first.report.before["parameters"]
    right(first)
    right(second)


def test_structures_of_inputs_and_outputs_come_back() -> None:
    model, x, y = Named(), rows(), torch.randn(3, 4)
    result = run(model, {"x": x, "y": y, "scale": 0.5}, PASSES).model
    out = result(x, y=y, scale=0.5)
    assert out.keys() == {"z", "parts", "scale"}
    assert torch.equal(out["parts"][0], x)
    assert out["parts"][1][1] is None
    fallback = program_module(capture(model, {"x": x, "y": y, "scale": 0.5}))
    again = fallback(y=y, scale=0.5, x=x)
    assert error(leaves(again), call(model, {"x": x, "y": y, "scale": 0.5})) == 0
    assert isinstance(again["parts"], tuple)


@pytest.mark.parametrize(
    ("inputs", "f"),
    [
        ((rows(),), lambda m, x: m.c(m.a(x).relu())),
        (rows(), lambda m, x: m.c(m.a(x).relu())),
        ([rows()], lambda m, x: m.c(m.a(x).relu())),
        (([rows(), {"k": rows() + 1}],), lambda m, xs: m.c((m.a(xs[0]) * m.a(xs[1]["k"])).relu())),
        ((rows(), rows() * 2), lambda m, x, y: (m.c(m.a(x)), [m.c(m.a(y)), {"n": x}])),
        ((torch.randn(6),), lambda m, x: m.c(m.a(x).relu())),
        ((rows(), 2.0, None, True), lambda m, x, s, n, flag: m.c(m.a(x) * s) if flag and n is None else x),
    ],
)
def test_inputs_of_every_form(inputs: Any, f: Callable[..., Any]) -> None:
    result = run(Tail(f), inputs, PASSES)
    assert result.certificate.status == "VERIFIED"
    right(result)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (None, "needs example_inputs"),
        ("text", "give a tuple of positional inputs or a dict"),
        ((), "Conv2d|forward|argument"),
        ((image(),) * 2, "itself fails on example_inputs"),
        ((image(channels=4),), "itself fails on example_inputs"),
        ({"picture": image()}, "picture"),
        ((image().long(),), "itself fails on example_inputs"),
    ],
)
def test_wrong_example_inputs_are_told_with_the_fix(inputs: Any, words: str) -> None:
    model, _ = CASES["conv_bn_relu"].make()
    before = fingerprint(model)
    with pytest.raises(InvalidOption, match=words):
        run(model, inputs, PASSES)
    assert fingerprint(model) == before


def test_a_call_of_another_structure_is_told() -> None:
    program = capture(Named(), {"x": rows(), "y": torch.randn(3, 4)})
    with pytest.raises(InvalidOption, match="same structure as example_inputs"):
        program.flat_inputs((rows(),), {})


# -- wrappers and other kinds of models ----------------------------------------------------------------


class DistributedDataParallel(nn.Module):
    """Looks like PyTorch's wrapper, which needs a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return self.module(*args)


@pytest.mark.parametrize("wrap", [DistributedDataParallel, nn.DataParallel, torch.compile])
def test_wrappers_are_taken_off(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model, inputs = CASES["conv_bn_relu"].make()
    result = run(wrap(model), inputs, PASSES)
    assert type(result.model) is type(model)
    assert any("unwrapped" in n for n in result.report.notes)
    assert result.plan == run(model, inputs, PASSES).plan


def test_real_ddp_is_taken_off() -> None:
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("no gloo here")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, inputs = CASES["conv_bn_relu"].make()
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert type(run(wrapped, inputs, PASSES).model) is type(model)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "name", ["residual_projection", "grouped_queries_built_in", "lstm", "tied_embedding"]
)
def test_exported_programs_are_pruned_like_their_module(name: str) -> None:
    model, inputs = CASES[name].make()
    expected = run(model, inputs, PASSES)
    dynamic = ({0: Dim.AUTO},)
    result = run(export(model, inputs, dynamic_shapes=dynamic), None, PASSES)
    assert result.certificate.status == "VERIFIED"
    assert isinstance(result.model, ExportedProgram)
    kept = {d.group: d.kept.tolist() for d in result.plan.decisions}
    assert kept == {d.group: d.kept.tolist() for d in expected.plan.decisions}
    assert error(call(result.model.module(), inputs), call(expected.model, inputs)) <= 1e-6
    assert result.model.module()(torch.cat([inputs[0]] * 3)).shape[0] == 6


def test_traced_graph_modules_are_pruned() -> None:
    model, inputs = CASES["residual_projection"].make()
    result = run(torch.fx.symbolic_trace(model), inputs, PASSES)
    assert isinstance(result.model, torch.fx.GraphModule)
    right(result)


def test_exported_graph_modules_are_pruned() -> None:
    model, inputs = CASES["conv_bn_relu"].make()
    result = run(export(model, inputs).module(), inputs, PASSES)
    assert result.report.after["parameters"] < result.report.before["parameters"]
    right(result)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_and_other_things_are_refused() -> None:
    model, inputs = CASES["conv_bn_relu"].make()
    with pytest.raises(UnsupportedModel, match="TorchScript"):
        capture(torch.jit.trace(model, inputs), inputs)
    with pytest.raises(UnsupportedModel, match="cannot capture a int"):
        capture(3, inputs)  # type: ignore[arg-type]


def test_models_that_cannot_be_traced_are_refused_with_the_tracers_words() -> None:
    def branch(m: Tail, x: Tensor) -> Tensor:
        return m.c(m.a(x)) if float(x.sum()) > 0 else x

    with pytest.raises(UnsupportedModel, match=r"torch\.export cannot trace Tail"):
        capture(Tail(branch), (rows(),))


def test_vmap_is_refused_before_it_can_leave_torch_in_a_nested_level() -> None:
    with pytest.raises(UnsupportedModel, match=r"torch\.vmap"):
        capture(Tail(lambda m, x: torch.vmap(lambda row: m.c(m.a(row)))(x)), (rows(),))


# -- modes, dtypes, devices ----------------------------------------------------------------------------


def test_train_mode_is_put_back_and_told() -> None:
    model, inputs = CASES["conv_bn_relu"].make()
    model.train()
    model[0][1].eval()  # type: ignore[index]
    flags = [m.training for m in model.modules()]
    result = run(model, inputs, PASSES)
    assert [m.training for m in model.modules()] == flags
    assert [m.training for m in result.model.modules()] == flags
    assert any("evaluation mode" in n for n in result.report.notes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["residual_projection", "fused_qkv_chunk", "rms_norm"])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    model, inputs = CASES[name].make()
    result = run(model.to(dtype), tuple(x.to(dtype) for x in inputs), PASSES)
    assert result.certificate.status == "VERIFIED"
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    right(result)


def test_mixed_dtypes() -> None:
    model = Tail(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x.double()).float())))))
    model.a.double()
    result = run(model, (rows(),), PASSES)
    assert result.certificate.status == "VERIFIED"
    assert result.model.a.weight.dtype == torch.float64


def test_frozen_parameters_are_pruned_and_stay_frozen() -> None:
    model, inputs = CASES["conv_bn_relu"].make()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    result = run(model, inputs, PASSES)
    assert result.report.after["parameters"] < result.report.before["parameters"]
    assert not any(p.requires_grad for p in result.model.parameters())


@pytest.mark.parametrize("name", ["conv_bn_relu", "fused_qkv_chunk", "tied_embedding", "lstm"])
def test_meta_models_are_analysed_and_planned(name: str) -> None:
    real, inputs = CASES[name].make()
    model = copy.deepcopy(real).to("meta")
    if name == "tied_embedding":  # torch's own .to() separates ties on the meta device
        model.lm_head.weight = model.table.weight  # type: ignore[union-attr]
    subject = TorchSubject(model, tuple(x.to("meta") for x in inputs))
    expected = TorchSubject(real, inputs)
    assert [str(g) for g in subject.analysis.groups] == [str(g) for g in expected.analysis.groups]
    kept = {}
    for group in subject.analysis.groups:
        kept[group.name] = torch.arange(group.size).numpy() < keep_count(group.size, 0.5)
    plan = lower(subject.analysis, kept)
    assert plan == lower(expected.analysis, kept)
    small = subject.apply(plan, kept).model
    shapes = {n: tuple(p.shape) for n, p in expected.apply(plan, kept).model.named_parameters()}
    assert {n: tuple(p.shape) for n, p in small.named_parameters()} == shapes
    assert all(p.is_meta for p in small.parameters())


def test_meta_models_cannot_be_ranked_or_verified() -> None:
    model, inputs = CASES["conv_bn_relu"].make()
    meta, fake = model.to("meta"), tuple(x.to("meta") for x in inputs)
    with pytest.raises(UnsupportedModel, match="meta device"):
        run(meta, fake, PASSES)
    subject = TorchSubject(meta, fake)
    kept = {g.name: torch.arange(g.size).numpy() < 2 for g in subject.analysis.groups}
    from sparsecc.pipeline import finish

    with pytest.raises(UnsupportedModel, match="meta device"):
        finish(subject, lower(subject.analysis, kept))


# -- dynamic sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "name", ["conv_bn_relu", "attention", "fused_qkv_static", "multihead_attention", "lstm"]
)
def test_a_model_captured_at_any_batch_runs_at_any_batch(name: str, batch: int) -> None:
    model, inputs = CASES[name].make()
    x = torch.cat([inputs[0]] * 2)[:batch]
    result = run(model, (x,), PASSES)
    assert not any("static" in n for n in result.report.notes)
    for size in (1, 5):
        wide = torch.cat([x] * 5)[:size]
        single = torch.cat(forward64(result.model, (wide[:1],)))
        assert error([forward64(result.model, (wide,))[0][:1]], [single]) <= 1e-12


def test_dynamic_shapes_make_more_dimensions_free() -> None:
    model, inputs = CASES["attention"].make()
    length = Dim("length", min=2, max=32)
    result = run(model, inputs, PASSES, dynamic_shapes=({0: Dim.AUTO, 1: length},))
    assert result.certificate.status == "VERIFIED"
    assert result.model(torch.randn(4, 9, 6)).shape == (4, 9, 3)
    assert any("[3, 6, 6]" in c.inputs for c in result.certificate.checks)


def test_dynamic_shapes_by_name_reach_the_graph_module_too() -> None:
    model, inputs = CASES["attention_default_scale"].make()
    shapes = {"input": {0: Dim.AUTO, 1: Dim.AUTO}}
    result = run(model, {"input": inputs[0]}, PASSES, dynamic_shapes=shapes)
    assert isinstance(result.model, ProgramModule)
    assert result.model(input=torch.randn(4, 9, 6)).shape == (4, 9, 3)


def test_a_model_that_fixes_its_batch_is_captured_static_and_says_so() -> None:
    model = Tail(lambda m, x: m.c(m.a(x).view(3, 8).relu()))
    result = run(model, (rows(),), PASSES)
    right(result)


# -- ties, sharing, buffers ----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "first", "second"), [
    ("tied_embedding", "table.weight", "lm_head.weight"),
    ("tied_convs", "a.weight", "b.weight"),
])  # fmt: skip
def test_tied_parameters_stay_one(name: str, first: str, second: str) -> None:
    model, inputs = CASES[name].make()
    result = run(model, inputs, PASSES)
    assert result.model.get_parameter(first) is result.model.get_parameter(second)
    fallback = program_module(capture(model, inputs))
    assert fallback.get_parameter(first) is fallback.get_parameter(second)
    assert len(list(fallback.parameters())) == len(list(model.parameters()))


def test_a_module_that_is_used_twice_stays_one() -> None:
    model, inputs = CASES["shared_module"].make()
    result = run(model, inputs, PASSES)
    assert len(list(result.model.modules())) == len(list(model.modules()))
    assert result.model.shared[0].out_channels == result.model.shared[0].in_channels == 4


def test_parameters_of_branches_not_taken_stay_whole_with_the_reason() -> None:
    model, inputs = CASES["branch_not_taken"].make()
    result = run(model, inputs, PASSES)
    assert result.model.spare[0].weight.shape == model.spare[0].weight.shape
    reasons = {f.reason.kind for f in result.subject.analysis.frozen if f.weight.startswith("spare")}
    assert reasons == {"unread"}


def _moving_average(m: Tail, x: Tensor) -> Tensor:
    y = m.a(x)
    m.state.mul_(0.9).add_(y.mean(0).detach())
    return m.c(y + m.state)


def _written_then_read_twice(m: Tail, x: Tensor) -> Tensor:
    m.state[:3].mul_(2.0)
    return m.c(m.b(m.a(x) * m.state) * m.state)


def _replaced(m: Tail, x: Tensor) -> Tensor:
    y = m.a(x)
    m.state = m.state * 0.5 + y.mean(0).detach()
    return m.c(y * m.state)


@pytest.mark.parametrize("f", [_moving_average, _written_then_read_twice, _replaced])
def test_buffers_that_change_are_one_tensor_for_all_their_readers(f: Callable[..., Tensor]) -> None:
    model = Tail(f, state=torch.randn(8))
    before = model.state.clone()
    result = run(model, (rows(),), PASSES)
    assert torch.equal(model.state, before)
    right(result)


def test_buffers_are_cut_for_every_reader_on_its_own() -> None:
    model = Tail(lambda m, x: m.c(m.b(m.a(x) * m.state) * m.state), state=torch.randn(8))
    result = run(model, (rows(),), PASSES)
    assert isinstance(result.model, ProgramModule)
    assert len(result.plan.decisions) == 2
    right(result)


@pytest.mark.parametrize("state", [torch.randn(8), nn.Parameter(torch.randn(8))])
def test_weights_that_are_outputs_stay_whole(state: Tensor) -> None:
    result = run(Tail(lambda m, x: (m.c(m.a(x).relu() * m.state), m.state), state=state), (rows(),), PASSES)
    assert not result.plan.decisions
    right(result)


# -- what must freeze or be right ----------------------------------------------------------------------


def _set_slice(m: Tail, x: Tensor) -> Tensor:
    y = m.a(x)
    y[:, 2:5] = 0
    return m.c(y)


def _set_from_another(m: Tail, x: Tensor) -> Tensor:
    y = m.a(x).clone()
    y[:, 2:5] = m.b(y)[:, :3]
    return m.c(y)


def _write_through_reshape(m: Tail, x: Tensor) -> Tensor:
    y = m.a(x)
    y.view(-1, 2, 4)[:, 1].mul_(2.0)
    return m.c(y)


def _read_before_and_after(m: Tail, x: Tensor) -> Tensor:
    y = m.a(x)
    z = y * 1
    y.add_(m.b(z))
    return m.c(y) + m.c(z)


def _index_put(m: Tail, x: Tensor) -> Tensor:
    y = m.a(x).clone()
    y[:, torch.tensor([1, 3])] = 1.0
    y[y > 0.5] = 0.25
    return m.c(y)


def _transposed_in_place(m: Tail, x: Tensor) -> Tensor:
    y = m.a(x)
    y.t_()
    return m.c(y.t())


def _input_in_place(m: Tail, x: Tensor) -> Tensor:
    return m.c(m.a(x.add_(1)))


def _conditional(m: Tail, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.c(torch.cond(y.sum() > 0, lambda z: m.b(z), lambda z: z * 2, (y,)))


def _no_grad(m: Tail, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.a(x)
    return m.c(F.relu(m.b(F.relu(y))))


def _low_rank(m: Tail, x: Tensor) -> Tensor:
    return m.c(F.linear(F.relu(m.a(x)), m.b.weight @ m.b.weight))


def _overflow(m: Tail, x: Tensor) -> Tensor:
    y = torch.exp(m.a(x) * 1e4)
    return m.c(torch.nan_to_num(y, posinf=3.0))


def _masked_with_infinity(m: Tail, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.c(F.relu(y.masked_fill(y < 0, float("-inf"))))


def _outer(m: Tail, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.c((y[:, :, None] * m.b(y)[:, None]).flatten(1).unflatten(1, (8, 8)).sum(1))


@pytest.mark.parametrize(
    ("f", "prunable"),
    [
        (_set_slice, True),
        (_set_from_another, True),
        (_write_through_reshape, True),
        (_read_before_and_after, True),
        (_index_put, False),
        (_transposed_in_place, False),
        (_input_in_place, True),
        (_conditional, False),
        (_no_grad, True),
        (_low_rank, False),
        (_overflow, True),
        (_masked_with_infinity, True),
        (_outer, True),
    ],
)
def test_awkward_code_is_right_or_frozen(f: Callable[..., Tensor], prunable: bool) -> None:
    model = Tail(f)
    before = fingerprint(model)
    result = run(model, (rows(),), PASSES)
    assert bool(result.plan.decisions) == prunable
    assert result.certificate.status == "VERIFIED"
    right(result)
    assert fingerprint(model) == before


@pytest.mark.parametrize("start", [-1, -3, 0, 1])
@pytest.mark.parametrize("dynamic", [False, True])
def test_cuts_from_the_end_of_axes_that_stay_leave_the_class(start: int, dynamic: bool) -> None:
    """A start that is counted from the end is the same number in the plan and in the class."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(x)[:, start:].relu()) + x[:, start:, -2:].sum(-1, keepdim=True)
            return y

    shapes = {"x": {0: Dim.AUTO, 1: Dim.AUTO}} if dynamic else None
    result = run(Last().eval(), (torch.randn(2, 5, 6),), PASSES, dynamic_shapes=shapes)
    assert result.plan.form == "class", result.report.notes
    assert result.plan.decisions
    assert result.model.a.out_features == 4


def test_a_branch_says_what_it_is_and_where() -> None:
    analysis = TorchSubject(Tail(_conditional), (torch.randn(2, 6),)).analysis
    (found,) = {f.reason.text for f in analysis.frozen if "cond" in f.reason.text}
    assert "runs graphs of its own" in found
    assert "test_capture.py" in found
    assert "@sparsecc" not in found


@pytest.mark.parametrize("mask", ["causal", "window", None])
def test_built_in_transformers_are_captured_with_any_mask(mask: str | None) -> None:
    """Whether a mask is the causal one is asked of its values, while it serves as it is."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 1)
            self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12, batch_first=True), 1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            far = {"causal": 1, "window": 2, None: 0}[mask]
            hidden = torch.full((4, 4), float("-inf")).triu(far) if mask else None
            out: Tensor = self.decoder(y, self.encoder(x, mask=hidden), tgt_mask=hidden)
            return out

    torch.manual_seed(0)
    model, inputs = Both().eval(), (torch.randn(2, 4, 8), torch.randn(2, 4, 8))
    result = run(model, inputs, (ChannelPruning(sparsity=0.5),))
    assert result.certificate.status == "VERIFIED"
    assert result.plan.decisions
    subject = result.subject
    assert isinstance(subject, TorchSubject)
    with torch.no_grad():
        assert error(subject.original(subject.bound(inputs)), [model(*inputs)]) < 1e-6


def test_autocast_regions_are_pruned_with_their_casts() -> None:
    """The masked original casts to bfloat16 where the region does, so that each operator can be compared."""

    def f(m: Tail, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = m.b(F.relu(m.a(x)))
        return m.c(y.float())

    result = run(Tail(f), (rows(),), PASSES)
    assert result.plan.decisions
    assert result.certificate.status == "VERIFIED"
    casts = [n for n in result.subject.program.graph.nodes if n.kwargs.get("dtype") is torch.bfloat16]
    assert len(casts) >= 3
    wide = program_module(result.applied.program)
    assert error(call(wide, (rows(),)), call(result.model, (rows(),))) == 0


def test_exported_regions_without_gradients_or_autocast_are_part_of_the_whole() -> None:
    def f(m: Tail, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = F.relu(m.a(x))
        with torch.autocast("cpu", enabled=False):
            y = F.relu(m.b(x.float()))
        return m.c(y)

    exported = torch.export.export(Tail(f).eval(), (rows(),))
    assert any("wrap_with" in str(n.target) for n in exported.graph.nodes)
    result = run(exported, None, PASSES)
    assert result.plan.decisions
    assert result.certificate.status == "VERIFIED"


def test_an_axis_whose_size_becomes_a_number_while_running_stays_whole() -> None:
    """torch.export writes sizes out; programs from elsewhere may read them back from a tensor."""
    exported = torch.export.export(
        Tail(lambda m, x: m.c(m.a(x)) * m.a(x).flatten().shape[0]).eval(),
        (rows(),),
        dynamic_shapes=(({0: Dim.AUTO},),),
    )
    graph = exported.graph
    flat = next(n for n in graph.nodes if "flatten" in str(n.target))
    sizes = [n for n in graph.nodes if str(n.meta.get("val")) == str(flat.meta["val"].shape[0])]
    with graph.inserting_after(flat):
        read = graph.call_function(torch.ops.aten.sym_size.int, (flat, 0))
    read.meta["val"] = flat.meta["val"].shape[0]
    for node in sizes:
        node.replace_all_uses_with(read)
    subject = TorchSubject(exported)
    measured = [f for f in subject.analysis.frozen if f.reason.kind == "sizes"]
    assert {f.weight for f in measured} == {"a.weight", "a.bias", "c.weight"}


@pytest.mark.parametrize("f", [_conditional, _no_grad])
def test_regions_survive_in_the_graph_module(f: Callable[..., Tensor]) -> None:
    model = Tail(f)
    fallback = program_module(capture(model, (rows(),)))
    assert error(call(fallback, (rows(),)), call(model, (rows(),))) == 0


@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: m.c(m.a(x) * m.a(x).shape[1] ** -0.5),
        lambda m, x: m.c(m.a(x) / torch.tensor(float(m.a(x).shape[1]))),
        lambda m, x: m.c(m.a(x) + torch.full((m.a(x).shape[1],), 1 / m.a(x).shape[1])),
        lambda m, x: m.c(m.a(x)) + m.a(x).shape[1],
        lambda m, x: m.c(F.relu(m.a(x)) if m.a(x).shape[1] > 6 else m.a(x)),
    ],
)
def test_a_width_that_reaches_data_keeps_its_value(f: Callable[..., Tensor]) -> None:
    """The class would compute another number from its new width, so the graph comes back."""
    result = run(Tail(f), (rows(),), PASSES)
    assert isinstance(result.model, ProgramModule)
    note = next(n for n in result.report.notes if "graph module" in n)
    assert "test_capture.py" in note
    right(result)


def test_positions_that_reach_data_freeze() -> None:
    result = run(Tail(lambda m, x: m.c(m.a(x) + torch.arange(m.a(x).shape[1]))), (rows(),), PASSES)
    assert not result.plan.decisions
    assert {f.reason.kind for f in result.subject.analysis.frozen} >= {"position"}


def test_random_models_cannot_be_verified_and_say_so() -> None:
    model = Tail(lambda m, x: m.c(F.dropout(m.a(x), 0.5, training=True)))
    with pytest.raises(UnsupportedModel, match="another output every time"):
        run(model, (rows(),), PASSES)
    assert run(model, (rows(),), PASSES, verify=False).certificate.status == "UNCHECKED"


# -- the graph module ----------------------------------------------------------------------------------


def test_the_graph_module_switches_dropout_and_batch_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        conv_block(3, 8), nn.Dropout(0.5), Apply(lambda y: y.view(-1, 8, 64).mean(2)), nn.Linear(8, 2)
    )
    model.eval()
    result = run(model, (image(),), PASSES).model
    assert isinstance(result, ProgramModule)
    x = image(batch=4)
    assert torch.equal(result(x), result(x))
    result.train()
    mean = result.get_buffer("0.1.running_mean").clone()
    assert not torch.equal(result(x), result(x))
    assert not torch.equal(result.get_buffer("0.1.running_mean"), mean)
    result.eval()
    assert torch.equal(result(x), result(x))


def test_the_graph_module_keeps_names_and_learns() -> None:
    model, inputs = CASES["attention_default_scale"].make()
    result = run(model, inputs, PASSES).model
    assert isinstance(result, ProgramModule)
    assert dict(result.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert result.state_dict().keys() == model.state_dict().keys()
    optimiser = torch.optim.SGD(result.parameters(), 0.1)
    before = result(*inputs).square().mean()
    before.backward()
    optimiser.step()
    assert result(*inputs).square().mean() < before


def test_errors_are_of_one_family() -> None:
    for kind in (InvalidOption, UnsupportedModel):
        assert issubclass(kind, SparseccError)
    assert head(3) is not None


def test_a_failing_export_is_told_by_its_error_alone(capfd: pytest.CaptureFixture[str]) -> None:
    class Choosing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if bool((x > 0).all()) else x - 1

    with pytest.raises(UnsupportedModel, match="Could not guard"):
        capture(Choosing(), (torch.randn(2, 3),))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("squeeze", "left"),
    [
        (lambda y: y.squeeze(1), 1),
        (lambda y: y.unsqueeze(3).squeeze(), 2),  # the batch may be one, too
        (lambda y: y.unsqueeze(3).squeeze((1, 3)), 1),
        (lambda y: torch.squeeze_copy(y, -2), 1),
    ],
)
def test_squeezes_drop_no_axis_for_what_is_left_of_it(squeeze: Any, left: int) -> None:
    """Of three channels one is left, which the original squeeze would drop."""

    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv1d(2, 3, 3, padding=1), nn.Conv1d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(squeeze(self.first(x).relu())).mean(2)
            return out

    torch.manual_seed(0)
    result = prune(Squeezed().eval(), (torch.randn(2, 2, 6),), sparsity=0.9)
    assert result.certificate.status == "VERIFIED"
    assert [int(d.kept.size) for d in result.plan.decisions] == [left]
    right(result)


def test_squeezes_that_may_drop_other_axes_keep_two_positions() -> None:
    """A batch of one is dropped in the original too, which nobody knows when the plan is made."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.first(x).mean((2, 3), keepdim=True).squeeze())
            return out

    torch.manual_seed(0)
    for batch, left, others in ((1, 1, (1,)), (2, 2, (1, 3))):
        model = Pooled().eval()
        result = prune(model, (torch.randn(batch, 3, 8, 8),), sparsity=0.9)
        assert result.certificate.status == "VERIFIED"
        assert any("static sizes" in note for note in result.report.notes) == (batch == 1)
        assert [int(d.kept.size) for d in result.plan.decisions] == [left]
        for other in others:
            x = torch.randn(other, 3, 8, 8)
            assert result.model(x).shape == model(x).shape
    with pytest.raises(InvalidOption, match="2 of its positions have to stay, and 1 would"):
        lower(analyze(model, (x,)), {"first.weight[0]": np.arange(4) == 1})


def test_a_squeeze_of_a_number_is_read() -> None:
    class Summed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum().squeeze(0).squeeze(-1)

    assert not analyze(Summed(), (torch.randn(3),)).groups
