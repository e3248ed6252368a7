"""Loops of one's own and threads: runs in several at a time, and runs that go from one to another."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import torch
from torch import Tensor

import hicache.fast
from hicache import HiCacheConfig
from tests.support import models, pipelines
from tests.support.models import flux_call
from tests.support.schedulers import CountingScheduler

EVERY_THIRD = HiCacheConfig(interval=3)


def test_a_run_may_go_from_thread_to_thread():
    pipe, _ = pipelines.build("flux")

    def steps(latents: Tensor, timesteps: Tensor) -> Tensor:
        with torch.no_grad():
            for timestep in timesteps:
                velocity = pipe.transformer(**flux_call(latents, timestep / 1000))[0]
                latents = pipe.scheduler.step(velocity, timestep, latents)[0]
        return latents

    start = models.noise(1, 16, 4)
    with hicache.fast.apply(pipe, EVERY_THIRD) as handle:
        pipe.scheduler.set_timesteps(12)
        here = steps(start, pipe.scheduler.timesteps)
        pipe.scheduler.set_timesteps(12)
        latents = start
        for timestep in pipe.scheduler.timesteps:
            with ThreadPoolExecutor(1) as pool:
                latents = pool.submit(steps, latents, timestep[None]).result()
        assert (handle.stats.full_steps, handle.stats.skipped_steps) == (6, 6)
    assert torch.equal(latents, here)


def test_runs_that_threads_begin_by_turns_and_go_on_in_others():
    """An executor's threads: whichever begins a run, its steps and calls are counted in all of them."""
    transformer, scheduler = models.flux_transformer(), CountingScheduler()

    def step(latents: Tensor, sigma: Tensor) -> Tensor:
        with torch.no_grad():
            latents = latents - transformer(**flux_call(latents, sigma))[0] / 12
        scheduler.step()
        return latents

    with contextlib.ExitStack() as stack:
        pools = [stack.enter_context(ThreadPoolExecutor(1)) for _ in range(3)]

        def draw(begins: int) -> Tensor:
            pools[begins].submit(scheduler.set_timesteps, 12).result()
            latents = models.noise(1, 16, 4)
            for number, sigma in enumerate(torch.linspace(1, 0.1, 12)):
                latents = pools[(begins + number) % 3].submit(step, latents, sigma).result()
            return latents

        handle = stack.enter_context(hicache.fast.apply(transformer, EVERY_THIRD, scheduler=scheduler))
        drawn = []
        for begins in (0, 1, 0, 2, 2, 1):
            drawn.append(draw(begins))
            assert (handle.stats.full_steps, handle.stats.skipped_steps) == (6, 6)
        assert len(handle._sessions._sessions) == 1
    assert all(torch.equal(picture, drawn[0]) for picture in drawn)


@pytest.mark.parametrize(
    ("begins", "goes_on"),
    [
        (2, [2, 0, 1] * 4),
        (1, [1, 0, 2] * 4),
        (2, [3] * 12),
        (2, [0] * 12),
        (2, [2] * 4 + [0] * 8),
        (1, [1] * 4 + [0] * 8),
    ],
    ids=["in all", "in the last one", "where none was", "where that began", "at its step", "at its step too"],
)
def test_a_run_called_off_among_threads_is_not_gone_on_with(begins: int, goes_on: list[int]):
    """DDIM keeps no count, so nothing says that a run is over: the timestep of a call says which it is of."""
    transformer = models.flux_transformer()

    def draw(called_off: list[int], begins: int, goes_on: list[int]) -> tuple[Tensor, int, int]:
        scheduler = diffusers.DDIMScheduler()

        def step(latents: Tensor, timestep: Tensor) -> Tensor:
            with torch.no_grad():
                velocity = transformer(**flux_call(latents, timestep / 1000))[0]
            return scheduler.step(velocity, timestep, latents).prev_sample

        def run(begins: int, goes_on: list[int], latents: Tensor) -> Tensor:
            pools[begins].submit(scheduler.set_timesteps, 12).result()
            for number, timestep in zip(goes_on, scheduler.timesteps, strict=False):
                latents = pools[number].submit(step, latents, timestep).result()
            return latents

        with contextlib.ExitStack() as stack:
            pools = [stack.enter_context(ThreadPoolExecutor(1)) for _ in range(4)]
            handle = stack.enter_context(hicache.fast.apply(transformer, EVERY_THIRD, scheduler=scheduler))
            if called_off:
                run(called_off[0], called_off, 2 * models.noise(1, 16, 4))
            drawn = run(begins, goes_on, models.noise(1, 16, 4))
            return drawn, handle.stats.full_steps, handle.stats.skipped_steps

    alone = draw([], 0, [0] * 12)
    after = draw([0, 1, 1, 1], begins, goes_on)
    assert alone[1:] == after[1:] == (6, 6)
    assert torch.equal(after[0], alone[0])


def test_loops_of_ones_own_in_threads():
    """Without a scheduler the timesteps of every thread are counted by themselves."""
    transformer = models.flux_transformer()

    def loop(number: int) -> Tensor:
        latents = models.noise(1, 16, 4) * (1 + number)
        with torch.no_grad():
            for sigma in torch.linspace(1, 0.1, 9):
                latents = latents - transformer(**flux_call(latents, sigma))[0] / 9
                barrier.wait(timeout=60)
        return latents

    with hicache.fast.apply(transformer, EVERY_THIRD):
        barrier = threading.Barrier(1)
        alone = [loop(number) for number in range(2)]
    with hicache.fast.apply(transformer, EVERY_THIRD):
        barrier = threading.Barrier(2)
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(loop, range(2)))
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


def test_the_history_of_a_thread_that_is_gone_serves_another():
    transformer = models.flux_transformer()

    def loop() -> Tensor:
        latents = models.noise(1, 16, 4)
        with torch.no_grad():
            for sigma in torch.linspace(1, 0.1, 9):
                latents = latents - transformer(**flux_call(latents, sigma))[0] / 9
        return latents

    with hicache.fast.apply(transformer, EVERY_THIRD) as handle:
        here = loop()
        held = handle.stats.history_bytes
        there = []
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                with ThreadPoolExecutor(1) as pool:
                    there.append(pool.submit(loop).result())
                # another that does nothing takes its identity, lest the next one have it
                stack.enter_context(ThreadPoolExecutor(1)).submit(int).result()
        assert handle.stats.history_bytes == 2 * held
    assert all(torch.equal(picture, here) for picture in there)
