"""Runs models on an emulated GPU and finds what of their calls a CUDA graph cannot capture."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final
from unittest import mock

import torch
from torch import nn

import hicache.fast
from benchmarks.capture_safety.emulated_gpu import EmulatedGpu, move, to_gpu
from benchmarks.capture_safety.models import Build
from hicache import HiCacheConfig
from hicache.adapters import registry
from hicache.cuda_graphs.capture_safety import UnsafeOp, UnsafeOps
from hicache.hooks.transformer import HookedTransformer
from tests.support.schedulers import CountingScheduler

CONFIG: Final = HiCacheConfig(interval=3, warmup=3)
STEPS: Final = 8
# of CONFIG in as many steps; left out are the call learned from, 0, and the skipped one that is checked, 3
FULL: Final = (1, 2, 5)
SKIPPED: Final = (4, 6, 7)


@dataclass(frozen=True)
class Found:
    """Unsafe ops of calls of one kind: of the first, and of those after it; each function's once."""

    first: tuple[UnsafeOp, ...]
    later: tuple[UnsafeOp, ...]

    @property
    def verdict(self) -> str:
        """Say in words what stands in the way, as the table does."""
        if not self.later:
            return "clean after a first call" if self.first else "clean"
        places: dict[str, list[str]] = {}
        for op in self.later:
            kinds = places.setdefault(op.place, [])
            if op.kind not in kinds:
                kinds.append(op.kind)
        return "; ".join(f"{', '.join(kinds)} {place}" for place, kinds in places.items())


@dataclass(frozen=True)
class Survey:
    """What was found in one model's calls."""

    own: Found
    cached: dict[str, tuple[Found, Found]]  # granularity → full steps, skipped steps

    @property
    def finest(self) -> str:
        """Name the finest granularity that the model can be cached at."""
        return "module" if "module" in self.cached else "stack"


def survey(build: Build) -> Survey:
    """Run a model by itself and cached, at every granularity it knows; find its unsafe ops."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' of its own deprecations
        return _survey(*build())


def _survey(model: nn.Module, call: Callable[[float], dict[str, Any]]) -> Survey:
    blocks = [block for block_list in HookedTransformer(model).lists for block in block_list]
    calls: list[list[UnsafeOp]] = []
    forward = model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        with UnsafeOps(blocks) as mode:
            output = forward(*args, **kwargs)
        calls.append(mode.found)
        return output

    def run(scheduler: CountingScheduler) -> list[list[UnsafeOp]]:
        calls.clear()
        scheduler.set_timesteps(STEPS)
        for t in torch.linspace(1, 0.1, STEPS):
            model(**to_gpu(call(float(t))))
            scheduler.step()
        return list(calls)

    cached = {}
    # weights of a GPU that is not there are no plain parameters, yet are to be read as those
    plain = mock.patch("hicache.adapters.gates._plain", return_value=True)
    with EmulatedGpu(), torch.no_grad(), plain:
        move(model)
        # what graphs would capture: the model's own forward, within all that is hooked around it
        model.forward = watched
        own = _of(run(CountingScheduler()), range(STEPS))
        for granularity in ("module", "stack"):
            if granularity == "module" and registry.find(model) is None:
                continue
            scheduler = CountingScheduler()
            try:
                with hicache.fast.apply(model, CONFIG, scheduler=scheduler, granularity=granularity):
                    found = run(scheduler)
            except RuntimeError as error:
                if "cannot be had" not in str(error):
                    raise
                continue
            cached[granularity] = _of(found, FULL), _of(found, SKIPPED)
    return Survey(own, cached)


def _of(calls: Sequence[Sequence[UnsafeOp]], steps: Sequence[int]) -> Found:
    first, *others = (calls[step] for step in steps)
    return Found(unique(first), unique([op for found in others for op in found]))


def unique(found: Sequence[UnsafeOp]) -> tuple[UnsafeOp, ...]:
    """Drop repetitions and keep the order."""
    return tuple(dict.fromkeys(found))
