"""Config, bases, schedule and engine: the formulas and worked numbers of docs/algorithm.md."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
import torch

from hicache import (
    Engine,
    HiCacheConfig,
    bound,
    full_steps,
    known_bases,
    numbers,
    register_basis,
    unregister_basis,
)
from hicache.basis import Named, evaluate
from hicache.run import Position
from hicache.schedule import with_speedup
from hicache_kernels import backend_status

GOLDEN = json.loads((Path(__file__).parent / "golden" / "forecast_cases.json").read_text())["cases"]
USABLE = [name for name, reason in backend_status("cpu").items() if reason is None and name != "triton"]


def series(values, config, dtype=torch.float64, backend="auto"):
    """Run a scalar series: (step, is full, differences or forecast) of every step."""
    engine = Engine(config, backend)
    engine.reset(num_steps=len(values))
    for step, value in enumerate(values):
        if engine.is_full(step):
            engine.record(step, [torch.tensor([value], dtype=dtype)])
            engine.flush()
            yield step, True, [engine.history.slot(0, k).item() for k in range(engine.differences.filled)]
        else:
            yield step, False, engine.forecast(step)[0].item()


def coefficients(name, gaps, distance, num_coeffs, sigma):
    """Of a basis with a name, checked."""
    return evaluate(Named(name, sigma), Position(distance, 0, tuple(gaps), num_coeffs))


def close(ours, golden, tolerance):
    return abs(ours - golden) <= tolerance * max(1.0, abs(golden))


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("index", range(len(GOLDEN)))
def test_golden(index, backend):
    case = GOLDEN[index]
    names = ("interval", "warmup", "order", "sigma", "basis")
    config = HiCacheConfig(**{name: case[name] for name in names})
    assert len(case["series"]) == case["num_steps"]
    for step, full, result in series(case["series"], config, backend=backend):
        assert full == case["full"][step]
        if full:
            assert len(result) == len(case["differences"][step])
            for ours, golden in zip(result, case["differences"][step], strict=True):
                assert close(ours, golden, 1e-12)
        else:
            assert close(result, case["forecast"][step], 1e-12)


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_golden_at_low_precision(dtype, backend):
    """No worse than twice what plain torch loses on the same series at this precision."""
    ours, peers, exact = [], [], []
    for case in GOLDEN:
        names = ("interval", "warmup", "order", "sigma", "basis")
        config = HiCacheConfig(**{name: case[name] for name in names})
        peer: list[torch.Tensor] = []
        last, gaps = None, []
        # the history keeps rounded numbers on both sides, so the series is compared as a whole
        for step, full, result in series(case["series"], config, dtype, backend):
            if full:
                new = [torch.tensor(case["series"][step], dtype=dtype)]
                if last is not None and step > config.warmup - 2:
                    for k in range(min(len(peer), config.order)):
                        new.append((new[k] - peer[k]) / (step - last))
                    gaps = [step - last, *gaps]
                peer, last = new, step
            else:
                weights = coefficients(config.basis, gaps, step - last, len(peer), config.sigma)
                peers.append(sum(w * d for w, d in zip(weights, peer, strict=True)).item())
                ours.append(result)
                exact.append(case["forecast"][step])
    ours, peers, exact = map(np.array, (ours, peers, exact))
    tiny = torch.finfo(dtype).eps * np.abs(exact).max()
    assert len(exact) > 1000
    assert np.abs(ours - exact).max() <= 2 * np.abs(peers - exact).max() + tiny
    assert np.linalg.norm(ours - exact) <= 2 * np.linalg.norm(peers - exact) + tiny


def test_worked_numbers_of_a_square():
    values = [float(s * s) for s in range(12)]
    expected = {
        "hermite": [53.35, 58.3, 63.55, 69.1],
        "taylor": [58.6, 69.4, 81.4, 94.6],
        "scaled_taylor": [51.2875, 53.65, 56.0875, 58.6],
        "reuse": [49.0] * 4,
    }
    for basis, forecasts in expected.items():
        steps = list(series(values, HiCacheConfig(interval=5, order=2, basis=basis)))
        assert steps[7][2] == pytest.approx([49, 9, 1.2], abs=1e-12)
        assert [result for _, _, result in steps[8:]] == pytest.approx(forecasts, abs=1e-12)
    hermite = list(series(values, HiCacheConfig(interval=5, order=2)))
    assert hermite[2][2] == [4.0, 3.0]
    assert [result for _, _, result in hermite[3:7]] == pytest.approx([5.5, 7, 8.5, 10])


def test_worked_numbers_of_a_damped_wave():
    values = [2 * math.exp(-0.1 * s) * math.cos(0.3 * s) for s in range(12)]
    steps = list(series(values, HiCacheConfig(interval=5, order=2)))
    expected = [-0.6868542, -0.8716279, -1.0560605, -1.2401519]
    assert [result for _, _, result in steps[8:]] == pytest.approx(expected, abs=1e-7)


def test_a_linear_series_is_forecast_exactly_at_sigma_one_over_root_two():
    """Its first weight is Taylor's there; forecasts look forward, not back."""
    values = [3.0 + 2.0 * s for s in range(20)]
    for _, full, result in series(values, HiCacheConfig(interval=6, order=1, sigma=math.sqrt(0.5))):
        assert full or result == pytest.approx(values[_], abs=1e-12)


