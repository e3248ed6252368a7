"""docs/results.md and its plots: what the tables of the comparison say."""

from __future__ import annotations

from pathlib import Path

import pytest

import hicache
from benchmarks import plots
from benchmarks.peers import page, rows
from benchmarks.peers.__main__ import FILES
from benchmarks.peers.rows import Row
from benchmarks.peers.table import METHODS, OURS
from benchmarks.peers.wins import no_more_full_steps, no_slower, wins

ROOT = Path(hicache.__file__).parent.parent


def row(name="one", package="diffusers", setting=3.0, **more):
    return Row(name, package, "interval", setting, False, **more)


def test_wins_are_over_the_best_of_ours_that_costs_no_more():
    ours = [
        row("a", OURS, full_steps=9.0, psnr_mean=38.0, speedup=4.0),
        row("b", OURS, full_steps=9.0, psnr_mean=39.0, speedup=3.0),
        row("c", OURS, full_steps=12.0, psnr_mean=44.0, speedup=2.0),
    ]
    behind = row("behind", full_steps=10.0, psnr_mean=38.5, speedup=2.5)
    ahead = row("ahead", full_steps=10.0, psnr_mean=40.0, speedup=2.0)
    fastest = row("fastest", full_steps=3.0, psnr_mean=20.0, speedup=9.0)
    table = [*ours, behind, ahead, fastest]
    found = wins(table, lambda one: one.psnr_mean, no_more_full_steps)
    assert [(win.peer, win.ours, win.by) for win in found] == [(ahead, ours[1], 1.0), (fastest, None, 20.0)]
    assert [win.peer for win in wins(table, lambda one: one.psnr_mean, no_slower)] == [fastest]


def test_the_page_is_made_of_its_tables():
    tables = [list(rows.read(ROOT / path).values()) for path in FILES.values()]
    assert (ROOT / "docs" / "results.md").read_text() == page.text(*tables)
    for table in tables:
        assert {one.method for one in table} <= set(METHODS)
        assert not [one.key for one in table if one.package == OURS and one.note]


def test_the_page_says_first_where_a_peer_wins():
    measured = {"pictures": 48, "blocks_run": 0.2, "psnr_worst": 30.0}
    table = [
        row("hicache, default", OURS, 7.0, full_steps=9.0, psnr_mean=38.0, **measured),
        row("ahead", "diffusers", 7.0, full_steps=9.0, psnr_mean=39.0, **measured),
    ]
    made = page.text(table, [row("not here", note="why")])
    [first, second] = [made.index(title) for title in ("## Where a peer wins", "## By full steps")]
    assert first < made.index("| ahead | none | 7 | N=7: 39.0 / 30.0 | hicache, default, N=7: 38.0 / 30.0 |")
    assert second > first
    assert "| not here | flux | why |" in made
    assert made.count("Not measured.") == 2  # times


def test_what_is_fitted_is_apart_from_the_fixed_bases():
    """By full steps: a basis that needs no calibration is compared by itself."""
    measured = {"full_steps": 9.0, "pictures": 48, "blocks_run": 0.2, "psnr_worst": 30.0}
    table = [
        row("hicache, default", OURS, 7.0, psnr_mean=38.0, **measured),
        row("hicache, fitted", OURS, 7.0, psnr_mean=42.0, **measured),
        row("hicache, stack, reuse", OURS, 7.0, psnr_mean=39.0, **measured),
        row("behind", "hicache-pp", 7.0, psnr_mean=37.0, **measured),
    ]
    sides = ["hicache, fitted, N=7", "hicache, stack, reuse, N=7", "behind, N=7"]
    found = [f"{mean} / 30.0 ({side})" for mean, side in zip((42.0, 39.0, 37.0), sides, strict=True)]
    assert f"| 7 | 9 | 38.0 / 30.0 | {' | '.join(found)} |  |" in page.text(table, [])


def test_the_page_names_what_has_no_row():
    """An empty cell is not a method that does not apply."""
    name = "hicache-pp auto"
    measured = {"full_steps": 9.0, "pictures": 48, "blocks_run": 0.2, "psnr_mean": 38.0, "psnr_worst": 30.0}
    table = [row(name, "hicache-pp", setting, **measured) for setting in METHODS[name].settings[:-2]]
    made = page.text(table, [])
    listed = made[made.index("## What is not measured yet") :]
    assert f"| {name} | bundled | interval 9, 10 |" in listed
    assert "| hicache-pp DMD | bundled | all |" in listed
    assert "| all | flux | all |" in listed
    assert " settings 6 have rows so far" in made
    whole = [
        row(name, method.package, setting, **measured)
        for name, method in METHODS.items()
        for setting in method.settings
    ]
    assert "| bundled |" not in page.text(whole, [])


@pytest.mark.parametrize(
    ("seconds", "drawn"), [("", {"a-steps.png"}), ("0.5", {"a-steps.png", "a-seconds.png"})]
)
def test_plots_are_of_what_was_measured(seconds, drawn):
    """Times come later than pictures."""
    line = {
        "method": "hicache, default",
        "package": OURS,
        "runs_blocks": "False",
        "full_steps": "9",
        "psnr_mean": "38",
        "seconds": seconds,
        "full_seconds": seconds,
        "speedup": seconds,
    }
    assert set(plots.figures([line, {**line, "full_steps": "12"}], "a")) == drawn
