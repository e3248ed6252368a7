"""Gates of a model whose weights are on the device for as long as their own block runs, and no longer.

Once the forward has come to its end such weights are gone again, and a skipped step never brings them: the
gates of a full step and of the skipped ones after it are written from within its blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hicache import compat
from hicache.adapters.gates import Later


class LateGates:
    """Writes that wait for the layers whose weights they need."""

    def __init__(self) -> None:
        self.needed = False  # whether there ever was such a write: not every model's gates need its blocks
        self._waiting: dict[nn.Module, list[Callable[[], None]]] = {}
        self._hook = torch.compiler.disable(self._write)

    def add(self, later: Later) -> None:
        """Have these writes done by the layers, each after its next call."""
        for layer, write in later:
            self.needed = True
            if layer not in self._waiting:
                self._waiting[layer] = []
                compat.add_output_hook(layer, self._hook)
            self._waiting[layer].append(write)

    def _write(self, layer: nn.Module, args: Any, output: Any) -> None:
        compat.remove_output_hook(layer)  # first: a layer without hooks is read in place
        with torch.no_grad():
            for write in self._waiting.pop(layer):
                write()

    @property
    def complete(self) -> bool:
        """Whether all writes have been done."""
        return not self._waiting

    def drop(self) -> None:
        """The call has ended: what was not done will not be."""
        for layer in self._waiting:
            compat.remove_output_hook(layer)
        self._waiting.clear()
