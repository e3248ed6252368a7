"""What captures CUDA graphs, and what all captures have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hicache import compat
from hicache.trees import tensors_of

Replay = Callable[[], None]


@dataclass(frozen=True)
class Captured:
    """A captured function.

    Args:
        replay: runs it again.
        output: what it returned, overwritten by every replay.
        nbytes: bytes of the device that its pool has grown by.
        free: bytes of the device that are left.
    """

    replay: Replay
    output: Any
    nbytes: int
    free: int


class CaptureBackend(Protocol):
    """What captures."""

    def unavailable(self, device: torch.device) -> str | None:
        """Why nothing can be captured on this device; None when it can."""

    def warm(self, function: Callable[[], Any]) -> Any:
        """Run a function as it will be captured, without capturing it."""

    def capture(self, function: Callable[[], Any]) -> Captured:
        """Capture a function."""

    def drop(self) -> None:
        """All graphs have been forgotten."""


class CudaBackend:
    """``torch.cuda.CUDAGraph`` on a stream and in a memory pool shared by all graphs of a transformer."""

    def __init__(self) -> None:
        self._device: torch.device | None = None
        self._pool: Any = None
        self._stream: Any = None

    def unavailable(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"the transformer is on {device.type}"
        if device != self._device:
            self._device, self._pool, self._stream = device, None, None
        return None

    @contextmanager
    def _on_stream(self) -> Iterator[Any]:
        """Make the transformer's device current, whatever it was, and work on the capture stream there."""
        with torch.cuda.device(self._device):
            self._stream = self._stream or torch.cuda.Stream()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            caller = torch.cuda.current_stream()
            self._stream.wait_stream(caller)
            try:
                with torch.cuda.stream(self._stream):
                    yield self._stream
            finally:
                caller.wait_stream(self._stream)

    def warm(self, function: Callable[[], Any]) -> Any:
        with self._on_stream():
            output = function()
        with torch.cuda.device(self._device):
            for tensor in tensors_of(output):
                tensor.record_stream(torch.cuda.current_stream())
        return output

    def capture(self, function: Callable[[], Any]) -> Captured:
        """See :class:`CaptureBackend`. Where it raises, streams and memory are as they were.

        ``torch.cuda.graph`` leaves the thread on its stream when the capture cannot be ended (torch 2.13),
        and the pool under capture (2.11, 2.12).
        """
        with self._on_stream():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # a pool of graphs cannot use what others have cached
            before = torch.cuda.memory_reserved()  # other processes may take of the device meanwhile
            graph = torch.cuda.CUDAGraph()
            try:
                # other threads (a data loader's) may go on using the device
                graph.capture_begin(self._pool, capture_error_mode="thread_local")
                output = function()
                graph.capture_end()
            except BaseException:
                with suppress(RuntimeError):  # the first error counts, not what ending the capture says
                    graph.capture_end()
                compat.end_pool_allocation(self._device, self._pool)
                self.drop()
                raise
            taken = torch.cuda.memory_reserved() - before
            free, _ = torch.cuda.mem_get_info()
        device = self._device

        def replay() -> None:
            with torch.cuda.device(device):
                graph.replay()

        return Captured(replay, output, taken, free)

    def drop(self) -> None:
        """Take another pool from the next capture on.

        A pool whose graphs are gone, or whose capture failed, may still hold a tensor somebody has.
        """
        self._pool = None


def modes() -> tuple[Any, ...]:
    """Switches of torch and diffusers that decide which kernels a call launches."""
    return (
        torch.is_inference_mode_enabled(),
        torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled() else None,
        *compat.attention_kernels(),
        compat.attention_backend(),
    )


def describe(leaves: Sequence[Any]) -> tuple[Any, ...] | None:
    """What of the leaves of a tree is part of a graph; None where one of them cannot be told.

    Objects of classes that torch's trees do not know may hold tensors, which nobody would copy.
    """
    described: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            described.append((leaf.shape, leaf.stride(), leaf.dtype, leaf.device))
        elif leaf is None or isinstance(leaf, (bool, int, float, str, torch.dtype, torch.device)):
            described.append((type(leaf), leaf))
        else:
            return None
    return tuple(described)


def like(tensor: Tensor) -> Tensor:
    """Memory for a tensor, dense in the order of its strides; of the same strides where those are dense."""
    # outlives the mode of the run that made it
    with torch.inference_mode(False):
        return torch.empty_like(tensor)
