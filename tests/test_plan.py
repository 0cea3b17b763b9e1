"""Plans: storage, application to weights, conflicts, damage, determinism."""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sparsecc.errors import InvalidModel, InvalidOption, PlanConflict
from sparsecc.fx.editor import edit
from sparsecc.fx.subject import TorchSubject
from sparsecc.lowering import lower
from sparsecc.passes import ChannelPruning, HeadPruning
from sparsecc.pipeline import run
from sparsecc.plan import (
    Action,
    Bypass,
    Decision,
    Mask,
    Pattern,
    Plan,
    SetAttr,
    SetModule,
    SetShape,
    Skip,
    Take,
    Write,
)
from tests.oracles import call, error
from tests.patterns import CASES

PASSES = (ChannelPruning(sparsity=0.5), HeadPruning(sparsity=0.5, head_dims=True))

names = st.text(min_size=1, max_size=8)
indices = arrays.arrays(np.int64, st.integers(0, 6), elements=st.integers(0, 9))
scalars = st.one_of(
    st.integers(-5, 5), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), names, st.none()
)
floats = st.floats(0, 9)
shapes = arrays.array_shapes(max_dims=3, max_side=3)
values = st.one_of(scalars, st.lists(st.integers(0, 9), max_size=3))
uses = st.none() | st.tuples(names, st.integers(0, 3))
actions = st.one_of(
    st.builds(Take, names, st.integers(0, 3), st.integers(10, 12), indices, uses),
    st.builds(Mask, names, arrays.arrays(np.bool_, shapes)),
    st.builds(Write, names, arrays.arrays(np.float32, shapes, elements=st.floats(-9, 9, width=32))),
    st.builds(SetShape, names, st.lists(st.none() | st.integers(-1, 9), max_size=4).map(tuple)),
    st.builds(SetAttr, names, names, values),
    st.builds(SetModule, names, names, st.integers(0, 9)),
    st.builds(Bypass, names, names, names),
)
plans = st.builds(
    Plan,
    dialect=st.sampled_from(["torch", "onnx"]),
    mode=st.sampled_from(["prune", "slim"]),
    actions=st.lists(actions, max_size=5).map(tuple),
    decisions=st.lists(st.builds(Decision, names, st.integers(1, 9), indices, names), max_size=3).map(tuple),
    skips=st.lists(st.builds(Skip, names, names), max_size=3).map(tuple),
    patterns=st.lists(
        st.builds(
            Pattern, names, st.integers(0, 3), names, st.sampled_from(["pruned", "there", "dense"]), floats
        ),
        max_size=3,
    ).map(tuple),
    shapes=st.dictionaries(names, st.lists(st.integers(0, 9), max_size=3).map(tuple), max_size=3),
    recipe=names,
)


def pruned(name: str = "residual_projection") -> tuple[torch.nn.Module, Any, Plan]:
    model, inputs = CASES[name].make()
    return model, inputs, run(model, inputs, PASSES, verify=False).plan


# -- storage -------------------------------------------------------------------------------------------


@given(plans)
def test_members_give_the_plan_back(plan: Plan) -> None:
    again = Plan.from_members(plan.members())
    assert again == plan
    assert again.members() == plan.members()
    assert str(again) == str(plan)


@pytest.mark.parametrize(
    "name", ["residual_projection", "fused_qkv_chunk", "grouped_queries_repeated", "slices"]
)
def test_saved_plans_are_equal_and_print_alike(name: str, tmp_path: Path) -> None:
    _, _, plan = pruned(name)
    plan.save(tmp_path / "p.plan")
    again = Plan.load(tmp_path / "p.plan")
    assert again == plan
    assert hash(again) == hash(plan)
    assert str(again) == str(plan)
    plan.save(tmp_path / "q.plan")
    assert (tmp_path / "p.plan").read_bytes() == (tmp_path / "q.plan").read_bytes()


def test_same_inputs_give_the_same_plan_and_other_weights_another() -> None:
    _, _, first = pruned()
    _, _, second = pruned()
    assert first.fingerprint() == second.fingerprint()
    model, inputs = CASES["residual_projection"].make()
    with torch.no_grad():
        model[0][0].weight.mul_(torch.randn(8, 1, 1, 1))  # type: ignore[index]
    assert run(model, inputs, PASSES, verify=False).plan != first


