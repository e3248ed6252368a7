"""Runs of transformers whose skipped steps compute MLPs for a few tokens."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hicache.reference
from hicache import HiCacheConfig
from hicache.companions.clusca import ClusCa
from hicache.companions.clusca.families import double_blocks, find_family
from hicache.reference.blocks import MODELS, Cached
from tests.support.runs import Run, recorded_in, replay
from tests.support.schedulers import CountingScheduler

FAMILIES = ("flux", "sd3", "qwen", "dit")
CONFIG = HiCacheConfig(interval=4, order=2, warmup=3)
TAYLOR = HiCacheConfig(interval=4, order=2, warmup=3, basis="taylor")
CPU = torch.device("cpu")
MANY = 10_000  # clusters: more than any picture here has tokens


@functools.cache
def recorded(name: str) -> tuple[nn.Module, Run]:
    """A float64 transformer that nobody caches, and its calls in twelve steps."""
    return recorded_in(name, torch.float64)


def by_reference(name: str, clusters: ClusCa | None, config: HiCacheConfig = CONFIG) -> Tensor:
    model, run = recorded(name)
    scheduler = CountingScheduler()
    with hicache.reference.apply(model, config, scheduler=scheduler, clusters=clusters):
        return replay(model, run, scheduler)


def off(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((one - other).abs().max() / other.abs().max())


def with_full_mlps(name: str, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Skipped steps forecast all but the image's MLPs, which run on all tokens."""
    model, _ = recorded(name)
    mlp, block = find_family(model).mlp, type(double_blocks(model)[0]).__name__
    known = MODELS[type(model).__name__]
    left = tuple(part for part in known[block].features if part != mlp)
    with monkeypatch.context() as patch:
        patch.setitem(known, block, Cached(left, known[block].idle))
        return by_reference(name, None)


class Spy:
    """Notes the shapes that the MLPs of double blocks are called with, as their first layers see them."""

    def __init__(self, model: nn.Module) -> None:
        self.shapes: list[tuple[int, ...]] = []
        mlp = find_family(model).mlp
        self._hooks = [
            getattr(block, mlp)
            .net[0]
            .register_forward_pre_hook(lambda _, args: self.shapes.append(tuple(args[0].shape)))
            for block in double_blocks(model)
        ]

    def __enter__(self) -> list[tuple[int, ...]]:
        return self.shapes

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()
