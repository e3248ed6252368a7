"""Schedules and bases as objects: places of full steps, speed-ups, unequal gaps, plain data."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings

import pytest
import torch

import hicache.fast
from hicache import (
    Basis,
    Chebyshev,
    Engine,
    Geometric,
    Hermite,
    HiCacheConfig,
    Interval,
    Position,
    Reuse,
    ScaledTaylor,
    Schedule,
    Steps,
    Table,
    Taylor,
    bound,
    full_steps,
)
from hicache.noise_levels import noise_levels
from hicache.run import Run
from hicache.schedule import with_speedup
from hicache.snapshots import coefficients_of_weights, differences_of_snapshots
from hicache.tables import TABLES
from tests.support import pipelines

FLUX = [0, 1, 2, 4, 6, 11, 24, 41, 49]


@dataclasses.dataclass(frozen=True)
class EveryOther(Schedule):
    """A schedule of one's own."""

    offset: int = 0

    def is_full(self, step: int, last_full: int | None, num_steps: int | None = None) -> bool:
        return step % 2 == self.offset


@dataclasses.dataclass(frozen=True)
class Fading(Basis):
    """A basis of one's own, that looks at noise levels."""

    reads_sigmas = True
    strength: float = 0.5

    def coefficients(self, at: Position) -> list[float]:
        assert at.sigmas is not None
        share = at.sigmas[at.step] / at.sigmas[at.last_full]
        return [share**self.strength, *[0.0] * (at.num_coeffs - 1)]


# Places.


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        (Steps(*FLUX), FLUX),
        (Steps(4, 6), [0, 4, 6]),  # the first step has nothing to be forecast from
        (Interval(7), full_steps(HiCacheConfig(), 50)),
        (Interval(7, warmup=1, last_step_full=True), [0, 7, 14, 21, 28, 35, 42, 49]),
        ("uniform", full_steps(HiCacheConfig(), 50)),
        ("flux-dev", FLUX),
        (Table("flux-dev", 14), [0, 1, 2, 3, 4, 5, 7, 8, 11, 15, 23, 39, 49]),
        (EveryOther(), list(range(0, 50, 2))),
    ],
)
def test_places(schedule: Schedule | str, steps: list[int]):
    assert full_steps(HiCacheConfig(schedule=schedule), 50) == steps


@pytest.mark.parametrize(
    ("count", "num_steps"), [(4, 50), (9, 50), (13, 28), (9, 12), (30, 50), (9, 9), (9, 4)]
)
def test_geometric_gaps_grow_up_to_the_last_step(count: int, num_steps: int):
    places = full_steps(HiCacheConfig(schedule=Geometric(count)), num_steps)
    assert len(places) == min(count, num_steps)
    assert places[:3] == [0, 1, 2]
    assert places[-1] == num_steps - 1
    gaps = [new - old for old, new in itertools.pairwise(places[2:])]
    # rounded to whole steps, a gap may be one shorter than the one before it
    assert all(new >= old - 1 for old, new in itertools.pairwise(gaps))


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_of_runs_of_fifty_steps_and_end_there(name: str):
    for places in TABLES[name].places:
        assert list(places) == sorted(set(places))
        assert places[:3] == (0, 1, 2)
        assert places[-1] == 49
    sigmas = TABLES[name].sigmas()
    assert sigmas[0] == pytest.approx(1)
    assert sigmas == sorted(sigmas, reverse=True)
    # at 50 steps, noise levels make no difference; elsewhere they decide
    run = Run(50, tuple(sigmas))
    assert Table(name).for_run(run) == Table(name).for_run(Run(50))


def test_a_table_is_matched_by_noise_level_at_other_numbers_of_steps():
    shift = TABLES["flux-dev"].shift
    for num_steps in (20, 28, 100):
        times = [1 - step / num_steps for step in range(num_steps)]
        sigmas = tuple(shift * t / (1 + (shift - 1) * t) for t in times)
        found = Table("flux-dev").for_run(Run(num_steps, sigmas))
        assert isinstance(found, Steps)
        assert found.steps[:3] == (0, 1, 2)
        assert found.steps[-1] == num_steps - 1
        known = TABLES["flux-dev"].sigmas()
        for place in FLUX:
            nearest = min(range(num_steps), key=lambda step, place=place: abs(sigmas[step] - known[place]))
            assert nearest in found.steps
    # another shift has other places: matching by ordinal would not see that
    flat = Table("flux-dev").for_run(Run(28, tuple(1 - step / 28 for step in range(28))))
    shifted = tuple(shift * t / (1 + (shift - 1) * t) for t in (1 - step / 28 for step in range(28)))
    assert flat != Table("flux-dev").for_run(Run(28, shifted))