def test_a_saved_plan_holds_no_pickle(tmp_path: Path) -> None:
    _, _, plan = pruned()
    plan.save(tmp_path / "p.plan")
    with zipfile.ZipFile(tmp_path / "p.plan") as archive:
        assert sorted(archive.namelist()) == ["plan.json", "plan.safetensors"]
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())


# -- damage --------------------------------------------------------------------------------------------


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    document = json.loads(members["plan.json"])
    change(document)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**members, "plan.json": json.dumps(document).encode()}.items():
            archive.writestr(name, data)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(format=2),
        lambda d: d.pop("actions"),
        lambda d: d["actions"][0].update(kind="Explode"),
        lambda d: d["actions"][0].update(indices="nowhere"),
        lambda d: d["actions"][0].pop("axis"),
        lambda d: d["actions"][0].update(surprise=1),
        lambda d: d.update(actions=3),
        lambda d: d["decisions"][0].update(kept="nowhere"),
        lambda d: d.update(shapes=[1]),
        lambda d: d.update(dialect="latin"),
        lambda d: d.update(mode="grow"),
        lambda d: d["actions"][0].update(axis="x"),
        lambda d: d["actions"][0].update(size=-3),
        lambda d: d["actions"][0].update(size=2),
    ],
)
def test_malformed_documents_are_refused(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    _, _, plan = pruned()
    plan.save(tmp_path / "p.plan")
    rewritten(tmp_path / "p.plan", change)
    with pytest.raises(InvalidModel):
        Plan.load(tmp_path / "p.plan")


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["actions"][0].pop("shape"),
        lambda d: d["actions"][0].update(shape=[2**40, 8]),
        lambda d: d["actions"][0].update(shape=[-4, -2]),
        lambda d: d["actions"][0].update(shape=[4, 1]),
        lambda d: d["actions"][0].update(shape=8),
        lambda d: d["patterns"][0].update(state="odd"),
        lambda d: d["patterns"][0].pop("weight"),
    ],
)
def test_malformed_masks_and_patterns_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    mask = Mask("w", np.eye(4, 5, dtype=bool))
    plan = Plan("torch", actions=(mask,), patterns=(Pattern("w", 1, "2:4", "pruned", 1.0, 2.0),))
    plan.save(tmp_path / "p.plan")
    assert np.array_equal(next(Plan.load(tmp_path / "p.plan").of(Mask)).keep, mask.keep)
    rewritten(tmp_path / "p.plan", change)
    with pytest.raises(InvalidModel):
        Plan.load(tmp_path / "p.plan")


def test_a_mask_of_another_shape_is_a_conflict() -> None:
    plan = Plan("torch", actions=(Mask("weight", np.ones((1, 8), bool)),))
    with pytest.raises(PlanConflict, match="of shape"):
        plan.apply_state_dict({"weight": torch.ones(4, 8)})


def test_truncated_files_are_refused_at_every_length(tmp_path: Path) -> None:
    _, _, plan = pruned("conv_bn_relu")
    plan.save(tmp_path / "p.plan")
    data = (tmp_path / "p.plan").read_bytes()
    for length in [0, 1, 20, *range(100, len(data), len(data) // 12)]:
        (tmp_path / "cut.plan").write_bytes(data[:length])
        with pytest.raises(InvalidModel, match=r"cut\.plan"):
            Plan.load(tmp_path / "cut.plan")


def test_other_files_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="no such file"):
        Plan.load(tmp_path / "none.plan")
    (tmp_path / "text.plan").write_text("hello")
    with pytest.raises(InvalidModel, match=r"text\.plan"):
        Plan.load(tmp_path / "text.plan")
    with zipfile.ZipFile(tmp_path / "empty.plan", "w"):
        pass
    with pytest.raises(InvalidModel, match=r"empty\.plan"):
        Plan.load(tmp_path / "empty.plan")
    with pytest.raises(InvalidModel):
        Plan.load(tmp_path)


@pytest.mark.parametrize("flip", range(0, 400, 37))
def test_flipped_bytes_never_give_another_error(tmp_path: Path, flip: int) -> None:
    _, _, plan = pruned("conv_bn_relu")
    plan.save(tmp_path / "p.plan")
    data = bytearray((tmp_path / "p.plan").read_bytes())
    data[flip] ^= 0x5A
    (tmp_path / "p.plan").write_bytes(bytes(data))
    with contextlib.suppress(InvalidModel):
        Plan.load(tmp_path / "p.plan")


# -- application ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["residual_projection", "tied_embedding", "lstm_two_layers_bidirectional", "frozen_parameters"]
)
def test_a_state_dict_is_cut_like_the_model(name: str) -> None:
    model, inputs = CASES[name].make()
    result = run(model, inputs, PASSES, verify=False)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    cut = result.plan.apply_state_dict(model.state_dict())
    assert cut.keys() == before.keys()
    result.model.load_state_dict(cut)
    assert all(torch.equal(result.model.state_dict()[n], t) for n, t in cut.items())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_ties_of_a_state_dict_survive() -> None:
    model, _, plan = pruned("tied_embedding")
    cut = plan.apply_state_dict(model.state_dict())
    assert cut["table.weight"].data_ptr() == cut["lm_head.weight"].data_ptr()


