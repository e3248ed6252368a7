"""Analytic σ: the formula, the rows it gives by layer, and where it cannot be had."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import hicache
import hicache.fast
import hicache.reference
from benchmarks import waits
from hicache import AnalyticHermite, Basis, Engine, HiCacheConfig, Position
from hicache.basis import hermite
from hicache.companions.analytic import AnalyticRows
from hicache.feature_rows import FeatureRows
from hicache.launch.settings import Settings
from tests.support import models, pipelines, runs
from tests.support.operations import Operations

INTERVAL = {"interval": 4, "order": 2, "warmup": 3}
SMALL = 0.2  # an α at which the σ of small models with random weights lie between nothing and their maximum
STEPS = 12
PLACE = Position(step=4, last_full=2, gaps=(1, 1), num_coeffs=3)


def analytic(**settings: Any) -> HiCacheConfig:
    return HiCacheConfig(**INTERVAL, basis=AnalyticHermite(**{"alpha": SMALL, **settings}))


def differences(*norms: Sequence[float]) -> Tensor:
    """First differences of features ``[features, 1, tokens, 3]``, whose tokens have these norms."""
    direction = torch.tensor([2.0, -1.0, 2.0], dtype=torch.float64) / 3
    return (torch.tensor(norms, dtype=torch.float64)[..., None] * direction)[:, None]


def measured(
    settings: dict[str, Any], *firsts: Tensor, layers: Sequence[str | None] = ("b.0",)
) -> AnalyticRows:
    rows = AnalyticHermite(**settings).for_features(layers, torch.device("cpu"))
    for first in firsts:
        rows.measure(first)
    return rows


def sigma(settings: dict[str, Any], *norms: Sequence[float]) -> float:
    """σ of a layer after first differences whose tokens have these norms."""
    return measured(settings, *(differences(one) for one in norms)).told["b.0"]


def sigma_of(q: float) -> float:
    return min(1.0, 1.28 / (math.sqrt(2) * q + 1e-6))


def draw(apply: Any, name: str, config: HiCacheConfig, steps: int = STEPS, **more: Any) -> tuple[Tensor, Any]:
    pipe, arguments = pipelines.build_randomized(name)
    with apply(pipe, config, **more) as handle:
        return pipelines.draw(pipe, arguments, steps), handle.stats


by_module = functools.partial(draw, functools.partial(hicache.fast.apply, granularity="module"))
by_reference = functools.partial(draw, hicache.reference.apply)


# The tests that the specification of the method lists, by their numbers.


def test_1_what_does_not_move_has_the_largest_sigma():
    assert sigma({}, [0.0, 0.0]) == 1.0
    assert sigma({"maximum": 1e9}, [0.0]) == pytest.approx(1.28 / 1e-6)


def test_2_sigma_follows_from_the_norm():
    assert sigma({}, [2.0, 2.0, 2.0]) == pytest.approx(0.45255, abs=5e-6)
    assert sigma({}, [1.0, 3.0]) == pytest.approx(sigma_of(2.0), rel=1e-15)


def test_3_later_norms_move_it_by_beta():
    expected = sigma_of(math.sqrt(0.99 * 4 + 0.01 * 25))
    assert sigma({}, [2.0], [5.0]) == pytest.approx(expected, rel=1e-15)
    expected = sigma_of(math.sqrt(0.5 * 4 + 0.5 * 25))
    assert sigma({"beta": 0.5}, [2.0], [5.0]) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("beta", [0.0, -1.0])
def test_4_without_beta_it_is_the_same_whatever_the_data(beta: float):
    assert sigma({"beta": beta}, [7.0], [0.1]) == sigma({"beta": beta}) == pytest.approx(0.90510, abs=5e-6)


def test_5_a_quantile_of_the_norms():
    assert sigma({"quantile": 0.5}, [1.0, 2.0, 9.0]) == pytest.approx(sigma_of(2.0), rel=1e-15)


def test_6_smoothed_in_the_logarithm():
    first, second = sigma_of(2.0), sigma_of(math.sqrt(0.5 * 4 + 0.5 * 100))
    settings = {"smooth": 0.5, "beta": 0.5}
    assert sigma(settings, [2.0]) == pytest.approx(first, rel=1e-15)
    assert sigma(settings, [2.0], [10.0]) == pytest.approx(math.sqrt(first * second), rel=1e-12)


def test_7_at_first_and_at_order_0_the_row_is_that_of_the_fixed_sigma():
    rows = measured({"sigma": 0.3}, layers=("b.0", "b.1"))
    assert rows.told == {}
    weights = hermite(PLACE.gaps, PLACE.distance, PLACE.num_coeffs, 0.3)
    assert rows.rows([PLACE]).tolist() == [[[weight] * 2 for weight in weights]]
    alone = Position(step=2, last_full=1, gaps=(), num_coeffs=1)
    moved = measured({}, differences([3.0], [4.0]), layers=("b.0", "b.1"))
    assert moved.rows([alone]).tolist() == [[[1.0, 1.0]]]
    # in a run: up to the full step after the one that has the first D1, nothing is measured
    fixed = HiCacheConfig(**INTERVAL, sigma=0.3)
    upto = 6  # full are 0, 1, 2, 6
    outputs, stats = _outputs("flux", analytic(sigma=0.3))
    expected, _ = _outputs("flux", fixed)
    assert [torch.equal(a, b) for a, b in zip(outputs, expected, strict=True)][: upto + 1] == [True] * (
        upto + 1
    )
    assert not torch.equal(outputs[upto + 1], expected[upto + 1])
    assert stats.places[:4] == (0, 1, 2, 6)


def _outputs(name: str, config: HiCacheConfig) -> tuple[list[Tensor], Any]:
    """What the transformer returns, step by step, to the calls of an uncached run."""
    model, run = runs.recorded(name)
    returned: list[Tensor] = []
    hook = model.register_forward_hook(lambda module, args, output: returned.append(output[0].clone()))
    scheduler = runs.CountingScheduler()
    try:
        with hicache.fast.apply(model, config, scheduler=scheduler, granularity="module") as handle:
            runs.replay(model, run, scheduler)
            return returned, handle.stats
    finally:
        hook.remove()


@pytest.mark.parametrize("name", ["flux", "qwen"])
@pytest.mark.parametrize("path", [by_module, by_reference], ids=["fast", "reference"])
def test_8_one_sigma_for_all_layers_is_that_sigma_bit_for_bit(name: str, path: Any):
    same = 1.28 / (math.sqrt(2) + 1e-6)
    drawn, stats = path(name, HiCacheConfig(**INTERVAL, basis=AnalyticHermite(beta=0)))
    assert {*stats.sigmas["transformer[0]"].values()} == {same}
    expected, _ = path(name, HiCacheConfig(**INTERVAL, sigma=same))
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("path", [by_module, by_reference], ids=["fast", "reference"])
def test_9_contexts_have_their_own(path: Any):
    _, stats = path("qwen", analytic())
    first, second = (stats.sigmas[f"transformer[{ordinal}]"] for ordinal in (0, 1))
    assert first.keys() == second.keys() == {"transformer_blocks.0", "transformer_blocks.1"}
    assert all(first[layer] != second[layer] for layer in first)
    # what a context measures is what it would with no other one
    model, run = runs.recorded("qwen")
    scheduler = runs.CountingScheduler()
    with hicache.fast.apply(model, analytic(), scheduler=scheduler, granularity="module") as handle:
        runs.replay(model, [calls[:1] for calls in run], scheduler)
        alone = handle.stats.sigmas
    with hicache.fast.apply(model, analytic(), scheduler=scheduler, granularity="module") as handle:
        runs.replay(model, run, scheduler)
        together = handle.stats.sigmas
    assert [*alone] == ["transformer[0]"]
    assert alone["transformer[0]"] == together["transformer[0]"]


@pytest.mark.parametrize("path", [by_module, by_reference], ids=["fast", "reference"])
def test_10_at_interval_1_nothing_changes(path: Any):
    pipe, arguments = pipelines.build_randomized("flux")
    uncached = pipelines.draw(pipe, arguments, STEPS)
    drawn, stats = path("flux", HiCacheConfig(interval=1, basis=AnalyticHermite()))
    assert torch.equal(drawn, uncached)
    assert stats.skipped_steps == 0
    assert stats.sigmas["transformer[0]"]


def test_11_by_layer_attention_moves_it_before_the_mlp():
    """Two features of a block, one of another; upstream's text features are no features here."""
    layers = ("b.0", "b.0", "s.0", None)
    first, second = differences([2.0], [4.0], [3.0], [1.0]), differences([5.0], [1.0], [3.0], [1.0])
    found = measured({"beta": 0.5}, first, second, layers=layers).told

    def move(q: float, n: float) -> float:
        return math.sqrt(0.5 * q**2 + 0.5 * n**2)

    assert found["b.0"] == pytest.approx(sigma_of(move(move(move(2, 4), 5), 1)), rel=1e-15)
    assert found["s.0"] == pytest.approx(sigma_of(3.0), rel=1e-15)
    by_feature = measured({"beta": 0.5, "key": "feature"}, first, second, layers=layers).told
    expected = {"b.0#0": move(2, 5), "b.0#1": move(4, 1), "s.0#0": 3.0}
    assert by_feature == pytest.approx({name: sigma_of(q) for name, q in expected.items()}, rel=1e-15)


