"""hicache.wrap: a function of a sampler of one's own, cached by what it returns."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import hicache
from hicache import HiCacheConfig, Taylor

STEPS = 20
FULL = (0, 1, 2, 9, 16)  # of 20 steps, at the default interval


class Network(nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.eval()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 6)
        self.calls: list[float] = []

    def forward(self, x: Tensor, sigma: float, **kwargs: Tensor) -> Tensor:
        self.calls.append(sigma)
        return torch.tanh(self.layer(x)) * (1 + 0.1 * sigma) + sum(kwargs.values())


def levels(steps: int = STEPS) -> list[float]:
    """EDM's noise levels and the zero after them (arXiv 2206.00364, equation 5)."""
    high, low, rho = 40.0, 0.002, 7.0
    ramp = [i / max(1, steps - 1) for i in range(steps)]
    return [(high ** (1 / rho) + t * (low ** (1 / rho) - high ** (1 / rho))) ** rho for t in ramp] + [0.0]


@torch.no_grad()
def heun(network, x: Tensor, steps: int = STEPS) -> Tensor:
    """EDM's sampler (algorithm 1 there without churn), with its scaling around the network."""

    def slope(x: Tensor, sigma: float) -> Tensor:
        scale = (sigma**2 + 0.25) ** 0.5
        clean = 0.25 / scale**2 * x + sigma * 0.5 / scale * network(x / scale, sigma)
        return (x - clean) / sigma

    sigmas = levels(steps)
    x = x * sigmas[0]
    for now, later in itertools.pairwise(sigmas):
        first = slope(x, now)
        moved = x + (later - now) * first
        if later:
            moved = x + (later - now) * (first + slope(moved, later)) / 2
        x = moved
    return x


def noise(seed: int = 0) -> Tensor:
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))


def test_at_interval_1_it_returns_the_functions_own_bits():
    network = Network()
    with hicache.wrap(network, STEPS, calls=2, last_calls=1, config=HiCacheConfig(interval=1)) as cached:
        assert torch.equal(heun(cached, noise()), heun(network, noise()))


def test_heuns_two_calls_are_two_contexts_that_skip_together_and_the_last_step_has_one():
    network = Network()
    with hicache.wrap(network, STEPS, calls=2, last_calls=1) as cached:
        heun(cached, noise())
        sigmas = levels()
        assert network.calls == [sigma for step in FULL for sigma in (sigmas[step], sigmas[step + 1])]
        first, second = cached.stats.contexts.values()
        assert (first.full_steps, first.skipped_steps) == (5, 15)
        assert (second.full_steps, second.skipped_steps) == (5, 14)


def test_runs_one_after_the_other_draw_what_each_draws_alone():
    network, settings = Network(), {"calls": 2, "last_calls": 1}
    alone = []
    for seed in (0, 1):
        with hicache.wrap(network, STEPS, **settings) as cached:
            alone.append(heun(cached, noise(seed)))
    with hicache.wrap(network, STEPS, **settings) as cached:
        together = [heun(cached, noise(seed)) for seed in (0, 1)]
    assert all(map(torch.equal, alone, together))


def test_what_is_linear_in_time_is_reproduced_where_the_function_is_not_called():
    calls: list[int] = []

    def linear(x: Tensor, step: int) -> Tensor:
        calls.append(step)
        return x * (3 + 0.7 * step)

    x = torch.arange(4, dtype=torch.float64)
    config = HiCacheConfig(interval=3, order=1, basis=Taylor(), warmup=2)
    with hicache.wrap(linear, 12, config=config) as cached:
        found = [cached(x, step) for step in range(12)]
    assert calls == [0, 1, 4, 7, 10]
    for step, tensor in enumerate(found):
        torch.testing.assert_close(tensor, x * (3 + 0.7 * step), rtol=1e-12, atol=1e-12)


def test_1024_tiles_have_1024_histories():
    tiles, steps = 1024, 6
    config = HiCacheConfig(interval=3, order=1, basis=Taylor(), warmup=2)
    calls: list[int] = []

    def denoiser(x: Tensor, step: int) -> Tensor:
        calls.append(step)
        return x * (1 + step)  # linear in time: order 1 is exact, if every tile has its own history

    given = [torch.full((1, 2), float(tile), dtype=torch.float64) for tile in range(tiles)]
    with hicache.wrap(denoiser, steps, calls=tiles, config=config) as cached:
        for step in range(steps):
            for tile in given:
                torch.testing.assert_close(cached(tile, step), tile * (1 + step), rtol=1e-12, atol=1e-12)
        assert len(cached.stats.contexts) == tiles
    assert len(calls) == tiles * 3  # 0, 1 and 4 of 6 steps


def test_tiles_of_other_shapes_and_more_arguments_go_through():
    shapes = ((4, 6), (2, 6), (1, 6))
    network = Network()
    with hicache.wrap(network, 8, calls=3, config=HiCacheConfig(interval=4)) as cached:
        for step in range(8):
            for shape in shapes:
                with torch.no_grad():
                    given = cached(torch.ones(shape), float(step), low=torch.ones(6))
                assert given.shape == shape
    assert len(network.calls) == 3 * 4  # steps 0, 1, 2, 6


def test_an_error_in_a_call_goes_to_the_caller_and_the_next_run_is_whole():
    network, seen = Network(), []

    def fails(x: Tensor, sigma: float) -> Tensor:
        seen.append(sigma)
        if len(seen) == 4:
            raise RuntimeError("no luck")
        return network(x, sigma)

    with hicache.wrap(fails, STEPS, calls=2, last_calls=1) as cached:
        with pytest.raises(RuntimeError, match="no luck"):
            heun(cached, noise())
        cached.restart()
        found = heun(cached, noise())
    with hicache.wrap(network, STEPS, calls=2, last_calls=1) as cached:
        assert torch.equal(found, heun(cached, noise()))


def test_what_is_wrapped_is_not_changed():
    network = Network()
    before = dict(vars(network))
    cached = hicache.wrap(network, STEPS, calls=2, last_calls=1)
    heun(cached, noise())
    cached.remove()
    assert {key: vars(network)[key] for key in before} == before
    network.calls.clear()
    heun(cached, noise())
    assert len(network.calls) == 2 * STEPS - 1  # removed: each call runs


def test_a_speed_up_and_a_schedule_that_reads_noise_levels():
    network = Network()
    with hicache.wrap(network, STEPS, calls=2, last_calls=1, speedup=4, sigmas=levels()[:-1]) as cached:
        heun(cached, noise())
        assert cached.stats.bound >= 4 * 0.9
    with pytest.raises(ValueError, match=r"expected 20 sigmas, one a step, got 3"):
        hicache.wrap(network, STEPS, sigmas=[3.0, 2.0, 1.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 20), "expected a function or a module, got 3"),
        ((abs, 0), "steps: expected an int >= 1, got 0"),
        ((abs, "20"), "steps: expected an int >= 1, got '20'"),
    ],
)
def test_bad_arguments_are_named(arguments, message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        hicache.wrap(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"calls": 0}, "calls: expected an int >= 1"), ({"calls": 2, "last_calls": 3}, "from 1 to 2, got 3")],
)
def test_bad_numbers_of_calls_are_named(options, message: str):
    with pytest.raises(ValueError, match=message):
        hicache.wrap(abs, 20, **options)
