"""Places of full steps: the cheapest by dynamic programming, what judges them, when they are refused."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import hicache
import hicache.demo
import hicache.fast
from hicache import HiCacheConfig, Steps, full_steps
from hicache.calibration.file import Calibration
from hicache.demo.prompts import random_prompts
from hicache.fitting import CalibrationRefused, closed_form, places, sway
from hicache.fitting.pictures import Pictures
from hicache.fitting.placing import Placing, freed
from hicache.fitting.products import Products
from hicache.fitting.replay import Replay, Trajectory
from hicache.fitting.rows import Layout
from hicache.fitting.trajectory import Target, full_runs

STEPS = 12
CONFIG = HiCacheConfig(interval=4)  # 5 full steps of 12


def demo() -> Any:
    pipe = hicache.demo.load()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def features(count: int, seed: int = 0) -> torch.Tensor:
    """Of a run that wanders, ``[count, 24]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 24, generator=generator, dtype=torch.float64).cumsum(0)


# The cheapest.


def least_squares(run: torch.Tensor, sources: list[int], step: int) -> float:
    """What a row with a ridge misses, from the features themselves."""
    given = run[sources]  # [sources, numbers]
    damping = (places.RIDGE * given.square().sum() / len(sources)).sqrt() * torch.eye(len(sources)).double()
    matrix = torch.cat([given.T, damping])
    aim = torch.cat([run[step], torch.zeros(len(sources)).double()])
    row = torch.linalg.lstsq(matrix, aim[:, None]).solution[:, 0]
    return float((matrix @ row - aim).square().sum())


def plain_cost(
    runs: list[torch.Tensor], weights: torch.Tensor, chosen: tuple[int, ...], config: HiCacheConfig
):
    """The cost of places by going through the run, step by step."""
    total = 0.0
    settings = dataclasses.replace(config, schedule=Steps(*chosen))
    for step, at in Layout.of(settings, len(weights)).positions.items():
        sources = [at.last_full]
        for gap in at.gaps:
            sources.append(int(sources[-1] - gap))
        total += float(weights[step]) * sum(least_squares(run, sources, step) for run in runs) ** 0.5
    return total


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("warmup", [1, 2, 3])
@pytest.mark.parametrize("count", [3, 4, 5])
def test_the_path_is_the_cheapest_of_all(order: int, warmup: int, count: int):
    num_steps = 9
    runs = [features(num_steps, seed) for seed in (1, 2)]  # of two contexts
    weights = torch.rand(num_steps, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    config = HiCacheConfig(order=order, warmup=warmup)
    cost = places.costs([run @ run.T for run in runs], weights, order)
    found, total = places.best(cost, count, warmup)
    every = [
        (*range(warmup), *others)
        for others in itertools.combinations(range(warmup, num_steps), count - warmup)
    ]
    by_hand = {chosen: plain_cost(runs, weights, chosen, config) for chosen in every}
    assert found == min(by_hand, key=by_hand.__getitem__)
    assert total == pytest.approx(by_hand[found], rel=1e-6)


def test_a_step_that_nothing_foretells_is_full():
    run = torch.zeros(12, 24, dtype=torch.float64)
    run[:7], run[7:] = features(2)
    for order in (0, 1):
        cost = places.costs([run @ run.T], torch.ones(12, dtype=torch.float64), order)
        assert 7 in places.best(cost, 3)[0]


@pytest.mark.parametrize("count", [0, 2, 10])
def test_numbers_of_full_steps_that_cannot_be(count: int):
    cost = places.costs([torch.eye(9, dtype=torch.float64)], torch.ones(9, dtype=torch.float64), 1)
    with pytest.raises(ValueError, match=f"expected 3 to 9 full steps, got {count}"):
        places.best(cost, count, warmup=3)


# What they are judged by.


def test_products_are_sums_over_runs_and_hold_one_run():
    products, runs = Products(), [features(6, seed) for seed in (1, 2, 3)]
    for run in runs:
        for step, feature in enumerate(run):
            products.take("t[0]", step, feature.reshape(2, 12))
            if step > 2:
                products.take("late", step, feature)  # begins in the middle: keeps the prior
            assert len(products._held["t[0]"]) == step + 1
    found = products.sums()
    assert found.keys() == {"t[0]"}
    assert products.partial == {"late"}
    expected = sum(run @ run.T / run.square().sum() for run in runs)
    assert torch.allclose(found["t[0]"], expected, rtol=1e-12)


def test_weights_say_what_an_error_does_to_the_final_latents():
    pipe = demo()
    pictures = Pictures(tuple(random_prompts(2, 1)), (0, 1), {"num_inference_steps": 6}, 2)
    products = Products()
    with Replay(pipe) as replay:
        target = full_runs(replay, pictures, products.take)
        sums = products.sums()
        weights = sway.weights(replay, pictures, target, sums)
        # errors half as large that move the latents as far weigh twice as much
        halved = sway.weights(replay, pictures, target, {name: one / 4 for name, one in sums.items()})
        # by hand: the fourth step, forecast from the two before it, in an otherwise full run
        [products_of] = sums.values()
        row = places.row(products_of, [1, 2], [3])[:, 0]
        rule = sway.AllButOne(3, [1, 2], {"transformer[0]": row})
        moved = replay.run(rule, pictures.arguments([0, 1], "latent")).output[0] - target.final
    assert weights.shape == (6,)
    assert (weights > 0).all()
    assert torch.allclose(halved, 2 * weights)
    size = (moved.double().square().flatten(1).mean(1).log().mean() / 2).exp()
    assert torch.allclose(weights[3], size / places.missed(products_of, [1, 2], [3]).sqrt())


@pytest.mark.parametrize(("num_steps", "tried"), [(2, 1), (3, 2), (13, 12), (14, 12), (50, 15)])
def test_the_second_and_the_last_steps_are_among_those_tried(num_steps: int, tried: int):
    steps = sway.probed(num_steps)
    assert (steps[0], steps[-1]) == (1, num_steps - 1)
    assert len(steps) == tried
    assert {*range(max(1, num_steps - sway.LAST), num_steps)} <= {*steps}


class Drift:
    """A replay whose features are the same whatever the latents: an error moves them by its step's size.

    Args:
        run: features, ``[steps, numbers]``.
        sizes: of the steps.
    """

    def __init__(self, run: torch.Tensor, sizes: torch.Tensor) -> None:
        self._features = run
        self._sizes = sizes

    def run(self, rule: Any, call: Any) -> Trajectory:
        latents = torch.zeros_like(self._features[:1])
        for step, feature in enumerate(self._features[:, None]):
            if rule.is_full(step):
                rule.record("t[0]", step, feature)
            else:
                feature = rule.forecast("t[0]", step)
            latents = latents - self._sizes[step] * feature
        return Trajectory(output=(latents,))


def test_a_last_step_that_is_shorter_says_nothing_of_those_before_it():
    run, num_steps = features(50), 50
    sizes = torch.full((num_steps,), 0.02, dtype=torch.float64)
    sizes[-1] = 0.001
    final = -(sizes[:, None] * run).sum(0, keepdim=True)
    target = Target(torch.zeros(num_steps, 1), final, ("t[0]",), None)
    pictures = Pictures(("a red ring",), (0,), {}, 1)
    weights = sway.weights(Drift(run, sizes), pictures, target, {"t[0]": run @ run.T})
    torch.testing.assert_close(weights / weights[1], sizes / sizes[1], rtol=0.2, atol=0.0)


# A calibration with places of its own.


def calibrated(pipe: Any, out: Path | None = None) -> Calibration:
    return hicache.calibrate(
        pipe,
        random_prompts(4, 1),
        configs=[CONFIG],
        num_inference_steps=STEPS,
        method="closed-form",
        places="searched",
        held_out_pictures=4,
        out=out,
    )


@pytest.fixture
def few_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("hicache.fitting.calibrate"), "CHOOSING", 4)


