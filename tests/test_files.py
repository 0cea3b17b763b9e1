"""The benchmark over files that others published: its lock, its rows and its page, without the network."""

from __future__ import annotations

import pytest

from benchmarks import data, files
from tests.exported import exported


def test_every_file_is_pinned_and_hashed() -> None:
    packages = data.read_lock(files.LOCK)
    assert len({p.name for p in packages}) == len(packages) >= 5
    for package in packages:
        assert package.source == "pypi"
        assert package.version in package.file
        assert len(package.sha256) == 64
        assert package.bytes > 10_000
        assert package.licence
        assert all(pattern.endswith(".onnx") for pattern in package.unpack)


def test_a_file_becomes_a_row() -> None:
    row = files.pruned("some 1.0", "conv.onnx", exported("conv_bn_relu").SerializeToString())
    assert row.outcome == "verified"
    assert row.left is not None
    assert row.left < 0.6
    assert row.groups >= 1
    assert f"| some 1.0 | conv.onnx | verified | 0.00 M | {row.left:.0%} |" in files.markdown([row])


@pytest.mark.parametrize("content", [b"", b"no model at all", b"\x08\x07" * 50])
def test_what_is_no_model_is_refused(content: bytes) -> None:
    row = files.pruned("some 1.0", "broken.onnx", content)
    assert (row.outcome, row.groups) == ("refused", 0)
    assert row.words
