"""What a CUDA graph cannot capture, found by running a call, on whatever device, and looking on.

A graph replays kernels at fixed addresses. So while a call is captured nothing may be copied between host and
device, the host may not ask for a number on the device, and no shape may depend on one.

>>> import torch
>>> for unsafe in unsafe_ops(lambda: torch.zeros(3, device="meta").copy_(torch.ones(3))):
...     print(unsafe.kind, unsafe.op)
copy copy_
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

import torch
from torch import Tensor, nn

from hicache import compat
from hicache.compat import TorchDispatchMode
from hicache.trees import tensors_of

COPY: Final = "copy"  # between host and device
SYNC: Final = "sync"  # the host waits for a number on the device
SHAPE: Final = "shape"  # depends on numbers on the device: a sync, and other addresses at every call

BEFORE: Final = "before the blocks"
INSIDE: Final = "inside the blocks"
AFTER: Final = "after the first block"  # between blocks, or in the head

# torch's own list of what cannot be traced without numbers is that of what reads them
_TAGS: Final = {torch.Tag.data_dependent_output: SYNC, torch.Tag.dynamic_output_shape: SHAPE}
_INDEXING: Final = ("index", "index_put", "index_put_")
_COMPREHENSIONS: Final = ("<listcomp>", "<setcomp>", "<dictcomp>")
_MASKS: Final = (torch.bool, torch.uint8)


@dataclass(frozen=True)
class UnsafeOp:
    """One operation that cannot be captured; equal to another of the same kind in the same function."""

    kind: str  # COPY, SYNC or SHAPE
    op: str  # torch's name for it
    place: str  # BEFORE, INSIDE or AFTER
    file: str  # that called it, torch's own left aside
    function: str
    line: int = field(compare=False)

    def __str__(self) -> str:
        return f"{self.kind} by {self.op} in {self.function} ({self.file}:{self.line}), {self.place}"


class UnsafeOps(TorchDispatchMode):
    """Notes the unsafe ones of the operations that run while it is entered, in ``found``.

    Tensors may be of any device; every device but the host counts as one. Kernels of this project are one
    operation each, whatever their backend does on a host.

    Args:
        blocks: what :attr:`UnsafeOp.place` refers to. In a skipped step the sum over the history stands for
            them.
    """

    def __init__(self, blocks: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self.found: list[UnsafeOp] = []
        self._blocks = list(blocks)
        self._depth = 0  # blocks that run now
        self._entered = False  # whether one has run
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> UnsafeOps:
        for block in self._blocks:
            self._undo.append(block.register_forward_pre_hook(self._before_block, prepend=True).remove)
            self._undo.append(block.register_forward_hook(self._after_block, always_call=True).remove)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        while self._undo:
            self._undo.pop()()

    def _before_block(self, block: nn.Module, args: Any) -> None:
        self._depth += 1
        self._entered = True

    def _after_block(self, block: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "hicache":
            self._entered = True
        kind = _kind(func, args, kwargs)
        if kind is not None:
            place = INSIDE if self._depth else AFTER if self._entered else BEFORE
            self.found.append(UnsafeOp(kind, func.overloadpacket.__name__, place, *_caller()))
        elif func.namespace != "hicache" and not _has_kernel(func, args, kwargs):
            # in inference mode, operations made of others arrive whole: look at the others
            super().__enter__()  # the mode alone, not what it watches
            try:
                result = func.decompose(*args, **kwargs)
            finally:
                super().__exit__(None, None, None)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)


def unsafe_ops(call: Callable[[], Any], blocks: Iterable[nn.Module] = ()) -> list[UnsafeOp]:
    """Run a call, and list what of it a CUDA graph cannot capture, in order; empty: nothing.

    What bypasses torch's operators (a synchronisation by name, a kernel's own launcher) is not seen.

    Args:
        call: runs as it would without.
        blocks: as for :class:`UnsafeOps`.
    """
    with UnsafeOps(blocks) as mode:
        call()
    return mode.found


def _kind(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
    """What is wrong with an operation; None: nothing."""
    hosts = [_on_host(tensor.device) for tensor in tensors_of((args, kwargs))]
    name = func.overloadpacket.__name__
    if name == "copy_":
        return COPY if hosts[0] != hosts[1] else None
    if name == "_to_copy":
        target = kwargs.get("device")
        return COPY if target is not None and _on_host(torch.device(target)) != hosts[0] else None
    if all(hosts):
        return None
    if name in _INDEXING:
        return _kind_of_index(name, *args)
    if name == "repeat_interleave" and kwargs.get("output_size") is not None:
        return None
    return next((kind for tag, kind in _TAGS.items() if tag in func.tags), None)


def _kind_of_index(
    name: str, given: Tensor, indices: Sequence[Tensor | None], value: Tensor | None = None, *more: Any
) -> str | None:
    """Of indexing. A mask makes it a search for what the mask lets through."""
    found = [index for index in indices if index is not None]
    if not any(index.dtype in _MASKS for index in found):
        return COPY if any(_on_host(index.device) for index in found) else None
    # one number of the host's is filled in under a mask without looking for its places
    fills = value is not None and value.numel() == 1 and _on_host(value.device) and not any(more)
    return None if fills else SHAPE


def _has_kernel(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether an operation that could be made of others has a kernel of its own where its tensors are.

    Taken apart it would round otherwise: ``torch.nn.RMSNorm`` does.
    """
    devices = {tensor.device.type for tensor in tensors_of((args, kwargs))}
    return any(compat.has_kernel(func, device) for device in devices)


def _on_host(device: torch.device) -> bool:
    return device.type == "cpu"


def _caller() -> tuple[str, str, int]:
    """File, function and line of the innermost code that is neither torch's, nor a tensor's, nor our own."""
    frame = sys._getframe(1)
    while frame.f_back is not None and not _counts(frame):
        frame = frame.f_back
    code, owner = frame.f_code, frame.f_locals.get("self")
    function = code.co_name if owner is None else f"{type(owner).__name__}.{code.co_name}"
    return Path(code.co_filename).name, function, frame.f_lineno


def _counts(frame: FrameType) -> bool:
    module = frame.f_globals.get("__name__", "")
    return not (
        module == __name__
        or module.split(".")[0] == "torch"
        or isinstance(frame.f_locals.get("self"), Tensor)  # a method of a subclass
        or frame.f_code.co_name in _COMPREHENSIONS  # no functions of their own from Python 3.12 on
    )
