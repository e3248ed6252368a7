"""Which tests run: a few of a test's cases by default, and parts of all."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest


def mark_all_but_few(items: Sequence[pytest.Item]) -> None:
    """Of a test's cases keep as many as its marker ``few`` says, the others are slow.

    Which goes by their names: those that are next to each other are alike.
    """
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("few") and not item.get_closest_marker("slow"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for found in cases.values():
        marker = found[0].get_closest_marker("few")
        assert marker is not None
        (count,) = marker.args
        for item in sorted(found, key=_number_of)[count:]:
            item.add_marker(pytest.mark.slow)


def in_part(item: pytest.Item, part: int, parts: int) -> bool:
    """Whether a test is in the ``part``-th, from 0, of so many parts of all tests."""
    return _number_of(item) % parts == part


def _number_of(item: pytest.Item) -> int:
    """A number that has nothing to do with what a test is about."""
    return int.from_bytes(hashlib.sha256(item.nodeid.encode()).digest()[:4], "big")
