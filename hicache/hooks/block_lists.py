"""Lists of blocks that can be watched, and skipped, while a transformer iterates over them.

On a full step the first list gives its blocks wrapped, so that the first one that runs is seen. On a skipped
step it gives one stand-in, and the later lists give nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

from torch import Tensor, nn

from hicache import compat
from hicache.hooks.block_interface import BlockInterface
from hicache.hooks.structures import structure_of
from hicache.mixin import mix_in
from hicache.step_plan import RunningCall

# In run order; the names diffusers and most others use.
BLOCK_LISTS: Final = (
    "joint_transformer_blocks",
    "double_stream_blocks",
    "double_blocks",
    "transformer_blocks",
    "visual_transformer_blocks",
    "single_transformer_blocks",
    "single_stream_blocks",
    "single_blocks",
    "blocks",
    "layers",
)
# Lists whose blocks take turns with those of another list: no block of one can stand for both.
_IN_TURNS: Final = ("temporal_transformer_blocks",)
# The first module after the blocks: its input is the hidden state the stack produced, text tokens cut off.
HEADS: Final = ("norm_final", "norm_out", "final_layer", "all_final_layer", "final_norm", "head")

_BY_OUTPUT: Final = "granularity='output' would cache what it returns"


def find_lists(module: nn.Module) -> list[nn.ModuleList]:
    """The block lists of a transformer, in run order but that the hidden state enters the first.

    Raises:
        ValueError: there is none, or they cannot be skipped as a whole; the message names the class.
    """
    children = dict(module.named_children())
    structure = structure_of(module)
    if structure.refusal is not None and structure.refused(module):
        instead = "" if structure.keeps else f"; {_BY_OUTPUT}"
        raise ValueError(f"hicache: {type(module).__name__} cannot be cached: {structure.refusal}{instead}")
    turns = next((name for name in _IN_TURNS if name in children), None)
    if turns is not None:
        raise ValueError(
            f"hicache: {type(module).__name__} cannot be cached: its blocks take turns with those of {turns}"
            f", so that no list of them can be skipped as a whole; {_BY_OUTPUT}"
        )
    paths = dict(module.named_modules()) if structure.lists else children
    lists = [
        block_list
        for name in structure.lists or BLOCK_LISTS
        if isinstance(block_list := paths.get(name), nn.ModuleList) and len(block_list) > 0
    ]
    if not lists:
        raise ValueError(
            f"hicache: nothing to hook in {type(module).__name__}: expected a non-empty ModuleList named "
            f"{', '.join(BLOCK_LISTS)}; its children are {', '.join(children) or 'none'}; {_BY_OUTPUT}"
        )
    return lists


def find_heads(module: nn.Module) -> list[nn.Module]:
    """The modules that take the hidden state after the blocks, one of which runs; empty: none does."""
    children = dict(module.named_children())
    known = structure_of(module).heads
    head = next((children[name] for name in (HEADS if known is None else known) if name in children), None)
    if head is None:
        return []
    return list(head.values()) if isinstance(head, nn.ModuleDict) else [head]


class Transformer(Protocol):
    """What a list tells of its blocks."""

    call: RunningCall
    interface: BlockInterface
    first_block: nn.Module
    returned: Tensor | None

    def enter(self, hidden: Tensor, block_kwargs: dict[str, Any]) -> None:
        """The hidden state enters the first block that runs."""

    def compare(self, hidden: Tensor) -> None:
        """The hidden state enters a later block, after :attr:`returned` was set."""

    def leave(self, hidden: Tensor) -> None:
        """The hidden state leaves the last block."""

    def run_stand_in(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A skipped step has come to its blocks: what the first of them would return."""


