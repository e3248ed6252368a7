"""One captured call: its own memory for what a call is given, and what its code left behind."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hicache import compat
from hicache.arguments import lasts
from hicache.cuda_graphs.capture import CaptureBackend, Captured, describe, like, modes
from hicache.cuda_graphs.live_bytes import nbytes
from hicache.step_plan import CallResult, RunningCall, SkippedStep
from hicache.trees import Layout, put_together, take_apart, tensors_of


@dataclass
class CallArguments:
    """What a call is given: its arguments, as leaves of a tree, and the tensors of its plan.

    Args:
        leaves: of the arguments.
        layout: of the tree.
        given: the tensors among them.
        planned: the tensors of the plan whose numbers differ from step to step.
        key: what must be equal for a graph to serve; None where that cannot be told.
    """

    leaves: Sequence[Any]
    layout: Layout
    given: Sequence[Tensor]
    planned: Sequence[Tensor]
    key: Any

    @classmethod
    def of(cls, call: RunningCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallArguments:
        """Take a call's arguments apart."""
        leaves: list[Any] = []
        layout = take_apart((args, kwargs), leaves)
        plan = call.plan
        planned = plan.inputs if isinstance(plan, SkippedStep) else []
        described = describe([*leaves, *planned])
        key = None if described is None else (type(plan), _form(call), layout, described, modes())
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return cls(leaves, layout, given, planned, key)

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors that a graph has memory of its own for: those given, then those planned."""
        return [*self.given, *self.planned]

    @property
    def lasting(self) -> list[int]:
        """Which of those given a run gives in all its steps; the same in all calls of one key."""
        _, kwargs = put_together(self.layout, iter(self.leaves))
        found = {id(value) for name, value in kwargs.items() if lasts(name)}
        return [index for index, tensor in enumerate(self.given) if id(tensor) in found]


def _form(call: RunningCall) -> tuple[Any, ...]:
    """What of a call's plan is part of a graph: what is done, and where its fixed memory is."""
    plan = call.plan
    view = None if plan is None or plan.view is None else plan.view.form
    if isinstance(plan, SkippedStep):
        # the history, and what the first full step left for skipped ones
        fixed: Sequence[Tensor | None] = [plan.sum.orders, *tensors_of(call.recalled)]
        # compute gates and embedding or read them, update so many differences or none
        computes = plan.gates is None, plan.embedded is None
        does: tuple[Any, ...] = *computes, plan.ones, plan.sum.inv_gap is None, plan.sum.filled
        if plan.correction is not None:
            fixed, does = [*fixed, *plan.correction.fixed], (*does, plan.correction.form)
    else:
        fixed = [] if plan is None else [plan.base, plan.weights, *plan.slots, *plan.corrected_by]
        does = ()
    # the form too: a history may be followed by a smaller one in the same place
    places = [None if tensor is None else (tensor.data_ptr(), tensor.shape) for tensor in fixed]
    return does, view, *places


class _Lasting:
    """Memory of a graph for a tensor that a run gives in all its steps, and what is in it.

    Args:
        index: of the tensor among those that a call is given.
        memory: of the graph.
    """

    def __init__(self, index: int, memory: Tensor) -> None:
        self.index, self.memory = index, memory
        self.forget()

    def forget(self) -> None:
        """The next tensor is to be copied, whichever it is."""
        # what was copied last; held weakly, with its place and how often it had been written to
        self.tensor: Callable[[], Tensor | None] = lambda: None
        self.state: tuple[int, int | None] = 0, None


@dataclass
class CallGraph:
    """A captured call."""

    captured: Captured
    _inputs: list[Tensor]  # memory of the graph, for the call's tensors and its plan's
    _lasting: list[_Lasting]  # some of it
    _changing: list[int]  # indices of the rest
    _result: CallResult
    _leaves: list[Any]  # of its output
    _layout: Layout
    used: int = 0  # when it was replayed last: larger is later

    @classmethod
    def capture(
        cls, backend: CaptureBackend, call: RunningCall, forward: Callable[..., Any], form: CallArguments
    ) -> CallGraph:
        """Capture the running call, which is afterwards as it was before.

        Raises:
            Exception: whatever the capture raised.
        """
        plan, result = call.plan, call.result
        inputs = [like(tensor).copy_(tensor) for tensor in form.inputs]
        writes = compat.write_counts(inputs)
        queue = iter(inputs)
        own = [next(queue) if isinstance(leaf, Tensor) else leaf for leaf in form.leaves]
        args, kwargs = put_together(form.layout, iter(own))
        if isinstance(plan, SkippedStep):
            call.plan = plan.with_inputs(list(queue))
        call.result, call.recall_index = CallResult(), 0
        try:
            captured = backend.capture(lambda: forward(*args, **kwargs))
            # what the graph itself writes to has to be copied each time
            kept = [i for i in form.lasting if writes[i] == compat.write_count(inputs[i])]
            changing = [index for index in range(len(inputs)) if index not in kept]
            lasting = [_Lasting(index, inputs[index]) for index in kept]
            leaves: list[Any] = []
            layout = take_apart(captured.output, leaves)
            return cls(captured, inputs, lasting, changing, call.result, leaves, layout)
        finally:
            call.plan, call.result, call.recall_index = plan, result, 0

    @property
    def input_nbytes(self) -> int:
        """Bytes of its memory for what a call is given."""
        return sum(map(nbytes, self._inputs))

    @property
    def given(self) -> list[Tensor]:
        """What it gives, in the memory of its pool."""
        return [*tensors_of(self.captured.output), *self._result.partial_sums.values()]

    def start_run(self) -> None:
        """A run starts: all that its first call is given is copied, also what was written to uncounted."""
        for slot in self._lasting:
            slot.forget()

    def replay(self, call: RunningCall, form: CallArguments) -> Any:
        """Run it with the numbers of this call; its output, which the next replay leaves alone."""
        self._copy(form)
        self.captured.replay()
        call.result = self._result.copy()
        return put_together(self._layout, map(_own, self._leaves))

    def _copy(self, form: CallArguments) -> None:
        """Copy a call's tensors to where the graph reads them, but for those that are there already.

        Of what lasts for a run, that is: the prompt is in the same place in all its steps. What else a call
        is given may be written to where torch does not count: by another graph, by a kernel of Triton.
        """
        inputs, given = self._inputs, form.inputs
        into, tensors, copied = [], [], []
        counts = compat.write_counts([given[slot.index] for slot in self._lasting])
        for slot, count in zip(self._lasting, counts, strict=True):
            tensor = given[slot.index]
            state = tensor.data_ptr(), count
            if count is None or slot.tensor() is not tensor or slot.state != state:
                into.append(slot.memory)
                tensors.append(tensor)
                copied.append((slot, tensor, state))
        into += [inputs[index] for index in self._changing]
        tensors += [given[index] for index in self._changing]
        compat.copy_all(into, tensors)
        for slot, tensor, state in copied:
            slot.tensor, slot.state = weakref.ref(tensor), state


def cloned(output: Any) -> Any:
    """An output whose tensors no replay overwrites."""
    leaves: list[Any] = []
    layout = take_apart(output, leaves)
    return put_together(layout, map(_own, leaves))


def _own(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
