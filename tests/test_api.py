"""The public functions and classes: what they promise whoever calls them."""

from __future__ import annotations

import copy
import doctest
import importlib
import inspect
import json
import pickle
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import sparsecc
from sparsecc.errors import InvalidOption, PlanConflict, VerificationFailed
from sparsecc.passes import ChannelPruning, HeadPruning
from tests.exported import exported
from tests.onnx_graphs import Graph, ort
from tests.patterns import CASES

MODELS = ("residual_identity", "grouped_conv", "attention", "lstm", "glu_fused_chunk", "group_norm")


def perceptron() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model whose plans take no time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    return model.eval(), (torch.randn(4, 6),)


def onnx_perceptron() -> onnx.ModelProto:
    g = Graph()
    y = g.node("Relu", [g.linear(g.input("x", ["batch", 6]), "a", 6, 12)], "act")
    g.linear(y, "b", 12, 3)
    return g.build("b")


def call(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        found = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    assert isinstance(found, Tensor)
    return found


# -- prune -------------------------------------------------------------------------------------------


def expected_counts(analysis: sparsecc.Analysis) -> dict[str, int]:
    return {g.name: g.size - g.size // 2 for g in analysis.groups}


@pytest.mark.parametrize("name", MODELS)
def test_a_sparsity_alone_halves_every_group(name: str) -> None:
    model, inputs = CASES[name].make()
    result = sparsecc.prune(model, inputs, sparsity=0.5, verify=False)
    wanted = expected_counts(sparsecc.analyze(model, inputs))
    assert {d.group: len(d.kept) for d in result.plan.decisions} == wanted
    assert {g.group: g.kept for g in result.report.groups} == wanted


@pytest.mark.parametrize("name", MODELS)
def test_a_sparsity_alone_halves_every_group_of_an_onnx_file(name: str) -> None:
    model = exported(name)
    result = sparsecc.prune(model, sparsity=0.5, verify=False)
    assert {d.group: len(d.kept) for d in result.plan.decisions} == expected_counts(sparsecc.analyze(model))


@pytest.mark.parametrize(("sparsity", "left"), [(0.0, 12), (0.1, 11), (0.25, 9), (0.99, 1)])
def test_no_more_goes_than_was_asked(sparsity: float, left: int) -> None:
    model, inputs = perceptron()
    result = sparsecc.prune(model, inputs, sparsity=sparsity)
    assert result.model[0].weight.shape == (left, 6)
    assert result.certificate.status == "VERIFIED"


def test_multiples_and_least_counts() -> None:
    model, inputs = perceptron()
    assert sparsecc.prune(model, inputs, sparsity=0.9, multiple_of=4).model[0].out_features == 4
    assert sparsecc.prune(model, inputs, sparsity=0.9, min_keep=5).model[0].out_features == 5


def test_outputs_keep_their_sizes() -> None:
    for name in MODELS:
        model, inputs = CASES[name].make()
        result = sparsecc.prune(model, inputs, sparsity=0.5, verify=False)
        assert call(result.model, inputs).shape == call(model, inputs).shape


class Named(nn.Module):
    """Two branches with names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.left = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 4))
        self.right = nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        return self.left(y) + self.right(y)  # type: ignore[no-any-return]


def widths(model: nn.Module, **options: Any) -> tuple[int, ...]:
    found = sparsecc.prune(model, (torch.randn(2, 6),), sparsity=0.5, verify=False, **options).model
    return tuple(found.get_submodule(n).out_features for n in ("stem", "left.0", "right.0"))


def test_include_and_exclude() -> None:
    torch.manual_seed(0)
    model = Named()
    assert widths(model) == (4, 5, 6)
    assert widths(model, exclude=["left"]) == (8, 10, 6)  # what left.0 reads stays whole, too
    assert widths(model, exclude="right.*") == (8, 5, 12)
    assert widths(model, exclude=[model.stem]) == (8, 5, 6)
    assert widths(model, exclude=[nn.LayerNorm]) == (4, 5, 12)
    assert widths(model, include=[model.right[1]]) == (8, 10, 6)
    assert widths(model, include=["left.*", "right.*"], exclude=["stem"]) == (8, 5, 6)
    assert widths(model, include=[nn.Linear], exclude=["*.2.weight"]) == (4, 10, 12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 1.5}, "0 <= sparsity < 1"),
        ({"sparsity": -0.1}, "0 <= sparsity < 1"),
        ({"sparsity": float("nan")}, "0 <= sparsity < 1"),
        ({"exclude": ["lefd"]}, "did you mean 'left'"),
        ({"exclude": [nn.Conv2d]}, "selects nothing"),
        ({"exclude": [nn.ReLU]}, "without parameters"),
        ({"include": [nn.Linear(2, 2)]}, "not part of the model"),
        ({"saliency": "best"}, "l2"),
        ({"allocation": "fair"}, "uniform"),
        ({"multiple_of": 0}, "positive integer"),
        ({"recipe": "Sharpen()"}, "there is no pass"),
        ({"recipe": "ChannelPruning(0.5)"}, "option=value"),
        ({"recipe": "ChannelPruning()", "sparsity": 0.5}, "either a recipe or sparsity"),
        ({"recipe": [nn.ReLU()]}, "is none"),
    ],
)
def test_bad_options_say_what_is_right(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidOption) as raised:
        sparsecc.prune(Named(), (torch.randn(2, 6),), **options)
    assert words in str(raised.value)


@pytest.mark.parametrize("saliency", ["l1", "l2", "random"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_the_same_seed_gives_the_same_plan(saliency: str, allocation: str) -> None:
    model, inputs = perceptron()
    options: dict[str, Any] = {"saliency": saliency, "allocation": allocation, "verify": False}
    first = sparsecc.prune(model, inputs, seed=3, **options).plan
    again = sparsecc.prune(copy.deepcopy(model), inputs, seed=3, **options).plan
    assert first == again
    assert first.fingerprint() == again.fingerprint()
    other = sparsecc.prune(model, inputs, seed=4, **options).plan
    assert (other == first) == (saliency != "random")


def test_recipes_in_every_form_are_the_same() -> None:
    model, inputs = perceptron()
    forms: list[Any] = [
        "ChannelPruning(sparsity=0.25); HeadPruning()",
        ChannelPruning(sparsity=0.25),
        [ChannelPruning(sparsity=0.25), HeadPruning()],
        iter([ChannelPruning(sparsity=0.25), HeadPruning()]),
    ]
    plans = [sparsecc.prune(model, inputs, recipe=r, verify=False).plan for r in forms]
    assert len({tuple(len(d.kept) for d in p.decisions) for p in plans}) == 1
    assert plans[0].recipe == "ChannelPruning(sparsity=0.25); HeadPruning()"


def test_a_pass_alone_is_a_function_of_models() -> None:
    model, inputs = perceptron()
    program = torch.export.export(model, inputs)
    traced = torch.fx.symbolic_trace(model)
    step = ChannelPruning(sparsity=0.5)
    for given, arguments in ((model, inputs), (traced, inputs), (program, None), (onnx_perceptron(), None)):
        result = step(given, arguments)
        assert result.certificate.status == "VERIFIED"
        assert isinstance(result, sparsecc.Pruned)


def test_progress_is_told() -> None:
    stages: list[str] = []
    sparsecc.prune(*perceptron(), sparsity=0.5, progress=stages.append)
    assert stages == ["capture", "analyse", "plan", "edit", "verify"]


# -- plans -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual_identity", "attention", "split_uneven", "lstm"])
def test_a_stored_plan_gives_the_same_model(name: str, tmp_path: Path) -> None:
    model, inputs = CASES[name].make()
    fresh = copy.deepcopy(model)
    result = sparsecc.prune(model, inputs, sparsity=0.5, verify=False)
    result.plan.save(tmp_path / "net.plan")
    plan = sparsecc.Plan.load(tmp_path / "net.plan")
    assert plan == result.plan
    again = plan.apply(fresh, None if plan.form == "class" else inputs)
    assert type(again).__name__ == type(result.model).__name__
    assert (type(again) is type(fresh)) == (plan.form == "class")
    ours, theirs = again.state_dict(), result.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert torch.equal(call(again, inputs), call(result.model, inputs))
    if plan.form == "class":
        state = plan.apply(fresh.state_dict())
        assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in theirs.items()}
        assert all(torch.equal(state[n], theirs[n]) for n in state)


def test_a_stored_plan_gives_the_same_onnx_model(tmp_path: Path) -> None:
    model = exported("attention")
    result = sparsecc.prune(model, sparsity=0.5, verify=False)
    result.plan.save(tmp_path / "net.plan")
    again = sparsecc.Plan.load(tmp_path / "net.plan").apply(model)
    assert again.SerializeToString() == result.model.SerializeToString()


def test_a_plan_refuses_other_models() -> None:
    model, inputs = perceptron()
    plan = sparsecc.prune(model, inputs, sparsity=0.5, verify=False).plan
    with pytest.raises(PlanConflict, match=r"0\.weight"):
        plan.apply(nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)))
    with pytest.raises(PlanConflict, match="the model given is onnx"):
        plan.apply(onnx_perceptron())
    with pytest.raises(PlanConflict, match="another model"):
        sparsecc.verify(Named(), model, (torch.randn(2, 6),), plan=plan)


def test_saved_results_load_again(tmp_path: Path) -> None:
    model, inputs = perceptron()
    result = sparsecc.prune(model, inputs, sparsity=0.5)
    result.save(tmp_path / "small.plan")
    again = sparsecc.Plan.load(tmp_path / "small.plan").apply(copy.deepcopy(model))
    assert torch.equal(call(again, inputs), call(result.model, inputs))
    result.save(tmp_path / "small.safetensors")
    from safetensors.torch import load_file

    again.load_state_dict(load_file(tmp_path / "small.safetensors"))
    onnx_result = sparsecc.prune(onnx_perceptron(), sparsity=0.5)
    onnx_result.save(tmp_path / "small.onnx")
    assert onnx.load(tmp_path / "small.onnx") == onnx_result.model


# -- verify ------------------------------------------------------------------------------------------


def test_verify_accepts_what_prune_made() -> None:
    model, inputs = perceptron()
    result = sparsecc.prune(model, inputs, sparsity=0.5, verify=False)
    assert result.certificate.status == "UNCHECKED"
    assert sparsecc.verify(model, result, inputs).status == "VERIFIED"
    assert sparsecc.verify(model, result.model, inputs, plan=result.plan).status == "VERIFIED"
    proto = onnx_perceptron()
    small = sparsecc.prune(proto, sparsity=0.5, verify=False)
    assert sparsecc.verify(proto, small).status == "VERIFIED"
    assert sparsecc.verify(proto, small.model, plan=small.plan).status == "VERIFIED"


def test_verify_catches_a_tampered_module() -> None:
    model, inputs = perceptron()
    result = sparsecc.prune(model, inputs, sparsity=0.5)
    with torch.no_grad():
        result.model[2].weight[0, 0] += 1e-3
    certificate = sparsecc.verify(model, result.model, inputs, plan=result.plan)
    assert certificate.status == "FAILED"
    with pytest.raises(VerificationFailed, match="checks failed"):
        certificate.require()


def test_verify_catches_a_tampered_onnx_model() -> None:
    proto = onnx_perceptron()
    result = sparsecc.prune(proto, sparsity=0.5)
    tampered = copy.deepcopy(result.model)
    weight = next(t for t in tampered.graph.initializer if t.name == "b.weight")
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0, 0] += 1e-3
    weight.CopyFrom(onnx.numpy_helper.from_array(values, "b.weight"))
    assert sparsecc.verify(proto, tampered, plan=result.plan).status == "FAILED"
    swapped = copy.deepcopy(result.model)
    swapped.graph.node[2].op_type = "Sigmoid"
    assert sparsecc.verify(proto, swapped, plan=result.plan).status == "FAILED"


def test_verify_without_a_plan_means_the_same_function() -> None:
    model, inputs = perceptron()
    assert sparsecc.verify(model, copy.deepcopy(model), inputs).status in ("VERIFIED", "VACUOUS")
    pruned = sparsecc.prune(model, inputs, sparsity=0.5, verify=False)
    assert sparsecc.verify(model, pruned.model, inputs).status == "FAILED"


def test_verify_catches_a_tampered_artifact(tmp_path: Path) -> None:
    model, inputs = perceptron()
    compiled = sparsecc.compile(model, inputs, recipe="ChannelPruning(sparsity=0.5)")
    assert sparsecc.verify(model, compiled, inputs).status == "VERIFIED"
    other, _ = perceptron()
    with torch.no_grad():
        other[0].weight += 0.1
    assert sparsecc.verify(other, compiled, inputs).status == "FAILED"


# -- compile -----------------------------------------------------------------------------------------

PRUNE = "ChannelPruning(sparsity=0.5)"


@pytest.mark.parametrize("target", ["cpu", "onnx"])
def test_compiled_models_are_called_like_the_original(target: str) -> None:
    model, inputs = CASES["keywords_and_nested_outputs"].make()
    compiled = sparsecc.compile(model, inputs, target=target, recipe=PRUNE)
    pruned = sparsecc.prune(model, inputs, recipe=PRUNE, verify=False).model
    by_name = compiled(**inputs)
    wanted = torch.utils._pytree.tree_leaves(pruned(**inputs))
    found = torch.utils._pytree.tree_leaves(by_name)
    assert len(found) == len(wanted)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))
    arrays = compiled(**{n: v.numpy() if isinstance(v, Tensor) else v for n, v in inputs.items()})
    assert all(isinstance(a, np.ndarray) for a in torch.utils._pytree.tree_leaves(arrays))


@pytest.mark.parametrize("target", ["cpu", "onnx"])
def test_compiled_onnx_models_take_torch_and_numpy(target: str) -> None:
    proto = onnx_perceptron()
    compiled = sparsecc.compile(proto, target=target, recipe=PRUNE)
    x = torch.randn(5, 6)
    expected = ort(sparsecc.prune(proto, recipe=PRUNE).model, {"x": x})[0]
    for result in (compiled(x), compiled(x=x), compiled({"x": x})):
        assert isinstance(result, Tensor)
        assert np.allclose(result.numpy(), expected, atol=1e-6)
    array = compiled(x.numpy())
    assert isinstance(array, np.ndarray)
    assert np.allclose(array, expected, atol=1e-6)


def test_compiling_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for make in (lambda: CASES["attention"].make(), lambda: (onnx_perceptron(), None)):
        for place in ("a", "b"):
            model, inputs = make()
            sparsecc.compile(model, inputs, recipe=f"{PRUNE}; HeadPruning()").save(tmp_path / place)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        (tmp_path / "a").unlink()
        (tmp_path / "b").unlink()


def test_a_bare_module_is_compiled_at_its_first_call() -> None:
    model, inputs = perceptron()
    compiled = sparsecc.compile(model, recipe=PRUNE)
    for name in ("report", "plan", "certificate", "artifact"):
        with pytest.raises(InvalidOption, match="compiles at its first call"):
            getattr(compiled, name)
    with pytest.raises(InvalidOption, match="compiles at its first call"):
        compiled.save("never.scc")
    assert not Path("never.scc").exists()
    first = compiled(*inputs)
    assert compiled.certificate.status == "VERIFIED"
    assert torch.equal(compiled(*inputs), first)
    eager = sparsecc.compile(model, inputs, recipe=PRUNE)
    assert torch.allclose(eager(*inputs), first)
    assert compiled.plan == eager.plan


SCRIPT = """
import json, sys
import numpy as np
import sparsecc
compiled = sparsecc.load(sys.argv[1])
y = compiled(np.load(sys.argv[2]))
print(json.dumps({"sum": float(abs(y).sum()), "shape": y.shape, "status": compiled.certificate.status,
                  "decisions": len(compiled.plan.decisions), "before": compiled.report.before["parameters"]}))
"""


def test_an_artifact_needs_no_user_code(tmp_path: Path) -> None:
    """The model's class lives in a module that the loading process cannot import."""
    source = """
        import torch
        class Secret(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)
            def forward(self, x):
                return self.b(torch.relu(self.a(x)))
    """
    namespace: dict[str, Any] = {"__name__": "a_module_that_is_nowhere"}
    exec(textwrap.dedent(source), namespace)
    x = torch.randn(4, 6)
    compiled = sparsecc.compile(namespace["Secret"](), (x,), recipe=PRUNE)
    compiled.save(tmp_path / "net.scc")
    np.save(tmp_path / "x.npy", x.numpy())
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "net.scc"), str(tmp_path / "x.npy")]
    printed = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(sparsecc.__file__).parents[1]
    )
    found = json.loads(printed.stdout)
    assert found["shape"] == [4, 3]
    assert found["status"] == "VERIFIED"
    assert found["decisions"] == 1
    assert found["sum"] == pytest.approx(float(compiled(x).abs().sum()), rel=1e-5)
    again = sparsecc.load(tmp_path / "net.scc")
    assert again.plan == compiled.plan
    assert again.certificate == compiled.certificate
    assert again.report == compiled.report


