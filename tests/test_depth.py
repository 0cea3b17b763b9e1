"""Whole residual blocks: which there are, and that what is left computes what it should."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsecc
from sparsecc.blocks import BLOCK_SALIENCIES, common_path, residual_blocks
from sparsecc.calibration import CalibrationData, Statistics
from sparsecc.errors import InvalidOption
from sparsecc.fx.capture import capture
from sparsecc.fx.to_onnx import to_onnx
from sparsecc.passes import PASSES, ChannelPruning, DepthPruning
from sparsecc.pipeline import Pruned, open_subject, run
from sparsecc.plan import Bypass, Plan, Replace
from sparsecc.recipe import parse
from sparsecc.saliency import Saliency
from tests.oracles import call, widened, zeroed

EXACT = 1e-12


class Basic(nn.Module):
    """A ResNet's block, in place as torchvision writes it."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.down = None
        if stride != 1 or inputs != outputs:
            self.down = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.down is None else self.down(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """Two stages of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1 = nn.Sequential(Basic(8, 8), Basic(8, 8))
        self.layer2 = nn.Sequential(Basic(8, 12, 2), Basic(12, 12))
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(F.relu(self.stem(x))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """A pre-norm transformer layer; ``skip`` names parts to leave out, for the oracle."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))
        self.skip: tuple[str, ...] = ()

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.attn["qkv"](x).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return self.attn["proj"](y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:
        if "attn" not in self.skip:
            x = x + self.attend(self.norm1(x), mask)
        if "mlp" not in self.skip:
            x = x + self.mlp(self.norm2(x))
        return x


class Transformer(nn.Module):
    """Layers called with a keyword, so that nothing but leaving one out can replace it."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(depth))
        self.head = nn.Linear(8, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, mask=mask)
        return self.head(x)  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def resnet() -> tuple[ResNet, tuple[Tensor]]:
    """In float64, with statistics that hide nothing."""
    model = ResNet().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.normal_()
                module.bias.normal_()
                module.running_mean.normal_()  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model.double(), (torch.randn(2, 3, 9, 9, dtype=torch.float64),)


def transformer() -> tuple[Transformer, dict[str, Tensor]]:
    """In float64."""
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[0, 4:] = False
    return Transformer().double().eval(), {"ids": torch.randint(0, 17, (3, 6)), "mask": mask}


def names(model: nn.Module, inputs: Any) -> list[str]:
    return [b.name for b in residual_blocks(open_subject(model, inputs).analysis)[0]]


def error(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


def without(model: ResNet, *blocks: str) -> ResNet:
    """The oracle: blocks replaced by hand by what is left of them."""
    out = copy.deepcopy(model)
    for name in blocks:
        stage, _, index = name.partition(".")
        getattr(out, stage)[int(index)] = nn.ReLU()
    return out


def skipping(model: Transformer, *parts: tuple[int, str]) -> Transformer:
    """The oracle: parts of layers left out by hand."""
    out = copy.deepcopy(model)
    for index, part in parts:
        out.layers[index].skip += (part,)  # type: ignore[operator,assignment]
    return out


def checked(result: Pruned, model: nn.Module, inputs: Any, oracle: nn.Module) -> Pruned:
    """Verified, equal to the oracle, different from the original, and as small as it says."""
    assert result.certificate.status == "VERIFIED"
    want = call(oracle, inputs)
    assert error(call(result.model, inputs), want) <= EXACT
    assert error(call(model, inputs), want) > 1e-3
    assert result.report.after["parameters"] == sum(p.numel() for p in result.model.parameters())
    assert result.report.after["macs"] < result.report.before["macs"]
    return result


# -- finding blocks -----------------------------------------------------------------------------------


def test_blocks_of_a_resnet_are_those_with_an_identity() -> None:
    assert names(*resnet()) == ["layer1.0", "layer1.1", "layer2.1"]


def test_attention_and_mlp_are_blocks_of_their_own() -> None:
    assert names(*transformer()) == [f"layers.{i}.{part}" for i in range(3) for part in ("attn", "mlp")]


class Sums(nn.Module):
    """Sums of several kinds."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem, self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        match self.kind:
            case "plain":
                return self.c(x + self.b(F.relu(self.a(x))))
            case "reversed":
                return self.c(self.b(F.relu(self.a(x))) + x)
            case "scaled branch":
                return self.c(torch.add(x, self.a(x), alpha=0.5))
            case "scaled source":
                return self.c(torch.add(self.a(x), x, alpha=0.5))
            case "branch read elsewhere":
                y = self.a(x)
                return self.c(x + self.b(y)) + y
            case "branch put out":
                y = self.a(x)
                return x + self.b(y), y
            case "projected":
                return self.c(self.a(x) + self.b(x))
            case "no weights":
                return self.c(x + 0.04 * x**3)
            case "broadcast":
                return self.c(x[:, :1] + self.a(x))
            case "subtracted":
                return self.c(x - self.a(x))
            case "nested":
                y = self.a(x)
                return self.c(x + F.relu(y + self.b(y)))
            case "branch from elsewhere":
                return self.c(self.a(x) + self.b(torch.tanh(x)))
            case "changed in place":
                y = x + self.a(F.relu_(x))  # x is what relu_ made of it
                return self.c(y) + x
            case "changed in place afterwards":
                y = x + self.a(x)
                return self.c(F.relu_(y)) + x
        raise AssertionError(self.kind)


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("plain", 1), ("reversed", 1), ("scaled branch", 1), ("scaled source", 0),
        ("branch read elsewhere", 0), ("branch put out", 0), ("projected", 0), ("no weights", 0),
        ("broadcast", 0), ("subtracted", 0), ("nested", 2), ("branch from elsewhere", 0),
        ("changed in place", 2), ("changed in place afterwards", 1),
    ],
)  # fmt: skip
def test_what_is_a_block(kind: str, count: int) -> None:
    model, inputs = Sums(kind), (torch.randn(3, 6),)
    assert len(names(model, inputs)) == count
    if count:
        oracle = copy.deepcopy(model)
        with torch.no_grad():  # a branch is zero when its last matrix is
            last = {"plain": "b", "reversed": "b", "scaled branch": "a", "nested": "ab"}.get(kind, "c")
            for name in last:
                getattr(oracle, name).weight.zero_()
                getattr(oracle, name).bias.zero_()
        inputs = widened(inputs)
        result = run(model.double(), inputs, [DepthPruning(blocks=("*",))])
        assert error(call(result.model, inputs), call(oracle.double(), inputs)) <= EXACT


