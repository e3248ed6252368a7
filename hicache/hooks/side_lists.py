"""Lists of modules beside the blocks, which make what is added to the hidden state between them.

What they add is in the cached residual already. On a skipped step such a list gives one stand-in, whatever
index it is asked for: the model adds nothing after the one block that stands for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from hicache.hooks.structures import structure_of
from hicache.mixin import mix_in
from hicache.step_plan import RunningCall


class _SilencedList(nn.ModuleList):
    """Mixed into the class of a list while it is hooked."""

    _hicache_side: tuple[RunningCall, Callable[..., Any]] | None = None

    def __iter__(self) -> Iterator[Any]:
        silenced = self._hicache_side
        if silenced is not None and silenced[0].skipping:
            return iter([silenced[1]])
        return super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        silenced = self._hicache_side
        if silenced is not None and silenced[0].skipping and not isinstance(index, slice):
            return silenced[1]
        return super().__getitem__(index)


class SideLists:
    """Those of one transformer.

    Args:
        module: the transformer. It is only looked at until :meth:`install`.
        call: its running call.
    """

    def __init__(self, module: nn.Module, call: RunningCall) -> None:
        children = dict(module.named_children())
        self._call = call
        self._found = [
            (side_list, stand_in)
            for name, stand_in in (structure_of(module).side_lists or {}).items()
            if isinstance(side_list := children.get(name), nn.ModuleList)
        ]

    def __bool__(self) -> bool:
        return bool(self._found)

    def install(self) -> list[Callable[[], None]]:
        """Hook them; returns what undoes it."""
        return [
            mix_in(side_list, _SilencedList, "_hicache_side", (self._call, stand_in))
            for side_list, stand_in in self._found
        ]
