"""One transformer, many runs at a time: pipelines made of a shared one for each request, in threads."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import hicache.fast
from hicache import HiCacheConfig
from hicache.hooks.step_clock import SchedulerClock
from tests.support import models, pipelines
from tests.support.models import Arguments, flux_call
from tests.support.pipelines import denoisers
from tests.support.runs import blocks_of
from tests.support.schedulers import flow_matching

EVERY_THIRD = HiCacheConfig(interval=3)
STOPS = ("_interrupt", "error", "interrupt")


class Stopped(Exception):
    """A request is called off."""


@dataclass(frozen=True)
class Request:
    """What somebody asks of a server."""

    number: int

    @property
    def stop(self) -> str | None:
        """How it is stopped in the middle: a third of them are."""
        return STOPS[self.number // 3 % 3] if self.number % 3 == 1 else None

    def draw(self, pipe: Any, arguments: Arguments) -> Tensor | None:
        """Its picture; None if it was stopped by an exception."""

        def on_step_end(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
            if step == 3 + self.number % 5:
                if self.stop == "_interrupt":
                    pipe._interrupt = True
                elif self.stop is not None:
                    raise Stopped if self.stop == "error" else KeyboardInterrupt
            return tensors

        strength = 1 + 0.2 * self.number
        prompts = {
            name: value * strength if name.startswith("prompt") and value.is_floating_point() else value
            for name, value in arguments.items()
            if isinstance(value, Tensor)
        }
        generator = torch.Generator().manual_seed(self.number)
        try:
            picture = pipe(
                num_inference_steps=10 + self.number % 3,
                generator=generator,
                callback_on_step_end=on_step_end,
                **{**arguments, **prompts},
            )[0]
        except (Stopped, KeyboardInterrupt):
            return None
        return torch.as_tensor(picture)


class Server:
    """The recipe of diffusers' documentation: of one pipeline, another for every request."""

    def __init__(self, shared: Any) -> None:
        self.shared = shared

    def pipeline(self) -> Any:
        scheduler = self.shared.scheduler.from_config(self.shared.scheduler.config)
        pipe = type(self.shared).from_pipe(self.shared, scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe


class BlockRuns:
    """How often blocks run, whoever calls."""

    def __init__(self, pipe: Any) -> None:
        self.count = 0
        self._lock = threading.Lock()
        for part in denoisers(pipe).values():
            for block in blocks_of(part):
                block.register_forward_hook(self._add)

    def _add(self, *_: Any) -> None:
        with self._lock:
            self.count += 1


def serve(name: str, threads: int, each: int) -> None:
    """Requests to a server, a third of them stopped: each as drawn alone, and no block run more often."""
    shared, arguments = pipelines.build(name)
    runs = BlockRuns(shared)
    requests = [Request(number) for number in range(threads * each)]
    alone = []
    for request in requests:
        with hicache.fast.apply(shared, EVERY_THIRD):
            alone.append(request.draw(shared, arguments))
    expected, runs.count = runs.count, 0
    server = Server(shared)
    with hicache.fast.apply(shared, EVERY_THIRD) as handle:
        with ThreadPoolExecutor(threads) as pool:
            drawn = list(pool.map(lambda request: request.draw(server.pipeline(), arguments), requests))
        assert len(handle._sessions._sessions) <= threads + 1
    assert runs.count == expected
    assert sum(picture is None for picture in alone) >= len(requests) // 5
    for number, (picture, wanted) in enumerate(zip(drawn, alone, strict=True)):
        if wanted is None:
            assert picture is None, number
        else:
            assert torch.equal(picture, wanted), number


@pytest.mark.few(2)
@pytest.mark.filterwarnings("error:hicache")
@pytest.mark.parametrize(("threads", "each"), [(1, 9), (3, 5)], ids=["one thread", "three threads"])
@pytest.mark.parametrize("name", ["flux_cfg", "sd3", "wan22"])
def test_a_pipeline_for_every_request(name: str, threads: int, each: int):
    serve(name, threads, each)


@pytest.mark.slow
@pytest.mark.filterwarnings("error:hicache")
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_two_hundred_requests(name: str):
    serve(name, 4, 50)


def test_the_server_of_the_documentation():
    """An event loop that has its requests drawn by an executor."""
    shared, arguments = pipelines.build("sd3")
    server = Server(shared)
    with hicache.fast.apply(shared, EVERY_THIRD):
        alone = [Request(number * 3).draw(shared, arguments) for number in range(4)]

    async def answer(number: int) -> Tensor | None:
        pipe, request = server.pipeline(), Request(number * 3)
        return await asyncio.get_running_loop().run_in_executor(None, lambda: request.draw(pipe, arguments))

    async def answer_all() -> list[Tensor | None]:
        return await asyncio.gather(*(answer(number) for number in range(4)))

    with hicache.fast.apply(shared, EVERY_THIRD) as handle:
        drawn = asyncio.run(answer_all())
        assert handle.stats.skipped_steps > 0
    assert all(torch.equal(one, other) for one, other in zip(drawn, alone, strict=True))


def test_a_run_inside_another_of_the_same_transformer():
    shared, arguments = pipelines.build("flux")
    server = Server(shared)
    with hicache.fast.apply(shared, EVERY_THIRD) as handle:
        alone = [Request(number).draw(shared, arguments) for number in (0, 3)]
        nested = []

        def inner(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
            if step in (2, 7):
                nested.append(Request(3).draw(server.pipeline(), arguments))
            return tensors

        outer = server.pipeline()
        scaled = {**arguments, "callback_on_step_end": inner}
        generator = torch.Generator().manual_seed(0)
        drawn = outer(num_inference_steps=10, generator=generator, **scaled)[0]
        assert handle.stats.skipped_steps > 0
    assert torch.equal(drawn, alone[0])
    assert all(torch.equal(picture, alone[1]) for picture in nested)
    assert len(nested) == 2


def test_threads_with_one_scheduler_that_keeps_no_count():
    """DDIM is told the timestep at every step: threads may share the pipeline as it is."""
    pipe, arguments = pipelines.build("dit")
    numbers = (0, 3, 6, 9)

    def draw(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        return pipe(num_inference_steps=12, generator=generator, **arguments)[0]

    draws = {number: draw(number) for number in numbers}
    barrier = threading.Barrier(len(numbers))

    def together(number: int) -> Tensor:
        barrier.wait(timeout=60)
        return draw(number)

    with hicache.fast.apply(pipe, HiCacheConfig(interval=1)), ThreadPoolExecutor(len(numbers)) as pool:
        plain = list(pool.map(together, numbers))
    assert all(torch.equal(one, other) for one, other in zip(plain, draws.values(), strict=True))
    runs = BlockRuns(pipe)
    with hicache.fast.apply(pipe, EVERY_THIRD):
        alone = [draw(number) for number in numbers]
        expected, runs.count = runs.count, 0
        with ThreadPoolExecutor(len(numbers)) as pool:
            cached = list(pool.map(together, numbers))
    assert all(torch.equal(one, other) for one, other in zip(cached, alone, strict=True))
    assert runs.count == expected


def test_runs_called_off_in_threads_of_a_pool_hold_one_history():
    """The scheduler counts its steps: what a thread begins with it ends what others were at."""
    pipe, arguments = pipelines.build("flux")
    called_off = (1, 4, 7)
    assert {Request(number).stop for number in called_off} == set(STOPS)
    with contextlib.ExitStack() as stack:
        handle = stack.enter_context(hicache.fast.apply(pipe, EVERY_THIRD))
        alone = Request(0).draw(pipe, arguments)
        held = handle.stats.history_bytes
        pools = [stack.enter_context(ThreadPoolExecutor(1)) for _ in range(4)]
        for number in called_off:
            for pool in pools:
                pool.submit(Request(number).draw, pipe, arguments).result()
        assert handle.stats.history_bytes == held
        for pool in pools:
            drawn = pool.submit(Request(0).draw, pipe, arguments).result()
            assert torch.equal(drawn, alone)
        assert handle.stats.history_bytes == held


def test_threads_take_turns_with_one_pipeline():
    """A pool of threads, one request at a time: one history serves all of them."""
    pipe, arguments = pipelines.build("flux")
    with hicache.fast.apply(pipe, EVERY_THIRD) as handle:
        alone = [Request(number).draw(pipe, arguments) for number in range(6)]
        held = handle.stats.history_bytes
        for number in (0, 2, 3, 5):
            with ThreadPoolExecutor(1) as pool:
                drawn = pool.submit(Request(number).draw, pipe, arguments).result()
            assert torch.equal(drawn, alone[number])
        assert handle.stats.history_bytes == held


def test_an_interrupt_in_the_middle_of_a_call_keeps_no_turn():
    """torch tells nobody of a call that ended by one; other threads are not kept waiting."""
    shared, arguments = pipelines.build("flux")
    server = Server(shared)

    def interrupt(*_: Any) -> None:
        hook.remove()
        raise KeyboardInterrupt

    with hicache.fast.apply(shared, EVERY_THIRD):
        alone = Request(0).draw(shared, arguments)
        for block in (0, 1):
            hook = shared.transformer.single_transformer_blocks[block].register_forward_pre_hook(interrupt)
            assert Request(3).draw(server.pipeline(), arguments) is None
            with ThreadPoolExecutor(1) as pool:
                drawn = pool.submit(Request(0).draw, server.pipeline(), arguments).result(timeout=60)
            assert torch.equal(drawn, alone)


def test_a_call_that_waited_while_the_cache_was_removed_runs_uncached():
    shared, arguments = pipelines.build("flux")
    server = Server(shared)
    entered, go_on = threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        hook.remove()
        entered.set()
        go_on.wait(timeout=60)

    waiting = server.pipeline()
    alone = Request(3).draw(server.pipeline(), arguments)  # uncached
    handle = hicache.fast.apply(shared, EVERY_THIRD)
    hook = shared.transformer.transformer_blocks[0].register_forward_pre_hook(hold)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(Request(0).draw, server.pipeline(), arguments)
        assert entered.wait(timeout=60)
        second = pool.submit(Request(3).draw, waiting, arguments)
        time.sleep(0.2)  # it waits for its turn by now; if it does not yet, it finds nothing to wait for
        removed = pool.submit(handle.remove)
        time.sleep(0.2)
        go_on.set()
        assert first.result(timeout=60) is not None
        removed.result(timeout=60)
        drawn = second.result(timeout=60)
    assert torch.equal(drawn, alone)
    assert not [name for name in ("step", "set_timesteps") if name in vars(waiting.scheduler)]


@pytest.mark.filterwarnings("error:hicache")
@pytest.mark.parametrize("scheduler", [None, "euler", flow_matching()], ids=["none", "a name", "not stepped"])
def test_a_sampler_of_ones_own_that_has_a_scheduler(scheduler: Any):
    """Nobody knows whether it steps it: a bare transformer counts by its timesteps."""

    class Sampler:
        def __init__(self) -> None:
            self.transformer = models.flux_transformer()
            self.scheduler = scheduler

        def __call__(self) -> None:
            with torch.no_grad():
                for sigma in torch.linspace(1, 0.1, 12):
                    self.transformer(**flux_call(models.noise(1, 16, 4), sigma))

    sampler = Sampler()
    with hicache.fast.apply(sampler.transformer, EVERY_THIRD) as handle:
        sampler()
        assert (handle.stats.full_steps, handle.stats.skipped_steps) == (6, 6)


def test_a_pipeline_of_diffusers_around_a_bare_transformer_is_followed():
    shared, arguments = pipelines.build("flux")
    with hicache.fast.apply(shared, EVERY_THIRD):
        alone = Request(0).draw(shared, arguments)
    with hicache.fast.apply(shared.transformer, EVERY_THIRD) as handle:
        assert torch.equal(Request(0).draw(shared, arguments), alone)
        assert isinstance(handle._sessions.latest.clock, SchedulerClock)


def test_schedulers_of_requests_are_not_kept():
    shared, arguments = pipelines.build("flux")
    server = Server(shared)
    gc.collect()
    gc.disable()  # nothing may wait for it
    try:
        with hicache.fast.apply(shared, EVERY_THIRD) as handle:
            for number in (1, 1, 0, 4, 4, 3):
                Request(number).draw(server.pipeline(), arguments)
            assert len(handle._sessions._sessions) == 2  # the pipeline's own scheduler stays watched
            held = handle.stats.history_bytes
            assert held == sum(context.history_bytes for context in handle.stats.contexts.values())
    finally:
        gc.enable()
    assert not {"step", "set_timesteps"} & set(vars(shared.scheduler))


def test_a_copied_pipeline_with_a_scheduler_of_its_own():
    """diffusers' asynchronous server copies the pipeline's object, not its parts."""
    shared, arguments = pipelines.build("flux")
    with hicache.fast.apply(shared, EVERY_THIRD) as handle:
        alone = Request(0).draw(shared, arguments)
        twin = object.__new__(type(shared))
        twin.__dict__.update(vars(shared))
        twin.scheduler = flow_matching()
        assert torch.equal(Request(0).draw(twin, arguments), alone)
        assert handle.stats.skipped_steps > 0
    assert isinstance(twin, diffusers.FluxPipeline)
