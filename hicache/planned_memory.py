"""What caching takes beside histories, as it is known before anything runs: gates, and CUDA graphs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hicache.adapters.base import ModuleAdapter
from hicache.adapters.gates import works_in_memory
from hicache.cuda_graphs.capture_safety import INSIDE
from hicache.dry_run import GraphBytes, StepBytes
from hicache.engine import Engine
from hicache.runtime.gate_rank import GateBasis


@dataclass(frozen=True)
class GatesPlan:
    """Bytes of gates."""

    held: int  # by all contexts: of steps to come, and of low rank what a run's gates are made of
    worked_in: int  # shared by contexts: what an adapter computes gates in

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.held + self.worked_in


def plan_gates(
    adapter: ModuleAdapter,
    engine: Engine,
    contexts: int,
    form: tuple[int, int, int],
    dtype: torch.dtype,
    rank: int,
) -> GatesPlan:
    """Bytes of the gates of a run whose steps the engine has been told.

    By module the gates of the skipped steps up to the next full one are there, ``steps · features · batch ·
    channels`` numbers; in low rank those of all steps, the directions they go in and how far
    (:class:`~hicache.runtime.gate_rank.GateBasis`). An adapter computes each number of steps in memory of its
    own.

    Args:
        adapter: the family's.
        engine: has the settings and the steps.
        contexts: calls of a step.
        form: ``num_features, batch, channels`` of the gates of one step.
        dtype: of gates.
        rank: of gates of low rank; 0 by module.
    """
    features, batch, channels = form
    step, num_steps = features * batch * channels * dtype.itemsize, engine.num_steps or 0
    coming = steps_ahead(engine, rank) if adapter.foretell else set()
    held = max(coming, default=0) * step
    if rank:
        held += GateBasis.planned_nbytes(rank, num_steps, features, batch, channels, dtype)
    # the step's own, and as many steps together as are foretold at once; gates of one sample are alike
    numbers = {1, *coming} if works_in_memory(adapter) else set()
    return GatesPlan(contexts * held, sum(numbers) * step)


def steps_ahead(engine: Engine, rank: int) -> set[int]:
    """For how many skipped steps at once gates and embeddings of a run are computed.

    Args:
        engine: has the settings and the steps.
        rank: of gates of low rank; 0 by module or by stack.
    """
    num_steps = engine.num_steps or 0
    last, found, steps = None, {num_steps - 1} if rank else set(), 0
    for step in range(0 if rank else num_steps):
        if engine.is_full(step, last):
            found.add(steps)
            last, steps = step, 0
        else:
            steps += 1
    return {count for count in (*found, steps) if count > 0}


@dataclass(frozen=True)
class GraphsPlan:
    """What CUDA graphs take of a GPU, estimated (:mod:`hicache.dry_run`), in bytes."""

    captured: str  # what fits: "full and skipped steps", "blocks", "skipped steps" or "nothing"
    nbytes: int  # of what is captured; 0 for nothing
    full_nbytes: int  # with full steps, or with blocks where full steps cannot be captured as a whole
    skipped_nbytes: int  # of skipped steps alone
    unsafe: str | None = None  # what of a full step cannot be captured


def plan_graphs(
    steps: StepBytes, contexts: int, fused: bool, room: int, choice: bool | str, sums: int
) -> GraphsPlan:
    """What of the graphs of a run fits, and what that takes.

    The graphs of a transformer share a pool: what one works in is used again by the next, what it gives
    stays. Copies of inputs are beside the pool, of each graph its own.

    Args:
        steps: what a context's steps take.
        contexts: calls of a step, each with graphs of its own.
        fused: whether the first skipped step after a full one is another graph: it updates the differences.
        room: bytes that histories and gates leave of the budget.
        choice: as ``cuda_graphs`` of :func:`hicache.fast.apply`.
        sums: bytes that full steps which run eagerly add features up in, beside the history.
    """
    unsafe = next(iter(steps.unsafe), None)
    whole = [(steps.full, contexts)] if unsafe is None else []
    skipped = [(steps.skipped, contexts * (2 if fused else 1))]
    full_nbytes, skipped_nbytes = _pool(whole + skipped), _pool(skipped)
    name = "full and skipped steps"
    if unsafe is not None:  # around blocks all is eager, skipped steps as well
        name, full_nbytes, skipped_nbytes = "blocks", _pool([(steps.blocks, contexts)]), 0
    possible = choice is not False and not any(op.place == INSIDE for op in steps.unsafe)
    captured, nbytes = "nothing", 0
    if possible and choice != "skipped" and (choice == "full" or full_nbytes <= room):
        captured, nbytes = name, full_nbytes
    elif possible and unsafe is None and skipped_nbytes + sums <= room:
        captured, nbytes = "skipped steps", skipped_nbytes
    return GraphsPlan(captured, nbytes, full_nbytes, skipped_nbytes, None if unsafe is None else str(unsafe))


def _pool(graphs: list[tuple[GraphBytes, int]]) -> int:
    """Bytes of graphs that are captured one after the other, so many of each."""
    most = held = inputs = 0
    for graph, count in graphs:
        for _ in range(count):
            most = max(most, held + graph.peak)
            held += graph.held
            inputs += graph.inputs
    return most + inputs


def latent_shape(pipe: Any, compression: tuple[int, int], size: tuple[int, int, int]) -> tuple[int, int, int]:
    """Frames, height and width of the latents: by the pipeline's autoencoder, or its family's usual one."""
    frames, height, width = size
    temporal, spatial = compression
    for name in ("vae_scale_factor_temporal", "vae_temporal_compression_ratio"):
        temporal = getattr(pipe, name, None) or temporal
    for name in ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio"):
        spatial = getattr(pipe, name, None) or spatial
    return (frames - 1) // temporal + 1, height // spatial, width // spatial


def returned_by_unet(
    pipe: Any, unet: nn.Module, size: tuple[int, int, int], samples: int
) -> tuple[int, int, int]:
    """What a U-Net returns: samples, places and channels of latents."""
    settings: Any = unet.config
    return samples, math.prod(latent_shape(pipe, (1, 8), size)), int(settings.out_channels)
