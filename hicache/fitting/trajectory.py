"""Rows fitted through the whole trajectory: gradients of the final error through heads and full steps.

Every forecast changes what later full steps see, so rows that are best one by one are not best together. Here
all rows of a run are moved together, by Adam, down the logarithm of the final latents' squared error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from hicache.basis import Basis
from hicache.calibration.file import Row
from hicache.fitting.pictures import Pictures
from hicache.fitting.replay import Replay, Rule, Trajectory
from hicache.fitting.rows import ByRows, InFull, Layout

_EVERY: Final = 5  # steps between those on the way whose error counts
_SHARE: Final = 0.1  # of the errors on the way
_FLOOR: Final = 1e-8  # of a squared error: early steps are the full run's own


@dataclass(frozen=True)
class Search:
    """How rows are moved.

    Args:
        iterations: steps of Adam.
        batch: pictures a step.
        rate: its first learning rate, in parts of what a change of a coefficient matters; falls to 0.
        tail: in [0, 1]: how much more the pictures that are far off weigh: the power of their errors that is
            averaged. 0 is their logarithm, as PSNR is averaged; 1 the mean squared error.
        through_full_steps: whether gradients go through full steps; a large model's do not fit in memory.
        seed: of the order of the pictures.
    """

    iterations: int = 150
    batch: int = 6
    rate: float = 0.03
    tail: float = 0.0
    through_full_steps: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.tail <= 1:
            raise ValueError(f"hicache: Search.tail: expected a number in [0, 1], got {self.tail!r}")


@dataclass(frozen=True)
class Target:
    """Where full runs went, a picture a row."""

    inputs: Tensor  # [steps, pictures, ...]: what every step was given
    final: Tensor  # [pictures, ...]
    contexts: tuple[str, ...]  # that began with the run
    sigmas: tuple[float, ...] | None  # the scheduler's noise levels


def full_runs(
    replay: Replay, pictures: Pictures, take: Callable[[str, int, Tensor], None] | None = None
) -> Target:
    """Run all pictures in full.

    Args:
        replay: the pipeline, entered.
        pictures: which.
        take: given every feature, with its context and its step.
    """
    found = [_run(replay, InFull(take), pictures, batch, False, False) for batch in pictures.batches()]
    inputs, final = torch.cat([inputs for inputs, _ in found], 1), torch.cat([final for _, final in found])
    return Target(inputs, final, tuple(replay.contexts), replay.sigmas)


def fit(
    replay: Replay,
    layout: Layout,
    prior: Basis,
    pictures: Pictures,
    target: Target,
    search: Search,
    progress: Callable[[int, float], None] = lambda iteration, loss: None,
) -> dict[str, dict[int, Tensor]]:
    """The rows of every context, float64, by skipped step.

    Args:
        replay: the pipeline, entered.
        layout: the full steps, and the form of a row.
        prior: rows begin as its.
        pictures: to fit to.
        target: their full runs, whose contexts get rows.
        search: how.
        progress: told every iteration and its loss.

    Raises:
        RuntimeError: the pipeline's output has no gradient: something in it detaches.
    """
    steps = layout.positions
    priors = {step: layout.row(prior, step) for step in steps}
    moves = {
        context: {step: torch.zeros_like(row).requires_grad_() for step, row in priors.items()}
        for context in target.contexts
    }
    scales = {step: layout.scale(step) for step in steps}

    def row(context: str, step: int) -> Tensor:
        return priors[step] + moves[context][step] * scales[step]

    optimizer = torch.optim.Adam([move for own in moves.values() for move in own.values()], lr=search.rate)
    order = torch.Generator().manual_seed(search.seed)
    for iteration in range(search.iterations):
        chosen = torch.randperm(len(pictures), generator=order)[: search.batch].tolist()
        for group in optimizer.param_groups:
            group["lr"] = search.rate * 0.5 * (1 + math.cos(math.pi * iteration / search.iterations))
        inputs, final = _run(replay, ByRows(layout, row), pictures, chosen, True, search.through_full_steps)
        if not final.requires_grad:
            raise RuntimeError("hicache: the pipeline's output has no gradient: it cannot be fitted through")
        loss = _loss(inputs, final, target, chosen, search.tail)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress(iteration, float(loss.detach()))
    with torch.no_grad():
        return {context: {step: row(context, step) for step in steps} for context in target.contexts}


def _loss(inputs: Tensor, final: Tensor, target: Target, chosen: list[int], tail: float) -> Tensor:
    aims, ends = target.inputs[:, chosen], target.final[chosen]
    loss = _log_error(final, ends, 0.0, tail)
    waymarks = range(_EVERY + 1, len(inputs), _EVERY)
    if waymarks:
        on_the_way = [_log_error(inputs[step], aims[step], _FLOOR, tail) for step in waymarks]
        loss = loss + _SHARE * torch.stack(on_the_way).mean()
    return loss


def _log_error(found: Tensor, wanted: Tensor, floor: float, tail: float) -> Tensor:
    """The logarithm of the pictures' squared errors' power mean."""
    logs = ((found - wanted).float().square().flatten(1).mean(1) + floor).log()
    if tail == 0:
        return logs.mean()
    return (torch.logsumexp(tail * logs, 0) - math.log(len(logs))) / tail


def _run(
    replay: Replay, rule: Rule, pictures: Pictures, chosen: list[int], gradients: bool, through: bool
) -> tuple[Tensor, Tensor]:
    """Inputs ``[steps, pictures, ...]`` and final latents ``[pictures, ...]`` of some pictures."""
    run = replay.run(rule, pictures.arguments(chosen, "latent"), gradients, through)
    return _inputs(run, len(chosen)), final_latents(run)


def _inputs(run: Trajectory, count: int) -> Tensor:
    """What each step was given, of the first call, and of the last of several halves of a batch."""
    return torch.stack([given[-count:] for given in run.inputs])


def final_latents(run: Trajectory) -> Tensor:
    """What a pipeline with ``output_type="latent"`` gave."""
    found = run.output[0]
    if not isinstance(found, Tensor):
        raise TypeError(f"hicache: expected latents of output_type='latent', got {type(found).__name__}")
    return found


def plain(rows: Mapping[str, Mapping[int, Tensor]]) -> dict[str, dict[int, Row]]:
    """Rows as numbers, rounded to what fp32 holds."""
    return {
        context: {step: tuple(map(_plain, row.tolist())) for step, row in own.items()}
        for context, own in rows.items()
    }


def _plain(number: Any) -> Any:
    return tuple(map(_plain, number)) if isinstance(number, list) else float(f"{number:.7g}")