def test_hermite_weights():
    for x in range(1, 7):
        assert coefficients("hermite", [7, 7], x, 3, 0.5) == pytest.approx([1, x / 2, x * x / 8 - 1 / 4])
    from numpy.polynomial.hermite import hermval

    for sigma in (0.3, 0.5, 1.0):
        for x in (1, 4, 9):
            weights = [sigma**k * hermval(sigma * x, [0] * k + [1]) / math.factorial(k) for k in range(5)]
            assert coefficients("hermite", [], x, 5, sigma) == pytest.approx(weights)


@pytest.mark.parametrize(
    ("x", "weights"),
    [(1, [1.06888, -0.06633, -0.00255]), (3, [1.23214, -0.25, 0.01786]), (6, [1.51531, -0.60204, 0.08673])],
)
def test_weights_on_snapshots(x, weights):
    """The recursion run on unit vectors: what each of the last three full steps contributes."""
    found = []
    for kept in (16, 9, 2):
        values = [float(s == kept) for s in range(17 + x)]
        found.append(list(series(values, HiCacheConfig()))[-1][2])
    assert found == pytest.approx(weights, abs=5e-6)
    assert sum(found) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("interval", "count"), [(3, 18), (4, 14), (5, 12), (6, 10), (7, 9), (8, 8), (10, 7), (1, 50)]
)
def test_schedule(interval, count):
    config = HiCacheConfig(interval=interval)
    assert len(full_steps(config, 50)) == count
    assert bound(config, 50) == 50 / count


def test_paper_s_schedule():
    assert full_steps(HiCacheConfig(), 50) == [0, 1, 2, 9, 16, 23, 30, 37, 44]
    assert full_steps(HiCacheConfig(last_step_full=True), 50) == [0, 1, 2, 9, 16, 23, 30, 37, 44, 49]
    assert full_steps(HiCacheConfig(warmup=1), 3) == [0]
    assert full_steps(HiCacheConfig(), 0) == []
    assert bound(HiCacheConfig(), 0) == 1.0


def test_with_speedup_takes_the_smallest_interval():
    for steps in (1, 4, 20, 28, 50, 100):
        for speedup in (1.0, 1.5, 2.0, 2.78, 3.0, 4.0, 5.55, 5.56, 9.0):
            config = with_speedup(HiCacheConfig(), speedup, steps)
            reachable = [
                n for n in range(1, steps + 1) if round(bound(HiCacheConfig(interval=n), steps), 2) >= speedup
            ]
            if reachable:
                assert config.interval == reachable[0]
            else:
                assert bound(config, steps) == max(
                    bound(HiCacheConfig(interval=n), steps) for n in range(1, steps + 1)
                )


