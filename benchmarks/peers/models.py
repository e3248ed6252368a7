"""What is cached: the bundled model, and FLUX.1's number of blocks at a tiny width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import hicache.demo
from benchmarks.peers.method import Method
from hicache.demo.pipeline import ShapesPipeline
from hicache.demo.train import flux_of_shapes


@dataclass(frozen=True)
class Model:
    """A model that every method is measured on.

    Args:
        load: makes a new pipeline of it.
        steps: of a run.
        judged: its pictures mean something.
        settings: of a method, those to measure.
    """

    load: Callable[[], ShapesPipeline]
    steps: int
    judged: bool
    settings: Callable[[Method], tuple[float, ...]]


def _bundled() -> ShapesPipeline:
    return hicache.demo.load()


def _flux() -> ShapesPipeline:
    """FLUX.1's 19 + 38 blocks, two heads wide, random weights: what a skipped step costs besides its sums."""
    torch.manual_seed(0)
    transformer = flux_of_shapes(num_layers=19, num_single_layers=38, num_heads=2)
    transformer.eval().requires_grad_(False)
    return ShapesPipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler())


def _interval_or_fastest(method: Method) -> tuple[float, ...]:
    if method.fitted:
        return ()
    return (7.0,) if 7.0 in method.settings else method.settings[-1:]


MODELS: Final = {
    "bundled": Model(_bundled, 50, True, lambda method: method.settings),
    "flux": Model(_flux, 20, False, _interval_or_fastest),
}


def load(name: str) -> ShapesPipeline:
    """Make a new pipeline, without a progress bar."""
    pipe = MODELS[name].load()
    pipe.set_progress_bar_config(disable=True)
    return pipe
