"""Every bare transformer, without a pipeline: exact when full, exact when skipped, whole after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import hicache.fast
from hicache import HiCacheConfig
from tests.support import models
from tests.support.comparisons import cast, flat, snapshot
from tests.support.pipelines import randomize
from tests.support.runs import block_lists, blocks_of, count_calls
from tests.support.schedulers import CountingScheduler

pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),  # Mochi's rope
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # Chroma's
]

TIMES = torch.linspace(1, 0.1, 12)
CONFIG = HiCacheConfig(interval=3, order=2, warmup=3)
FULL_STEPS = [0, 1, 2, 5, 8, 11]  # of CONFIG in as many steps as TIMES

every_model = pytest.mark.parametrize("name", models.BARE)


def draw(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return flat(model(**arguments))


def run(model: nn.Module, call: Callable[[Any], dict[str, Any]]) -> Tensor:
    """Every step's output, [steps, numbers]."""
    return torch.stack([draw(model, call(t)) for t in TIMES])


@pytest.mark.few(6)
@every_model
def test_nothing_skipped_is_nothing_changed(name: str):
    model, call = models.build(name)
    uncached = run(model, call)
    before = snapshot(model)

    handle = hicache.fast.apply(model, HiCacheConfig(interval=1))
    cached = run(model, call)
    handle.remove()

    assert uncached.isfinite().all()
    assert not torch.equal(uncached[0], uncached[1])  # else the time does not reach the model
    assert torch.equal(cached, uncached)
    assert handle.stats.full_steps == len(TIMES)
    assert handle.stats.skipped_steps == 0
    assert snapshot(model) == before
    assert torch.equal(run(model, call), uncached)


@pytest.mark.few(6)
@every_model
def test_skipping_runs_no_block_and_leaves_no_trace(name: str):
    model, call = models.build(name)
    lists = block_lists(model)
    assert lists
    assert all(len(blocks) >= 2 for blocks in lists.values())
    uncached = run(model, call)
    calls: Counter[int] = Counter()
    blocks = blocks_of(model)
    count_calls(blocks, calls)
    before = snapshot(model)

    with hicache.fast.apply(model, CONFIG) as handle:
        for step, t in enumerate(TIMES):
            calls.clear()
            output = draw(model, call(t))
            full = step in FULL_STEPS
            assert calls == Counter(range(len(blocks)) if full else ()), step
            assert output.isfinite().all()
            assert torch.equal(output, uncached[step]) == full, step
        assert (handle.stats.full_steps, handle.stats.skipped_steps) == (6, 6)
        assert list(handle.stats.contexts) == ["transformer[0]"]

    assert snapshot(model) == before
    assert torch.equal(run(model, call), uncached)


@pytest.mark.few(12)
@every_model
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["float32", "float64"]
)
def test_a_step_repeated_is_exact(name: str, dtype: torch.dtype, tolerance: float):
    """Reusing a step's residual for the same inputs is that step: whatever is mixed up or lost would show."""
    model, call = models.build(name)
    model.to(dtype)
    arguments = cast(call(0.7), dtype)
    calls: Counter[int] = Counter()
    count_calls(blocks_of(model), calls)
    scheduler = CountingScheduler()

    config = HiCacheConfig(interval=2, order=0, warmup=1, basis="reuse")
    with hicache.fast.apply(model, config, scheduler=scheduler) as handle:
        scheduler.set_timesteps(2)
        full = draw(model, arguments)
        scheduler.step()
        calls.clear()
        skipped = draw(model, arguments)
        assert (handle.stats.full_steps, handle.stats.skipped_steps) == (1, 1)

    assert not calls
    assert (skipped - full).abs().max() <= tolerance * full.abs().max()
    assert vars(scheduler) == {"timesteps": range(2)}


class Hinted(nn.Module):
    """Adds hints between its blocks, and nobody is told."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.norm_out = nn.LayerNorm(4)

    def forward(self, hidden_states: Tensor, timestep: Tensor, scale: float) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states) + scale * timestep
        return self.norm_out(hidden_states)


@pytest.mark.parametrize(
    "runs",
    [([1.0] * 12,), ([0.0] * 12, [1.0] * 12), ([0.0] * 6 + [1.0] * 6,)],
    ids=["from the start", "in the next run", "in the same run"],
)
def test_hints_between_blocks_are_noticed(runs: tuple[list[float], ...]):
    """Skipped steps that happened to be exact do not vouch for later ones; refusing earlier is fine too."""
    model, scheduler = Hinted(), CountingScheduler()
    before = snapshot(model)
    with (
        torch.no_grad(),
        hicache.fast.apply(model, CONFIG, scheduler=scheduler),
        pytest.raises(RuntimeError, match="Hinted changes the hidden state between its blocks"),
    ):
        for scales in runs:
            scheduler.set_timesteps(len(TIMES))
            for t, scale in zip(TIMES, scales, strict=True):
                model(models.noise(1, 3, 4), timestep=t, scale=scale)
                scheduler.step()
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(2, 2),
        diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(4, 8),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=2,
            cross_attention_dim=8,
            attention_head_dim=2,
        ),
    ],
    ids=["linear", "unet"],
)
def test_models_without_blocks_are_refused_at_once(model: nn.Module):
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"nothing to hook in {type(model).__name__}"):
        hicache.fast.apply(model, CONFIG)
    assert snapshot(model) == before


def test_kandinsky_is_cached_by_stack():
    """Its modulation is zero as built, and it computes in fp32 whatever its weights are."""
    model, call = models.build("kandinsky5")
    randomize(model)
    uncached = run(model, call)
    assert not torch.equal(uncached[0], uncached[1])
    calls: Counter[int] = Counter()
    count_calls(model.visual_transformer_blocks, calls)
    with hicache.fast.apply(model, HiCacheConfig(interval=1)):
        assert torch.equal(run(model, call), uncached)
    calls.clear()
    with hicache.fast.apply(model, CONFIG) as handle:
        cached = run(model, call)
        assert handle.stats.granularity == "stack"
    assert set(calls.values()) == {len(FULL_STEPS)}
    assert torch.equal(cached[:3], uncached[:3])
    assert (cached - uncached).norm() < 0.2 * uncached.norm()
