"""Tensors: trees of them, writes to them, sizes under torch.compile, pools of memory (torch 2.11 – 2.13)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils import _python_dispatch, _pytree

pytree: Final = _pytree

TorchDispatchMode = _python_dispatch.TorchDispatchMode

no_torch_function: Final = torch._C._disabled_torch_function_impl  # what torch has subclasses take it from


def has_kernel(operation: Any, device: str) -> bool:
    """Whether an operator has a kernel of its own for a type of device: it may only be made of others."""
    key = torch._C._dispatch_key_for_device(device)
    return torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), key)


def of_any_size(value: Any) -> Any:
    """The same tensors, or those in a tuple, whose sizes torch.compile leaves open from the first time on.

    Without it a second size makes a second graph, and that one serves all (``maybe_mark_dynamic``). Aliases:
    the mark is not to be seen on a tensor of the caller's, nor what that is a view of.
    """
    if isinstance(value, tuple):
        return tuple(map(of_any_size, value))
    if not isinstance(value, Tensor):
        return value
    alias = value.data
    torch._dynamo.maybe_mark_dynamic(alias, list(range(alias.ndim)))
    return alias


def take_equal_sizes_for_one(taken: bool) -> bool:
    """Whether torch.compile takes sizes that are open, and the same once, for the same ever after.

    So it does where nothing is said: a square picture and one that is not are two graphs to it
    (``torch.fx.experimental._config.use_duck_shape``). Returns what held before.
    """
    from torch.fx.experimental import _config

    before: bool = _config.use_duck_shape
    _config.use_duck_shape = taken
    return before


def attention_kernels() -> tuple[bool, ...]:
    """Which kernels ``scaled_dot_product_attention`` may take: flash, memory-efficient, plain, cuDNN.

    What ``torch.backends.cuda`` says of each, by the functions of ``torch._C`` that it asks.
    """
    c = torch._C
    return (
        c._get_flash_sdp_enabled(),
        c._get_mem_efficient_sdp_enabled(),
        c._get_math_sdp_enabled(),
        c._get_cudnn_sdp_enabled(),
    )


def end_pool_allocation(device: torch.device | None, pool: Any) -> None:
    """Stop the allocator from serving a graph's memory pool after its capture failed.

    ``torch._C._cuda_endAllocateToPool``, which ``CUDAGraph.capture_end`` calls only where it succeeds (2.13)
    or not at all once the capture is invalid (2.11, 2.12). Nothing where the allocation has been ended.
    """
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    if end is None or device is None:
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    with contextlib.suppress(RuntimeError):
        end(index, pool)


def copy_all(into: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Copy tensors into others of their shapes and dtypes (``torch._foreach_copy_``).

    One launch where all have one dtype and the strides of what they are copied to, else one each.
    """
    if into:
        torch._foreach_copy_(list(into), list(tensors))


def write_count(tensor: Tensor) -> int | None:
    """How often a tensor was written to (``Tensor._version``); None in inference mode."""
    return None if tensor.is_inference() else int(tensor._version)


def write_counts(tensors: Iterable[Tensor]) -> list[int | None]:
    """:func:`write_count` of many."""
    return [None if tensor.is_inference() else tensor._version for tensor in tensors]
