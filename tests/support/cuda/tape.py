"""A captured graph as a list of operators: a replay runs those at their old addresses, and no Python.

Nothing is computed by a capture: what it made is poisoned, and what it wrote to is put back. Memory from
outside is not kept alive: a replay after it has been freed is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

# operators that make numbers of nothing: they are part of the program, not of the graph
CONSTANTS = {torch.ops.aten.lift_fresh.default, torch.ops.aten.scalar_tensor.default}


class FreedMemory(RuntimeError):
    """A replay reads or writes memory that is no longer there."""


class Memory:
    """What is where: the storages that operators were given, or made, last at every place."""

    def __init__(self) -> None:
        self._storages: dict[int, StorageWeakRef] = {}

    def note(self, leaves: Sequence[Any]) -> None:
        """These are there."""
        for leaf in leaves:
            if isinstance(leaf, Tensor) and (
                place(leaf) not in self._storages or self._storages[place(leaf)].expired()
            ):
                self._storages[place(leaf)] = StorageWeakRef(leaf.untyped_storage())

    def at(self, where: int) -> StorageWeakRef | None:
        """What is there; None where nothing is."""
        held = self._storages.get(where)
        return None if held is None or held.expired() else held


@dataclass(frozen=True)
class Outside:
    """A tensor that was there before the capture: its place, not its numbers."""

    storage: StorageWeakRef
    place: int
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Outside:
        return cls(
            StorageWeakRef(tensor.untyped_storage()),
            place(tensor),
            tensor.dtype,
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
        )

    def tensor(self, memory: Memory) -> Tensor:
        """The tensor as it is now, or what has come to its place: a graph has addresses.

        Raises:
            FreedMemory: there is nothing any more.
        """
        held = self.storage if not self.storage.expired() else memory.at(self.place)
        if held is None:
            raise FreedMemory(f"a graph uses memory {tuple(self.shape)} that has been freed")
        storage = torch.UntypedStorage._new_with_weak_ptr(held.cdata)
        with torch.inference_mode(False):
            return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.shape, self.stride)


def place(tensor: Tensor) -> int:
    """Where a tensor's storage begins."""
    return tensor.untyped_storage().data_ptr()


def written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operator writes to."""
    found: list[Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        found += [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return found


@dataclass
class _Entry:
    func: Any
    args: Any  # trees with Outside in the places of tensors from before the capture
    kwargs: Any
    made: list[Tensor]


@dataclass
class Tape:
    """The operators of one capture."""

    memory: Memory
    entries: list[_Entry] = field(default_factory=list)
    _mine: dict[int, Tensor] = field(default_factory=dict)  # by place; held, so that no other comes there
    _constant: set[int] = field(default_factory=set)
    _before: dict[int, tuple[Outside, Tensor]] = field(default_factory=dict)

    def record(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operator of the capture, for its shapes, and note it."""
        targets = written(func, args, kwargs)
        for target in targets:
            if place(target) not in self._mine and place(target) not in self._before:
                whole = torch.empty(0, dtype=torch.uint8).set_(target.untyped_storage())
                self._before[place(target)] = Outside.of(whole), whole.clone()
        given = {place(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        output = func(*args, **kwargs)
        made = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        if func not in CONSTANTS:
            made = [tensor for tensor in made if place(tensor) not in given]
        for tensor in made:
            self._mine[place(tensor)] = tensor
            if func in CONSTANTS:
                self._constant.add(place(tensor))
        if func not in CONSTANTS and (made or targets):  # else it is a view
            args, kwargs = pytree.tree_map(self._placed, (args, kwargs))
            self.entries.append(_Entry(func, args, kwargs, made))
        return output

    def _placed(self, leaf: Any) -> Any:
        return Outside.of(leaf) if isinstance(leaf, Tensor) and place(leaf) not in self._mine else leaf

    def finish(self) -> None:
        """The capture has ended: nothing has been computed."""
        for outside, numbers in self._before.values():
            outside.tensor(self.memory).copy_(numbers)
        self._before.clear()
        self._poison()

    def _poison(self) -> None:
        for where, tensor in self._mine.items():
            if where not in self._constant:
                poison(tensor)

    def replay(self) -> None:
        """Run the operators again.

        Raises:
            FreedMemory: one of them uses memory that has been freed.
        """
        self._poison()
        for entry in self.entries:
            args, kwargs = pytree.tree_map(
                lambda leaf: leaf.tensor(self.memory) if isinstance(leaf, Outside) else leaf,
                (entry.args, entry.kwargs),
            )
            output = entry.func(*args, **kwargs)
            given = {place(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            new = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
            new = [tensor for tensor in new if place(tensor) not in given]
            for tensor, numbers in zip(entry.made, new, strict=True):
                tensor.copy_(numbers)

    @property
    def made(self) -> list[Tensor]:
        """What the capture made."""
        return list(self._mine.values())

    def outside(self, writes: bool) -> set[int]:
        """Places outside that a replay reads, or those it writes to."""
        found: set[int] = set()
        for entry in self.entries:
            leaves = (
                written(entry.func, entry.args, entry.kwargs)
                if writes
                else pytree.tree_leaves((entry.args, entry.kwargs))
            )
            found |= {place(leaf.tensor(self.memory)) for leaf in leaves if isinstance(leaf, Outside)}
        return found


def poison(tensor: Tensor) -> None:
    """Numbers that nobody may use."""
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
