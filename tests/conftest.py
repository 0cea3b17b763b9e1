"""Options, hypothesis profiles and fixtures that all tests share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

from benchmarks.zoo.torchvision_ops import define
from tests.patterns import CASES

torch.set_num_threads(1)
# Tests build what they test, and leave nothing behind; a machine without TVM may be given what another built.
os.environ["SPARSECC_KERNELS"] = os.environ.get("SPARSECC_TEST_KERNELS", "off")
define()  # transformers imports torchvision where it is installed

_SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large)
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=60, suppress_health_check=_SLOW)
settings.register_profile("nightly", deadline=None, max_examples=2000, suppress_health_check=_SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

TABLE = {
    "tests/test_property_torch.py::test_every_entry_of_the_table_computes_masked_semantics",
    "tests/test_onnx_property.py::test_every_rule_is_fuzzed_in_some_dialect",
}
GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write golden files instead of comparing")


class Together(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """Tests that share what was captured run in one process, which captures it once."""

    def _split_scope(self, nodeid: str) -> str:
        """A pattern's name, the random networks that call every operator, or the test alone."""
        function, _, rest = nodeid.partition("[")
        if (name := rest.removesuffix("]")) in CASES:
            return name
        return "table" if function in TABLE else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Together:
    return Together(config, log)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden("groups/name.txt", text)`` compares a text with a file under tests/golden."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"{path} is missing; run pytest --update-golden and look at the difference"
        assert text == path.read_text(encoding="utf-8"), (
            f"{path} differs; pytest --update-golden writes it anew"
        )

    return check
