"""How often the host waits for the device: never at a full or a skipped step of a run that is under way.

Whole runs on the emulated GPU of the benchmarks. What is left is listed here, and in docs/architecture.md.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import hicache.fast
import hicache.numbers
from benchmarks import waits
from benchmarks.capture_safety.emulated_gpu import DEVICE, move, to_gpu
from hicache.runtime.gate_prefetch import GatePrefetch
from tests.support import models, pipelines
from tests.support.schedulers import flow_matching

NAMES = [*waits.MODELS.values()]
# of the first call of a form, once in the life of a context: is what was recorded what the blocks made?
LEARNING = {"check_sum", "come_out_alike"}
EMBEDDING = {"embeds_ahead"}
# of the first skipped step, once in the life of a model: is nothing added between blocks and head?
VERIFYING = {"_equal"}
RUN_START = {"run_start"}  # where among its scheduler's timesteps a run begins
POSITIONS = {"__call__"}  # of FLUX's tokens: which are drawn
GROUPS = {"_run_length"}  # of neighbouring tokens with one timestep, where they have timesteps of their own
DIRECTIONS = {"of"}  # of low rank
TWO_CALLS = {"flux_cfg", "qwen", "wan", "wan_ti2v_picture"}  # a step

counted = functools.cache(waits.count)


def own(name: str, granularity: str, run: int, kind: str) -> list[Counter[str]]:
    """The functions of hicache that wait at the steps of a kind, step by step."""
    runs = counted(name, granularity)
    if runs is None:
        pytest.skip(f"{name} is not cached by {granularity}")
    return [Counter(wait.function for wait in step if wait.own) for step in waits.of_kind(runs[run], kind)]


each_way = pytest.mark.parametrize("granularity", waits.GRANULARITIES)
each_model = pytest.mark.parametrize("name", NAMES)


@pytest.mark.few(10)
@each_model
@each_way
@pytest.mark.parametrize("run", range(waits.RUNS))
def test_no_later_step_waits(name: str, granularity: str, run: int):
    for kind in ("later full steps", "later skipped steps"):
        assert not any(own(name, granularity, run, kind))


@pytest.mark.few(8)
@each_model
@each_way
def test_the_first_run_waits_for_what_it_learns(name: str, granularity: str):
    run = functools.partial(own, name, granularity, 0)
    [start], [full], [skipped] = map(run, ("start of the run", "first full step", "first skipped step"))
    allowed = LEARNING | EMBEDDING if granularity != "stack" else EMBEDDING
    allowed = allowed | (DIRECTIONS if granularity == "low-rank" else set())
    assert start.keys() <= {*allowed, *RUN_START, *POSITIONS, *GROUPS}
    assert full.keys() <= {*allowed, *GROUPS}
    assert skipped.keys() == VERIFYING


@pytest.mark.few(8)
@each_model
@each_way
def test_a_later_run_waits_before_its_first_block(name: str, granularity: str):
    """Once for its timesteps, and for positions; for each call of a step by low rank or groups of tokens."""
    run = functools.partial(own, name, granularity, 1)
    [start], [full], [skipped] = map(run, ("start of the run", "first full step", "first skipped step"))
    positions = POSITIONS if name.startswith("flux") else set()
    by_call = DIRECTIONS if granularity == "low-rank" else GROUPS if "ti2v" in name else set()
    assert start == Counter(RUN_START | positions | by_call)
    assert full == Counter(by_call if name in TWO_CALLS else ())
    assert not skipped


@pytest.mark.few(6)
@each_model
@each_way
def test_the_pipeline_and_the_model_wait_no_more_than_uncached(name: str, granularity: str):
    runs, uncached = counted(name, granularity), counted(name, None)
    assert uncached is not None
    for with_cache, without in zip(runs or (), uncached, strict=False):
        for step, other in zip(with_cache, without, strict=True):
            found = Counter(wait[:3] for wait in step if not wait.own)
            assert found <= Counter(wait[:3] for wait in other)


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["flux_cfg", "hunyuan"])
@each_way
def test_a_device_that_is_behind_is_not_waited_for(name: str, granularity: str):
    """It answers nothing in the whole run; the picture is the same."""

    def draw(answers: bool) -> Tensor:
        with waits.emulated(lambda: answers) as seen, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            pipe, arguments = waits.build(name, seen)
            with hicache.fast.apply(pipe, waits.CONFIG, granularity=granularity):
                waits.of_a_run(seen, pipe, arguments)
                seen.found.clear()
                seen.begun = False
                drawn = pipelines.draw(pipe, arguments, waits.STEPS)
                found = Counter(wait.function for wait in seen.found if wait.own and wait.begun)
        assert found == Counter(DIRECTIONS if granularity == "low-rank" and name in TWO_CALLS else ())
        return drawn.host

    assert torch.equal(draw(answers=False), draw(answers=True))


@pytest.mark.parametrize("granularity", ["stack", "module"])
def test_coefficients_of_a_run_are_brought_to_the_device_together(
    granularity: str, monkeypatch: pytest.MonkeyPatch
):
    """One upload a context in its first run, and none in later ones."""
    uploads: list[Tensor] = []
    uploaded = hicache.numbers.uploaded

    def noted(numbers: Tensor, device: torch.device) -> Tensor:
        uploads.append(numbers)
        return uploaded(numbers, device)

    monkeypatch.setattr(hicache.numbers, "uploaded", noted)
    with waits.emulated() as seen, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe, arguments = waits.build("flux", seen)
        with hicache.fast.apply(pipe, waits.CONFIG, granularity=granularity):
            waits.of_a_run(seen, pipe, arguments)
            assert len(uploads) == 1
            waits.of_a_run(seen, pipe, arguments)
    assert len(uploads) == 1


# Timesteps that turn out not to be the scheduler's.

WRONG = 5  # from this step on: the last skipped one before a full one; full are 0, 1, 2, 6, 10


def loop(answers_at: int) -> tuple[list[Tensor], int | None, list[bool]]:
    """A loop of one's own; the device answers from a step on.

    Returns:
        The outputs; the step at which a warning came; whether each skipped step had gates computed ahead.
    """
    torch.manual_seed(0)
    now, told, ahead = -1, None, []
    outputs: list[Tensor] = []
    ahead_of = GatePrefetch.ahead

    def watched(self: GatePrefetch, *args: Any) -> Any:
        result = ahead_of(self, *args)
        ahead.append(result.gates is not None)
        return result

    with (
        waits.emulated(lambda: now >= answers_at) as seen,
        warnings.catch_warnings(record=True) as caught,
        pytest.MonkeyPatch.context() as patch,
    ):
        warnings.simplefilter("always")
        patch.setattr(GatePrefetch, "ahead", watched)
        model, scheduler = models.flux_transformer(), flow_matching()
        move(model)
        call = to_gpu(
            models.flux_call(
                models.noise(1, 16, 4),
                torch.zeros(1),
                guidance=torch.full((1,), 3.5),
                pooled_projections=models.noise(1, 32),
            )
        )
        with hicache.fast.apply(model, waits.CONFIG, scheduler=scheduler, granularity="module"):
            scheduler.set_timesteps(14, device=DEVICE)
            for now, t in enumerate(scheduler.timesteps):
                timestep = t.expand(1) / 1000
                timestep = timestep * 0.9 if now >= WRONG else timestep
                outputs.append(model(**{**call, "timestep": timestep})[0].host)
                scheduler.step(to_gpu(models.noise(1, 16, 4)), t, to_gpu(models.noise(1, 16, 4)))
                if told is None and any("not the scheduler's" in str(one.message) for one in caught):
                    told = now
        assert not [wait for wait in seen.found if wait.own and wait.function == "reading"]
    return outputs, told, ahead


def test_other_timesteps_are_told_at_the_next_full_step():
    _, told, ahead = loop(answers_at=0)
    assert told == 6
    assert ahead == [True, True, True, *[False] * 6]


@pytest.mark.parametrize("answers_at", [7, 10])
def test_or_as_soon_as_the_device_has_come_to_it(answers_at: int):
    """A full step later at most, where the host is no further ahead; from there on no gates are taken."""
    _, told, ahead = loop(answers_at)
    assert told == answers_at
    late = answers_at - 7
    assert ahead == [True] * (3 + late) + [False] * (6 - late)


def test_gates_of_other_timesteps_are_not_used_for_longer_than_told():
    at_once, later = loop(answers_at=0)[0], loop(answers_at=7)[0]
    assert all(torch.equal(one, other) for one, other in zip(at_once, later, strict=True))
