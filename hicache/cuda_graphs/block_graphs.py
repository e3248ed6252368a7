"""CUDA graphs of single blocks, for transformers whose embedding before the blocks cannot be captured.

What comes before and after the blocks runs eagerly. What one block gives the next is memory of the first
one's graph and is read where it stands; whatever else a block takes is copied into fixed memory, once a call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hicache.cuda_graphs.capture import CaptureBackend, Captured, describe, like, modes
from hicache.cuda_graphs.graph_memory import Expected, GraphMemory, expected
from hicache.cuda_graphs.live_bytes import LiveBytes, nbytes
from hicache.step_plan import FullStep, RunningCall
from hicache.trees import leaves_of, put_together, take_apart, tensors_of


class NoRoom(RuntimeError):
    """The budget leaves too little memory for the graphs of all blocks; the message says how much."""


@dataclass
class _BlockGraph:
    """One captured block."""

    captured: Captured
    partial_sums: dict[int, Tensor]  # what it began to add up


class BlockGraphs:
    """The graphs of a transformer's blocks, for full steps.

    Args:
        call: the transformer's running call.
        backend: what captures.
        memory: what graphs take, and may.
        limit: live graphs; when there are more, all are dropped.
    """

    def __init__(self, call: RunningCall, backend: CaptureBackend, memory: GraphMemory, limit: int) -> None:
        self._call = call
        self._backend = backend
        self._memory = memory
        self._limit = limit
        self._graphs: dict[Any, _BlockGraph] = {}
        self._warmed: set[Any] = set()
        self._coming: dict[Any, Expected] = {}  # of those warmed up that are not captured yet
        self._buffers: dict[Any, Tensor] = {}
        self.begin()

    def begin(self) -> None:
        """A call begins."""
        self._position = 0
        self._made: list[Tensor] = []  # by graphs of this call
        self._copied: list[tuple[Tensor, Tensor]] = []  # what blocks were given, and the copy they read

    def drop(self) -> None:
        """Forget all graphs, and the pool that they share with those of whole calls."""
        self._graphs.clear()
        self._warmed.clear()
        self._coming.clear()
        self._buffers.clear()
        self._backend.drop()
        self._memory.clear()
        self.begin()

    def run(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A block: eagerly the first time, captured the second, then replayed.

        What it returns is overwritten by the next call of the transformer.

        Raises:
            TypeError: it takes or returns objects that may hold tensors nobody would copy.
            NoRoom: the budget leaves too little memory for it and those to come.
        """
        leaves: list[Any] = []
        layout = take_apart((args, kwargs), leaves)
        form = describe(leaves)
        if form is None:
            raise TypeError(f"{type(block).__name__} takes what cannot be told apart from call to call")
        plan, sums = self._call.plan, self._call.result.partial_sums
        view = None if plan is None or plan.view is None else plan.view.form
        place = (self._position, id(block), layout, form, view, *modes())
        self._position += 1
        fixed = (*plan.slots, plan.weights) if isinstance(plan, FullStep) else ()
        targets = tuple(tensor.data_ptr() for tensor in fixed if tensor is not None)
        if (place, targets) not in self._warmed:
            if len(self._graphs) + len(self._warmed) > 2 * self._limit:
                self.drop()
            self._warmed.add((place, targets))
            given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            return self._warm((place, targets), given, lambda: block(*args, **kwargs))
        own = [self._own(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        read = [*(leaf for leaf in own if isinstance(leaf, Tensor)), *sums.values()]
        key = (place, targets, tuple(tensor.data_ptr() for tensor in read))
        graph = self._graphs.get(key)
        if graph is None:
            self._make_room((place, targets))
            own_args, own_kwargs = put_together(layout, iter(own))
            before = set(sums)
            captured = self._backend.capture(lambda: block(*own_args, **own_kwargs))
            if describe(leaves_of(captured.output)) is None:
                raise TypeError(f"{type(block).__name__} returns {type(captured.output).__name__}")
            begun = {feature: total for feature, total in sums.items() if feature not in before}
            graph = self._graphs[key] = _BlockGraph(captured, begun)
            self._memory.took(captured, [*tensors_of(captured.output), *begun.values()], inputs=0)
            if (reason := self._memory.overdrawn()) is not None:  # more than was expected
                raise NoRoom(reason)
        graph.captured.replay()
        self._memory.stats.replays += 1
        sums.update(graph.partial_sums)
        self._made += tensors_of(graph.captured.output)
        return graph.captured.output

    def _warm(self, place: Any, given: list[Tensor], run: Callable[[], Any]) -> Any:
        before = [*self._call.result.partial_sums.values()]
        with LiveBytes(given[0].device.type) as memory:
            output = self._backend.warm(run)
        sums = self._call.result.partial_sums.values()
        begun = [total for total in sums if not any(total is known for known in before)]
        self._coming[place] = expected(memory, output, begun)
        return output

    def _make_room(self, place: Any) -> None:
        """A block is about to be captured: see whether it and those that will be fit the budget.

        Raises:
            NoRoom: they do not.
        """
        coming = self._coming.values()
        held = sum(one.held for one in coming)
        working = max((one.peak - one.held for one in coming), default=0)
        if (reason := self._memory.why_not(Expected(held + working, held))) is not None:
            raise NoRoom(reason)
        self._coming.pop(place, None)

    def _own(self, given: Tensor) -> Tensor:
        """Memory that is at the same place in every call, with the numbers of this one."""
        if any(given is made for made in self._made):
            return given
        for known, copy in self._copied:
            if known is given:
                return copy
        key = (len(self._copied), given.shape, given.stride(), given.dtype, given.device)
        if key not in self._buffers:
            self._buffers[key] = like(given)
            self._memory.stats.input_nbytes += nbytes(given)
        copy = self._buffers[key].copy_(given)
        self._copied.append((given, copy))
        return copy
