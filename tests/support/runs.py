"""Runs of denoisers: what they say in a pipeline's run, recorded calls, and the same calls made again."""

from __future__ import annotations

import copy
import functools
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import hicache.fast
import hicache.reference
from hicache import HiCacheConfig
from hicache.hooks.block_lists import BLOCK_LISTS
from tests.support import pipelines
from tests.support.comparisons import cast, first
from tests.support.models import Arguments
from tests.support.schedulers import CountingScheduler

# (args, kwargs) of one call; the calls of one step; those of a run
Call = tuple[tuple[Any, ...], Arguments]
Run = list[list[Call]]


def drawn(model: nn.Module, arguments: Arguments, output: Any) -> Tensor:
    """What pipelines read of what a denoiser returns: not the tokens of given pictures."""
    hidden = first(output)
    shapes, ids = arguments.get("img_shapes"), arguments.get("img_ids")
    if shapes is not None and isinstance(shapes[0], list):
        # in layers, all are drawn but the last
        last = -1 if model.config.use_layer3d_rope else 1
        return hidden[:, : sum(map(math.prod, shapes[0][:last]))]
    if ids is not None:
        return hidden[:, : int((ids.reshape(-1, ids.shape[-1])[: hidden.shape[1], 0] == 0).sum())]
    replaced = getattr(model.config, "image_condition_type", None) == "token_replace"
    return hidden[:, :, 1:] if replaced and hidden.shape[2] > 1 else hidden


def trace(pipe: Any, arguments: Arguments, steps: int = 9) -> Tensor:
    """All that a pipeline reads of its denoisers in a run, and what comes of it, in one row of float64."""
    returned: list[Tensor] = []

    def keep(model: nn.Module, args: Any, kwargs: Arguments, output: Any) -> None:
        returned.append(drawn(model, kwargs, output))

    hooks = [
        denoiser.register_forward_hook(keep, with_kwargs=True)
        for denoiser in pipelines.denoisers(pipe).values()
    ]
    torch.manual_seed(0)  # some pipelines encode their input picture at random
    try:
        picture = pipelines.draw(pipe, arguments, steps)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat([part.double().flatten() for part in (*returned, picture)])


def record(pipe: Any, arguments: Arguments, steps: int = 12) -> Run:
    """The calls of ``pipe.transformer`` in an uncached run, step by step."""
    run: Run = []
    step_of = pipe.scheduler.step

    def step(*args: Any, **kwargs: Any) -> Any:
        run.append([])
        return step_of(*args, **kwargs)

    run.append([])
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: run[-1].append(copy.deepcopy((args, kwargs))), with_kwargs=True
    )
    pipe.scheduler.step = functools.wraps(step_of)(step)
    try:
        torch.manual_seed(0)
        pipelines.draw(pipe, arguments, steps)
    finally:
        hook.remove()
        del pipe.scheduler.step
    return [calls for calls in run if calls]


@functools.cache
def recorded(name: str) -> tuple[nn.Module, Run]:
    """A randomized pipeline's transformer and its calls in twelve steps. Leave it uncached, or copy it."""
    pipe, arguments = pipelines.build_randomized(name)
    return pipe.transformer, record(pipe, arguments)


def recorded_in(name: str, dtype: torch.dtype) -> tuple[nn.Module, Run]:
    """A copy of :func:`recorded` in another dtype."""
    model, run = recorded(name)
    return copy.deepcopy(model).to(dtype), cast(run, dtype)


def replay(model: nn.Module, run: Run, scheduler: CountingScheduler | None = None) -> Tensor:
    """What a denoiser returns to the calls of a run, in one row of float64."""
    returned: list[Tensor] = []
    scheduler = scheduler or CountingScheduler()
    scheduler.set_timesteps(len(run))
    for calls in run:
        for args, kwargs in calls:
            with torch.no_grad():
                output = model(*copy.deepcopy(args), **copy.deepcopy(kwargs))
            returned.append(drawn(model, kwargs, output).double().flatten())
        scheduler.step()
    return torch.cat(returned)


def by_reference(model: nn.Module, run: Run, config: HiCacheConfig) -> Tensor:
    """:func:`replay` under :mod:`hicache.reference`."""
    scheduler = CountingScheduler()
    with hicache.reference.apply(model, config, scheduler=scheduler):
        return replay(model, run, scheduler)


def by_fast(model: nn.Module, run: Run, config: HiCacheConfig, granularity: str = "module") -> Tensor:
    """:func:`replay` under :mod:`hicache.fast`, some of whose steps are skipped."""
    scheduler = CountingScheduler()
    with hicache.fast.apply(model, config, scheduler=scheduler, granularity=granularity) as handle:
        returned = replay(model, run, scheduler)
        assert handle.stats.granularity == granularity
        assert handle.stats.skipped_steps > 0
    return returned


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of a denoiser's blocks, by their names."""
    found = {name: getattr(model, name, None) for name in BLOCK_LISTS}
    return {name: blocks for name, blocks in found.items() if isinstance(blocks, nn.ModuleList)}


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """All blocks of a denoiser."""
    return [block for blocks in block_lists(model).values() for block in blocks]


def count_calls(blocks: Iterable[nn.Module], calls: Counter[int]) -> None:
    """From now on, count the calls of every block under its index."""
    for index, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, index=index: calls.update([index]))