def test_names_are_told_apart() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(4, 4) for _ in range(4)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for a, b, c, d in self.layers:  # type: ignore[misc]
                x = x + b(F.relu(a(x)))
                x = x + d(F.relu(c(x)))
            return F.relu(x)

    assert names(Flat(), (torch.randn(2, 4),)) == ["layers.0[0]", "layers.0[2]", "layers.1[0]", "layers.1[2]"]
    assert common_path(["a.b.weight", "a.bc.weight"]) == "a"
    assert common_path(["/a/b/weight", "/a/b/c/weight"]) == "a.b"


# -- removing them: PyTorch ---------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [("layer1.0",), ("layer1.0", "layer1.1"), ("layer1.1", "layer2.1")])
def test_a_resnet_keeps_its_class(blocks: tuple[str, ...]) -> None:
    model, inputs = resnet()
    result = checked(
        run(model, inputs, [DepthPruning(blocks=blocks)]), model, inputs, without(model, *blocks)
    )
    assert type(result.model) is ResNet
    assert set(result.model.state_dict()) == set(without(model, *blocks).state_dict())
    assert list(result.plan.of(Replace)) == [Replace(b, "relu") for b in blocks]
    result.model.train()(*inputs).sum().backward()  # still trains
    assert result.model.stem.weight.grad is not None


def test_a_whole_layer_leaves_its_list() -> None:
    model, inputs = transformer()
    result = run(model, inputs, [DepthPruning(blocks=("layers.1",))])
    checked(result, model, inputs, skipping(model, (1, "attn"), (1, "mlp")))
    assert type(result.model) is Transformer
    assert len(result.model.layers) == 2
    assert list(result.plan.of(Replace)) == [Replace("layers.1", "nothing")]
    torch.testing.assert_close(result.model.layers[1].norm1.weight, model.layers[2].norm1.weight)


