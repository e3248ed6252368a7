"""``hicache.fast.plan(pipe, height=..., width=...)``: bytes and launches before anything runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from hicache.adapters import registry
from hicache.config import HiCacheConfig
from hicache.engine import Engine
from hicache.pipeline import (
    GRANULARITIES,
    MEMORY_BUDGET,
    check_budget,
    check_choice,
    check_config,
    check_whole,
    find_controlnets,
    find_denoisers,
    is_unet,
)
from hicache.runtime.gate_rank import SumMemory, why_not

#: Ranks whose bytes are planned: gates hardly ever need more.
RANKS: Final = 8


@dataclass(frozen=True)
class DenoiserPlan:
    """What caching one transformer takes."""

    granularity: str  # "module", "low-rank" or "stack", as apply() would choose, or "output"
    contexts: int  # calls a step, each with a history of its own
    # what is recorded of a call's hidden state: batch, tokens, channels; of a U-Net, of what it returns
    hidden: tuple[int, int, int]
    num_features: int  # of a history by module; a history of the stack has one
    module_bytes: int  # of all contexts; 0 for a U-Net, as stack_bytes
    stack_bytes: int
    # at rank 1, 2, …, with what features are added up in; none where gates cannot be taken in low rank
    low_rank_bytes: tuple[int, ...] = ()
    # with gates of low rank, the highest that fits. A run's gates say which one they need; where it does not
    # fit, "auto" takes the stack.
    rank: int = 0
    output_bytes: int = 0  # 0 where it is not known what the model returns

    @property
    def history_bytes(self) -> int:
        """Bytes of history a run holds, or with gates of low rank holds at most."""
        if self.granularity == "low-rank":
            return self.low_rank_bytes[self.rank - 1]
        by_name = {"module": self.module_bytes, "stack": self.stack_bytes, "output": self.output_bytes}
        return by_name[self.granularity]

    @property
    def terms(self) -> int:
        """The name :attr:`num_features` had."""
        return self.num_features

    @property
    def launches(self) -> int:
        """Cache kernels a skipped step launches: one a context."""
        return self.contexts


@dataclass(frozen=True)
class Plan:
    """What caching a pipeline takes: the plans of its transformers by name."""

    denoisers: Mapping[str, DenoiserPlan]

    @property
    def history_bytes(self) -> int:
        """Bytes of history a run holds at most: of all transformers together."""
        return sum(plan.history_bytes for plan in self.denoisers.values())

    def __str__(self) -> str:
        return "\n".join(f"{name}: {_described(plan)}" for name, plan in self.denoisers.items())


def _described(plan: DenoiserPlan) -> str:
    chosen = plan.granularity
    if plan.rank:
        chosen = f"{chosen} of at most rank {plan.rank}"
    sizes = []
    if plan.module_bytes:
        sizes.append(f"module {plan.module_bytes:,} in {plan.num_features} features")
    if plan.low_rank_bytes:
        sizes.append(f"low-rank {plan.low_rank_bytes[0]:,} at rank 1")
    if plan.stack_bytes:
        sizes.append(f"stack {plan.stack_bytes:,}")
    if plan.output_bytes:
        sizes.append(f"output {plan.output_bytes:,}")
    return (
        f"{chosen}, {plan.history_bytes:,} bytes of history ({', '.join(sizes)}), {plan.contexts} x "
        f"{list(plan.hidden)}, {plan.launches} cache kernel{'s' if plan.launches > 1 else ''} a skipped step"
    )


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
) -> Plan:
    """How much memory caching a pipeline takes and what it launches, without running anything.

    The transformer may be on the meta device.

    Args:
        pipe: as for :func:`hicache.fast.apply`; of a model whose modules are known, or by output with a
            U-Net.
        config: as for :func:`hicache.fast.apply`.
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

    Returns:
        Plan: by transformer, the granularity that would be chosen and the bytes of each; ``print()`` it.

    Raises:
        TypeError, ValueError: bad arguments, or a model whose modules are not known.
    """
    config = check_config(config)
    check_choice("granularity", granularity, GRANULARITIES)
    check_budget(memory_budget)
    counts = {"height": height, "width": width, "num_frames": num_frames, "batch": batch}
    for name, value in {**counts, "calls": 1 if calls is None else calls}.items():
        check_whole(name, value, least=1)
    check_whole("more_tokens", more_tokens, least=0)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(
            f"hicache: expected dtype to be a floating dtype such as torch.bfloat16, or None, got {dtype!r}"
        )
    plans = {}
    size = num_frames, height, width
    for name, module in find_denoisers(pipe, unets=granularity == "output").items():
        if is_unet(name, module):
            plans[name] = _by_output_alone(pipe, module, config, size, batch, guided, calls, dtype)
            continue
        adapter = registry.find(module)
        if adapter is None:
            raise ValueError(
                f"hicache: plan() does not know how many tokens {type(module).__name__} works on; known are "
                f"{', '.join(registry.known())}"
            )
        contexts, samples = adapter.guidance if guided else (1, 1)
        contexts = calls or contexts
        drawn = adapter.tokens(_latent_shape(pipe, adapter.compression, size))
        tokens = drawn + (0 if adapter.edits else more_tokens)
        hidden = (batch * samples, tokens, adapter.channels)
        engine = Engine(config)
        kept = dtype or next(module.parameters()).dtype
        num_features = adapter.num_features({}) + bool(find_controlnets(pipe))
        by_module = contexts * engine.planned_nbytes([hidden] * num_features, kept)
        by_stack = contexts * engine.planned_nbytes([hidden], kept)
        returned = (batch * samples, drawn + more_tokens, adapter.returned)
        by_output = contexts * engine.planned_nbytes([returned], kept)
        by_rank: tuple[int, ...] = ()
        if why_not(adapter, num_features) is None:
            by_rank = tuple(
                contexts * engine.planned_nbytes([hidden] * (rank + 1), kept)
                + SumMemory.planned_nbytes(rank + 1, num_features, hidden, kept)
                for rank in range(1, min(RANKS, num_features - 2) + 1)
            )
        if granularity == "low-rank" and not by_rank:
            raise ValueError(f"hicache: granularity='low-rank': {why_not(adapter, num_features)}")
        if granularity == "output" and not by_output:
            raise ValueError(
                f"hicache: granularity='output': plan() does not know what {type(module).__name__} returns: "
                "its adapter's `returned` says it"
            )
        rank = sum(nbytes <= memory_budget for nbytes in by_rank)
        chosen = granularity
        if granularity == "auto":
            chosen = "module" if by_module <= memory_budget else "low-rank" if rank else "stack"
        rank = max(1, rank) if chosen == "low-rank" else 0
        plans[name] = DenoiserPlan(
            chosen, contexts, hidden, num_features, by_module, by_stack, by_rank, rank, by_output
        )
    return Plan(plans)


def _by_output_alone(
    pipe: Any,
    unet: nn.Module,
    config: HiCacheConfig,
    size: tuple[int, int, int],
    batch: int,
    guided: bool,
    calls: int | None,
    dtype: torch.dtype | None,
) -> DenoiserPlan:
    """The plan of a U-Net: it takes and returns latents, in one call of both samples where it is guided."""
    latents = math.prod(_latent_shape(pipe, (1, 8), size))
    settings: Any = unet.config
    returned = (batch * (1 if calls or not guided else 2), latents, int(settings.out_channels))
    contexts = calls or 1
    nbytes = Engine(config).planned_nbytes([returned], dtype or next(unet.parameters()).dtype)
    return DenoiserPlan("output", contexts, returned, 1, 0, 0, output_bytes=contexts * nbytes)


def _latent_shape(
    pipe: Any, compression: tuple[int, int], size: tuple[int, int, int]
) -> tuple[int, int, int]:
    """Frames, height and width of the latents: by the pipeline's autoencoder, or its family's usual one."""
    frames, height, width = size
    temporal, spatial = compression
    for name in ("vae_scale_factor_temporal", "vae_temporal_compression_ratio"):
        temporal = getattr(pipe, name, None) or temporal
    for name in ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio"):
        spatial = getattr(pipe, name, None) or spatial
    return (frames - 1) // temporal + 1, height // spatial, width // spatial
