"""How much memory a call holds at once, found by running it, on whatever device, and looking on.

>>> import torch
>>> with LiveBytes("meta") as memory:
...     total = torch.empty(1024, device="meta") + torch.empty(1024, device="meta")
>>> memory.peak, memory.live
(12288, 4096)
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any, Final

from torch import Tensor

from hicache.compat import TorchDispatchMode, pytree
from hicache.trees import tensors_of

_BLOCK: Final = 512  # bytes: torch's allocator gives memory on GPUs in multiples of it


class LiveBytes(TorchDispatchMode):
    """Counts the memory that operations allocate while it is entered, and that is let go of again.

    Not seen is what an operation takes and frees inside (a workspace of a library), and what is lost between
    pieces of a pool: less is counted than a GPU takes.

    Args:
        device: type of the device whose memory counts.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.live = 0  # bytes held now
        self.peak = 0  # at most, since it was entered or since :meth:`mark`
        self._device = device
        self._held: dict[int, weakref.ref[Any]] = {}  # storages, by their ids

    def mark(self) -> int:
        """Begin to look for a peak anew; returns the last one."""
        peak, self.peak = self.peak, self.live
        return peak

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        made = tensors_of(output)
        if any(tensor.device.type == self._device for tensor in made):
            leaves = pytree.tree_leaves((args, kwargs))
            given = {id(leaf.untyped_storage()) for leaf in leaves if isinstance(leaf, Tensor)}
            for tensor in made:
                storage = tensor.untyped_storage()
                if tensor.device.type == self._device and id(storage) not in given:
                    self._add(storage)
        return output

    def _add(self, storage: Any) -> None:
        key = id(storage)
        if key in self._held:
            return
        taken = _rounded(storage.nbytes())

        def freed(_: Any) -> None:
            self.live -= taken
            del self._held[key]

        self._held[key] = weakref.ref(storage, freed)
        self.live += taken
        self.peak = max(self.peak, self.live)


def nbytes(tensor: Tensor) -> int:
    """Bytes that a tensor like this takes in memory of its own, strides aside."""
    return _rounded(tensor.nbytes)


def _rounded(taken: int) -> int:
    return math.ceil(taken / _BLOCK) * _BLOCK