@pytest.mark.usefixtures("few_choose")
def test_places_that_are_better_are_in_the_file_and_speedup_takes_them(tmp_path: Path):
    pipe = demo()
    out = tmp_path / "places.json"
    [entry] = calibrated(pipe, out).entries
    assert len(entry.full_steps) == len(full_steps(CONFIG, STEPS))
    assert entry.full_steps != tuple(full_steps(CONFIG, STEPS))
    assert entry.full_steps[0] == 0
    assert entry.rows["transformer[0]"].keys() == set(range(STEPS)) - set(entry.full_steps)
    assert entry.scores["fitted mean dB"] > entry.scores["prior mean dB"]
    with hicache.fast.apply(pipe, HiCacheConfig.load(out), speedup=STEPS / 5) as handle:
        pipe("a red ring on blue", STEPS)
        assert tuple(full_steps(handle.stats.config, STEPS)) == entry.full_steps
        assert handle.stats.config.fallbacks == []
    # who asks for an interval gets its places, and the prior with them
    with (
        pytest.warns(RuntimeWarning, match="no rows for these 5 full steps"),
        hicache.fast.apply(pipe, dataclasses.replace(CONFIG, basis=str(out))) as handle,
    ):
        pipe("a red ring on blue", STEPS)
        assert full_steps(handle.stats.config, STEPS) == full_steps(CONFIG, STEPS)
    # the same seed makes the same file; what is there is not made again
    text = out.read_text()
    out.unlink()
    calibrated(pipe, out)
    assert out.read_text() == text
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Placing, "__init__", None)
        assert calibrated(pipe, out).entries == (entry,)
    with pytest.raises(ValueError, match="other settings"):
        hicache.calibrate(
            pipe, random_prompts(4, 1), num_inference_steps=STEPS, method="closed-form", out=out
        )


@pytest.mark.usefixtures("few_choose")
def test_places_found_in_noise_are_refused(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    take, fit, fitted = Products.take, closed_form.fit, []

    def noted(replay: Replay, layout: Layout, *more: Any) -> Any:
        fitted.append(layout.full_steps)
        return fit(replay, layout, *more)

    monkeypatch.setattr(Products, "take", lambda self, c, s, one: take(self, c, s, torch.randn_like(one)))
    monkeypatch.setattr(closed_form, "fit", noted)
    with warnings.catch_warnings(), contextlib.suppress(CalibrationRefused):  # of rows, as may be
        warnings.simplefilter("ignore")
        calibrated(demo())
    given, found, kept = fitted
    assert given == kept == tuple(full_steps(CONFIG, STEPS))
    assert found != given


def test_denoisers_that_are_called_in_some_steps_only_are_refused(monkeypatch: pytest.MonkeyPatch):
    take = Products.take
    late = lambda self, c, s, one: take(self, c, s, one) if s > 1 else None  # noqa: E731
    monkeypatch.setattr(Products, "take", late)
    pictures = Pictures(("a red ring on blue",), (0,), {"num_inference_steps": 4}, 1)
    with Replay(demo()) as replay, pytest.raises(ValueError, match=r"got transformer\[0\] in some of 4 only"):
        Placing(replay, pictures)


def test_without_a_warm_up_the_full_steps_are_the_same():
    config = freed(CONFIG, STEPS)
    assert full_steps(config, STEPS) == full_steps(CONFIG, STEPS)
    assert config.warmup == 1


def test_places_that_are_not_known():
    with pytest.raises(ValueError, match="expected places to be one of given, searched, got 'best'"):
        hicache.calibrate(demo(), ["a red ring on blue"], places="best")