def test_engine_of_many_features_and_uneven_gaps():
    """Features of several shapes at once equal one engine each; gaps of 1, 3 and 5 steps."""
    config = HiCacheConfig(interval=100, warmup=1, order=3)
    shapes = [(2, 3), (5,), (1, 4, 2)]
    generator = torch.Generator().manual_seed(0)
    snapshots = {s: [torch.randn(*shape, generator=generator) for shape in shapes] for s in (0, 1, 4, 9)}
    together, apart = Engine(config), [Engine(config) for _ in shapes]
    for step, features in snapshots.items():
        together.record(step, features)
        for engine, feature in zip(apart, features, strict=True):
            engine.record(step, [feature])
            engine.flush()
        for ahead in (1, 2):
            if step + ahead in snapshots:
                break
            alone = [engine.forecast(step + ahead)[0] for engine in apart]
            for ours, theirs, shape in zip(together.forecast(step + ahead), alone, shapes, strict=True):
                assert ours.shape == shape
                torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert together.nbytes == together.history.nbytes > 0
    together.release()
    assert (together.nbytes, together.differences.last_full) == (0, None)


def test_lazy_update_equals_an_immediate_one():
    lazy, eager = Engine(HiCacheConfig(interval=3)), Engine(HiCacheConfig(interval=3))
    for step in range(14):
        value = torch.full((4,), math.sin(step), dtype=torch.float64)
        if lazy.is_full(step):
            lazy.record(step, [value])
            eager.record(step, [value])
            eager.flush()
        else:
            base = torch.ones(2, 2, dtype=torch.float64)
            if step % 2:
                assert torch.equal(lazy.forecast(step)[0], eager.forecast(step)[0])
            else:
                ours = Engine.gated_sum(lazy, step, base.view(1, 4))
                assert torch.equal(ours, base.view(1, 4) + eager.forecast(step)[0])


def test_an_overflow_does_not_reach_the_next_run():
    """Orders that do not exist are weighed with zero, and what an earlier run left there may be no number."""
    engine = Engine(HiCacheConfig(interval=3, order=3, warmup=1))
    for value in (math.nan, 1.0):
        engine.reset()
        for step in range(9):
            if engine.is_full(step):
                engine.record(step, [torch.full((1, 4, 8), value)])
                continue
            hidden = engine.prepare(step, fixed=True)(torch.zeros(1, 4, 8), None)
            engine.settle()
            # differences of a constant are zero
            assert torch.equal(hidden, torch.full((1, 4, 8), value)) or math.isnan(value)


def test_a_basis_of_ones_own_sees_gaps_and_distance():
    seen = []

    @register_basis("nearest two")
    def nearest_two(gaps, distance, terms, sigma):
        seen.append((tuple(gaps), distance, terms))
        return [1.0, distance / 2, 0.0][:terms]

    try:
        assert "nearest two" in known_bases()
        with pytest.raises(ValueError, match="'nearest two' is taken"):
            register_basis("nearest two")(nearest_two)
        results = list(
            series([1.0, 2.0, 4.0, 0.0, 0.0, 10.0, 0.0], HiCacheConfig(interval=3, basis="nearest two"))
        )
        assert results[3][2] == 4.0 + 0.5 * 2.0
        # once as it comes and once when all numbers of a run are made
        assert list(dict.fromkeys(seen)) == [((1,), 1, 2), ((1,), 2, 2), ((3, 1), 1, 3)]
    finally:
        unregister_basis("nearest two")
    with pytest.raises(ValueError, match="unknown basis 'nearest two'; known bases: hermite, taylor"):
        HiCacheConfig(basis="nearest two")


