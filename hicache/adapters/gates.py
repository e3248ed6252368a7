"""Gates from the modulation layers of a model, reading only the rows of their weights that make gates.

A modulation layer maps an embedding to shifts, scales and gates, ``parts`` vectors of one width; the gates
are a third of it (docs/algorithm.md, "Gates are known in advance").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hicache import compat


class GateRows:
    """The gates one modulation layer gives.

    The rows are views of the layer's own weight, taken anew each time: one that is held would keep the memory
    of a weight that has moved to another device. A layer that is anything but a plain ``nn.Linear`` with its
    weight at hand (LoRA, quantised, offloaded, hooked) is called as it is.

    Args:
        owner: has the layer as a child: LoRA puts another in its place.
        name: of the child, which maps an activated embedding ``[batch, width]`` to
            ``[batch, parts · channels]``.
        rows: which of the parts are gates, evenly spaced.
        parts: vectors the layer gives.
    """

    def __init__(self, owner: nn.Module, name: str, rows: Sequence[int], parts: int) -> None:
        self._owner = owner
        self._name = name
        self.count = len(rows)
        self._parts = parts
        self._rows = slice(rows[0], rows[-1] + 1, rows[1] - rows[0] if len(rows) > 1 else 1)
        assert tuple(range(parts)[self._rows]) == tuple(rows)

    def write(self, activated: Tensor, out: Tensor) -> None:
        """Write the gates ``[count, batch, channels]`` of activated embeddings ``[batch, width]``."""
        layer: Any = getattr(self._owner, self._name)
        if not _plain(layer, activated) or out.dtype != activated.dtype:
            moved = activated if compat.is_hooked(layer) else activated.to(layer_device(layer, activated))
            given = layer(moved)
            given = given.unflatten(-1, (self._parts, -1))[:, self._rows]  # [B, count, channels]
            out.copy_(given.transpose(0, 1))
            return
        weight, bias = self._views(layer)
        if bias is None:
            torch.bmm(activated.expand(self.count, *activated.shape), weight, out=out)
        elif self.count == 1:
            torch.addmm(bias[0], activated, weight[0], out=out[0])
        else:
            torch.baddbmm(bias, activated.expand(self.count, *activated.shape), weight, out=out)

    def _views(self, layer: nn.Linear) -> tuple[Tensor, Tensor | None]:
        """The gates' rows ``[count, width, channels]`` and biases ``[count, 1, channels]``."""
        weight = layer.weight.detach().unflatten(0, (self._parts, -1))[self._rows].transpose(1, 2)
        if layer.bias is None:
            return weight, None
        return weight, layer.bias.detach().unflatten(0, (self._parts, -1))[self._rows][:, None]


def layer_device(layer: nn.Module, like: Tensor) -> torch.device:
    """Where a layer computes: where its weights are."""
    parameter = next(layer.parameters(), None)
    return like.device if parameter is None or parameter.is_meta else parameter.device


def _plain(layer: nn.Module, like: Tensor) -> bool:
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and not layer.weight.is_meta
        and layer.weight.device == like.device
        and layer.weight.dtype == like.dtype
        and not compat.is_hooked(layer)
    )


class Gates:
    """The gates of a whole model: layers that share one activated embedding, in one tensor of fixed address.

    Args:
        rows: the layers, in the order of their features.
        ones: features after them whose gate is one.
    """

    def __init__(self, rows: Sequence[GateRows], ones: int = 0) -> None:
        self._rows = rows
        self._num_features = sum(row.count for row in rows) + ones
        self._ones = ones
        self._held: tuple[Any, ...] = ()
        self._out = torch.empty(0)
        self._parts: list[Tensor] = []
        # of every form met: a CUDA graph goes on writing to the memory it was captured with
        self._buffers: dict[tuple[Any, ...], tuple[Tensor, list[Tensor]]] = {}

    def of(self, activated: Tensor | Sequence[Tensor], channels: int) -> Tensor:
        """``[num_features, batch, channels]`` for activated ``[batch, width]``: one, or one a layer.

        The memory is used again by the next call.
        """
        shared = isinstance(activated, Tensor)
        first = activated if isinstance(activated, Tensor) else activated[0]
        self._hold(len(first), channels, first.dtype, first.device)
        for index, (row, part) in enumerate(zip(self._rows, self._parts, strict=True)):
            row.write(first if shared else activated[index], part)
        return self._out

    def _hold(self, batch: int, channels: int, dtype: torch.dtype, device: torch.device) -> None:
        form = batch, channels, dtype, device
        if self._held == form:
            return
        if form not in self._buffers:
            # outlives the mode of the run that made it
            with torch.inference_mode(False):
                out = torch.ones(self._num_features, batch, channels, dtype=dtype, device=device)
                counts = [row.count for row in self._rows]
                self._buffers[form] = out, list(out[: sum(counts)].split(counts)) if counts else []
        self._out, self._parts = self._buffers[form]
        self._held = form