def test_a_fresh_copy_takes_the_plan() -> None:
    model, inputs, plan = pruned()
    fresh, _ = CASES["residual_projection"].make()
    small = plan.apply(fresh, inputs)
    assert type(small) is type(model)
    assert error(call(small, inputs), call(run(model, inputs, PASSES).model, inputs)) == 0


def test_weights_of_other_shapes_are_a_conflict() -> None:
    model, _, plan = pruned()
    state = model.state_dict()
    state["0.0.weight"] = state["0.0.weight"][:4]
    with pytest.raises(
        PlanConflict, match=r"0\.0\.weight: has shape \(4, 3, 3, 3\), planned for \(8, 3, 3, 3\)"
    ):
        plan.apply_state_dict(state)
    other, other_inputs = CASES["conv_bn_relu"].make()
    with pytest.raises(PlanConflict):
        plan.apply(other, other_inputs)


def test_constants_that_nodes_share_cannot_be_cut_in_a_state_dict() -> None:
    plan = Plan("torch", actions=(Take("n", 0, 4, np.arange(2), ("mul", 1)),))
    with pytest.raises(PlanConflict, match="cut differently"):
        plan.apply_state_dict({"n": torch.zeros(4)})


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (SetAttr("nowhere", "groups", 2), "lacks"),
        (SetShape("nowhere", (1, 2)), "lacks"),
        (SetAttr("relu", "groups", 2), "no 'groups' to set"),
        (Bypass("b", "nowhere", "relu"), "lacks"),
    ],
)
def test_actions_that_do_not_fit_the_graph_are_conflicts(action: Action, words: str) -> None:
    model, inputs = CASES["conv_bn_relu"].make()
    subject = TorchSubject(model, inputs)
    with pytest.raises(PlanConflict, match=words):
        edit(subject.program, Plan("torch", actions=(action,)))


def test_masks_that_do_not_fit_their_group_are_refused() -> None:
    model, inputs = CASES["conv_bn_relu"].make()
    analysis = TorchSubject(model, inputs).analysis
    name = analysis.groups[0].name
    with pytest.raises(InvalidOption, match="a mask of 3 for a group of 8"):
        lower(analysis, {name: np.ones(3, bool)})
    with pytest.raises(InvalidOption, match="at least one position must stay"):
        lower(analysis, {name: np.zeros(8, bool)})
    with pytest.raises(KeyError, match="no group 'nothing'"):
        lower(analysis, {"nothing": np.ones(3, bool)})


def test_written_and_masked_values_are_put_in_before_positions_go() -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    values = np.full((3, 4), 7.0, np.float32)
    keep = np.ones((3, 4), bool)
    keep[:, 1] = False
    plan = Plan(
        "torch",
        actions=(Take("w", 0, 3, np.array([0, 2])), Mask("w", keep), Write("w", values)),
        shapes={"w": (3, 4)},
    )
    assert plan.apply_state_dict({"w": weight})["w"].tolist() == [[7, 0, 7, 7], [7, 0, 7, 7]]
    assert weight[0, 1] == 1


def test_an_empty_plan_is_false_and_changes_nothing() -> None:
    plan = Plan("torch")
    assert not plan
    state = {"w": torch.ones(2)}
    assert plan.apply_state_dict(state)["w"] is state["w"]
