"""What a loop does besides drawing: blocks that run, operators, tensors that are held, time."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.judging import Subject
from benchmarks.launches import OperatorCounter
from hicache.demo.pipeline import ShapesPipeline

GUIDANCE = 4.0


class BlockCounter:
    """Counts how much of a transformer's blocks is used, by the weights of the linear layers that are called.

    Whole blocks would not do: some methods run a part of each. No cache hooks a linear layer, so each of its
    calls is one that happened.

    Args:
        transformer: before anything is cached.
    """

    def __init__(self, transformer: Any) -> None:
        lists = [part for part in transformer.children() if isinstance(part, nn.ModuleList)]
        self._layers = [part for blocks in lists for part in blocks.modules() if isinstance(part, nn.Linear)]
        self._all = sum(layer.weight.numel() for layer in self._layers)
        self._used = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count while this is entered: a call that is timed has no hooks of ours."""
        self._used = 0
        handles = [layer.register_forward_pre_hook(self._use) for layer in self._layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self) -> float:
        """Return the share of the blocks' weights that was used since the last time: 1 at a full step."""
        used, self._used = self._used, 0
        return used / self._all

    def _use(self, layer: nn.Linear, args: Any) -> None:
        self._used += layer.weight.numel()


def is_full(share: float) -> bool:
    """Whether all blocks ran at a step."""
    return share > 1 - 1e-6


def draw(pipe: ShapesPipeline, subjects: Sequence[Subject], steps: int, mark: Any = None) -> Tensor:
    """Run the denoising loop of some pictures together; latents ``[pictures, tokens, channels]``.

    Args:
        pipe: cached or not.
        subjects: prompts and their noise.
        steps: of the run.
        mark: called after every step.
    """

    def on_step_end(*args: Any) -> dict[str, Any]:
        mark()
        return {}

    drawn: Tensor = pipe(
        [subject.prompt for subject in subjects],
        steps,
        guidance_scale=GUIDANCE,
        latents=torch.cat([subject.latents for subject in subjects]),
        output_type="latent",
        callback_on_step_end=on_step_end if mark else None,
    ).images
    return drawn


def shares_of(
    pipe: ShapesPipeline, counter: BlockCounter, subjects: Sequence[Subject], steps: int
) -> tuple[Tensor, list[float]]:
    """Draw pictures together; their latents, and the share of the blocks that ran at each step."""
    shares: list[float] = []
    with counter.counting():
        latents = draw(pipe, subjects, steps, lambda: shares.append(counter.take()))
    return latents, shares


def operators_of(pipe: ShapesPipeline, subjects: Sequence[Subject], steps: int) -> list[int]:
    """Return the operators that compute, step by step."""
    counter, totals = OperatorCounter(), [0]
    with counter:
        draw(pipe, subjects, steps, lambda: totals.append(counter.counts.total()))
    return _differences(totals)


def step_seconds_of(pipe: ShapesPipeline, subjects: Sequence[Subject], steps: int) -> list[float]:
    """Return the seconds of each step."""
    times = [time.perf_counter()]
    draw(pipe, subjects, steps, lambda: times.append(time.perf_counter()))
    return _differences(times)


def held_bytes() -> int:
    """Return the bytes of all tensors that Python knows of, memory that several share counted once."""
    held: dict[int, int] = {}
    for one in gc.get_objects():
        if issubclass(type(one), Tensor):
            storage = one.untyped_storage()
            if storage.device.type != "meta":  # a fake tensor says another device, and has no memory either
                held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def held_bytes_at_rest() -> int:
    """Return :func:`held_bytes` without what only waits to be collected, such as an earlier pipeline."""
    for _ in range(2):  # finalizers may leave some of it to the second time
        gc.collect()
    return held_bytes()


def most_bytes_of(pipe: ShapesPipeline, subjects: Sequence[Subject], steps: int) -> int:
    """Return the bytes of tensors that are alive after a step, the most of a few steps.

    A look takes as long as some steps do, and what is kept of earlier steps is complete long before the last.
    """
    step, sizes = 0, []

    def look() -> None:
        nonlocal step
        step += 1
        if step % 8 == 0 or step >= steps - 1:
            sizes.append(held_bytes())

    gc.collect()
    draw(pipe, subjects, steps, look)
    return max(sizes)


def _differences(values: Sequence[Any]) -> list[Any]:
    return [after - before for before, after in itertools.pairwise(values)]
