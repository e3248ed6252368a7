"""Rotary embeddings of skipped steps: those of the last full one, and what that saves."""

from __future__ import annotations

import pytest

from benchmarks import rotary


@pytest.mark.parametrize(
    ("build", "computing"), [(rotary.wan, 2), (rotary.demo, 41)], ids=["wan", "bundled model"]
)
def test_remembered_embeddings_save_operators_and_change_nothing(build: rotary.Build, computing: int):
    """Operators that are no views, counted in a skipped step."""
    row = rotary.measure(build, "stack", rounds=1)  # raises where a number differs
    assert row["computing without memo"] - row["computing"] >= computing
