"""Nothing is forgotten: every operator of ONNX's default domain has a rule, or a reason to stay whole."""

from __future__ import annotations

import onnx.defs
import pytest

from sparsecc.axes import RULES
from sparsecc.onnxfile import contrib, opaque, ops


def default_domain() -> set[str]:
    """Operators that a model of opset 11 or newer may use."""
    schemas = onnx.defs.get_all_schemas_with_history()
    return {s.name for s in schemas if s.domain == ""}


def test_every_operator_of_the_default_domain_is_in_one_table() -> None:
    ruled, frozen = set(ops.TABLE) - set(contrib.DEFAULT), set(opaque.DEFAULT)
    assert ruled & frozen == set()
    assert default_domain() - ruled - frozen == set(), "decide: a rule in ops.TABLE, or a reason in opaque"
    assert (ruled | frozen) - default_domain() == set(), "no operators of this onnx"


def test_no_fused_operator_is_in_both_tables() -> None:
    assert {name for domain, name in opaque.CONTRIB if domain == "com.microsoft"} & set(
        contrib.TABLE
    ) == set()


@pytest.mark.parametrize("why", sorted({*opaque.DEFAULT.values(), *opaque.CONTRIB.values()}))
def test_a_reason_completes_the_sentence_that_names_the_operator(why: str) -> None:
    """``opaque 'y' (node 3, NonZero) puts places in a tensor into data``"""
    assert why[0].islower()
    assert not why.endswith(".")


def test_the_rule_of_what_stays_whole_is_there() -> None:
    assert "opaque" in RULES
