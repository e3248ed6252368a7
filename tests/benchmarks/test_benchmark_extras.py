"""The commands that set companions and the upscaler beside plain HiCache, on few pictures."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import extras, super_resolution
from hicache.demo import upscaler

ROOT = Path(__file__).parents[2]


def cells(row: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(extras.HEADER, row, strict=True))


def test_rows_have_equal_full_steps_and_each_its_own_picture(monkeypatch):
    monkeypatch.setattr(extras, "STEPS", 8)
    monkeypatch.setattr(extras, "INTERVALS", (3,))
    rows = [cells(row) for row in extras.sweep("shapes", *extras.shapes(1), extras.METHODS, 8, rounds=1)]
    full, plain, *others = rows
    assert (full["method"], full["full steps"], full["mean PSNR dB"]) == ("full run", "8", "")
    assert {row["full steps"] for row in (plain, *others)} == {"4"}
    assert len({row["mean PSNR dB"] for row in rows}) >= len(rows) - 2  # variants of ClusCa are near
    assert all(float(row["mean PSNR dB"]) > 15 for row in (plain, *others))


def test_the_committed_table_has_every_method_at_every_interval():
    with (ROOT / "benchmarks" / "results" / "extras.csv").open() as file:
        rows = list(csv.DictReader(file))
    wanted = {f"{method.name} N={interval}" for method in extras.METHODS for interval in extras.INTERVALS}
    found = {row["method"] for row in rows if row["pictures"] == "shapes"}
    assert found == {"full run", *wanted}
    for interval in extras.INTERVALS:
        equal = {row["full steps"] for row in rows if row["method"].endswith(f"N={interval}")}
        assert len(equal) == 2  # one of the shapes, one of the enlarged ones


@pytest.mark.parametrize("size", super_resolution.SIZES)
def test_super_resolution_sets_bicubic_and_the_full_run_beside_it(size, monkeypatch):
    monkeypatch.setattr(super_resolution, "INTERVALS", (2,))
    rows = super_resolution.sweep(size, 1, 6)
    found = [dict(zip(super_resolution.HEADER, row, strict=True)) for row in rows]
    names = ["bicubic", "full run", "HiCache module N=2", "HiCache output N=2"]
    assert [row["method"] for row in found] == names
    assert [row["full steps"] for row in found] == ["", "6", "4", "4"]
    assert found[1]["PSNR to full, mean"] == ""
    assert all(float(row["PSNR to truth, mean"]) > 10 for row in found)


def test_what_is_enlarged_is_what_was_made_small():
    pictures = torch.rand(2, 3, upscaler.TILE, upscaler.TILE)
    flat = torch.full_like(pictures, 0.25)
    assert torch.equal(upscaler.enlarge(upscaler.shrink(flat)), flat)
    assert upscaler.enlarge(upscaler.shrink(pictures)).shape == pictures.shape