def test_artifacts_hold_no_pickles(tmp_path: Path) -> None:
    compiled = sparsecc.compile(*perceptron(), recipe=PRUNE)
    compiled.save(tmp_path / "net.scc")
    with zipfile.ZipFile(tmp_path / "net.scc") as archive:
        for name in archive.namelist():
            with pytest.raises(
                (pickle.UnpicklingError, EOFError, KeyError, IndexError, ValueError, AttributeError)
            ):
                _Strict(archive.open(name)).load()


class _Strict(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name}")


# -- the package -------------------------------------------------------------------------------------


def public_objects() -> list[tuple[str, Any]]:
    return [(name, getattr(sparsecc, name)) for name in sparsecc.__all__]


@pytest.mark.parametrize(("name", "thing"), public_objects())
def test_public_names_are_documented(name: str, thing: Any) -> None:
    assert inspect.getdoc(thing), name
    if not inspect.isclass(thing):
        return
    for member, value in vars(thing).items():
        if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
            assert inspect.getdoc(value), f"{name}.{member}"


def test_functions_say_what_they_raise() -> None:
    for function in (sparsecc.prune, sparsecc.compile, sparsecc.load, sparsecc.verify):
        assert "aise" in (inspect.getdoc(function) or ""), function


@pytest.mark.parametrize("module", ["sparsecc.api", "sparsecc.recipe"])
def test_examples_in_docstrings(module: str) -> None:
    found = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert found.attempted > 0
    assert found.failed == 0


