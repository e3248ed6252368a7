"""How much memory a full and a skipped step take beside the history: both are run on the meta device.

That device has shapes and no numbers: a model of the same configuration is made on it, without weights, and
called as its pipeline would, with the hooks of a run. What operations allocate is counted
(:mod:`hicache.cuda_graphs.live_bytes`), with attention as one operation that keeps no scores, as the fused
kernels of GPUs do. It is an estimate: a GPU's libraries take workspaces, and its allocator loses some memory
between pieces.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hicache import compat
from hicache.adapters import registry
from hicache.cuda_graphs.capture_safety import UnsafeOp, UnsafeOps
from hicache.cuda_graphs.live_bytes import LiveBytes, nbytes
from hicache.engine import Sum
from hicache.hooks.block_lists import find_lists
from hicache.hooks.module_outputs import ModuleOutputs
from hicache.hooks.transformer import HookedTransformer
from hicache.runtime.conditions import conditioning
from hicache.runtime.gate_rank import SumMemory
from hicache.runtime.planner import forecast
from hicache.step_plan import CallResult, FullStep, RunningCall, SkippedStep
from hicache.trees import tensors_of

_META = torch.device("meta")


@dataclass(frozen=True)
class GraphBytes:
    """Memory of one CUDA graph, or of those of all blocks."""

    peak: int  # of its pool while it is captured
    held: int  # of that, what it gives and what its blocks give each other: no other graph can use it
    inputs: int  # beside the pool: copies of what it is given


@dataclass(frozen=True)
class StepBytes:
    """What the steps of one context take beside its history, in bytes."""

    full: GraphBytes
    blocks: GraphBytes  # where only they can be captured
    skipped: GraphBytes
    sums: int  # by module: what a full step adds features up in while it runs
    embedded: int  # what the model's embedder of timesteps gives, where that is computed ahead
    kept: int  # for the run: embeddings that only blocks read, and copies of the prompt that tell calls apart
    unsafe: tuple[UnsafeOp, ...]  # operations of a full step that cannot be captured


@dataclass(frozen=True)
class Recorded:
    """What a full step records.

    Args:
        granularity: ``"module"``, ``"low-rank"`` or ``"stack"``.
        num_features: of a history by module.
        hidden: shape of a feature, ``[batch, tokens, channels]``.
        num_coeffs: orders of the history.
        rank: of gates of low rank.
    """

    granularity: str
    num_features: int
    hidden: tuple[int, int, int]
    num_coeffs: int
    rank: int = 0

    @property
    def kept(self) -> int:
        """Features of the history."""
        return {"module": self.num_features, "low-rank": self.rank + 1, "stack": 1}[self.granularity]


def dry_run(
    module: nn.Module, latents: Sequence[int], text: int, dtype: torch.dtype, recorded: Recorded
) -> StepBytes | None:
    """Run a full and a skipped step of a model, cached, on the meta device.

    Args:
        module: only its class and its configuration are looked at.
        latents: their frames, height and width.
        text: tokens of the prompt.
        dtype: of the model's weights, but for those that its class keeps in fp32.
        recorded: what the full step records.

    Returns:
        None: the model's adapter does not say what it is called with.

    Raises:
        Exception: the model cannot be made of its configuration, or called so.
    """
    model = _on_meta(module, dtype)
    standing_for = _shorten(model)
    adapter = registry.find(model)
    like = torch.empty((), dtype=dtype, device=_META)
    given = None if adapter is None else adapter.example(latents, recorded.hidden[0], text, like)
    if adapter is None or given is None:
        return None
    hooked = HookedTransformer(model)
    outputs = ModuleOutputs(hooked.call, adapter.outputs())
    call, hidden = hooked.call, torch.empty(recorded.hidden, dtype=dtype, device=_META)
    with torch.no_grad(), _FusedAttention(), ExitStack() as hooks:
        made = adapter.embedder
        hooked.install(lambda plan, base, block_kwargs: forecast(plan, None, base, block_kwargs), made)
        hooks.callback(hooked.remove)
        hooked.refresh()
        plan = _full_step(recorded, hidden, outputs)
        _begin(call, plan)
        call.lesson = _Lesson(plan)
        model(**given, return_dict=False)  # what a model keeps of its first call is not of a graph
        call.lesson = None
        ahead = call.embedded[0] if len(call.embedded) == 1 else None
        embedded = ahead if isinstance(ahead, Tensor) else None
        _begin(call, plan)
        full = _Watched(model, hooked, given, standing_for)
        sums = sum(map(nbytes, call.result.partial_sums.values()))
        kept = sum(tensor.nbytes for tensor in [*tensors_of(call.recalled), *conditioning(given)])
        outputs.remove()
        inside = recorded.granularity == "stack"  # a graph embeds its timestep itself
        _begin(call, replace(_skipped_step(recorded, hidden), embedded=None if inside else embedded))
        skipped = _Watched(model, hooked, given, standing_for)
        read = sum(map(nbytes, call.plan.inputs)) if isinstance(call.plan, SkippedStep) else 0
    inputs = sum(map(nbytes, tensors_of(given)))
    return StepBytes(
        GraphBytes(full.peak, full.held, inputs),
        GraphBytes(full.block_peak, full.block_held, full.block_inputs),
        GraphBytes(skipped.peak, skipped.held, inputs + read),
        sums,
        0 if embedded is None else embedded.nbytes,
        kept,
        tuple(full.unsafe),
    )


class _Watched:
    """One call of a model, and what it took.

    Args:
        model: the model.
        hooked: it, with a plan for the call.
        given: arguments of the call.
        standing_for: how many blocks each is there for.
    """

    def __init__(
        self,
        model: nn.Module,
        hooked: HookedTransformer,
        given: Mapping[str, Any],
        standing_for: Mapping[nn.Module, int],
    ) -> None:
        self.block_peak = self.block_held = self.block_inputs = 0
        # ids of what blocks gave, and took from elsewhere: held, that would count
        self._known: set[int] = set()
        self._before = 0
        self._memory = LiveBytes("meta")
        blocks = [block for blocks in hooked.lists for block in compat.children_of_list(blocks)]
        unsafe = UnsafeOps(blocks)
        self._standing_for = standing_for
        with ExitStack() as stack:
            for block in blocks:
                before = block.register_forward_pre_hook(self._enter, with_kwargs=True)
                after = block.register_forward_hook(self._leave)
                stack.callback(before.remove)
                stack.callback(after.remove)
            stack.enter_context(self._memory)
            stack.enter_context(unsafe)
            output = model(**given, return_dict=False)
        self.peak = self._memory.reserved
        self.held = sum(map(nbytes, [*tensors_of(output), *hooked.call.result.partial_sums.values()]))
        # the pool of blocks: what all of them give stays, and each needs room to work in
        self.block_peak += self.block_held
        self.unsafe = unsafe.found

    def _enter(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        self._memory.mark()
        self._before = self._memory.live
        for tensor in tensors_of((args, kwargs)):
            if id(tensor) not in self._known:
                self._note(tensor)
                self.block_inputs += nbytes(tensor)

    def _leave(self, block: nn.Module, args: Any, output: Any) -> None:
        self.block_peak = max(self.block_peak, self._memory.reserved_since_mark)
        self.block_held += self._standing_for.get(block, 1) * (self._memory.live - self._before)
        for tensor in tensors_of(output):
            self._note(tensor)

    def _note(self, tensor: Tensor) -> None:
        key = id(tensor)
        self._known.add(key)
        weakref.finalize(tensor, self._known.discard, key)


class _Lesson:
    """What the first call of a form shows of the model is noted by the hooks: nothing is to be checked."""

    def __init__(self, plan: FullStep) -> None:
        self.unfit: str | None = None
        self._plan = plan

    def first_block(self, hidden: Tensor, block_kwargs: Mapping[str, Any]) -> FullStep:
        return self._plan

    def head(self, plan: FullStep, hidden: Tensor) -> FullStep:
        return plan


class _FusedAttention(TorchFunctionMode):
    """Attention takes memory for what it gives alone: the meta device would make all scores."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            query, value = named["query"], named["value"]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


