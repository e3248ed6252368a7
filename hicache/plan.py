"""``hicache.fast.plan(pipe, height=..., width=...)``: bytes and launches before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from hicache.adapters import registry
from hicache.adapters.base import ModuleAdapter
from hicache.adapters.layers import check_layers
from hicache.checks import check_whole
from hicache.config import HiCacheConfig
from hicache.cuda_graphs.runner import CHOICES
from hicache.dry_run import Recorded, dry_run
from hicache.engine import Engine
from hicache.pipeline import (
    MEMORY_BUDGET,
    check_budget,
    check_choice,
    check_config,
    find_controlnets,
    find_denoisers,
    granularity_of,
    is_unet,
)
from hicache.planned_memory import (
    GatesPlan,
    GraphsPlan,
    latent_shape,
    plan_gates,
    plan_graphs,
    returned_by_unet,
)
from hicache.runtime.gate_rank import SumMemory, why_not
from hicache.schedule import full_steps

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
    low_rank_wanted: tuple[int, ...] = ()  # what must fit the budget at every rank: with the gates of a run
    gates_bytes: int = 0  # of all contexts: gates of steps to come, of low rank of the whole run
    # where the family's adapter says what the model is called with; else None
    kept_bytes: int | None = None  # coefficients, embeddings and copies of prompts
    sums_bytes: int | None = None  # by module: what a full step adds features up in, while it runs
    graphs: GraphsPlan | None = None  # CUDA graphs on a GPU; an estimate
    not_estimated: str | None = None  # why these three are None

    @property
    def history_bytes(self) -> int:
        """Bytes of history a run holds, or with gates of low rank holds at most."""
        if self.granularity == "low-rank":
            return self.low_rank_bytes[self.rank - 1]
        by_name = {"module": self.module_bytes, "stack": self.stack_bytes, "output": self.output_bytes}
        return by_name[self.granularity]

    @property
    def graphs_nbytes(self) -> int:
        """Bytes that CUDA graphs take, estimated; 0 where nothing is captured, or it is not known."""
        return 0 if self.graphs is None else self.graphs.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes that caching takes at most, but for what is not known: :attr:`graphs_nbytes` is estimated."""
        full = self.graphs is not None and self.graphs.captured.startswith(("full", "blocks"))
        sums = 0 if full else self.sums_bytes or 0  # in the graphs' pool, then
        held = self.history_bytes + self.gates_bytes + (self.kept_bytes or 0)
        return held + sums + self.graphs_nbytes

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
    steps: int = 0  # of a run
    full_steps: int = 0  # of those; at most, where a schedule decides as it goes

    @property
    def history_bytes(self) -> int:
        """Bytes of history a run holds at most: of all transformers together."""
        return sum(plan.history_bytes for plan in self.denoisers.values())

    @property
    def nbytes(self) -> int:
        """Bytes that caching takes at most, estimated: see :attr:`DenoiserPlan.nbytes`."""
        return sum(plan.nbytes for plan in self.denoisers.values())

    def __str__(self) -> str:
        lines = [f"{name}: {_described(plan)}" for name, plan in self.denoisers.items()]
        return "\n".join([*lines, f"at most {self.full_steps} of {self.steps} steps are full"])


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
    graphs = "of CUDA graphs what is not estimated,"
    if plan.graphs is not None:
        graphs = f"about {plan.graphs_nbytes:,} of CUDA graphs ({plan.graphs.captured})"
    kernels = f"{plan.launches} cache kernel{'s' if plan.launches > 1 else ''}"
    return (
        f"{chosen}, {plan.history_bytes:,} bytes of history ({', '.join(sizes)}), {plan.contexts} x "
        f"{list(plan.hidden)}, {kernels} a skipped step; "
        f"with {plan.gates_bytes:,} of gates and {graphs} about {plan.nbytes:,} in all"
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
    steps: int = 50,
    text_tokens: int | None = None,
    cuda_graphs: bool | str = "auto",
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
    config = check_config(config)
    granularity = granularity_of(granularity, config.by_feature)
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
    plans = {}
    size = num_frames, height, width
    for name, module in find_denoisers(pipe, unets=granularity == "output").items():
        if is_unet(name, module):
            # latents in, latents out, in one call of both samples where it is guided
            returned = returned_by_unet(pipe, module, size, batch * (1 if calls or not guided else 2))
            nbytes = Engine(config).planned_nbytes([returned], dtype or next(module.parameters()).dtype)
            contexts = calls or 1
            plans[name] = DenoiserPlan("output", contexts, returned, 1, 0, 0, output_bytes=contexts * nbytes)
            continue
        adapter = registry.find(module)
        if adapter is None:
            raise ValueError(
                f"hicache: plan() does not know how many tokens {type(module).__name__} works on; known are "
                f"{', '.join(registry.known())}"
            )
        check_layers(adapter, config.by_feature)
        contexts, samples = adapter.guidance if guided else (1, 1)
        latents = latent_shape(pipe, adapter.compression, size)
        drawn = adapter.tokens(latents)
        tokens = drawn + (0 if adapter.edits else more_tokens)
        engine = Engine(config)
        engine.reset(num_steps=steps)
        call = _Call(
            adapter,
            engine,
            calls or contexts,
            (batch * samples, tokens, adapter.channels),
            (batch * samples, drawn + more_tokens, adapter.returned),
            adapter.num_features({}) + bool(find_controlnets(pipe)),
            dtype or next(module.parameters()).dtype,
        )
        chosen = _choose(call, granularity, memory_budget)
        text = text_tokens or adapter.text_tokens
        if more_tokens:
            plans[name] = replace(chosen, not_estimated="of calls with given pictures")
        else:
            plans[name] = _with_graphs(chosen, call, latents, text, memory_budget, cuda_graphs)
    return Plan(plans, steps, len(full_steps(config, steps)))


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


def _choose(call: _Call, granularity: str, memory_budget: int) -> DenoiserPlan:
    """The granularity, and what is held from step to step.

    Raises:
        ValueError: gates of low rank were asked for and cannot be had.
    """
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
    memory_budget: int,
    choice: bool | str,
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
    kept = call.contexts * (steps.kept + numbers)
    room = memory_budget - chosen.history_bytes - chosen.gates_bytes - kept
    graphs = plan_graphs(steps, call.contexts, order > 0, room, choice, steps.sums)
    return replace(chosen, kept_bytes=kept, sums_bytes=steps.sums, graphs=graphs)
