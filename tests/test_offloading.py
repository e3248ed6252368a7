"""Weights that diffusers brings in for as long as a group of blocks runs, and takes away again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup

import hicache.fast
from hicache import HiCacheConfig
from tests.support import models, pipelines
from tests.support.comparisons import close
from tests.support.schedulers import flow_matching

CONFIG = HiCacheConfig(interval=4)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _taken_weights_are_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read while its weights are away shows."""
    offload = ModuleGroup.offload_

    def taken(self: ModuleGroup) -> None:
        offload(self)
        for tensor in self.tensor_to_key:
            if tensor.is_floating_point():
                tensor.data.fill_(torch.nan)

    monkeypatch.setattr(ModuleGroup, "offload_", taken)


def offload(module: Any, folder: Path) -> None:
    apply_group_offloading(
        module, CPU, CPU, "block_level", num_blocks_per_group=1, offload_to_disk_path=str(folder)
    )


def slow(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("granularity", ["module", "stack"])
@pytest.mark.parametrize(
    "name", ["flux", "sd3", "qwen", *slow("hunyuan", "cogvideox", "wan", "flux_ip_adapter", "sd3_skip_layer")]
)
def test_groups_of_blocks(name: str, granularity: str, tmp_path: Path):
    """The run draws what it draws with all weights there, the first time and the second."""
    pipe, arguments = pipelines.build_randomized(name)
    with hicache.fast.apply(pipe, CONFIG, granularity=granularity):
        expected = pipelines.draw(pipe, arguments)
    offload(pipe.transformer, tmp_path)
    with hicache.fast.apply(pipe, CONFIG, granularity=granularity) as handle:
        assert torch.equal(pipelines.draw(pipe, arguments), expected)
        assert torch.equal(pipelines.draw(pipe, arguments), expected)
        assert (handle.stats.full_steps, handle.stats.skipped_steps) == (5, 7)


def test_a_guidance_made_anew_at_every_step(tmp_path: Path):
    """As ControlNets' pipelines of FLUX do: gates that were prefetched are those of its number."""
    pipe, arguments = pipelines.build_randomized("flux_controlnet")
    torch.manual_seed(0)  # the control picture is encoded at random
    with hicache.fast.apply(pipe, CONFIG, granularity="module"):
        expected = pipelines.draw(pipe, arguments)
    offload(pipe.transformer, tmp_path)
    torch.manual_seed(0)
    with hicache.fast.apply(pipe, CONFIG, granularity="module") as handle:
        drawn = pipelines.draw(pipe, arguments)
        assert (handle.stats.full_steps, handle.stats.skipped_steps) == (5, 7)
    assert close(drawn, expected)


def test_offloading_that_begins_between_runs(tmp_path: Path):
    pipe, arguments = pipelines.build_randomized("flux")
    with hicache.fast.apply(pipe, CONFIG, granularity="module"):
        expected = pipelines.draw(pipe, arguments)
        offload(pipe.transformer, tmp_path)
        assert torch.equal(pipelines.draw(pipe, arguments), expected)


def _loop(transformer: Any, scheduler: Any = None, another: int | None = None) -> torch.Tensor:
    """Fourteen steps; from step ``another`` on with another guidance."""
    timesteps = flow_matching()
    timesteps.set_timesteps(14)
    if scheduler is not None:
        scheduler.set_timesteps(14)
    guidance, pooled = torch.full((1,), 3.5), models.noise(1, 32)
    outputs = []
    for step, t in enumerate(timesteps.timesteps):
        if step == another:
            guidance = guidance + 1
        call = models.flux_call(
            models.noise(1, 16, 4), t.expand(1) / 1000, guidance=guidance, pooled_projections=pooled
        )
        outputs.append(transformer(**call)[0])
        if scheduler is not None:
            scheduler.step(outputs[-1], t, models.noise(1, 16, 4))
    return torch.stack(outputs)


@torch.no_grad()
def test_without_a_scheduler_the_stack_is_cached(tmp_path: Path):
    """Nothing says which timesteps come, so that no gates can be computed while their weights are there."""
    transformer = models.flux_transformer()
    offload(transformer, tmp_path)
    with hicache.fast.apply(transformer, CONFIG) as handle:
        assert _loop(transformer).isfinite().all()
        assert "there in their own blocks only" in handle.stats.choices["transformer"]
        assert handle.stats.skipped_steps > 6
    with hicache.fast.apply(transformer, CONFIG, granularity="module"):
        with pytest.raises(RuntimeError, match="there in their own blocks only"):
            _loop(transformer)


@torch.no_grad()
def test_a_step_whose_gates_were_not_prefetched_runs_in_full(tmp_path: Path):
    """Another guidance half-way: its gates are computed where their weights are, in a full step."""
    transformer, scheduler = models.flux_transformer(), flow_matching()
    offload(transformer, tmp_path)
    with hicache.fast.apply(transformer, CONFIG, scheduler=scheduler, granularity="module") as handle:
        torch.manual_seed(0)
        assert _loop(transformer, scheduler).isfinite().all()
        assert handle.stats.full_steps == 5  # 0, 1, 2, 6, 10
        assert _loop(transformer, scheduler, another=8).isfinite().all()
        assert handle.stats.full_steps == 6  # 0, 1, 2, 6, 8, 12