# Beyond those.


def test_a_feature_of_no_one_layer_keeps_the_fixed_sigma():
    rows = measured({"sigma": 0.3}, differences([2.0], [5.0]), layers=("b.0", None)).rows([PLACE])
    weights = hermite(PLACE.gaps, PLACE.distance, PLACE.num_coeffs, 0.3)
    assert rows[0, :, 1].tolist() == weights


def test_norms_that_are_not_finite_count_for_nothing():
    nan = differences([float("nan")])
    assert measured({}, nan).told == {}
    assert measured({}, differences([2.0]), nan).told == {"b.0": pytest.approx(sigma_of(2.0), rel=1e-15)}


@pytest.mark.few(6)
@pytest.mark.parametrize("key", ["layer", "feature"])
@pytest.mark.parametrize("name", pipelines.BY_LAYER)
def test_the_fast_path_equals_the_reference(name: str, key: str):
    model, run = runs.recorded_in(name, torch.float64)
    config = analytic(key=key)
    scheduler = runs.CountingScheduler()
    with hicache.reference.apply(model, config, scheduler=scheduler) as handle:
        expected = runs.replay(model, run, scheduler)
        theirs = handle.stats.sigmas
    with hicache.fast.apply(model, config, scheduler=scheduler) as handle:
        drawn = runs.replay(model, run, scheduler)
        ours, stats = handle.stats.sigmas, handle.stats
    assert stats.granularity == "module"
    assert stats.skipped_steps > 0
    torch.testing.assert_close(drawn, expected, rtol=1e-10, atol=1e-10)
    assert ours.keys() == theirs.keys()
    for context, sigmas in ours.items():
        assert sigmas == pytest.approx(theirs[context], rel=1e-10)
        assert len({*sigmas.values()}) > 1
        assert any(0 < one < 1 for one in sigmas.values())
        layer, one = next(iter(sigmas.items()))
        assert f"{context}: σ " in str(stats)
        assert f"{layer} {one:.3g}" in str(stats)


