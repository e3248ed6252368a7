"""Gates from the modulation layers of a model, reading only the rows of their weights that make gates.

A modulation layer maps an embedding to shifts, scales and gates, ``parts`` vectors of one width; the gates
are a third of it (docs/algorithm.md, "Gates are known in advance").
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hicache import compat

# (module, what to do while its weights are at hand)
Later = list[tuple[nn.Module, Callable[[], None]]]


@contextmanager
def deferred(adapter: object) -> Iterator[Later]:
    """Inside, an adapter's gates get memory of their own and no numbers: what is in the list writes those.

    For weights that offloading brings to the device while their own block runs, and not for longer.
    """
    later: Later = []
    found = _gates_of(adapter)
    for gates in found:
        gates.later = later
    try:
        yield later
    finally:
        for gates in found:
            gates.later = None


def works_in_memory(adapter: object) -> bool:
    """Whether an adapter's gates are computed in memory that it keeps."""
    return bool(_gates_of(adapter))


def held_nbytes(adapter: object) -> int:
    """Bytes of the memory that an adapter's gates are computed in."""
    return sum(gates.nbytes for gates in _gates_of(adapter))


def let_go(adapter: object) -> None:
    """Free that memory; no CUDA graph may be left that writes there."""
    for gates in _gates_of(adapter):
        gates.release()


def _gates_of(adapter: object) -> list[Gates]:
    return [value for value in vars(adapter).values() if isinstance(value, Gates)]


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
        self.owner = owner
        self.name = name
        self.count = len(rows)
        self._parts = parts
        self._rows = slice(rows[0], rows[-1] + 1, rows[1] - rows[0] if len(rows) > 1 else 1)
        assert tuple(range(parts)[self._rows]) == tuple(rows)

    @property
    def layer(self) -> nn.Module:
        """The modulation layer as it is now."""
        layer: nn.Module = getattr(self.owner, self.name)
        return layer

    def write(self, activated: Tensor, out: Tensor) -> None:
        """Write the gates ``[count, batch, channels]`` of activated embeddings ``[batch, width]``."""
        layer: Any = self.layer
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
        self._owners: list[Any] = [compat.children_by_name(row.owner) for row in rows]
        self._names = [row.name for row in rows]
        self._num_features = sum(row.count for row in rows) + ones
        self.later: Later | None = None  # where writes go that have to wait, see deferred()
        # of every form met: a CUDA graph goes on writing to the memory it was captured with
        self._buffers: dict[tuple[Any, ...], tuple[Tensor, list[Tensor]]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of its memory, of every form of call so far."""
        return sum(out.nbytes for out, _ in self._buffers.values())

    def release(self) -> None:
        """Free its memory."""
        self._buffers.clear()

    @property
    def layers(self) -> list[nn.Module]:
        """The modulation layers as they are now; asked at every skipped step."""
        return list(map(operator.getitem, self._owners, self._names))

    def of(self, activated: Tensor, channels: int) -> Tensor:
        """``[num_features, batch, channels]`` for an activated embedding ``[batch, width]`` of all layers.

        The memory is used again by the next call, unless writes are :func:`deferred`.
        """
        form = len(activated), channels, activated.dtype, activated.device
        return self._write([lambda: activated] * len(self._rows), form)

    def of_each(self, embed: Sequence[Callable[[], Tensor]], like: Tensor) -> Tensor:
        """The same where every layer has an activated embedding of its own, which its function computes.

        Args:
            embed: a function a layer, ``[batch, width]``; it may need weights from beside the layer.
            like: ``[batch, ..., channels]``, of the embeddings' dtype and device.
        """
        return self._write(embed, (len(like), like.shape[-1], like.dtype, like.device))

    def _write(self, embed: Sequence[Callable[[], Tensor]], form: tuple[Any, ...]) -> Tensor:
        later = self.later
        out, parts = self._held(form) if later is None else self._memory(form)
        for row, one, part in zip(self._rows, embed, parts, strict=True):
            if later is None:
                row.write(one(), part)
            else:
                later.append((row.layer, functools.partial(_write_later, row, one, part)))
        return out

    def _held(self, form: tuple[Any, ...]) -> tuple[Tensor, list[Tensor]]:
        if form not in self._buffers:
            self._buffers[form] = self._memory(form)
        return self._buffers[form]

    def _memory(self, form: tuple[Any, ...]) -> tuple[Tensor, list[Tensor]]:
        """Ones for all gates, and the parts of them that are the layers'."""
        batch, channels, dtype, device = form
        # outlives the mode of the run that made it
        with torch.inference_mode(False):
            out = torch.ones(self._num_features, batch, channels, dtype=dtype, device=device)
            counts = [row.count for row in self._rows]
            return out, list(out[: sum(counts)].split(counts)) if counts else []


def _write_later(row: GateRows, embed: Callable[[], Tensor], out: Tensor) -> None:
    row.write(embed(), out)
