"""``hicache.fast.plan(pipe, height=..., width=...)``: bytes and launches before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import nn

from hicache.adapters import registry
from hicache.adapters.base import ModuleAdapter
from hicache.adapters.layers import check_layers
from hicache.checks import check_whole
from hicache.config import HiCacheConfig
from hicache.cuda_graphs.runner import CHOICES
from hicache.dry_run import Recorded, dry_run
from hicache.engine import Engine
from hicache.offers import granularity_for, offers_for
from hicache.pipeline import (
    MEMORY_BUDGET,
    check_budget,
    check_choice,
    check_config,
    find_controlnets,
    find_denoisers,
    is_unet,
)
from hicache.planned import DenoiserPlan, Plan
from hicache.planned_memory import (
    GatesPlan,
    latent_shape,
    plan_gates,
    plan_graphs,
    returned_by_unet,
    steps_ahead,
)
from hicache.run import Run
from hicache.runtime.gate_rank import SumMemory, why_not
from hicache.schedule import full_steps

#: Ranks whose bytes are planned: gates hardly ever need more.
RANKS: Final = 8


def plan(
    pipe: Any,
    config: HiCacheConfig | None = None,
    *,
    height: int,
    width: int,
    num_frames: int = 1,
    batch: int = 1,
    guided: bool = True,
    calls: int | None = None,
    more_tokens: int = 0,
    granularity: str = "auto",
    memory_budget: int = MEMORY_BUDGET,
    dtype: torch.dtype | None = None,
    steps: int = 50,
    text_tokens: int | None = None,
    cuda_graphs: bool | str = "auto",
) -> Plan:
    """How much memory caching a pipeline takes and what it launches, without running anything.

    The transformer may be on the meta device.

    Args:
        pipe: as for :func:`hicache.fast.apply`; of a model whose modules are known, or by output with a
            U-Net.
        config: as for :func:`hicache.fast.apply`; None: what comes with the model for runs of ``steps``, else
            the defaults.
        height: of the picture, in pixels.
        width: of the picture, in pixels.
        num_frames: of the video; 1 for pictures.
        batch: pictures drawn at once.
        guided: with classifier-free guidance, as the family's pipeline does it: two calls a step, or one of
            twice the batch. Nothing for models with distilled guidance.
        calls: of the transformer in a step, where it is not as many: 2 for FLUX.1 with true guidance.
        more_tokens: image tokens besides the picture's own: those of pictures given to a model. They take no
            history where only the drawn tokens are recorded (FLUX.1 Kontext, FLUX.2, Qwen-Image's editing
            models), but by output.
        granularity: as for :func:`hicache.fast.apply`.
        memory_budget: as for :func:`hicache.fast.apply`.
        dtype: of the features; the transformer's own when None.
        steps: of a run: gates of low rank are there of all of them.
        text_tokens: of the prompt, as the transformer is given them; what the family's pipeline pads it to,
            or cuts it off at, when None.
        cuda_graphs: as for :func:`hicache.fast.apply`.

    Returns:
        Plan: by transformer, the granularity that would be chosen and the bytes of each; ``print()`` it. What
        graphs take is estimated, from a full and a skipped step without numbers (:mod:`hicache.dry_run`).

    Raises:
        TypeError, ValueError: bad arguments, or a model whose modules are not known.
    """
    offers = offers_for(pipe, granularity) if config is None else []
    config = check_config(config)
    granularity = granularity_for(pipe, granularity, config, bool(offers))
    check_budget(memory_budget)
    counts = {"height": height, "width": width, "num_frames": num_frames, "batch": batch, "steps": steps}
    optional = {"calls": calls, "text_tokens": text_tokens}
    counts |= {name: value for name, value in optional.items() if value is not None}
    for name, value in counts.items():
        check_whole(f"hicache: {name}", value)
    check_whole("hicache: more_tokens", more_tokens, 0)
    if not isinstance(cuda_graphs, bool):
        check_choice("cuda_graphs", cuda_graphs, CHOICES)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(
            f"hicache: expected dtype to be a floating dtype such as torch.bfloat16, or None, got {dtype!r}"
        )
    for offer in offers:
        fitted = offer.for_run(Run(steps))
        if not fitted.fallbacks:
            config, granularity = fitted, offer.fitted_by or granularity
            break
    size = num_frames, height, width
    run = _Run(config, size, batch, guided, calls, more_tokens, text_tokens, dtype, steps)
    settings = _Settings(granularity, memory_budget, cuda_graphs)
    plans = {
        name: _of_unet(pipe, module, run)
        if is_unet(name, module)
        else _of_transformer(pipe, module, run, settings)
        for name, module in find_denoisers(pipe, unets=granularity == "output").items()
    }
    return Plan(plans, steps, len(full_steps(config, steps)))


@dataclass(frozen=True)
class _Run:
    """What is drawn; see :func:`plan`."""

    config: HiCacheConfig
    size: tuple[int, int, int]  # frames, height, width
    batch: int
    guided: bool
    calls: int | None
    more_tokens: int
    text_tokens: int | None
    dtype: torch.dtype | None
    steps: int

    def dtype_of(self, module: nn.Module) -> torch.dtype:
        """Of the features of a denoiser."""
        return self.dtype or next(module.parameters()).dtype


@dataclass(frozen=True)
class _Settings:
    """How it is cached; see :func:`plan`."""

    granularity: str
    memory_budget: int
    cuda_graphs: bool | str


def _of_unet(pipe: Any, module: nn.Module, run: _Run) -> DenoiserPlan:
    """Latents in, latents out, in one call of both samples where it is guided."""
    samples = 1 if run.calls or not run.guided else 2
    returned = returned_by_unet(pipe, module, run.size, run.batch * samples)
    nbytes = Engine(run.config).planned_nbytes([returned], run.dtype_of(module))
    contexts = run.calls or 1
    return DenoiserPlan("output", contexts, returned, 1, 0, 0, output_bytes=contexts * nbytes)


def _of_transformer(pipe: Any, module: nn.Module, run: _Run, settings: _Settings) -> DenoiserPlan:
    """The plan of a model whose modules are known.

    Raises:
        ValueError: nobody knows them.
    """
    adapter = registry.find(module)
    if adapter is None:
        raise ValueError(
            f"hicache: plan() does not know how many tokens {type(module).__name__} works on; known are "
            f"{', '.join(registry.known())}"
        )
    check_layers(adapter, run.config.by_feature)
    contexts, samples = adapter.guidance if run.guided else (1, 1)
    latents = latent_shape(pipe, adapter.compression, run.size)
    drawn = adapter.tokens(latents)
    tokens = drawn + (0 if adapter.edits else run.more_tokens)
    engine = Engine(run.config)
    engine.reset(num_steps=run.steps)
    call = _Call(
        adapter,
        engine,
        run.calls or contexts,
        (run.batch * samples, tokens, adapter.channels),
        (run.batch * samples, drawn + run.more_tokens, adapter.returned),
        adapter.num_features({}) + bool(find_controlnets(pipe)),
        run.dtype_of(module),
    )
    chosen = _choose(call, settings)
    if run.more_tokens:
        return replace(chosen, not_estimated="of calls with given pictures")
    return _with_graphs(chosen, call, latents, run.text_tokens or adapter.text_tokens, settings)


@dataclass(frozen=True)
class _Call:
    """What the calls of a step have in common."""

    adapter: ModuleAdapter
    engine: Engine
    contexts: int
    hidden: tuple[int, int, int]
    returned: tuple[int, int, int]  # what the model returns; no channels where that is not known
    num_features: int
    dtype: torch.dtype

    def history_nbytes(self, features: int) -> int:
        """Bytes of the histories of all contexts, of so many features."""
        return self.contexts * self.engine.planned_nbytes([self.hidden] * features, self.dtype)

    @property
    def output_nbytes(self) -> int:
        """Bytes of the histories of all contexts, of what the model returns."""
        return self.contexts * self.engine.planned_nbytes([self.returned], self.dtype)

    def gates_at(self, rank: int) -> GatesPlan:
        """Gates by module (rank 0), or of low rank."""
        batch, _, channels = self.hidden
        form = self.num_features, batch, channels
        return plan_gates(self.adapter, self.engine, self.contexts, form, self.dtype, rank)


def _choose(call: _Call, settings: _Settings) -> DenoiserPlan:
    """The granularity, and what is held from step to step.

    Raises:
        ValueError: gates of low rank were asked for and cannot be had.
    """
    granularity, memory_budget = settings.granularity, settings.memory_budget
    by_module, by_stack = call.history_nbytes(call.num_features), call.history_nbytes(1)
    refusal = why_not(call.adapter, call.num_features)
    ranks = range(1, min(RANKS, call.num_features - 2) + 1) if refusal is None else range(0)
    by_rank = tuple(
        call.history_nbytes(rank + 1)
        + SumMemory.planned_nbytes(rank + 1, call.num_features, call.hidden, call.dtype)
        for rank in ranks
    )
    if granularity == "low-rank" and not by_rank:
        raise ValueError(f"hicache: granularity='low-rank': {refusal}")
    if granularity == "output" and not call.output_nbytes:
        raise ValueError(
            "hicache: granularity='output': plan() does not know what "
            f"{type(call.adapter.module).__name__} returns: its adapter's `returned` says it"
        )
    wanted = tuple(nbytes + call.gates_at(rank).held for rank, nbytes in zip(ranks, by_rank, strict=True))
    rank = sum(nbytes <= memory_budget for nbytes in wanted)
    chosen = granularity
    if granularity == "auto":
        chosen = "module" if by_module <= memory_budget else "low-rank" if rank else "stack"
    rank = max(1, rank) if chosen == "low-rank" else 0
    gates = 0 if chosen in ("stack", "output") else call.gates_at(rank).nbytes
    return DenoiserPlan(
        chosen,
        call.contexts,
        call.hidden,
        call.num_features,
        by_module,
        by_stack,
        by_rank,
        rank,
        call.output_nbytes,
        wanted,
        gates,
    )


def _with_graphs(
    chosen: DenoiserPlan,
    call: _Call,
    latents: tuple[int, int, int],
    text: int,
    settings: _Settings,
) -> DenoiserPlan:
    """The plan with what a full and a skipped step take, where that can be told."""
    if chosen.granularity == "output":
        return replace(chosen, not_estimated="of full steps by output")
    order = call.engine.config.order
    recorded = Recorded(chosen.granularity, call.num_features, call.hidden, order + 1, chosen.rank)
    try:
        steps = dry_run(call.adapter.module, latents, text, call.dtype, recorded)
    except Exception as error:  # whatever the model's own code raises: nothing depends on an estimate
        return replace(chosen, not_estimated=f"{type(error).__name__}: {error}")
    if steps is None:
        kind = type(call.adapter).__name__
        return replace(chosen, not_estimated=f"{kind}.example() does not say what the model is called with")
    numbers = call.engine.numbers.planned_nbytes(call.dtype)
    ahead = max(steps_ahead(call.engine, chosen.rank), default=0)
    kept = call.contexts * (steps.kept + ahead * steps.embedded + numbers)
    room = settings.memory_budget - chosen.history_bytes - chosen.gates_bytes - kept
    graphs = plan_graphs(steps, call.contexts, order > 0, room, settings.cuda_graphs, steps.sums)
    return replace(chosen, kept_bytes=kept, sums_bytes=steps.sums, graphs=graphs)
