"""Choosing places of full steps for a model: what is measured of it once, and places for a number of them."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from hicache.config import HiCacheConfig
from hicache.fitting import places, sway
from hicache.fitting.pictures import Pictures
from hicache.fitting.products import Products
from hicache.fitting.replay import Replay
from hicache.fitting.trajectory import Target, full_runs
from hicache.schedule import Steps, full_steps


class Placing:
    """Places by dynamic programming, from full runs.

    Args:
        replay: the pipeline, entered.
        pictures: that are run in full.

    Raises:
        ValueError: a denoiser is called in some of the steps only.
    """

    def __init__(self, replay: Replay, pictures: Pictures) -> None:
        products = Products()
        self.target: Target = full_runs(replay, pictures, products.take)
        self._products = products.sums()
        num_steps = len(self.target.inputs)
        partial = {name for name, one in self._products.items() if len(one) < num_steps} | products.partial
        if partial:
            raise ValueError(
                "hicache: places='searched': expected every denoiser to be called in every step, got "
                f"{', '.join(sorted(partial))} in some of {num_steps} only: use places='given'"
            )
        self._weights: Tensor = sway.weights(replay, pictures, self.target, self._products)

    def found(self, config: HiCacheConfig) -> HiCacheConfig:
        """A config with as many full steps, in the places of the least cost."""
        num_steps = len(self._weights)
        cost = places.costs(list(self._products.values()), self._weights, config.order)
        count = len(full_steps(config, num_steps))
        chosen, _ = places.best(cost, count, config.warmup)
        return replace(config, schedule=Steps(*chosen))


def freed(config: HiCacheConfig, num_steps: int) -> HiCacheConfig:
    """A config with the same full steps of a run, none of which is bound to be there but the first.

    A warm-up is a rule for places where nothing is known of a model.
    """
    return replace(config, schedule=Steps(*full_steps(config, num_steps)), warmup=1)
