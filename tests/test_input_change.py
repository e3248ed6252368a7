"""Full steps decided while a run goes on: the budget, frozen decisions, waits, and what decides."""

from __future__ import annotations

import itertools
import math
import random
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import hicache.fast
import hicache.reference
from benchmarks import waits
from benchmarks.capture_safety.emulated_gpu import EmulatedTensor
from hicache import HiCacheConfig, InputChange, Interval, Steps, full_steps
from hicache.input_change import Decisions, Frozen
from hicache.input_filter import FILTERS
from hicache.run import Run
from hicache.runtime.input_watch import InputWatch
from tests.support import models, pipelines
from tests.support.comparisons import close
from tests.support.graphs import FakeBackend, connect, other_prompt
from tests.support.schedulers import flow_matching
from tests.support.unets import build as build_unet


def decided(rule: InputChange, changes: Sequence[float]) -> list[int]:
    """The full steps of a run whose latents change by these from each step to the next."""
    num_steps = len(changes) + 1
    decisions, full, heard = Decisions(rule, Run(num_steps)), [], {}
    for step in range(num_steps):
        if step and decisions.measures(step):
            heard[step] = changes[step - 1]
        if decisions.asks(step):
            decisions.ask(step, lambda found=heard: found)
            heard = {}
        if not full or decisions.is_full(step, full[-1], num_steps):
            decisions.note(step)
            full.append(step)
        decisions.end(step)
    return full


# What is decided.


def test_even_changes_are_the_interval_of_as_many_full_steps():
    assert decided(InputChange(9), [0.1] * 49) == full_steps(HiCacheConfig(interval=7), 50)
    assert full_steps(HiCacheConfig(schedule=InputChange(9)), 50) == full_steps(HiCacheConfig(interval=7), 50)


@pytest.mark.parametrize("warmup", [2, 3, 5])
def test_latents_that_do_not_change_are_never_full_after_the_warm_up(warmup: int):
    assert decided(InputChange(9, warmup=warmup), [0.0] * 49) == list(range(warmup))
    last = InputChange(9, warmup=warmup, last_step_full=True)
    assert decided(last, [0.0] * 49) == [*range(warmup), 49]


def test_a_warm_up_of_one_step_tells_no_change():
    """So the step after it is where it would be if all changes were alike."""
    assert decided(InputChange(5, warmup=1), [0.0] * 49) == [0, 10]


def test_steps_are_full_where_latents_change_most():
    early = decided(InputChange(9), [0.2] * 15 + [0.02] * 34)
    late = decided(InputChange(9), [0.02] * 25 + [0.2] * 24)
    assert sum(step >= 25 for step in early) < sum(step >= 25 for step in late)


def test_a_threshold_leaves_full_steps_unspent():
    assert decided(InputChange(threshold=0.45), [0.1] * 30) == [0, 1, 2, 7, 12, 17, 22, 27]
    assert decided(InputChange(20, threshold=0.95), [0.1] * 30) == [0, 1, 2, 12, 22]
    assert len(decided(InputChange(4, threshold=0.1), [0.1] * 30)) == 4


@pytest.mark.parametrize("seed", range(60))
def test_the_budget_is_never_exceeded(seed: int):
    draw = random.Random(seed)
    num_steps, warmup = draw.randint(1, 60), draw.randint(1, 4)
    last, most = draw.random() < 0.5, draw.choice([None, 1, 3, 8])
    budget = draw.randint(warmup + last, warmup + last + 20)
    kinds = [0.0, 1e-30, 1e-3, 0.1, 5.0, 1e30, math.nan, math.inf]
    changes = [draw.choice(kinds) * draw.random() for _ in range(num_steps - 1)]
    rule = InputChange(budget, warmup=warmup, last_step_full=last, max_skips=most)
    full = decided(rule, changes)
    assert len(full) <= budget
    assert full[:warmup] == list(range(min(warmup, num_steps)))
    assert not last or full[-1] == num_steps - 1
    if most is not None and len(full) < budget:
        gaps = [new - old for old, new in zip(full, [*full[1:], num_steps], strict=True)]
        assert max(gaps) <= most + 1