@pytest.mark.few(2)
@pytest.mark.parametrize("more", [{}, {"quantile": 0.9, "smooth": 0.5}], ids=["mean", "quantile"])
@pytest.mark.parametrize("answers", [True, False], ids=["at hand", "behind"])
def test_no_step_waits_for_a_device(answers: bool, more: dict[str, Any]):
    """Nor does the picture depend on how far behind the device is."""
    config = HiCacheConfig(**INTERVAL, basis=AnalyticHermite(alpha=SMALL, **more))
    with waits.emulated(lambda: answers) as seen, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        pipe, arguments = waits.build("flux", seen)
        with hicache.fast.apply(pipe, config):
            waits.of_a_run(seen, pipe, arguments)
            seen.found.clear()
            seen.begun = False
            drawn = pipelines.draw(pipe, arguments, STEPS)
            assert not [wait for wait in seen.found if wait.own and wait.begun]
    torch.manual_seed(0)
    pipe, arguments = pipelines.build("flux")
    with hicache.fast.apply(pipe, config, cuda_graphs=False):
        expected = pipelines.draw(pipe, arguments, STEPS)
    torch.testing.assert_close(drawn.host, expected)


def test_a_skipped_step_launches_what_it_does_with_one_sigma():
    """Rows are made at the first skipped step after a full one, for all up to the next."""

    def operations(config: HiCacheConfig) -> list[int]:
        model, run = runs.recorded("flux")
        scheduler = runs.CountingScheduler()
        counted: list[int] = []
        with hicache.fast.apply(model, config, scheduler=scheduler, granularity="module"):
            scheduler.set_timesteps(len(run))
            for [(args, kwargs)] in run:
                with torch.no_grad(), Operations() as mode:
                    model(*args, **kwargs)
                counted.append(sum(mode.seen.values()))
                scheduler.step()
        return counted

    with_one, with_many = operations(HiCacheConfig(**INTERVAL)), operations(analytic())
    later = [4, 5, 8, 9]  # skipped after a skipped step; full are 0, 1, 2, 6, 10
    assert [with_many[step] for step in later] == [with_one[step] for step in later]