def test_a_basis_that_returns_nonsense_is_an_error():
    register_basis("short")(lambda gaps, distance, terms, sigma: [1.0])
    register_basis("nan")(lambda gaps, distance, terms, sigma: [float("nan")] * terms)
    try:
        for name in ("short", "nan"):
            with pytest.raises(ValueError, match=f"basis '{name}': expected 3 finite weights"):
                coefficients(name, [1, 1], 1, 3, 0.5)
    finally:
        unregister_basis("short")
        unregister_basis("nan")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"interval": 0}, ValueError, "interval: expected an int >= 1, got 0"),
        ({"interval": 2.0}, TypeError, "interval: expected an int >= 1, got 2.0"),
        ({"interval": True}, TypeError, "got True"),
        ({"order": 5}, ValueError, "order: expected an int from 0 to 4, got 5"),
        ({"warmup": 0}, ValueError, "warmup: expected an int >= 1, got 0"),
        ({"sigma": 0.0}, ValueError, "sigma: expected a finite number > 0, got 0.0"),
        ({"sigma": float("nan")}, ValueError, "sigma"),
        ({"sigma": "0.5"}, TypeError, "sigma: expected a number > 0, got '0.5'"),
        (
            {"basis": "hermit"},
            ValueError,
            "unknown basis 'hermit'; known bases: hermite, taylor, scaled_taylor, reuse",
        ),
        ({"basis": None}, TypeError, "basis: expected the name"),
        ({"last_step_full": 1}, TypeError, "last_step_full: expected True or False, got 1"),
        (
            {"history_dtype": torch.int8},
            TypeError,
            r"history_dtype: expected torch.float64, .* got torch.int8",
        ),
        ({"history_dtype": torch.float8_e4m3fn}, TypeError, "got torch.float8_e4m3fn"),
        ({"intervall": 3}, TypeError, "intervall"),
    ],
)
def test_bad_config(arguments, error, message):
    with pytest.raises(error, match=message):
        HiCacheConfig(**arguments)


def test_config_is_frozen_and_printable():
    config = HiCacheConfig(interval=5)
    with pytest.raises(FrozenInstanceError):
        config.interval = 6
    assert "interval=5" in repr(config)
    assert hash(config) == hash(HiCacheConfig(interval=5))


def test_engine_errors():
    engine = Engine(HiCacheConfig())
    with pytest.raises(RuntimeError, match="expected a full step recorded before step 3"):
        engine.forecast(3)
    with pytest.raises(ValueError, match="expected features of one dtype and device"):
        engine.record(0, [])
    engine.record(4, [torch.ones(2)])
    with pytest.raises(ValueError, match="expected a step after the last full step 4, got 4"):
        engine.record(4, [torch.ones(2)])
    with pytest.raises(ValueError, match="expected a step after the last full step 4, got 3"):
        engine.forecast(3)


@pytest.mark.parametrize("fixed", [False, True])
def test_numbers_of_a_run_are_brought_to_the_device_once(fixed, monkeypatch):
    """A later run of as many steps brings none; one whose length is not known brings them as they come."""
    uploads: list[int] = []
    uploaded = numbers.uploaded
    monkeypatch.setattr(
        numbers, "uploaded", lambda values, device: uploads.append(1) or uploaded(values, device)
    )
    engine = Engine(HiCacheConfig(interval=7, order=2))
    for num_steps, brought in ((50, 1), (50, 0), (None, 0), (55, 0), (200, 0)):
        engine.reset(num_steps=num_steps)
        for step in range(num_steps or 40):
            if engine.is_full(step):
                [slot] = engine.open([(1, 4, 8)], torch.float32, torch.device("cpu"))
                slot.fill_(step)
                engine.commit(step)
            else:
                engine.prepare(step, fixed=fixed)(torch.zeros(1, 4, 8), None)
                engine.settle()
        assert len(uploads) == brought, num_steps
        uploads.clear()


def test_numbers_of_the_device_begin_where_kernels_like_them_to():
    """16 bytes: otherwise Triton makes other code for every place a row of coefficients may begin at."""
    engine = Engine(HiCacheConfig(interval=4, order=2))
    engine.reset(num_steps=30)
    for step in range(30):
        if engine.is_full(step):
            engine.record(step, [torch.full((1, 4, 8), float(step))])
            continue
        total = engine.prepare(step)
        for row in (total.coeffs, total.inv_gap):
            assert row is None or row.data_ptr() % 16 == 0
        total(torch.zeros(1, 4, 8), None)
        engine.settle()