def _on_meta(module: Any, dtype: torch.dtype) -> nn.Module:
    """A model of the same class and configuration, without weights."""
    kind = type(module)
    # hooks give an object a subclass of the same name
    plain: Any = [parent for parent in kind.__mro__ if parent.__name__ == kind.__name__][-1]
    with _META:
        model: Any = plain.from_config(module.config)
    in_fp32 = compat.kept_in_fp32(model) if dtype.itemsize < 4 else set()
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if weight.is_floating_point() and not in_fp32.intersection(name.split(".")):
            weight.data = weight.data.to(dtype)
    made: nn.Module = model.eval().requires_grad_(False)
    return made


def _shorten(model: nn.Module) -> dict[nn.Module, int]:
    """Leave out blocks that are as the two before them; returns how many each that is left stands for."""
    standing_for: dict[nn.Module, int] = {}
    for blocks in find_lists(model):
        kept: list[nn.Module] = []
        kinds: list[Any] = []
        for block in compat.children_of_list(blocks):
            kind = type(block), [weight.shape for weight in block.parameters()]
            if kinds[-2:] == [kind, kind]:
                standing_for[kept[-1]] += 1
            else:
                kept.append(block)
                kinds.append(kind)
                standing_for[block] = 1
        del blocks[len(kept) :]
        for index, block in enumerate(kept):
            blocks[index] = block
    return standing_for


def _begin(call: RunningCall, plan: FullStep | SkippedStep) -> None:
    call.plan, call.result, call.recall_index = plan, CallResult(), 0


def _full_step(recorded: Recorded, hidden: Tensor, outputs: ModuleOutputs) -> FullStep:
    slots = tuple(torch.empty_like(hidden) for _ in range(recorded.kept))
    if recorded.granularity == "stack":
        return FullStep(slots, slots[0])
    if recorded.granularity == "module":
        outputs.bind(slots, None)
        return FullStep(slots)
    memory = SumMemory(recorded.kept, recorded.num_features, hidden.shape, hidden.dtype, hidden.device)
    outputs.bind_sums(memory.sums, memory.weights, None)
    return FullStep((*slots, *memory.sums), weights=memory.weights)


def _skipped_step(recorded: Recorded, hidden: Tensor) -> SkippedStep:
    orders = hidden.new_empty(recorded.num_coeffs, recorded.kept, hidden.numel())
    coeffs = torch.empty(recorded.num_coeffs, device=_META)
    gated = recorded.granularity != "stack"
    gates = hidden.new_empty(recorded.kept, len(hidden), hidden.shape[-1]) if gated else None
    return SkippedStep(Sum(orders, coeffs, None, 0, "reference"), gates, gated)
