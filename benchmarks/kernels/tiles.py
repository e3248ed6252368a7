"""Finds the tile the Triton kernels are fastest with on this card: a table for ``HICACHE_TILES``."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.common.timing import Call, time_together
from benchmarks.kernels.parity import check_op, rounding
from benchmarks.kernels.problems import OPS, Op, Problem, Size, minimum_bytes
from hicache_kernels import tiles
from hicache_kernels.tiles import Tile

# one long row: elements a program, warps
ROW_TILES = tuple(
    Tile(block=block, num_warps=warps)
    for block, warps in (
        (512, 4), (1024, 4), (1024, 8), (2048, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 8),
    )
)  # fmt: skip
# rows by channels, and loads of how many features are in flight
GATED_TILES = tuple(
    Tile(rows=rows, columns=columns, num_warps=warps, num_stages=stages)
    for rows, columns, warps, stages in (
        (4, 256, 4, 1), (8, 256, 4, 1), (8, 256, 8, 1), (4, 512, 4, 1), (2, 512, 4, 1), (1, 1024, 4, 1),
        (16, 128, 4, 1), (2, 256, 4, 1), (4, 256, 4, 2), (4, 256, 4, 3), (8, 256, 8, 2), (2, 256, 2, 3),
    )
)  # fmt: skip
# the forms a skipped step takes: a history of one residual without gates, of many features with them
TUNED = (
    ("gated_sum", "many"), ("gated_sum, update", "many"), ("gated_sum, no gates", "1"),
    ("gated_sum, no gates, update", "1"), ("update_forecast_", "1"), ("forecast", "1"), ("update_", "1"),
)  # fmt: skip
GAIN = 1.02  # less than this over the default is noise


@dataclass(frozen=True)
class Choice:
    """The best tile of one key and what it gains."""

    key: str
    op: str
    tile: Tile
    GBps: float
    default_GBps: float
    tried: int


def tile_key(op: Op, orders: int, itemsize: int, features: int) -> str:
    """Return the key by which the Triton backend looks an op up."""
    if op.sums:
        return tiles.key("gated_sum_update_" if op.updates else op.form, orders, itemsize, features)
    return tiles.key(op.form, orders, itemsize, 1)


def with_tile(call: Call, key: str, tile: Tile) -> Call:
    """Return the call with this tile."""

    def tiled() -> object:
        with tiles.override({key: tile}):
            return call()

    return tiled


def choose(
    op: Op,
    features: int,
    order: int,
    dtype: torch.dtype,
    device: str,
    sizes: Mapping[int, Size],
    candidates: Sequence[Tile] | None = None,
    deadline: float = float("inf"),
) -> Choice:
    """Time every candidate that compiles and passes its parity check; choose the fastest.

    Args:
        op, order, dtype: the problem.
        features: 1, or any other number for many.
        sizes: features → the size to time at.
        candidates: tiles to try beside the default; the ones above when None.
        deadline: of ``time.monotonic()``, past which no further candidate is compiled.
    """
    key = tile_key(op, order + 1, dtype.itemsize, features)
    default = tiles.default(order + 1, dtype.itemsize)
    if candidates is None:
        candidates = GATED_TILES if op.gated else ROW_TILES
    small = Problem(Size(min(features, 3), 37, 96, batch=2), order, dtype, device)
    problem = Problem(sizes[features], order, dtype, device)
    calls: dict[Tile, Call] = {}
    for tile in dict.fromkeys((default, *candidates)):
        if calls and time.monotonic() > deadline:
            break
        try:
            check = with_tile(small.call(op, "triton"), key, tile)
            check_op(small, op, "triton", check, rounding("triton", dtype))
            call = with_tile(problem.call(op, "triton"), key, tile)
            call()
        except Exception as error:  # what a compiler refuses is no candidate, whatever it says
            print(f"tune: {key}, {tile}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
            continue
        calls[tile] = call
    named = {str(tile): tile for tile in calls}
    before = problem.record if op.updates else None
    functions = {name: calls[tile] for name, tile in named.items()}
    timings = time_together(functions, rounds=9, device=device, before=before)
    moved = minimum_bytes(op, sizes[features], order, dtype.itemsize) / 1e9
    best = min(timings, key=lambda name: timings[name].p50)
    usual = timings[str(default)].p50
    if usual < GAIN * timings[best].p50:
        best = str(default)
    return Choice(key, op.name, named[best], moved / timings[best].p50, moved / usual, len(calls))


def tune(
    device: str,
    sizes: Mapping[int, Size],
    deadline: float = float("inf"),
    orders: Sequence[int] = (2, 1),
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
    candidates: Sequence[Tile] | None = None,
) -> Iterator[Choice]:
    """Yield the choices that there is time for; ``sizes`` is for 1 feature and for one other number."""
    [many] = set(sizes) - {1}
    for order in orders:
        for dtype in dtypes:
            for name, features in TUNED:
                if time.monotonic() > deadline:
                    return
                count = 1 if features == "1" else many
                yield choose(OPS[name], count, order, dtype, device, sizes, candidates, deadline)
