"""``hicache.fast.plan(pipe, height=..., width=...)``: bytes and launches before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hicache.adapters import registry
from hicache.adapters.base import ModuleAdapter
from hicache.config import HiCacheConfig
from hicache.engine import Engine


@dataclass(frozen=True)
class DenoiserPlan:
    """What caching one transformer takes."""

    granularity: str  # "module" or "stack", as apply() would choose
    contexts: int  # calls a step, each with a history of its own
    hidden: tuple[int, int, int]  # the hidden state of a call: batch, image tokens, channels
    num_features: int  # of a history by module; a history of the stack has one
    module_bytes: int  # of all contexts
    stack_bytes: int

    @property
    def history_bytes(self) -> int:
        """Bytes of history a run holds."""
        return self.module_bytes if self.granularity == "module" else self.stack_bytes

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
        return "\n".join(
            f"{name}: {plan.granularity}, {plan.history_bytes:,} bytes of history (module "
            f"{plan.module_bytes:,} in {plan.num_features} features, stack {plan.stack_bytes:,}), "
            f"{plan.contexts} x {list(plan.hidden)}, {plan.launches} cache "
            f"kernel{'s' if plan.launches > 1 else ''} a skipped step"
            for name, plan in self.denoisers.items()
        )


def make_plan(
    pipe: Any,
    modules: Mapping[str, nn.Module],
    config: HiCacheConfig,
    granularity: str,
    memory_budget: int,
    size: tuple[int, int, int],
    batch: int,
    guided: bool,
    calls: int | None,
    more_tokens: int,
    dtype: torch.dtype | None,
) -> Plan:
    """See :func:`hicache.fast.plan`, which checks the arguments."""
    plans = {}
    for name, module in modules.items():
        adapter = registry.find(module)
        if adapter is None:
            raise ValueError(
                f"hicache: plan() does not know how many tokens {type(module).__name__} works on; known are "
                f"{', '.join(registry.known())}"
            )
        contexts, samples = adapter.guidance if guided else (1, 1)
        contexts = calls or contexts
        tokens = adapter.tokens(_latent_shape(pipe, adapter, size)) + more_tokens
        hidden = (batch * samples, tokens, adapter.channels)
        engine = Engine(config)
        kept = dtype or next(module.parameters()).dtype
        num_features = adapter.num_features({})
        by_module = contexts * engine.planned_nbytes([hidden] * num_features, kept)
        by_stack = contexts * engine.planned_nbytes([hidden], kept)
        fits = granularity == "module" or (granularity == "auto" and by_module <= memory_budget)
        chosen = "module" if fits else "stack"
        plans[name] = DenoiserPlan(chosen, contexts, hidden, num_features, by_module, by_stack)
    return Plan(plans)


def _latent_shape(pipe: Any, adapter: ModuleAdapter, size: tuple[int, int, int]) -> tuple[int, int, int]:
    """Frames, height and width of the latents: by the pipeline's autoencoder, or its family's usual one."""
    frames, height, width = size
    temporal, spatial = adapter.compression
    for name in ("vae_scale_factor_temporal", "vae_temporal_compression_ratio"):
        temporal = getattr(pipe, name, None) or temporal
    for name in ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio"):
        spatial = getattr(pipe, name, None) or spatial
    return (frames - 1) // temporal + 1, height // spatial, width // spatial