class _SkippableList(nn.ModuleList):
    """Mixed into the class of a list while it is hooked."""

    _hicache: BlockListHook | None = None

    def __iter__(self) -> Iterator[Any]:
        hook = self._hicache
        # the list itself while a copy of it is being made
        return super().__iter__() if hook is None else hook.blocks(super().__iter__)

    def __getitem__(self, index: Any) -> Any:
        hook = self._hicache
        if isinstance(index, slice) and hook is not None:
            # some models run their blocks in slices, and offloading takes slices outside of any call
            return hook.slice(index)
        return super().__getitem__(index)


class BlockListHook:
    """What a list of blocks gives to who iterates over it: its blocks, wrapped ones, or a stand-in.

    Args:
        transformer: the hooked transformer.
        blocks: the list.
        first: whether the hidden state enters this one first.
        ends: whether it is taken from the last block of this one.
        stands_in: which of its blocks the stand-in is given for, by its index; None: for none.
    """

    def __init__(
        self,
        transformer: Transformer,
        blocks: nn.ModuleList,
        first: bool,
        ends: bool,
        stands_in: int | None,
    ) -> None:
        self._transformer = transformer
        self._call = transformer.call
        self._blocks = blocks
        self._first = first
        self._ends = ends
        self._stands_in = stands_in
        self._stand_in: list[Any] = [] if stands_in is None else [_StandIn(transformer)]
        self._watched: list[_WatchedBlock] = []

    def install(self) -> Callable[[], None]:
        """Hook the list; returns what undoes it."""
        return mix_in(self._blocks, _SkippableList, "_hicache", self)

    def refresh(self) -> None:
        """Watch the blocks that are in the list now: others may have been put in their places."""
        current = compat.children_of_list(self._blocks)
        if [watched.block for watched in self._watched] != current:
            last = current[-1] if current and self._ends else None
            self._watched = [
                _WatchedBlock(self._transformer, block, self._first, block is last) for block in current
            ]

    def blocks(self, own: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """What iteration gives; ``own`` gives the list's own iterator."""
        call = self._call
        if call.skipping:
            return iter(self._stand_in)
        return iter(self._watched) if self._watching else own()

    def slice(self, index: slice) -> Any:
        """What a slice gives."""
        blocks = compat.children_of_list(self._blocks)
        if self._call.skipping:
            given = self._stands_in is not None and blocks[self._stands_in] in blocks[index]
            return self._stand_in if given else []
        return self._watched[index] if self._watching else nn.ModuleList(blocks[index])

    @property
    def _watching(self) -> bool:
        return self._call.recording and (self._first or self._ends or self._call.run_block is not None)


class _WatchedBlock:
    """A block on a full step; other attributes are the block's."""

    def __init__(self, transformer: Transformer, block: nn.Module, first: bool, last: bool) -> None:
        self._transformer = transformer
        self._call = transformer.call
        self._first = first  # in the first list
        self._last = last  # of all, with no head to take the hidden state from
        self.block = block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        transformer, call = self._transformer, self._call
        if self._first and not call.result.entered:
            transformer.enter(*transformer.interface.arguments(self.block, args, kwargs))
        elif self._first and transformer.returned is not None:
            transformer.compare(transformer.interface.arguments(self.block, args, kwargs)[0])
        if call.run_block is not None:
            output = call.run_block(self.block, args, kwargs)
        else:
            output = self.block(*args, **kwargs)
        if call.lesson is not None and transformer.interface.layout is None:
            transformer.interface.learn(*transformer.interface.arguments(self.block, args, kwargs), output)
        if self._first and call.checked and not call.opaque:
            transformer.returned = transformer.interface.image(output)
        if self._last:
            left = transformer.interface.image(output)
            if left is not None:
                transformer.leave(left)
        return output

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # a copy in the making has no block yet
            raise AttributeError(name)
        return getattr(self.block, name)


class _StandIn:
    """Takes the first block's place on a skipped step; other attributes are the block's."""

    def __init__(self, transformer: Transformer) -> None:
        self._transformer = transformer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._transformer.run_stand_in(args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._transformer.first_block, name)
