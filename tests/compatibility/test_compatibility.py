"""docs/compatibility.md is what situations come to: every row, and nothing beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="offloading needs accelerate")
pytest.importorskip("peft", reason="LoRA of diffusers models needs peft")

import hicache.engine
from hicache.runtime.context import Contexts
from tests.compatibility.checks import Outcome, plain_run
from tests.compatibility.page import COMMAND, page, read, versions
from tests.compatibility.registry import WRONG, Row, try_out
from tests.compatibility.situations import rows
from tests.compatibility.subjects import MODELS, STEPS

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
ROWS = rows()
# Models' own code, and what diffusers refuses by itself, differ from one version to the next.
of_the_page = pytest.mark.skipif(
    versions() not in PAGE.read_text(), reason=f"docs/compatibility.md is not {versions().lower()}"
)


def representative() -> set[str]:
    """Every situation that costs little with one model, and every model: the least used one each time."""
    used: Counter[str] = Counter()
    chosen = set()
    # those with fewest models first: the others have a choice
    for row in sorted(ROWS, key=lambda row: len(row.situation.models)):
        situation = row.situation
        if situation.costly or any(f"{situation.name} / {model}" in chosen for model in situation.models):
            continue
        model = min(situation.models, key=lambda model: used[model])
        used[model] += 1
        chosen.add(f"{situation.name} / {model}")
    missing = {row.model: row.key for row in reversed(ROWS) if not used[row.model]}  # its first row
    return chosen | set(missing.values())


def parameters() -> list[Any]:
    cheap = representative()
    return [pytest.param(row, id=row.key, marks=() if row.key in cheap else pytest.mark.slow) for row in ROWS]


def cells(row: Row) -> tuple[str, str]:
    return row.situation.name, MODELS[row.model].title


@pytest.fixture(scope="module")
def written() -> dict[tuple[str, str], Outcome]:
    return read(PAGE.read_text())


@of_the_page
@pytest.mark.parametrize("row", parameters())
def test_a_row_is_what_is_found(row: Row, written: dict[tuple[str, str], Outcome]):
    assert try_out(row) == written[cells(row)], COMMAND


def test_the_page_has_all_rows_and_no_others(written: dict[tuple[str, str], Outcome]):
    assert list(written) == [cells(row) for row in ROWS], COMMAND
    assert len(written) >= 250
    assert len({row.key for row in ROWS}) == len(ROWS)


@of_the_page
def test_the_text_around_the_rows_is_of_today(written: dict[tuple[str, str], Outcome]):
    assert PAGE.read_text() == page({row.key: written[cells(row)] for row in ROWS}, STEPS), COMMAND


def test_no_row_is_wrong(written: dict[tuple[str, str], Outcome]):
    assert not [cell for cell, found in written.items() if found.text.startswith(WRONG)]


def test_every_situation_and_model_is_tried_by_default():
    tried = representative()
    assert {row.situation.name for row in ROWS if row.key in tried} == {
        row.situation.name for row in ROWS if not row.situation.costly
    }
    assert {row.model for row in ROWS if row.key in tried} == set(MODELS)


# What a row would not let pass.


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Changes code: what was drawn of a model before, or is while it lasts, does not count elsewhere."""
    plain_run.cache_clear()
    yield monkeypatch
    plain_run.cache_clear()


def find(name: str, model: str) -> Outcome:
    [row] = [row for row in ROWS if row.key == f"{name} / {model}"]
    return try_out(row)


def test_a_sum_that_is_off_shows(changed: pytest.MonkeyPatch):
    own = hicache.engine.Sum.__call__

    def off(self: Any, *given: Any) -> Any:
        total = own(self, *given)
        return total + 1e-3 * total.roll(1, -1)

    changed.setattr(hicache.engine.Sum, "__call__", off)
    found = find("LoRA", "flux")
    assert found.text.startswith(f"{WRONG}: off the reference by"), found


def test_a_history_that_goes_on_in_the_next_run_shows(changed: pytest.MonkeyPatch):
    changed.setattr(Contexts, "start_run", lambda self: None)
    found = find("a second run", "z_image")
    assert found.text.startswith(f"{WRONG}: "), found


def test_what_raises_is_no_outcome(changed: pytest.MonkeyPatch):
    changed.setattr(hicache.engine.Sum, "__call__", lambda self, *given: given[9])
    assert find("a run", "z_image").text == f"{WRONG}: raises IndexError: tuple index out of range"
