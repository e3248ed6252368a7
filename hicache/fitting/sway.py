"""How much an error at a step moves the final latents.

Early errors are for the most part undone: the runs of a picture come together. What is left of one is
measured, by full runs in which one step alone is forecast as places are judged by: with the row of least
squares from two steps before it (:func:`hicache.fitting.places.row`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from hicache.fitting.pictures import Pictures
from hicache.fitting.places import missed, row
from hicache.fitting.replay import Replay
from hicache.fitting.rows import InFull
from hicache.fitting.trajectory import Target, final_latents

PROBES: Final = 12  # steps that are tried; between them, weights are interpolated
# Steps at the end that are all tried: nothing undoes their errors any more, and the last may be far shorter
# than the one before it, as a flow's that ends near zero noise is.
LAST: Final = 4
GAP: Final = 12  # parts of a run: so far back are the steps that a tried one is forecast from
_LEAST: Final = 1e-30


class AllButOne(InFull):
    """Every step is full but one (:class:`hicache.fitting.replay.Rule`).

    Args:
        skipped: that one.
        sources: the steps that it is forecast from.
        rows: their weights, ``[sources]``, by context.
    """

    def __init__(self, skipped: int, sources: Sequence[int], rows: Mapping[str, Tensor]) -> None:
        super().__init__(self._keep)
        self._skipped = skipped
        self._sources = sources
        self._rows = rows
        self._kept: dict[str, list[Tensor]] = {}

    def is_full(self, step: int) -> bool:
        return step != self._skipped

    def forecast(self, context: str, step: int) -> Tensor:
        weights = self._rows[context].tolist()
        terms = [weight * one for weight, one in zip(weights, self._kept[context], strict=True)]
        return torch.stack(terms).sum(0)

    def _keep(self, context: str, step: int, feature: Tensor) -> None:
        if step in self._sources:
            self._kept.setdefault(context, []).append(feature.clone())


def probed(num_steps: int) -> list[int]:
    """The steps that are tried, from the second to the last."""
    count = min(PROBES, num_steps - 1)
    spread = {1 + round(index * (num_steps - 2) / max(1, count - 1)) for index in range(count)}
    return sorted(spread | set(range(max(1, num_steps - LAST), num_steps)))


def weights(replay: Replay, pictures: Pictures, target: Target, products: Mapping[str, Tensor]) -> Tensor:
    """Of an error at each step, float64 ``[T]``: the final latents' over the feature's.

    Args:
        replay: the pipeline, entered.
        pictures: to try it on; those of one call are.
        target: their full runs.
        products: of the features of steps, by context (:class:`hicache.fitting.products.Products`).
    """
    num_steps = len(target.inputs)
    gap = max(1, num_steps // GAP)
    batch = next(pictures.batches())
    found = []
    for step in probed(num_steps):
        sources = sorted({max(0, step - 2 * gap), max(0, step - gap)})
        rows = {context: row(one, sources, [step])[:, 0] for context, one in products.items()}
        run = replay.run(AllButOne(step, sources, rows), pictures.arguments(batch, "latent"))
        moved = (final_latents(run) - target.final[batch]).double().square().flatten(1).mean(1)
        error = sum(float(missed(one, sources, [step])) for one in products.values())
        # the geometric mean over pictures, as their PSNR is averaged
        found.append((float(moved.clamp_min(_LEAST).log().mean()) - math.log(max(error, _LEAST))) / 2)
    return _between(probed(num_steps), found, num_steps).exp()


def _between(steps: Sequence[int], values: Sequence[float], num_steps: int) -> Tensor:
    """Values of all steps from those of some: straight lines between them, level beyond."""
    if len(steps) == 1:
        return torch.full((num_steps,), values[0], dtype=torch.float64)
    ends = torch.tensor(steps)
    right = torch.bucketize(torch.arange(num_steps), ends).clamp(1, len(steps) - 1)
    low, high = torch.tensor(values, dtype=torch.float64)[torch.stack([right - 1, right])]
    share = (torch.arange(num_steps) - ends[right - 1]) / (ends[right] - ends[right - 1])
    return torch.lerp(low, high, share.clamp(0, 1).double())
