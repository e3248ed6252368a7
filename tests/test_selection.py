"""What is run of the tests (tests/support/selection.py)."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.support.selection import in_part, mark_all_but_few


class Item:
    """What is used of a test, as pytest has it."""

    def __init__(self, nodeid: str, *markers: pytest.MarkDecorator) -> None:
        self.nodeid, self.markers = nodeid, [marker.mark for marker in markers]

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return next((marker for marker in self.markers if marker.name == name), None)

    def add_marker(self, marker: pytest.MarkDecorator) -> None:
        self.markers.append(marker.mark)


def cases(test: str, count: int, *markers: pytest.MarkDecorator) -> list[Item]:
    return [Item(f"tests/test_it.py::{test}[{number}]", *markers) for number in range(count)]


def fast(items: list[Item]) -> list[Item]:
    return [item for item in items if item.get_closest_marker("slow") is None]


def test_few_cases_of_each_test_are_fast():
    many, less = cases("test_many", 40, pytest.mark.few(5)), cases("test_less", 3, pytest.mark.few(5))
    plain = cases("test_plain", 40)
    mark_all_but_few([*many, *less, *plain])
    assert len(fast(many)) == 5
    assert fast(less) == less
    assert fast(plain) == plain


def test_they_are_the_same_whatever_else_is_run():
    alone, among = (cases("test_many", 40, pytest.mark.few(5)) for _ in range(2))
    mark_all_but_few(alone)
    mark_all_but_few([*cases("test_other", 9, pytest.mark.few(2)), *reversed(among)])
    assert [item.nodeid for item in fast(alone)] == [item.nodeid for item in fast(among)]


def test_they_are_spread():
    many = cases("test_many", 400, pytest.mark.few(40))
    mark_all_but_few(many)
    kept = Counter(many.index(item) // 100 for item in fast(many))
    assert min(kept[quarter] for quarter in range(4)) >= 4


def test_what_is_slow_anyhow_is_not_counted():
    many = cases("test_many", 40, pytest.mark.few(5))
    for item in many[:30]:
        item.add_marker(pytest.mark.slow)
    mark_all_but_few(many)
    assert len(fast(many)) == 5


def test_every_test_is_in_one_part():
    many = cases("test_many", 200)
    for item in many:
        assert [in_part(item, part, 8) for part in range(8)].count(True) == 1
    assert all(any(in_part(item, part, 8) for item in many) for part in range(8))