@dataclass(frozen=True)
class ByLayer(Basis):
    """Rows by layer that nothing is measured for, as fitted ones are."""

    weights: dict[str, float]
    by_feature: ClassVar[bool] = True

    def coefficients(self, at: Position) -> Sequence[float]:
        return hermite(at.gaps, at.distance, at.num_coeffs, 0.5)

    def for_features(self, layers: Sequence[str | None], device: torch.device) -> FeatureRows:
        return _Rows([self.weights[str(layer)] for layer in layers])


class _Rows(FeatureRows):
    def __init__(self, sigmas: list[float]) -> None:
        self.sigmas = sigmas

    def rows(self, places: Sequence[Position]) -> Tensor:
        rows = [[hermite(at.gaps, at.distance, at.num_coeffs, one) for one in self.sigmas] for at in places]
        return torch.tensor(rows, dtype=torch.float64).mT


def test_any_basis_may_have_rows_by_feature():
    """By an engine: each feature is forecast as by an engine of its own."""
    sigmas = {"0": 0.3, "1": 0.5, "2": 0.9}
    settings = {"interval": 5, "order": 2, "warmup": 3}
    together = Engine(HiCacheConfig(**settings, basis=ByLayer(sigmas)))
    apart = [Engine(HiCacheConfig(**settings, sigma=one)) for one in sigmas.values()]
    for step in range(14):
        features = torch.randn(3, 2, 7, dtype=torch.float64).unbind()
        if together.is_full(step):
            together.record(step, features)
            for engine, feature in zip(apart, features, strict=True):
                engine.record(step, [feature])
            continue
        expected = [engine.forecast(step)[0] for engine in apart]
        for one, other in zip(together.forecast(step), expected, strict=True):
            assert torch.equal(one, other)


def test_features_of_several_shapes_cannot_have_rows_of_their_own():
    engine = Engine(analytic())
    with pytest.raises(ValueError, match="expected features of one shape"):
        engine.record(0, [torch.ones(1, 2, 3), torch.ones(1, 3, 3)])