def test_full_steps_that_nobody_decided_take_the_place_of_the_next():
    decisions = Decisions(InputChange(6, last_step_full=True), Run(30))
    for step in (0, 1, 2):
        decisions.note(step)
    first, second, last = decisions.places[3:]
    decisions.note(3)  # there was nothing to forecast from
    assert decisions.places == (0, 1, 2, 3, second, last) != (0, 1, 2, 3, first, last)
    for step in (4, 5, 6):
        decisions.note(step)
    assert decisions.places == (0, 1, 2, 3, 4, 5, 6), "nothing is left, not for the last step either"


def test_a_context_that_begins_late_counts_from_its_first_step():
    decisions = Decisions(InputChange(9), Run(50))
    for step in (0, 1, 2):
        decisions.note(step)
    assert decisions.is_full(9, 2, 50)
    assert decisions.is_full(4, 0, 45), "step 9 of the run"
    assert decisions.is_full(1, 0, 45), "its warm-up"
    spent = Decisions(InputChange(3), Run(50))
    for step in (0, 1, 2):
        spent.note(step)
    assert not spent.is_full(1, 0, 45), "which the budget has nothing left for"
    assert Frozen((0, 1, 2, 9), 50).is_full(4, 0, 45)


# What it is decided by.


@pytest.mark.parametrize("shape", [(2, 64, 8), (1, 4, 8, 12), (1, 4, 3, 8, 8)])
@pytest.mark.parametrize("sigma", [1.0, 0.7, 0.01, 14.0])
def test_sea_passes_means_and_coarse_shapes_more_than_fine_ones(shape: tuple[int, ...], sigma: float):
    sea = FILTERS["sea"]
    axis = 1 if len(shape) == 3 else -1
    places = torch.arange(shape[axis], dtype=torch.float64)
    view = [1] * len(shape)
    view[axis] = -1

    def gain(waves: float) -> float:
        wave = torch.cos(2 * math.pi * waves * places / shape[axis]).view(view).expand(shape)
        return float(sea(wave, sigma, 2.0).norm() / wave.norm())

    coarse, fine = gain(1), gain(shape[axis] // 4)
    assert coarse > fine or sigma == 0.01
    assert gain(0) == pytest.approx(gain(1) * 1, rel=1e-9)
    if sigma == 0.01:
        assert fine > 0.9 * coarse, "hardly any noise is left"
    noise = torch.randn(shape)
    assert sea(noise, sigma, 2.0).shape == shape
    assert sea(noise.bfloat16(), sigma, 2.0).dtype == torch.float32


def test_all_tensors_of_a_nested_argument_count_and_are_copied():
    online = Decisions(InputChange(9), Run(20))
    watch, one, other = InputWatch(online), torch.ones(3, 4), torch.ones(2)
    for step in range(3):
        watch.see(step, [one, {"more": other}])
        watch.see(step, [one * 100])  # another call of the step
        online.note(step)
        one += 0.5  # in place: what is held is a copy
    watch.end(2)
    sizes = [12 + 2, 18 + 2]
    assert online._changes == {1: pytest.approx(6 / sizes[0]), 2: pytest.approx(6 / sizes[1])}


def test_other_shapes_in_the_middle_of_a_run_are_not_compared():
    online = Decisions(InputChange(9), Run(20))
    watch = InputWatch(online)
    for step, tokens in enumerate((8, 16, 16)):
        watch.see(step, torch.ones(1, tokens, 4))
    watch.end(2)
    assert online._changes == {2: 0.0}


def test_without_latents_it_is_an_error():
    with pytest.raises(TypeError, match="expected latents for the first argument, got None"):
        InputWatch(Decisions(InputChange(9), Run(20))).see(0, None)


# In runs.


@pytest.mark.parametrize("name", ["flux", "flux_cfg", "sd3", "flux_controlnet"])
@pytest.mark.parametrize("rule", [InputChange(6), InputChange(6, filter="sea", last_step_full=True)])
def test_fast_decides_as_the_reference_does(name: str, rule: InputChange):
    pipe, arguments = pipelines.in_float64(name)
    config = HiCacheConfig(schedule=rule)
    with hicache.fast.apply(pipe, config, granularity="module") as handle:
        fast, places = pipelines.draw(pipe, arguments, 14), handle.stats.places
    with hicache.reference.apply(pipe, config) as handle:
        reference = pipelines.draw(pipe, arguments, 14)
        assert handle.stats.places == places
    assert (fast - reference).abs().max() <= 1e-10
    assert len(places) <= 6 < 14


@pytest.mark.parametrize("granularity", ["stack", "module", "low-rank", "output"])
@pytest.mark.parametrize("name", ["flux_cfg", "flux_many", "wan22"])
def test_all_calls_of_a_step_follow_one_decision(name: str, granularity: str):
    if (name, granularity) == ("wan22", "low-rank"):
        pytest.skip("Wan's gates are not of low rank")
    pipe, arguments = pipelines.build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with hicache.fast.apply(
            pipe, HiCacheConfig(schedule=InputChange(7)), granularity=granularity
        ) as handle:
            for num_steps in (14, 9, 14):
                pipelines.draw(pipe, arguments, num_steps)
                stats = handle.stats
                counts = Counter((label.split("[")[0], c.full_steps) for label, c in stats.contexts.items())
                denoisers = {label.split("[")[0] for label in stats.contexts}
                assert len(counts) == len(denoisers), "the contexts of a denoiser have as many"
                assert stats.full_steps == len(stats.places) <= 7
                assert stats.places[:3] == (0, 1, 2)


def test_frozen_runs_are_the_first_one_bit_for_bit_and_look_at_nothing(monkeypatch: pytest.MonkeyPatch):
    pipe, arguments = pipelines.build("flux_cfg")
    rule = InputChange(6, freeze=True)
    seen: list[int] = []
    see = InputWatch.see
    monkeypatch.setattr(
        InputWatch, "see", lambda self, step, given: (seen.append(step), see(self, step, given))
    )
    with hicache.fast.apply(pipe, HiCacheConfig(schedule=rule)) as handle:
        first, places = pipelines.draw(pipe, arguments, 14), handle.stats.places
        assert set(seen) == set(range(14))
        seen.clear()
        again = pipelines.draw(pipe, arguments, 14)
        assert torch.equal(first, again)
        assert handle.stats.places == places
        assert handle.stats.config.schedule == Frozen(places, 14)
        assert not seen
        other = {**arguments, "latents": arguments["latents"] * 3} if "latents" in arguments else arguments
        pipelines.draw(pipe, other, 14)
        assert handle.stats.places == places, "whatever is drawn"
        pipelines.draw(pipe, arguments, 10)
        assert set(seen) == set(range(10)), "another number of steps decides for itself"
        steps = handle.stats.schedule
        assert isinstance(steps, Steps)
    with hicache.fast.apply(pipe, HiCacheConfig(schedule=steps)) as handle:
        pipelines.draw(pipe, arguments, 10)
        assert handle.stats.places == steps.steps


def test_a_run_that_was_broken_off_is_not_frozen():
    pipe, arguments = pipelines.build("flux")

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            raise KeyboardInterrupt
        return {}

    with hicache.fast.apply(pipe, HiCacheConfig(schedule=InputChange(6, freeze=True))) as handle:
        with pytest.raises(KeyboardInterrupt):
            pipelines.draw(pipe, arguments, 14, callback_on_step_end=stop)
        pipelines.draw(pipe, arguments, 14)
        assert isinstance(handle.stats.config.schedule, Decisions)
        pipelines.draw(pipe, arguments, 14)
        assert isinstance(handle.stats.config.schedule, Frozen)


def test_a_unet_by_output():
    pipe, arguments = build_unet("sd15")
    with hicache.fast.apply(
        pipe, HiCacheConfig(schedule=InputChange(5, filter="sea")), granularity="output"
    ) as h:
        pipelines.draw(pipe, arguments, 12)
        assert len(h.stats.places) <= 5
        assert h.stats.skipped_steps >= 7


def test_a_run_that_leaves_out_its_first_steps():
    """As image to image does: ``begin_index`` says where it starts."""
    torch.manual_seed(0)
    model, scheduler = models.flux_transformer(), flow_matching()
    with hicache.fast.apply(
        model, HiCacheConfig(schedule=InputChange(5)), scheduler=scheduler, granularity="stack"
    ) as handle:
        scheduler.set_timesteps(16)
        scheduler.set_begin_index(6)
        latents = models.noise(1, 16, 4)
        for t in scheduler.timesteps[6:]:
            call = models.flux_call(
                latents,
                t.expand(1) / 1000,
                guidance=torch.full((1,), 3.5),
                pooled_projections=models.noise(1, 32),
            )
            with torch.no_grad():
                latents = scheduler.step(model(**call)[0], t, latents)[0]
        assert handle.stats.full_steps + handle.stats.skipped_steps == 10
        assert full_steps(handle.stats.config, 10) == list(handle.stats.places)
        assert len(handle.stats.places) <= 5


@pytest.mark.parametrize("speedup", [2.0, 50 / 9, 10.0])
def test_speedup_chooses_the_budget(speedup: float):
    pipe, arguments = pipelines.build("flux")
    with hicache.fast.apply(pipe, HiCacheConfig(schedule=InputChange()), speedup=speedup) as handle:
        pipelines.draw(pipe, arguments, 50)
        stats = handle.stats
        assert stats.bound >= round(speedup, 2) - 0.005
        assert 0.7 * 50 / speedup <= len(stats.places) <= 50 / speedup + 1e-9


def test_an_interval_is_as_it_was():
    """Nothing is looked at, and the bits are those of the same steps given one by one."""
    pipe, arguments = pipelines.build("flux")
    with hicache.fast.apply(pipe, HiCacheConfig(schedule=Interval(4))) as handle:
        drawn = pipelines.draw(pipe, arguments, 14)
        assert handle.stats.places == (0, 1, 2, 6, 10)
        assert handle._sessions.latest.latents is None
    with hicache.fast.apply(
        pipe, HiCacheConfig(schedule=Steps(0, 1, 2, 6, 10), basis=HiCacheConfig().weighed_by)
    ):
        assert torch.equal(pipelines.draw(pipe, arguments, 14), drawn)


def test_plan_says_the_most_full_steps():
    pipe, _ = pipelines.build("flux")
    plan = hicache.fast.plan(pipe, HiCacheConfig(schedule=InputChange(9)), height=64, width=64)
    assert (plan.full_steps, plan.steps) == (9, 50)
    assert str(plan).endswith("at most 9 of 50 steps are full")


@pytest.mark.parametrize("granularity", ["stack", "module"])
def test_replayed_graphs_decide_as_eager_calls_do(granularity: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hicache.fast, "CudaBackend", FakeBackend)
    pipe, arguments = pipelines.build("flux")
    config = HiCacheConfig(schedule=InputChange(6))

    def drawn(**more: Any) -> tuple[list[Tensor], list[tuple[int, ...]], Any]:
        found, places = [], []
        with connect(hicache.fast.apply(pipe, config, granularity=granularity, **more)) as handle:
            for given in (arguments, other_prompt(arguments), arguments):
                with torch.no_grad():
                    found.append(pipelines.draw(pipe, given, 14))
                places.append(handle.stats.places)
            return found, places, handle.stats.graphs

    eager, replayed = drawn(cuda_graphs=False), drawn()
    assert replayed[1] == eager[1]
    assert all(map(close, replayed[0], eager[0]))
    [graphs] = replayed[2].values()
    assert graphs.eager is None
    assert graphs.captures == 3, "as with any schedule, whatever its gaps"
    assert graphs.replays > 12


# Waits, on an emulated GPU: three runs of 12 steps, the device ahead of the host or behind.


def waits_of(
    granularity: str, answers: bool, rule: InputChange
) -> Iterator[tuple[set[int], list[Counter[str]]]]:
    """Full steps of a later run, and hicache's own waits step by step."""
    with waits.emulated(lambda: answers) as seen, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe, arguments = waits.build("flux_cfg", seen)
        config = HiCacheConfig(schedule=rule)
        with hicache.fast.apply(pipe, config, granularity=granularity) as handle:
            for _ in range(3):
                steps = waits.of_a_run(seen, pipe, arguments)
                found = [Counter(wait.function for wait in step if wait.own) for step in steps]
                yield set(handle.stats.places), found


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("granularity", "filter", "answers"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] * (index % 3 > 0))
        for index, case in enumerate(
            itertools.product(["stack", "module", "output"], ["identity", "sea"], [True, False])
        )
    ],
)
def test_no_skipped_step_waits(granularity: str, filter: str, answers: bool):
    _, *later = waits_of(granularity, answers, InputChange(6, filter=filter))
    for full, found in later:
        assert {0, 1, 2} < full
        assert len(full) < waits.STEPS
        for step in range(3, waits.STEPS):
            wanted = {"answer": 1} if step in full and not answers else {}
            assert found[step] == Counter(wanted) or (step in full and not found[step])
        told = sum(step["answer"] for step in found)
        assert told == 0 if answers else 1 <= told <= 6 - 3


