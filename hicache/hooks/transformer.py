"""One transformer, watched: where the hidden state enters its blocks and where it leaves them.

On a full step it notes the hidden state before the first block and before the output head; the model runs
untouched. On a skipped step the first list of blocks gives one stand-in that returns base + forecast in the
block's own return order. Caching the stack's residual equals caching every block's gated residual
(docs/algorithm.md, "Telescoping").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hicache import compat
from hicache.hooks import recall
from hicache.hooks.block_interface import UNCACHED, BlockInterface
from hicache.hooks.block_lists import BlockListHook, find_heads, find_lists
from hicache.hooks.hooked import Forecast, HookedModule
from hicache.hooks.side_lists import SideLists
from hicache.hooks.structures import structure_of
from hicache.step_plan import FullStep, SkippedStep


class HookedTransformer(HookedModule):
    """Finds the blocks and the head of a transformer, and carries out the plan of its running call.

    Args:
        module: the transformer. It is only looked at until :meth:`install`.
        may_leave_out: whether runs by output are to be expected, too.

    Raises:
        ValueError: there is nothing to hook; the message names the class.
    """

    def __init__(self, module: nn.Module, may_leave_out: bool = False) -> None:
        super().__init__(module, may_leave_out)
        self.lists = find_lists(module)
        self.heads = find_heads(module)
        self.first_block: nn.Module = next(iter(self.lists[0]))
        self.interface = BlockInterface(self.name, self.first_block)
        self.returned: Tensor | None = None  # by a block, until the next one is seen to take it
        self.verified = False  # whether what the stand-in returned once reached the head
        self._expected: Tensor | None = None  # what the stand-in returned, until it is seen to reach the head
        self._forecast: Forecast | None = None
        first, last = self.lists[0], self.lists[-1]
        again = structure_of(module).begins_again(module)
        place = {last: -1} if again else {first: 0}
        self._list_hooks = [
            BlockListHook(self, blocks, blocks is first, not self.heads and blocks is last, place.get(blocks))
            for blocks in self.lists
        ]
        self.side_lists = SideLists(module, self.call)
        self._undo: list[Callable[[], None]] = []

    def install(self, forecast: Forecast, embedder: nn.Module | None = None) -> None:
        """Hook the transformer. :meth:`remove` undoes it exactly."""
        self._forecast = forecast
        self._undo += [hook.install() for hook in self._list_hooks]
        self._undo += self.side_lists.install()
        self._undo += recall.hook(self.module, self._recall)
        if embedder is not None:
            self._undo += recall.route(embedder, self._embed)
        for head in self.heads:
            self._undo.append(head.register_forward_pre_hook(self._before_head, with_kwargs=True).remove)

    def remove(self) -> None:
        """Leave the transformer as it was before :meth:`install`."""
        self.end()
        while self._undo:
            self._undo.pop()()
        self._forecast = None

    def refresh(self) -> None:
        """A full step begins: blocks may have been put in others' places since."""
        for hook in self._list_hooks:
            hook.refresh()

    def end(self) -> None:
        """A call has ended, or never came to its end: let go of its tensors."""
        self.returned = self._expected = None
        self.call.clear()

    # What a full step goes through.

    def enter(self, hidden: Tensor, block_kwargs: Mapping[str, Any]) -> None:
        """The hidden state enters the first block that runs; skip-layer guidance may leave out the first."""
        call = self.call
        call.result.entered = True
        lesson = call.lesson
        if lesson is not None:
            # whoever lists a model's outputs there is to find its own blocks
            call.lesson = None
            try:
                call.plan = lesson.first_block(hidden, block_kwargs)
            finally:
                call.lesson = lesson
        plan = call.plan
        if isinstance(plan, FullStep) and plan.base is not None:
            plan.base.copy_(plan.drawn(hidden).detach())
        if call.on_entry is not None:
            call.on_entry()

    def compare(self, hidden: Tensor) -> None:
        """Make sure that a block takes what the last one returned: nothing else changes the hidden state.

        Raises:
            RuntimeError: something does.
        """
        # the same object, but for models that rewrap it: only those are compared by value
        if self.returned is not None and hidden is not self.returned and not _equal(hidden, self.returned):
            raise self._changed()
        self.returned = None

    def leave(self, hidden: Tensor) -> None:
        """The hidden state leaves the last block."""
        call, plan = self.call, self.call.plan
        if isinstance(plan, FullStep):
            if call.result.head_reached:
                return
            call.result.head_reached = True
            if call.lesson is not None:
                plan = call.plan = call.lesson.head(plan, hidden)
            if plan is not None and plan.base is not None:
                slot = plan.slots[0]
                torch.sub(plan.drawn(hidden).detach().to(slot.device), plan.base, out=slot)
        elif self._expected is not None:
            # Once a model: nothing but the blocks may stand between the stand-in and the head either. What
            # else is added there is in the cached residual, and would be added again.
            same = _equal(hidden, self._expected)
            self._expected = None
            if not same:
                raise self._changed()
            self.verified = True

    def _before_head(self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
        if isinstance(hidden, Tensor):
            self.leave(hidden)

    # What a skipped step goes through.

    def run_stand_in(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the first block returns on a skipped step."""
        assert self._forecast is not None
        assert isinstance(self.call.plan, SkippedStep)
        hidden, block_kwargs = self.interface.arguments(self.first_block, args, kwargs)
        image = self._forecast(self.call.plan, hidden, block_kwargs)
        if self.call.verifying:
            # without a head, nothing of what comes after the blocks is in the cached residual
            self._expected, self.verified = (image, False) if self.heads else (None, True)
        return self.interface.returned(image, block_kwargs)

    def _recall(self, compute: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What only blocks read: computed at full steps, that of the first one given on skipped steps."""
        call = self.call
        index = call.recall_index
        call.recall_index = index + 1
        if call.skipping and index < len(call.recalled):
            return call.recalled[index]
        output = compute(*args, **kwargs)
        if call.lesson is not None:
            call.recalled[index:] = [compat.pytree.tree_map(_detached, output)]
        return output

    def _embed(self, compute: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the embedder of timesteps gives: that of the plan, where it has one."""
        call = self.call
        if isinstance(call.plan, SkippedStep) and call.plan.embedded is not None:
            return call.plan.embedded
        output = compute(*args, **kwargs)
        if call.lesson is not None:
            call.embedded.append(output)
        return output

    def _changed(self) -> RuntimeError:
        return RuntimeError(
            f"hicache: {self.name} changes the hidden state between its blocks, so they cannot be skipped "
            f"as a whole; {UNCACHED}"
        )


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether a hidden state holds the numbers of an earlier one, but for a cast and a move."""
    if one.shape != other.shape:
        return False
    return torch.allclose(one, other.to(one.device, one.dtype), rtol=0, atol=0, equal_nan=True)