def fresh(code: str) -> str:
    root = Path(sparsecc.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    ).stdout


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'onnx', 'onnxruntime', 'onnxscript', 'numpy', 'safetensors'}"
    assert fresh(f"import sys, sparsecc; print({heavy} & set(sys.modules))").strip() == "set()"


def test_public_names_are_loaded_when_they_are_used() -> None:
    code = "import sys, sparsecc; sparsecc.Plan; print('torch' in sys.modules, 'prune' in dir(sparsecc))"
    assert fresh(code).split() == ["False", "True"]
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        sparsecc.prun  # noqa: B018


def test_runtimes_are_imported_when_they_are_needed() -> None:
    code = """
import sys, torch, sparsecc
net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
sparsecc.prune(net, (torch.randn(2, 4),), sparsity=0.5)
print({'onnxruntime', 'onnxscript', 'tvm'} & set(sys.modules))
"""
    assert fresh(code).strip() == "set()"


def test_every_input_stays_as_it_was() -> None:
    model, inputs = perceptron()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.train()
    functions: list[Callable[[], Any]] = [
        lambda: sparsecc.prune(model, inputs, sparsity=0.5),
        lambda: sparsecc.compile(model, inputs, recipe=PRUNE),
        lambda: sparsecc.analyze(model, inputs),
    ]
    for function in functions:
        function()
        assert model.training
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())