def test_a_hugging_face_model_generates_with_fewer_layers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    inputs = {"input_ids": torch.randint(0, 50, (2, 6))}
    result = run(model, inputs, [DepthPruning(blocks=("model.layers.0", "model.layers.2"))])
    assert result.certificate.status == "VERIFIED"
    assert type(result.model) is type(model)
    assert result.model.config.num_hidden_layers == 2
    assert model.config.num_hidden_layers == 4
    oracle = transformers.LlamaForCausalLM(result.model.config).eval()
    state = model.state_dict()
    for ours, theirs in ((0, 1), (1, 3)):
        layer = {n: t for n, t in state.items() if n.startswith(f"model.layers.{theirs}.")}
        state |= {n.replace(f"layers.{theirs}.", f"layers.{ours}."): t for n, t in layer.items()}
    oracle.load_state_dict({n: state[n] for n in oracle.state_dict()})
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(result.model.generate(**inputs, **options), oracle.generate(**inputs, **options))


def test_a_list_that_is_indexed_gets_an_identity() -> None:
    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Residual() for _ in range(3))
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks[2](self.blocks[1](self.blocks[0](x))))  # type: ignore[no-any-return]

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(self.f(x))

    model, inputs = Indexed().double(), (torch.randn(3, 6, dtype=torch.float64),)
    oracle = copy.deepcopy(model)
    oracle.blocks[1] = nn.Identity()
    result = checked(run(model, inputs, [DepthPruning(blocks=("blocks.1",))]), model, inputs, oracle)
    assert type(result.model) is Indexed
    assert isinstance(result.model.blocks[1], nn.Identity)


def test_a_part_of_a_layer_makes_a_graph_module() -> None:
    model, inputs = transformer()
    result = run(model, inputs, [DepthPruning(blocks=("layers.0.mlp", "layers.2.attn"))])
    checked(result, model, inputs, skipping(model, (0, "mlp"), (2, "attn")))
    assert type(result.model) is not Transformer
    assert "no module of its own" in str(result.report)
    assert not any(
        n.startswith(("layers.0.mlp", "layers.0.norm2", "layers.2.attn")) for n in result.model.state_dict()
    )
    assert any(n.startswith("layers.1.mlp") for n in result.model.state_dict())


@settings(max_examples=12)
@given(st.sets(st.tuples(st.integers(0, 2), st.sampled_from(["attn", "mlp"])), min_size=1, max_size=6))
def test_any_parts_of_layers(parts: set[tuple[int, str]]) -> None:
    torch.manual_seed(1)
    model, inputs = transformer()
    result = run(
        model, inputs, [DepthPruning(blocks=tuple(f"layers.{i}.{part}" for i, part in sorted(parts)))]
    )
    checked(result, model, inputs, skipping(model, *parts))
    whole = all({(i, "attn"), (i, "mlp")} <= parts for i, _ in parts)
    assert (type(result.model) is Transformer) == whole


def test_shared_weights_stay_while_anybody_reads_them() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x + torch.tanh(self.f(self.g(x)))
            x = x + torch.sin(self.f(x))
            return self.head(x)  # type: ignore[no-any-return]

    model, inputs = Shared().double(), (torch.randn(3, 6, dtype=torch.float64),)
    found = residual_blocks(open_subject(model, inputs).analysis)[0]
    result = run(model, inputs, [DepthPruning(blocks=(found[0].name,))])
    assert set(result.model.state_dict()) == {"f.weight", "f.bias", "head.weight", "head.bias"}
    x = inputs[0]
    assert error(call(result.model, inputs), [model.head(x + torch.sin(model.f(x)))]) <= EXACT


def test_with_channel_pruning_in_one_recipe() -> None:
    model, inputs = resnet()
    for recipe in (
        [DepthPruning(blocks=("layer1.1",)), ChannelPruning(sparsity=0.5)],
        [ChannelPruning(sparsity=0.5), DepthPruning(blocks=("layer1.1",))],
    ):
        result = run(model, inputs, recipe)
        assert type(result.model) is ResNet
        assert not any(d.group.startswith("layer1.1") for d in result.plan.decisions)
        assert any(d.group.startswith("layer1.0") for d in result.plan.decisions)
        oracle = without(zeroed(model, result.plan), "layer1.1")  # type: ignore[arg-type]
        checked(result, model, inputs, oracle)


