"""Timing sparse attention: what is checked before it is timed, and the page's table of a card."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import sparse_attention as benchmark
from hicache_kernels import sparse_attention as kernels

ROOT = Path(__file__).parents[2]
SMALL = benchmark.SHAPES["cpu"]["small"]


def test_a_row_for_every_share_of_the_columns():
    rows = list(benchmark.measure("small", SMALL, "cpu", seconds=0.0))
    assert [row.keep for row in rows] == list(benchmark.KEEPS)
    assert [row.columns for row in rows] == sorted({row.columns for row in rows})
    for row in rows:
        assert row.error < 1e-5
        assert row.sparse_over_dense == pytest.approx(row.sparse_ms / row.dense_ms)


def test_nothing_wrong_is_timed(monkeypatch: pytest.MonkeyPatch):
    attention = kernels.sparse_attention

    def wrong(*args: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
        return attention(*args, **options) * 1.1

    monkeypatch.setattr(kernels, "sparse_attention", wrong)
    with pytest.raises(SystemExit, match=r"small: 0\.1 off float64: nothing is timed"):
        list(benchmark.measure("small", SMALL, "cpu", seconds=0.0))


def test_the_page_has_what_a_card_took():
    page = (ROOT / "docs" / "companions.md").read_text(encoding="utf-8")
    with (ROOT / "benchmarks/results/nvidia-h200/sparse-attention.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()]
    lines = {(cells[0], cells[1]): cells[2:] for cells in table if len(cells) == 6}
    for row in rows:
        shown = [*map(float, lines[row["shape"], row["keep"]])]
        found = [float(row[name]) for name in ("dense_ms", "sparse_ms", "sparse_over_dense", "choosing_ms")]
        assert shown == pytest.approx(found, rel=0.03), row["shape"]
