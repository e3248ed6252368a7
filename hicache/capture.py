"""What captures CUDA graphs, and what all captures have in common."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Replay = Callable[[], None]


class Backend(Protocol):
    """What captures."""

    def unavailable(self, device: torch.device) -> str | None:
        """Why nothing can be captured on this device; None when it can."""

    def warm(self, function: Callable[[], Any]) -> Any:
        """Run a function as it will be captured, without capturing it."""

    def capture(self, function: Callable[[], Any]) -> tuple[Replay, Any]:
        """Capture a function: what replays it, and what it returned, overwritten by every replay."""


class CudaBackend:
    """``torch.cuda.CUDAGraph`` on a stream and in a memory pool shared by all graphs of a transformer."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: Any = None

    def unavailable(self, device: torch.device) -> str | None:
        return None if device.type == "cuda" else f"the transformer is on {device.type}"

    def warm(self, function: Callable[[], Any]) -> Any:
        if self._stream is None:
            self._stream = torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            output = function()
        torch.cuda.current_stream().wait_stream(self._stream)
        for tensor in pytree.tree_leaves(output):
            if isinstance(tensor, Tensor):
                tensor.record_stream(torch.cuda.current_stream())
        return output

    def capture(self, function: Callable[[], Any]) -> tuple[Replay, Any]:
        graph = torch.cuda.CUDAGraph()
        # other threads (a data loader's) may go on using the device
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            output = function()
        return graph.replay, output


def modes() -> tuple[Any, ...]:
    """Switches of torch and diffusers that decide which kernels a call launches."""
    return (
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(),
        torch.get_autocast_dtype("cuda"),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
        _attention_backend(),
    )


def _attention_backend() -> str:
    """diffusers' choice for processors that have none of their own."""
    dispatch: Any = sys.modules.get("diffusers.models.attention_dispatch")
    registry = getattr(dispatch, "_AttentionBackendRegistry", None)
    return str(getattr(registry, "_active_backend", None))


def tensors(leaves: Sequence[Any]) -> list[Tensor]:
    """The tensors among the leaves of a tree."""
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


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


def parts(weight: Tensor) -> list[Tensor]:
    """The tensors that hold a weight's numbers: those of a quantised one are inside of it."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    names, _ = weight.__tensor_flatten__()
    return [part for name in names for part in parts(getattr(weight, name))]


def like(tensor: Tensor) -> Tensor:
    """Memory for a tensor, dense in the order of its strides; of the same strides where those are dense."""
    # outlives the mode of the run that made it
    with torch.inference_mode(False):
        return torch.empty_like(tensor)
