"""NaN and infinity: what a full step could not compute is told, and nothing is forecast from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import hicache.fast
from hicache import HiCacheConfig
from tests.support import models, pipelines
from tests.support.comparisons import relative_rms
from tests.support.models import flux_call
from tests.support.schedulers import CountingScheduler

CONFIG = HiCacheConfig(interval=4, warmup=3)  # full: 0, 1, 2, 6, 10
STEPS = 14
BOTH = pytest.mark.parametrize("granularity", ["module", "stack"])


def run(model: Any, scheduler: Any, broken: tuple[int, ...] = (), number: float = torch.nan) -> torch.Tensor:
    """The outputs of a run whose latents do not depend on them; at ``broken`` steps an attention fails."""
    outputs = []
    scheduler.set_timesteps(STEPS)
    for step in range(STEPS):
        undo: Callable[[], None] | None = None
        if step in broken:
            undo = (
                model.transformer_blocks[0]
                .attn.to_out[0]
                .register_forward_hook(
                    lambda module, args, output: output.index_fill(1, torch.tensor([2]), number)
                )
                .remove
            )
        torch.manual_seed(0)
        call = flux_call(models.noise(1, 16, 4), torch.tensor([1 - step / STEPS]))
        with torch.no_grad():
            outputs.append(model(**call)[0])
        if undo is not None:
            undo()
        scheduler.step()
    return torch.stack(outputs)


@BOTH
@pytest.mark.parametrize("number", [torch.nan, torch.inf], ids=str)
@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_a_step_that_is_not_finite_is_told_and_the_next_runs_in_full(granularity, number):
    model, scheduler = models.flux_transformer(), CountingScheduler()
    plain = run(model, scheduler)
    with hicache.fast.apply(model, CONFIG, scheduler=scheduler, granularity=granularity) as handle:
        clean = run(model, scheduler)
        with pytest.warns(RuntimeWarning, match=r"not finite.* at step 6 of transformer\[0\]"):
            drawn = run(model, scheduler, broken=(6,), number=number)
        assert not drawn[6].isfinite().all()
        rest = [*range(6), *range(7, STEPS)]
        assert drawn[rest].isfinite().all()
        assert relative_rms(drawn[rest], plain[rest]) < 0.1
        assert handle.stats.full_steps == 6  # 0, 1, 2, 6, 7, 11
        assert handle.stats.granularity == granularity
        assert torch.equal(run(model, scheduler), clean)


@BOTH
@pytest.mark.parametrize("first", [(0,), (0, 1, 2)], ids=["first step", "warm-up"])
@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_a_first_run_that_is_not_finite_changes_no_later_one(first, granularity):
    model, scheduler = models.flux_transformer(), CountingScheduler()
    with hicache.fast.apply(model, CONFIG, scheduler=scheduler, granularity=granularity):
        clean = run(model, scheduler)
    with hicache.fast.apply(model, CONFIG, scheduler=scheduler) as handle:
        with pytest.warns(RuntimeWarning, match="not finite.* at step 0 of"):
            drawn = run(model, scheduler, broken=first)
        assert drawn[len(first) :].isfinite().all()
        assert "not add" not in handle.stats.choices["transformer"]
    with hicache.fast.apply(model, CONFIG, scheduler=scheduler, granularity=granularity) as handle:
        with pytest.warns(RuntimeWarning, match="not finite"):
            run(model, scheduler, broken=first)
        assert torch.equal(run(model, scheduler), clean)
        assert handle.stats.granularity == granularity


@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_a_history_that_is_too_narrow_for_a_feature():
    """The model's own numbers are finite; those of half precision are not."""
    model, scheduler = models.flux_transformer(), CountingScheduler()
    config = HiCacheConfig(interval=4, history_dtype=torch.float16)
    with torch.no_grad():
        model.proj_out.weight.mul_(1e-6)
    with hicache.fast.apply(model, config, scheduler=scheduler, granularity="stack"):
        with pytest.warns(RuntimeWarning, match=r"not finite.* at step 6 of"):
            assert run(model, scheduler, broken=(6,), number=1e6).isfinite().all()


def test_a_pipeline_of_two_calls_a_step():
    pipe, arguments = pipelines.build("flux_cfg")
    hit = 0

    def break_once(module: Any, args: Any, output: Any) -> Any:
        nonlocal hit
        hit += 1
        return output * torch.nan if hit == 6 else output  # step 2, the second call

    hook = pipe.transformer.proj_out.register_forward_hook(break_once)

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"].nan_to_num()}

    with hicache.fast.apply(pipe, CONFIG) as handle:
        with pytest.warns(RuntimeWarning, match=r"not finite.* at step 2 of transformer\[1\]"):
            drawn = pipelines.draw(pipe, arguments, callback_on_step_end=callback)
        counts = [context.full_steps for context in handle.stats.contexts.values()]
        assert counts == [5, 6]
    hook.remove()
    assert drawn.isfinite().all()
