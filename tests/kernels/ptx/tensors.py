"""CPU tensors as allocations of a card's memory, at the addresses they have."""

from __future__ import annotations

import ctypes

import numpy as np
from torch import Tensor

from ptx.memory import Allocation


def allocation(name: str, tensor: Tensor, holds: bool = True, writable: bool = False) -> Allocation:
    """A contiguous tensor, which a launch then changes.

    Raises:
        ValueError: it is not contiguous.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"expected a contiguous {name}, got strides {tensor.stride()}")
    data = np.empty(0, np.uint8)
    if tensor.nbytes:
        memory = (ctypes.c_uint8 * tensor.nbytes).from_address(tensor.data_ptr())
        data = np.frombuffer(memory, np.uint8)
    return Allocation(name, tensor.data_ptr(), data, holds, writable)
