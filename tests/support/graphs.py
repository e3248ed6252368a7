"""A capture that is faked: CUDA graphs without a GPU.

:class:`FakeBackend` records a closure and runs it again at every replay, as a graph would: into the same
output memory, with the Python state of the capture and without leaving any behind. Between replays it poisons
its outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hicache import HiCacheConfig
from hicache.cuda_graphs.capture import Captured
from hicache.step_plan import CallResult, FullStep, RunningCall, SkippedStep
from tests.support.models import Arguments

CONFIG = HiCacheConfig(interval=3, order=2, warmup=3)
STEPS = 14
PIPELINES = (
    "flux",
    "flux_cfg",
    "flux_kontext",
    "qwen",
    "sd3",
    "wan",
    "wan_ti2v_picture",
    "hunyuan",
    "ltx",
    "dit",
    "pixart",
)


class FakeBackend:
    """Records closures. One per transformer, as the backend it stands in for."""

    made: ClassVar[list[FakeBackend]] = []
    room: ClassVar[tuple[int, int]] = (10, 100)  # bytes a capture takes, and leaves free

    def __init__(self) -> None:
        self.call: RunningCall | None = None
        self.outputs: list[Tensor] = []
        self.captures = self.replays = self.drops = 0
        self.fails: Exception | None = None
        self.by_block = False
        self.fails_whole: Exception | None = None  # once: the first to be captured is a whole call
        FakeBackend.made.append(self)

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def drop(self) -> None:
        self.drops += 1

    def warm(self, function: Callable[[], Any]) -> Any:
        return function()

    def capture(self, function: Callable[[], Any]) -> Captured:
        self.captures += 1
        if self.fails is not None:
            raise self.fails
        if self.fails_whole is not None:
            error, self.fails_whole, self.by_block = self.fails_whole, None, True
            raise error
        assert self.call is not None
        call = self.call
        before = _State.of(call)
        plan = call.plan
        slots = plan.slots if isinstance(plan, FullStep) else ()
        updated = [plan.sum.orders] if isinstance(plan, SkippedStep) and plan.sum.inv_gap is not None else []
        held = [*slots, *updated, *call.result.partial_sums.values()]
        history = [tensor.clone() for tensor in held]
        output = function()
        # a capture computes nothing
        for tensor, old in zip(held, history, strict=True):
            tensor.copy_(old)
        written = [*_tensors(output), *_left(call)]
        mine = [tensor for tensor in written if not any(tensor is old for old in held)]
        _poison(mine)
        self.outputs += mine

        def replay() -> None:
            self.replays += 1
            # what other calls gave must not be relied on; but a block reads what the one before it gave
            _poison(mine if self.by_block else self.outputs)
            now = _State.of(call)
            before.restore(call)
            again = function()
            for tensor, new in zip(written, [*_tensors(again), *_left(call)], strict=True):
                if tensor is not new:
                    tensor.copy_(new)
            now.restore(call)

        return Captured(replay, output, *self.room)


@dataclass(frozen=True)
class _State:
    """What of a running call Python code reads, as it stood at one moment."""

    fields: dict[str, Any]
    result: CallResult

    @classmethod
    def of(cls, call: RunningCall) -> _State:
        return cls(dict(vars(call)), call.result.copy())

    def restore(self, call: RunningCall) -> None:
        vars(call).update(self.fields)
        # in place: the code around a capture holds on to both
        call.result.entered, call.result.head_reached = self.result.entered, self.result.head_reached
        call.result.partial_sums.clear()
        call.result.partial_sums.update(self.result.partial_sums)


def _left(call: RunningCall) -> list[Tensor]:
    """The tensors that code leaves for whoever reads the call after it."""
    return _tensors(call.result.partial_sums)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _poison(outputs: list[Tensor]) -> None:
    for tensor in outputs:
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))


def connect(handle: Any) -> Any:
    """Tell the fake backends of a handle whose calls they capture; returns the handle."""
    for denoiser in handle._denoisers:
        if denoiser.graphs is not None:
            denoiser.graphs._backend.call = denoiser.hooked.call
    return handle


def other_prompt(arguments: Arguments) -> Arguments:
    """The arguments of a pipeline with another prompt."""
    return {
        name: value * 0.7 + 0.1 if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