@pytest.mark.parametrize(
    ("granularity", "why"),
    [
        ("stack", "the residual of all layers is one feature, and the basis has a row for every layer"),
        ("low-rank", "features are weighed sums of all layers"),
        ("output", "what the model returns is the only feature"),
    ],
)
@pytest.mark.parametrize("asked", ["apply", "plan"])
def test_what_has_no_layers_is_refused(asked: str, granularity: str, why: str):
    pipe, arguments = pipelines.build("flux")
    before = pipelines.draw(pipe, arguments, 4)
    wanted = {"apply": hicache.fast.apply, "plan": functools.partial(hicache.fast.plan, height=64, width=64)}
    with pytest.raises(ValueError, match=f"granularity='{granularity}': {why}.*use granularity='module'"):
        wanted[asked](pipe, analytic(), granularity=granularity)
    assert torch.equal(pipelines.draw(pipe, arguments, 4), before)


@pytest.mark.parametrize("name", ["wan", "ltx", "pixart", "sana", "flux2"])
def test_sums_of_all_layers_are_refused(name: str):
    pipe, _ = pipelines.build(name)
    kind = type(pipe.transformer).__name__
    with pytest.raises(ValueError, match=f"blocks of {kind} share their gates.*a row for every layer"):
        hicache.fast.apply(pipe, analytic())
    assert not [name for name in vars(pipe.transformer) if "hicache" in name]


def test_a_model_whose_modules_nobody_knows_is_refused():
    with pytest.raises(ValueError, match=r"granularity='module': the modules of AuraFlow\w+ are not known"):
        hicache.fast.apply(models.MODELS["auraflow"].built(), analytic())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"alpha": 0}, ValueError, "AnalyticHermite.alpha: expected a finite number > 0, got 0"),
        ({"maximum": -1}, ValueError, "AnalyticHermite.maximum: expected a finite number > 0"),
        ({"eps": "no"}, TypeError, "AnalyticHermite.eps: expected a number > 0, got 'no'"),
        ({"beta": 1.5}, ValueError, "AnalyticHermite.beta: expected a number up to 1, got 1.5"),
        ({"beta": True}, TypeError, "AnalyticHermite.beta: expected a number, got True"),
        ({"beta": float("nan")}, ValueError, "AnalyticHermite.beta: expected a number up to 1, got nan"),
        ({"quantile": 1.0}, ValueError, r"AnalyticHermite.quantile: expected a number in \(0, 1\) or None"),
        ({"smooth": 1}, ValueError, r"AnalyticHermite.smooth: expected a number in \[0, 1\), got 1"),
        ({"key": "block"}, ValueError, "AnalyticHermite.key: expected one of layer, feature, got 'block'"),
    ],
)
def test_bad_settings_are_errors(settings: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        AnalyticHermite(**settings)


def test_nobody_who_does_not_use_it_reads_it():
    """A config that names it is enough to find it."""
    text = analytic(quantile=0.5).to_json()
    script = (
        "import sys, hicache.fast, hicache.reference, hicache.launch.settings\n"
        "assert not [name for name in sys.modules if name.startswith('hicache.companions')]\n"
        f"config = hicache.HiCacheConfig.from_json({text!r})\n"
        "assert type(config.basis) is hicache.AnalyticHermite\n"
        "print(config.to_json())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(text)


def test_hicache_generate_has_a_mode_for_it():
    settings = Settings(mode="hicache-analytic", interval=5, sigma=0.3)
    assert settings.config() == HiCacheConfig(interval=5, sigma=0.3, basis=AnalyticHermite(sigma=0.3))
    assert settings.tag.startswith("hicache-analytic_N5_O2_s0.3")
    assert Settings(mode="hicache-analytic").config() == HiCacheConfig(basis=AnalyticHermite())
    with pytest.raises(ValueError, match=r"--mode: expected one of .*hicache-analytic"):
        Settings(mode="analytic")