def test_a_table_without_noise_levels_is_an_interval_and_says_so():
    pipe, arguments = pipelines.build("flux")
    scheduler = pipe.scheduler
    with hicache.fast.apply(pipe, HiCacheConfig(schedule="flux-dev"), granularity="stack") as handle:
        pipelines.draw(pipe, arguments, 12)
        assert scheduler.sigmas is not None
        assert isinstance(handle.stats.config.schedule, Steps)
    taken = Table("flux-dev").for_run(Run(25))
    assert "tells no noise levels" in str(taken.fallback)
    assert len([step for step in range(25) if step in full_steps(HiCacheConfig(schedule=taken), 25)]) <= 5


def test_noise_levels_of_schedulers():
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

    for scheduler in (FlowMatchEulerDiscreteScheduler(shift=3.0), EulerDiscreteScheduler(), DDIMScheduler()):
        scheduler.set_timesteps(10)
        found = noise_levels(scheduler, 10)
        assert found is not None
        assert len(found) == 10
        assert list(found) == sorted(found, reverse=True), type(scheduler)
        assert noise_levels(scheduler, 7) == found[3:], "the last steps: image to image leaves out the first"
        assert noise_levels(scheduler, None) is None
    assert noise_levels(object(), 10) is None


# Speed-ups.


@pytest.mark.parametrize(
    ("schedule", "speedup", "count"),
    [("flux-dev", 50 / 9, 9), ("flux-dev", 3.5, 13), ("flux-dev", 2.0, 21), (Geometric(), 5.0, 10)],
)
def test_speedup_chooses_the_number_and_the_schedule_the_places(
    schedule: Schedule | str, speedup: float, count: int
):
    config = with_speedup(HiCacheConfig(schedule=schedule), speedup, 50)
    assert len(full_steps(config, 50)) == count
    assert bound(config, 50) >= round(speedup, 2) - 0.005


def test_speedup_of_given_steps_is_an_error_and_leaves_the_pipeline():
    with pytest.raises(ValueError, match="Steps has its own"):
        with_speedup(HiCacheConfig(schedule=Steps(0, 3)), 4.0, 50)
    pipe, arguments = pipelines.build("flux")
    before = pipelines.draw(pipe, arguments, 6)
    handle = hicache.fast.apply(pipe, HiCacheConfig(schedule=Steps(0, 3)), speedup=4.0)
    with pytest.raises(ValueError, match="Steps has its own"):
        pipelines.draw(pipe, arguments, 6)
    handle.remove()
    assert torch.equal(pipelines.draw(pipe, arguments, 6), before)


# Bases.


def test_objects_are_their_names_where_gaps_do_not_shrink():
    for name, basis in {
        "hermite": Hermite(0.4),
        "scaled_taylor": ScaledTaylor(0.4),
        "taylor": Taylor(),
        "reuse": Reuse(),
    }.items():
        values = torch.randn(40, 3, dtype=torch.float64)
        named = _forecasts(HiCacheConfig(basis=name, sigma=0.4, order=3), values)
        given = _forecasts(HiCacheConfig(basis=basis, order=3), values)
        assert torch.equal(named, given), name


@pytest.mark.parametrize("basis", ["hermite", "taylor", "scaled_taylor"])
def test_an_order_that_would_overshoot_is_left_out(basis: str):
    """D2 is a derivative where gaps are equal, else (newer + older) / (2 newer) times one."""
    for newer, older in ((4, 4), (1, 7), (7, 1), (2, 5)):
        places, last = [0, older, older + newer], older + newer
        engine = Engine(HiCacheConfig(warmup=1, basis="taylor", schedule=None, interval=1))
        for step in places:
            engine.record(step, [torch.tensor([step**2 / 2.0], dtype=torch.float64)])  # D2 is 1
        second = (engine.forecast(last + 1)[0] - last**2 / 2 - (last - newer / 2)) / 0.5
        assert second.item() == pytest.approx((newer + older) / (2 * newer))

        at = Position(last + 1, last, (newer, older), 3)
        weights = HiCacheConfig(basis=basis, schedule=Steps(*places)).weighed_by.coefficients(at)
        assert (weights[2] == 0) == (older > 2 * newer)
        assert weights[1] != 0
        # the paper's schedule has the paper's orders, all of them
        assert HiCacheConfig(basis=basis).weighed_by.coefficients(at)[2] != 0