def test_a_plan_goes_through_a_file_and_onto_a_fresh_model(tmp_path: Path) -> None:
    model, inputs = resnet()
    result = run(
        model, inputs, [DepthPruning(blocks=("layer1.1", "layer2.1")), ChannelPruning(sparsity=0.25)]
    )
    result.plan.save(tmp_path / "plan")
    plan = Plan.load(tmp_path / "plan")
    assert plan == result.plan
    again = plan.apply(copy.deepcopy(model))
    assert error(call(again, inputs), call(result.model, inputs)) == 0
    state = plan.apply_state_dict(model.state_dict())
    assert {n: tuple(t.shape) for n, t in state.items()} == {
        n: tuple(t.shape) for n, t in again.state_dict().items()
    }
    again.load_state_dict(state)


def test_state_dicts_follow_what_leaves_a_list() -> None:
    model, inputs = transformer()
    result = run(model, inputs, [DepthPruning(blocks=("layers.0", "layers.1"))])
    state = result.plan.apply_state_dict(model.state_dict())
    assert set(state) == set(result.model.state_dict())
    assert all(torch.equal(t, result.model.state_dict()[n]) for n, t in state.items())


def test_state_dicts_of_graph_modules() -> None:
    model, inputs = resnet()
    exported = torch.export.export(model, inputs)
    result = run(exported, None, [DepthPruning(blocks=("layer1.1",))])
    state = result.plan.apply_state_dict(model.state_dict())
    assert set(state) == {n for n in model.state_dict() if not n.startswith("layer1.1.")}
    assert error(call(result.model.module(), inputs), call(without(model, "layer1.1"), inputs)) <= EXACT


# -- choosing ------------------------------------------------------------------------------------------


def bypassed(result: Plan) -> list[str]:
    return [b.block for b in result.of(Bypass)]


def test_the_least_block_goes_first() -> None:
    model, inputs = resnet()
    with torch.no_grad():
        model.layer1[0].bn2.weight.mul_(0.1)  # type: ignore[union-attr,operator]
        model.layer2[1].conv2.weight.mul_(0.01)  # type: ignore[union-attr,operator]
    analysis = open_subject(model, inputs).analysis
    assert bypassed(DepthPruning(sparsity=0.34).plan(analysis)) == ["layer2.1"]
    assert bypassed(DepthPruning(sparsity=0.67).plan(analysis)) == ["layer1.0", "layer2.1"]
    assert bypassed(DepthPruning(sparsity=0.3).plan(analysis)) == []
    assert bypassed(DepthPruning(sparsity=0.5, exclude=("layer2",)).plan(analysis)) == ["layer1.0"]
    assert bypassed(DepthPruning(sparsity=0.99, include=("layer1.*",)).plan(analysis)) == ["layer1.0"]
    skips = DepthPruning(sparsity=0.5, exclude=("layer2.1.conv1",)).plan(analysis).skips
    assert [(s.where, s.reason) for s in skips] == [("layer2.1", "excluded")]


@pytest.mark.parametrize(
    "options",
    [{"sparsity": 1.0}, {"sparsity": -0.1}, {"rank": "best"}, {"blocks": "layer1.0"}, {"include": "x"}],
)
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption):
        DepthPruning(**options)


def test_a_block_that_is_not_there() -> None:
    model, inputs = resnet()
    with pytest.raises(InvalidOption, match=r"layer9.*layer1\.0, layer1\.1, layer2\.1"):
        run(model, inputs, [DepthPruning(blocks=("layer9",))])


def test_text_form() -> None:
    step = DepthPruning(sparsity=0.5, blocks=("layer1.0",))
    assert parse(str(step), PASSES) == [step]


# -- ONNX ----------------------------------------------------------------------------------------------


def ort_outputs(proto: onnx.ModelProto, inputs: dict[str, Tensor]) -> list[Tensor]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(y) for y in session.run(None, {k: v.numpy() for k, v in inputs.items()})]


def onnx_size(proto: onnx.ModelProto) -> int:
    return sum(math.prod(t.dims) for t in proto.graph.initializer)


