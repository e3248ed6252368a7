"""How much memory a call holds at once, found by running it, on whatever device, and looking on.

>>> import torch
>>> with LiveBytes("meta") as memory:
...     total = torch.empty(1024, device="meta") + torch.empty(1024, device="meta")
>>> memory.peak, memory.live, memory.reserved
(12288, 4096, 2097152)
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hicache.compat import TorchDispatchMode, pytree
from hicache.cuda_graphs.arena import BLOCK, Arena, round_up
from hicache.trees import tensors_of


class LiveBytes(TorchDispatchMode):
    """Counts the memory that operations allocate while it is entered, and that is let go of again.

    Not seen is what an operation takes and frees inside (a workspace of a library).

    Args:
        device: type of the device whose memory counts.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.live = 0  # bytes held now
        self.peak = 0  # at most
        self._arena, self._since_mark = Arena(), Arena()
        self._device = device
        self._held: dict[int, weakref.ref[Any]] = {}  # storages, by their ids

    @property
    def reserved(self) -> int:
        """Bytes of a pool that serves all of it."""
        return self._arena.reserved

    @property
    def reserved_since_mark(self) -> int:
        """Bytes of a pool that serves what was allocated since :meth:`mark`."""
        return self._since_mark.reserved

    def mark(self) -> None:
        """Begin to count :attr:`reserved_since_mark` anew."""
        self._since_mark = Arena()

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
        taken = [(arena, arena.take(storage.nbytes())) for arena in (self._arena, self._since_mark)]
        size = round_up(storage.nbytes(), BLOCK)

        def freed(_: Any) -> None:
            self.live -= size
            for arena, block in taken:
                arena.give_back(block)
            del self._held[key]

        self._held[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


def nbytes(tensor: Tensor) -> int:
    """Bytes that a tensor like this takes in memory of its own, strides aside."""
    return round_up(tensor.nbytes, BLOCK)
