"""A capture that is faked: CUDA graphs without a GPU.

:class:`FakeBackend` records a closure and runs it again at every replay, as a graph would: into the same
output memory, with the Python state of the capture and without leaving any behind. Between replays it poisons
its outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hicache import HiCacheConfig
from hicache.step_plan import Call
from tests.support.models import Arguments

CONFIG = HiCacheConfig(interval=3, order=2, warmup=3)
STEPS = 14
PIPELINES = ("flux", "flux_cfg", "qwen", "sd3", "wan", "hunyuan", "ltx", "dit", "pixart")


class FakeBackend:
    """Records closures. One per transformer, as the backend it stands in for."""

    made: ClassVar[list[FakeBackend]] = []

    def __init__(self) -> None:
        self.call: Call | None = None
        self.outputs: list[Tensor] = []
        self.captures = self.replays = 0
        self.fails: Exception | None = None
        self.by_block = False
        self.fails_whole: Exception | None = None  # once: the first to be captured is a whole call
        FakeBackend.made.append(self)

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def warm(self, function: Callable[[], Any]) -> Any:
        return function()

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.captures += 1
        if self.fails is not None:
            raise self.fails
        if self.fails_whole is not None:
            error, self.fails_whole, self.by_block = self.fails_whole, None, True
            raise error
        assert self.call is not None
        call = self.call
        before = _frozen(call)
        held = [*call.targets, *call.sums.values()]
        history = [tensor.clone() for tensor in held]
        output = function()
        # a capture computes nothing
        for tensor, old in zip(held, history, strict=True):
            tensor.copy_(old)
        written = [*_tensors(output), *_tensors(call.sums), *_tensors(call.remembered)]
        known = [*_tensors(before["remembered"]), *held]
        mine = [tensor for tensor in written if not any(tensor is old for old in known)]
        _poison(mine)
        self.outputs += mine

        def replay() -> None:
            self.replays += 1
            # what other calls gave must not be relied on; but a block reads what the one before it gave
            _poison(mine if self.by_block else self.outputs)
            now = dict(call.__dict__)
            remembered = list(call.remembered)
            _restore(call, before)
            again = function()
            fresh = [*_tensors(again), *_tensors(call.sums), *_tensors(call.remembered)]
            for tensor, new in zip(written, fresh, strict=True):
                if tensor is not new:
                    tensor.copy_(new)
            call.__dict__.update(now)
            call.remembered[:] = remembered

        return replay, output


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _poison(outputs: list[Tensor]) -> None:
    for tensor in outputs:
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))


def _frozen(call: Call) -> dict[str, Any]:
    return {**call.__dict__, "remembered": list(call.remembered), "sums": dict(call.sums)}


def _restore(call: Call, state: dict[str, Any]) -> None:
    held = call.remembered
    call.__dict__.update({**state, "sums": dict(state["sums"]), "remembered": held})
    held[:] = state["remembered"]


def connect(handle: Any) -> Any:
    """Tell the fake backends of a handle whose calls they capture; returns the handle."""
    for denoiser in handle._denoisers:
        if denoiser.graphs is not None:
            denoiser.graphs._backend.call = denoiser.adapter.call
    return handle


def other_prompt(arguments: Arguments) -> Arguments:
    """The arguments of a pipeline with another prompt."""
    return {
        name: value * 0.7 + 0.1 if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