@pytest.mark.parametrize("widths", [False, True])
def test_onnx_resnet(widths: bool) -> None:
    model, (image,) = resnet()
    model, image = model.float(), image.float()
    proto = to_onnx(capture(model, (image,)).exported)
    blocks = [b.name for b in residual_blocks(open_subject(proto).analysis)[0]]
    assert blocks == ["layer1.0", "layer1.1", "layer2.1"]
    recipe = [
        DepthPruning(blocks=("layer1.1", "layer2.1")),
        *([ChannelPruning(sparsity=0.5)] if widths else []),
    ]
    result = run(proto, None, recipe)
    assert result.certificate.status == "VERIFIED"
    onnx.checker.check_model(result.model, full_check=True)
    assert (
        onnx_size(proto) - onnx_size(result.model)
        >= result.report.before["parameters"] - result.report.after["parameters"]
    )
    oracle = without(zeroed(model, result.plan) if widths else model, "layer1.1", "layer2.1")  # type: ignore[arg-type]
    feeds = {proto.graph.input[0].name: torch.randn(3, 3, 9, 9)}
    ours = ort_outputs(result.model, feeds)
    assert error(ours, call(oracle, tuple(feeds.values()))) <= 1e-5


def test_onnx_transformer() -> None:
    model, inputs = transformer()
    model = model.float()
    proto = to_onnx(capture(model, inputs).exported)
    blocks = [b.name for b in residual_blocks(open_subject(proto).analysis)[0]]
    assert blocks == [f"layers.{i}.{part}" for i in range(3) for part in ("attn", "mlp")]
    result = run(proto, None, [DepthPruning(blocks=("layers.0.mlp", "layers.1", "layers.2.attn"))])
    assert result.certificate.status == "VERIFIED"
    oracle = skipping(model, (0, "mlp"), (1, "attn"), (1, "mlp"), (2, "attn"))
    assert not any("layers.1" in t.name for t in result.model.graph.initializer)
    feeds = dict(zip([i.name for i in proto.graph.input], inputs.values(), strict=True))
    assert error(ort_outputs(result.model, feeds), call(oracle, inputs)) <= 1e-5


def test_onnx_block_at_the_end() -> None:
    class Tail(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.c(x)
            return x + self.b(F.relu(self.a(x)))  # type: ignore[no-any-return]

    model, x = Tail(), torch.randn(2, 4)
    proto = to_onnx(capture(model, (x,)).exported)
    result = run(proto, None, [DepthPruning(blocks=("*",))])
    assert result.certificate.status == "VERIFIED"
    assert [o.name for o in result.model.graph.output] == [o.name for o in proto.graph.output]
    assert error(ort_outputs(result.model, {proto.graph.input[0].name: x}), [model.c(x).detach()]) <= 1e-6


def test_influence_is_one_minus_the_cosine_of_what_passes() -> None:
    """Block influence of ShortGPT, from module hooks; the block that turns least goes first."""
    torch.manual_seed(0)

    class Residual(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.up, self.down, self.scale = nn.Linear(8, 16), nn.Linear(16, 8), scale

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.scale * self.down(self.up(x).relu())

    blocks = nn.Sequential(Residual(2.0), Residual(0.05), Residual(1.0))
    net = nn.Sequential(nn.Linear(5, 8), *blocks, nn.Linear(8, 3)).eval()
    data = [torch.randn(4, 6, 5), torch.randn(2, 6, 5)]
    pairs: dict[nn.Module, list[torch.Tensor]] = {}
    for block in blocks:
        block.register_forward_hook(
            lambda m, args, y: pairs.setdefault(m, []).append(
                1 - torch.cosine_similarity(args[0].double(), y.double(), -1).reshape(-1)
            )
        )
    with torch.no_grad():
        for batch in data:
            net(batch)
    want = [float(torch.cat(pairs[b]).mean()) for b in blocks]
    subject = open_subject(net, (data[0],))
    saliency = Saliency(subject.analysis, statistics=Statistics(subject, CalibrationData(data)))
    found, _ = residual_blocks(subject.analysis)
    got = BLOCK_SALIENCIES["influence"](subject.analysis, found, saliency)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    recipe = DepthPruning(sparsity=0.34, rank="influence")
    result = sparsecc.prune(net, (data[0],), recipe=recipe, calibration=data)
    assert result.certificate.status == "VERIFIED"
    (gone,) = [a.block for a in result.plan.actions if isinstance(a, Bypass)]
    assert gone == found[int(np.argmin(want))].name


def test_influence_needs_data() -> None:
    """Without calibration data the error names the pass and the argument."""
    recipe = DepthPruning(sparsity=0.5, rank="influence")
    with pytest.raises(InvalidOption, match="calibration="):
        sparsecc.prune(_two_blocks(), (torch.randn(2, 8),), recipe=recipe)


def _two_blocks() -> nn.Module:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.a(x).relu()
            return x + self.b(x).relu()

    return Twice().eval()
