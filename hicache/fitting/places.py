"""Places of full steps by dynamic programming on what forecasts from them would miss.

A step's feature is forecast from the newest full steps by a row that is fitted afterwards: what no row can
give of it is the residual of least squares, a closed form of inner products of features
(:class:`hicache.fitting.products.Products`). Its norm counts as much as an error at that step moves the final
latents (:mod:`hicache.fitting.sway`). Errors of a run add up, so the best places are a shortest path.
(DPCache, CVPR 2026, has such a path for features forecast by Taylor's polynomial.)

The path is exact for forecasts from one full step (order 0) or two (order 1); rows of higher orders weigh
older snapshots, too, which add little.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

RIDGE: Final = 1e-4  # of the mean square of what is forecast from: rows do not grow without end for a little


def row(products: Tensor, sources: Sequence[int], steps: slice | Sequence[int]) -> Tensor:
    """Weights of the features of some steps that give those of others best, float64 ``[sources, steps]``.

    Args:
        products: of the features of steps with one another, ``[T, T]``.
        sources: the steps that are forecast from.
        steps: those that are forecast.
    """
    own = products[sources][:, sources]
    scale = float(own.trace()) / len(own) or 1.0  # features that are all zeros explain nothing
    damped = own + RIDGE * scale * torch.eye(len(own), dtype=torch.float64)
    found: Tensor = torch.linalg.solve(damped, products[sources][:, steps])
    return found


def missed(products: Tensor, sources: Sequence[int], steps: slice | Sequence[int]) -> Tensor:
    """Squares of what :func:`row` misses, ``[steps]``, and of what the ridge keeps it from."""
    explained = (row(products, sources, steps) * products[sources][:, steps]).sum(0)
    return (products.diagonal()[steps] - explained).clamp_min(0.0)


def costs(products: Sequence[Tensor], weights: Tensor, order: int) -> Tensor:
    """What the skipped steps after a full one miss together, float64 ``[T, T, T + 1]``.

    At ``[i, j, k]`` all of j + 1 … k - 1, where j is full, i the full step before it, and k the next one, or
    T at the end of the run. At ``[j, j, k]`` there is none before j, or none that counts.

    Args:
        products: ``[T, T]`` of every context; rows are a context's own.
        weights: of an error at each step, ``[T]``.
        order: of the rows: 0 looks at j alone.
    """
    count = len(weights)
    found = torch.full((count, count, count + 1), float("inf"), dtype=torch.float64)
    for newer in range(count):
        later = slice(newer + 1, count)
        for older in range(newer + 1) if order else [newer]:
            squares = torch.stack([missed(one, sorted({older, newer}), later) for one in products]).sum(0)
            found[older, newer, newer + 1] = 0.0
            found[older, newer, newer + 2 :] = (squares.sqrt() * weights[later]).cumsum(0)
    if order == 0:
        own = found.diagonal(dim1=0, dim2=1).T  # [j, k]
        found = torch.where(
            (torch.arange(count)[:, None] <= torch.arange(count))[..., None], own, float("inf")
        )
    return found


def best(cost: Tensor, full_steps: int, warmup: int = 1) -> tuple[tuple[int, ...], float]:
    """The places of the least cost, and that cost.

    Args:
        cost: see :func:`costs`.
        full_steps: how many.
        warmup: the first so many steps are among them.

    Raises:
        ValueError: there are not so many steps, or fewer full ones than the warm-up has.
    """
    count = len(cost)
    if not warmup <= full_steps <= count:
        raise ValueError(f"hicache: expected {warmup} to {count} full steps, got {full_steps}")
    # of every pair of the newest full steps: the least cost so far, and the full step before the pair
    so_far = torch.full((count, count), float("inf"), dtype=torch.float64)
    so_far[max(0, warmup - 2), warmup - 1] = 0.0
    before = []
    for _ in range(full_steps - warmup):
        so_far, chosen = (so_far[..., None] + cost[..., :count]).min(0)
        before.append(chosen)
    ends = so_far + cost[..., count]
    total, last = ends.flatten().min(0)
    pair = divmod(int(last), count)
    path = [pair[1]]
    for chosen in reversed(before):
        path.append(pair[0])
        pair = int(chosen[pair]), pair[0]
    return (*range(warmup - 1), *reversed(path)), float(total)


def cost_of(cost: Tensor, places: Sequence[int], warmup: int = 1) -> float:
    """The cost of given places: those of the warm-up, and others."""
    ends = [*places, len(cost)]
    pairs = [(max(0, warmup - 2), warmup - 1)]
    pairs += [(ends[index - 1], ends[index]) for index in range(warmup, len(places))]
    return float(sum(cost[older, newer, ends[warmup + at]] for at, (older, newer) in enumerate(pairs)))
