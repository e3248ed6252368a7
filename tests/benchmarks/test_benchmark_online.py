"""The benchmark of full steps that are decided in the run, made small; and the page that has its numbers."""

from __future__ import annotations

import csv
from pathlib import Path

from benchmarks import online

ROOT = Path(__file__).parents[2]


def test_every_schedule_is_measured_with_every_basis():
    rows = online.sweep(steps=12, count=2)
    assert [(row.basis, row.schedule) for row in rows] == [
        (basis, schedule) for basis in online.BASES for schedule in online.SCHEDULES
    ]
    for row in rows:
        assert len(row.full) == len(row.psnr) == 2
        assert max(row.full) <= 9
        assert len(row.cells) == len(online.HEADER)


def test_the_page_has_the_numbers_of_the_file():
    with (ROOT / "benchmarks/results/online.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    page = (ROOT / "docs/calibrating.md").read_text(encoding="utf-8")
    assert [(row["basis"], row["schedule"]) for row in rows] == [
        (basis, schedule) for basis in online.BASES for schedule in online.SCHEDULES
    ]
    for schedule in online.SCHEDULES:
        cells = [
            f"{row['mean PSNR dB']} / {row['worst PSNR dB']}" for row in rows if row["schedule"] == schedule
        ]
        assert f"| `{schedule}` | {' | '.join(cells)} |" in page