@pytest.mark.parametrize("gaps", [(), (3,), (1, 7), (4, 2, 5), (1, 1, 1, 1)])
def test_differences_are_combinations_of_snapshots(gaps: tuple[int, ...]):
    torch.manual_seed(0)
    snapshots = torch.randn(len(gaps) + 1, 5, dtype=torch.float64)  # newest first
    engine = Engine(HiCacheConfig(order=4, warmup=1, interval=1))
    step = 0
    engine.record(step, [snapshots[-1]])
    for gap, feature in zip(reversed(gaps), reversed(snapshots[:-1]), strict=True):
        step += gap
        engine.record(step, [feature])
    engine.flush()
    assert engine.history is not None
    held = engine.history.orders[: len(gaps) + 1, :5]
    assert torch.allclose(differences_of_snapshots(gaps) @ snapshots, held, atol=1e-12)
    weights = torch.randn(len(gaps) + 1, dtype=torch.float64)
    alphas = coefficients_of_weights(weights, gaps)
    assert torch.allclose(alphas @ held, weights @ snapshots, atol=1e-10)


@pytest.mark.parametrize("gaps", [(3,), (1, 7), (4, 2, 5), (2, 9, 1, 3)])
def test_chebyshev_is_exact_without_a_ridge_and_reuse_with_a_large_one(gaps: tuple[int, ...]):
    count, last = len(gaps) + 1, sum(gaps)
    taken = [last - sum(gaps[:index]) for index in range(count)]
    polynomial = [0.3, -1.2, 0.7, 0.05, -0.01][:count]

    def feature(step: float) -> float:
        return sum(factor * step**power for power, factor in enumerate(polynomial))

    at = Position(last + 2, last, gaps, count)
    snapshots = torch.tensor([feature(step) for step in taken], dtype=torch.float64)
    differences = differences_of_snapshots(gaps) @ snapshots

    def forecast(ridge: float) -> float:
        weights = Chebyshev(ridge, degree=count - 1).coefficients(at)
        return float(torch.tensor(weights, dtype=torch.float64) @ differences)

    assert forecast(0) == pytest.approx(feature(last + 2), rel=1e-9)
    assert forecast(1e12) == pytest.approx(feature(last), rel=1e-6)


def test_chebyshev_overshoots_less_than_taylor_where_gaps_shrink():
    at = Position(20, 10, (1, 9), 3)
    snapshots = torch.tensor([1.1, 1.0, 1.0], dtype=torch.float64)
    differences = differences_of_snapshots(at.gaps) @ snapshots
    damped = float(torch.tensor(Chebyshev().coefficients(at), dtype=torch.float64) @ differences)
    bare = sum(10**k / math.factorial(k) * float(d) for k, d in enumerate(differences))
    assert abs(damped - 1.1) < abs(bare - 1.1)


def test_a_basis_sees_the_scheduler_s_noise_levels_in_fast_and_reference():
    import hicache.reference

    config = HiCacheConfig(interval=3, basis=Fading())
    pipe, arguments = pipelines.in_float64("flux")
    with hicache.fast.apply(pipe, config, granularity="module"):
        fast = pipelines.draw(pipe, arguments, 10)
    with hicache.reference.apply(pipe, config):
        reference = pipelines.draw(pipe, arguments, 10)
    assert (fast - reference).abs().max() <= 1e-10
    with hicache.fast.apply(pipe, HiCacheConfig(interval=3, basis="reuse"), granularity="module"):
        assert (pipelines.draw(pipe, arguments, 10) - fast).abs().max() > 1e-10


# In runs.


@pytest.mark.parametrize("schedule", [Steps(0, 1, 2, 4, 7), Geometric(6), "flux-dev", EveryOther(1)])
@pytest.mark.parametrize("granularity", ["module", "stack"])
def test_fast_and_reference_follow_a_schedule(schedule: Schedule | str, granularity: str):
    import hicache.reference

    config = HiCacheConfig(schedule=schedule)
    pipe, arguments = pipelines.in_float64("sd3")
    with hicache.fast.apply(pipe, config, granularity=granularity) as handle:
        fast = pipelines.draw(pipe, arguments, 10)
        stats = handle.stats
    if granularity == "module":
        with hicache.reference.apply(pipe, config) as handle:
            reference = pipelines.draw(pipe, arguments, 10)
            assert handle.stats.full_steps == stats.full_steps
        assert (fast - reference).abs().max() <= 1e-10
    assert stats.full_steps == len(full_steps(stats.config, 10))
    assert stats.skipped_steps


def test_all_steps_full_are_the_pipeline_s_own_bits():
    pipe, arguments = pipelines.build("flux")
    before = pipelines.draw(pipe, arguments, 8)
    with hicache.fast.apply(pipe, HiCacheConfig(schedule=Steps(*range(8)))):
        assert torch.equal(pipelines.draw(pipe, arguments, 8), before)