def test_frozen_runs_wait_for_nothing_and_launch_nothing_more():
    def launches(rule: Any) -> list[int]:
        """Operations on the device at each step of the third run."""
        counts: list[int] = []
        with waits.emulated() as seen, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe, arguments = waits.build("flux", seen)
            with (
                hicache.fast.apply(pipe, HiCacheConfig(schedule=rule), granularity="stack"),
                Counting() as ops,
            ):
                for _ in range(3):
                    pipelines.draw(
                        pipe,
                        arguments,
                        waits.STEPS,
                        callback_on_step_end=lambda *_: counts.append(ops.found) or {},
                    )
        third = counts[2 * waits.STEPS - 1 :]
        return [new - old for old, new in itertools.pairwise(third)]

    frozen = launches(InputChange(6, freeze=True))
    online = launches(InputChange(6))
    with waits.emulated() as seen:
        pipe, arguments = waits.build("flux", seen)
        with hicache.fast.apply(pipe, HiCacheConfig(schedule=InputChange(6)), granularity="stack") as handle:
            pipelines.draw(pipe, arguments, waits.STEPS)
            places = handle.stats.places
    given = launches(Steps(*places))
    assert frozen[1:] == given[1:]
    assert frozen[0] - given[0] <= 3, "the noise levels of the run, by which it is known again"
    more = [one - other for one, other in zip(online, frozen, strict=True)]
    assert max(more) <= 12
    assert max(more[step] for step in range(4, waits.STEPS) if step not in places) <= 5, "and two views"


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts operations on the emulated device."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        self.found += any(isinstance(tensor, EmulatedTensor) for tensor in tensors)
        return output