class Flagged(nn.Module):
    """``outputs`` has the value of a width by chance, and says what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 6), nn.Linear(6, 3)
        self.width, self.outputs = 6, 6

    def forward(self, x: Tensor) -> Any:
        y = self.last(self.first(x).relu().view(-1, self.width))
        return y if self.outputs == 6 else (y, y)


def test_a_class_that_would_return_something_else_is_not_given_back() -> None:
    x = torch.randn(4, 8)
    result = sparsecc.prune(Flagged().eval(), (x,), sparsity=0.5)
    assert result.certificate.status == "VERIFIED"
    assert result.plan.form == "graph"
    assert result.model(x).shape == (4, 3)
    assert any("returns other values" in note for note in result.applied.notes)


@pytest.mark.parametrize("recipe", [None, "ChannelPruning(sparsity=0.5)"])
def test_exported_programs_are_compiled_and_timed(recipe: str | None) -> None:
    """What is exported already is lowered as it is, and runs with other batches."""
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(net, (torch.randn(3, 8),), dynamic_shapes=({0: batch},))
    compiled = sparsecc.compile(program, target="cpu", recipe=recipe, latency=True)
    assert compiled.certificate.status == "VERIFIED"
    assert compiled.report.latency is not None
    x = torch.randn(5, 8)
    if recipe is None:
        torch.testing.assert_close(compiled(x), net(x))
    else:
        pruned = sparsecc.prune(program, recipe=recipe).model
        torch.testing.assert_close(compiled(x), pruned.module()(x))
