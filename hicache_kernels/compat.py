"""Private names of torch that the ops and the loops of the extension need: all of them are here."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

# What a thread's dispatcher adds to the keys of tensors where nothing else is going on; the second in
# inference mode. Modes, transforms of torch.func, tracing and functionalisation each add a key of their own.
_SELECT = DispatchKeySet(DispatchKey.BackendSelect)
_USUAL = frozenset(
    keys.raw_repr() for keys in (_SELECT | DispatchKeySet(DispatchKey.ADInplaceOrView), _SELECT)
)


def nobody_listens() -> bool:
    """Whether nothing of torch's would see, change or record a call of an op on ordinary tensors.

    Not so inside torch.compile or export, under a mode, a transform, a tracer or a profiler.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_function_stack()
        and not torch._C._autograd._profiler_enabled()
        and torch._C._dispatch_tls_local_include_set().raw_repr() in _USUAL
    )


def write_counts(tensors: Sequence[Tensor]) -> list[int]:
    """How often tensors were written to, none of them made in inference mode (``Tensor._version``)."""
    return [tensor._version for tensor in tensors]


def tensor_handles(tensors: Sequence[Tensor]) -> list[Any]:
    """Capsules around an ``at::Tensor`` each, new ones, to be :func:`given_back`.

    ``torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors``.

    Raises:
        AttributeError: torch has it no longer.
    """
    _ = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs  # what is not given back is lost
    handles: Any = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(list(tensors))  # declared otherwise
    return list(handles)


def places(handles: Sequence[Any]) -> list[int]:
    """Addresses of the ``at::Tensor`` that capsules are around."""
    kind = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    read = kind(("PyCapsule_GetPointer", ctypes.pythonapi))
    return [read(handle, None) for handle in handles]


def given_back(handles: Sequence[Any]) -> None:
    """Free what :func:`tensor_handles` gave (``torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs``)."""
    torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(list(handles))


@functools.cache
def state_functions() -> tuple[int, int] | None:
    """Where functions of torch's library are that take such a handle; None where it has none of these names.

    ``aoti_torch_get_data_ptr`` of its C interface, and ``at::TensorBase::_version`` by its name on Linux and
    macOS: for :mod:`hicache_kernels.unchanged`, which compares what they say with what Python says.
    """
    if not hasattr(os, "RTLD_NOLOAD"):
        return None
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            # the one that is there, and no other
            library = ctypes.CDLL(str(folder / name), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            functions = library.aoti_torch_get_data_ptr, library._ZNK2at10TensorBase8_versionEv
        except (OSError, AttributeError):
            continue
        address, writes = (ctypes.cast(function, ctypes.c_void_p).value for function in functions)
        if address and writes:
            return address, writes
    return None