def test_settings_of_a_run_that_need_nothing_of_it_are_the_given_ones():
    config = HiCacheConfig(interval=3)
    assert config.for_run(Run(12)) is config
    pipe, arguments = pipelines.build("flux")
    with warnings.catch_warnings(), hicache.fast.apply(pipe, config) as handle:
        warnings.simplefilter("error")
        pipelines.draw(pipe, arguments, 6)
        assert handle.stats.config == config


# Plain data.


@pytest.mark.parametrize(
    "config",
    [
        HiCacheConfig(),
        HiCacheConfig(interval=4, order=1, sigma=0.3, history_dtype=torch.float32, last_step_full=True),
        HiCacheConfig(basis=Hermite(0.3, max_gap_ratio=3.0), schedule=Steps(*FLUX)),
        HiCacheConfig(basis=Taylor(), schedule=Geometric(12, warmup=2)),
        HiCacheConfig(basis=Chebyshev(0.2, 2), schedule="wan"),
        HiCacheConfig(basis=Reuse(), schedule=Table("qwen-image", 13)),
        HiCacheConfig(basis=Fading(0.25), schedule=EveryOther(1)),
        HiCacheConfig(schedule=Interval(5)),
    ],
)
def test_a_config_is_plain_data(config: HiCacheConfig, tmp_path):
    assert HiCacheConfig.from_json(config.to_json()) == config
    config.save(tmp_path / "config.json")
    assert HiCacheConfig.load(tmp_path / "config.json") == config
    assert full_steps(HiCacheConfig.from_json(config.to_json()), 50) == full_steps(config, 50)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: not JSON"),
        ('{\n "interval": 7,\n oops', "line 3: not JSON"),
        ("[1]", "expected settings of"),
        ('{"intervall": 3}', "got intervall"),
        ('{"interval": 0}', "expected an int >= 1, got 0"),
        ('{"basis": {"kind": "Hermit"}}', "expected a kind of .*Hermite.*, got 'Hermit'"),
        ('{"basis": {"kind": "Hermite", "sgma": 1}}', "cannot make Hermite"),
        ('{"schedule": {"kind": "Steps", "steps": [3, 1]}}', "rising"),
        ('{"schedule": "flux"}', "unknown schedule 'flux'; known schedules: .*flux-dev"),
    ],
)
def test_data_that_is_no_config_is_an_error(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        HiCacheConfig.from_json(text)


def test_what_nobody_knows_the_fields_of_cannot_be_saved():
    class Own(Basis):
        def coefficients(self, at: Position) -> list[float]:
            return [1.0] * at.num_coeffs

    with pytest.raises(TypeError, match="expected Own to be a dataclass"):
        HiCacheConfig(basis=Own()).to_json()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: HiCacheConfig(basis=3), TypeError, "name of a basis or a Basis, got 3"),
        (lambda: HiCacheConfig(schedule=7), TypeError, "a name, a Schedule or None, got 7"),
        (lambda: HiCacheConfig(schedule="often"), ValueError, "unknown schedule 'often'"),
        (lambda: HiCacheConfig(basis="missing.json"), ValueError, "missing.json: cannot be read"),
        (lambda: HiCacheConfig(schedule="missing.json"), ValueError, "missing.json: cannot be read"),
        (lambda: Hermite(0), ValueError, "Hermite.sigma: expected a finite number > 0, got 0"),
        (lambda: Hermite("a"), TypeError, "Hermite.sigma: expected a number > 0, got 'a'"),
        (lambda: Taylor(-1), ValueError, "Taylor.max_gap_ratio"),
        (lambda: ScaledTaylor(math.nan), ValueError, "ScaledTaylor.sigma"),
        (lambda: Chebyshev(-0.1), ValueError, "Chebyshev.ridge: expected a finite number >= 0, got -0.1"),
        (lambda: Chebyshev(0.1, 0), ValueError, "Chebyshev.degree: expected an int >= 1, got 0"),
        (lambda: Steps(), ValueError, "Steps: expected at least one ordinal"),
        (lambda: Steps(3, 1), ValueError, "Steps: expected at least one ordinal, rising"),
        (lambda: Steps(0.5), TypeError, "Steps: expected an int >= 0, got 0.5"),
        (lambda: Interval(0), ValueError, "Interval.interval: expected an int >= 1, got 0"),
        (lambda: Geometric(3), ValueError, "Geometric.count: expected an int >= 4, got 3"),
        (lambda: Table("sdxl"), ValueError, "Table: expected one of flux-dev, .*, got 'sdxl'"),
    ],
)
def test_wrong_settings_are_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def _forecasts(config: HiCacheConfig, values: torch.Tensor) -> torch.Tensor:
    engine, found = Engine(config), []
    engine.reset(num_steps=len(values))
    for step, value in enumerate(values):
        if engine.is_full(step):
            engine.record(step, [value])
        else:
            found.append(engine.forecast(step)[0])
    return torch.stack(found)