# Plain data and errors.


@pytest.mark.parametrize(
    "rule",
    [InputChange(9), InputChange(threshold=0.2, filter="sea", power=3.0, max_skips=4, freeze=True)],
)
def test_settings_are_plain_data_before_and_in_a_run(rule: InputChange):
    config = HiCacheConfig(schedule=rule)
    assert HiCacheConfig.from_json(config.to_json()) == config
    settled = config.for_run(Run(20, tuple(1 - step / 20 for step in range(20))))
    assert HiCacheConfig.from_json(settled.to_json()).schedule == rule
    frozen = HiCacheConfig(schedule=Frozen((0, 1, 5), 20))
    assert HiCacheConfig.from_json(frozen.to_json()) == frozen


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: InputChange(2), ValueError, "InputChange.budget: expected an int >= 3, got 2"),
        (lambda: InputChange(3, last_step_full=True), ValueError, "expected an int >= 4, got 3"),
        (lambda: InputChange(2.5), TypeError, "InputChange.budget: expected an int >= 3, got 2.5"),
        (lambda: InputChange(9, warmup=0), ValueError, "InputChange.warmup: expected an int >= 1, got 0"),
        (
            lambda: InputChange(9, max_skips=0),
            ValueError,
            "InputChange.max_skips: expected an int >= 1, got 0",
        ),
        (
            lambda: InputChange(9, threshold=-1),
            ValueError,
            "InputChange.threshold: expected a finite number >= 0",
        ),
        (
            lambda: InputChange(9, power=0),
            ValueError,
            "InputChange.power: expected a finite number > 0, got 0",
        ),
        (lambda: InputChange(9, filter="fft"), ValueError, "expected one of identity, sea, got 'fft'"),
        (lambda: InputChange(9, freeze=1), TypeError, "InputChange.freeze: expected True or False, got 1"),
        (lambda: InputChange(9).for_run(Run()), ValueError, "needs the number of steps: pass scheduler="),
        (lambda: InputChange().for_run(Run(20)), ValueError, "a budget=, a threshold= or speedup="),
        (lambda: InputChange(9, filter="sea").for_run(Run(20)), ValueError, "this scheduler has none"),
        (lambda: InputChange(9).with_full_steps(5, Run(20)), ValueError, "InputChange has its own"),
        (lambda: hicache.fast.Stats(HiCacheConfig(), "stack", "auto").schedule, ValueError, "at least one"),
    ],
)
def test_wrong_settings_are_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_an_error_in_a_run_leaves_the_pipeline():
    pipe, arguments = pipelines.build("flux")
    before = pipelines.draw(pipe, arguments, 6)
    with hicache.fast.apply(pipe, HiCacheConfig(schedule=InputChange())) as handle:
        with pytest.raises(ValueError, match="a budget="):
            pipelines.draw(pipe, arguments, 6)
        assert handle.active
    assert torch.equal(pipelines.draw(pipe, arguments, 6), before)
