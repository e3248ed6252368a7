"""One captured call: its own memory for what a call is given, and what its code left behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

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
        inputs: the tensors whose numbers differ from call to call, of the arguments and then of the plan.
        key: what must be equal for a graph to serve; None where that cannot be told.
    """

    leaves: Sequence[Any]
    layout: Layout
    inputs: Sequence[Tensor]
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
        return cls(leaves, layout, [leaf for leaf in leaves if isinstance(leaf, Tensor)] + planned, key)


def _form(call: RunningCall) -> tuple[Any, ...]:
    """What of a call's plan is part of a graph: what is done, and where its fixed memory is."""
    plan = call.plan
    view = None if plan is None or plan.view is None else plan.view.form
    if isinstance(plan, SkippedStep):
        # the history, and what the first full step left for skipped ones
        fixed: Sequence[Tensor | None] = [plan.sum.orders, *tensors_of(call.recalled)]
        # compute gates or read them, update so many differences or none
        does: tuple[Any, ...] = plan.gates is None, plan.ones, plan.sum.inv_gap is None, plan.sum.filled
        if plan.correction is not None:
            fixed, does = [*fixed, *plan.correction.fixed], (*does, plan.correction.form)
    else:
        fixed = [] if plan is None else [plan.base, plan.weights, *plan.slots, *plan.corrected_by]
        does = ()
    # the form too: a history may be followed by a smaller one in the same place
    places = [None if tensor is None else (tensor.data_ptr(), tensor.shape) for tensor in fixed]
    return does, view, *places


@dataclass
class CallGraph:
    """A captured call."""

    captured: Captured
    _inputs: list[Tensor]  # memory of the graph, for the call's tensors and its plan's
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
        queue = iter(inputs)
        own = [next(queue) if isinstance(leaf, Tensor) else leaf for leaf in form.leaves]
        args, kwargs = put_together(form.layout, iter(own))
        if isinstance(plan, SkippedStep):
            call.plan = plan.with_inputs(list(queue))
        call.result, call.recall_index = CallResult(), 0
        try:
            captured = backend.capture(lambda: forward(*args, **kwargs))
            leaves: list[Any] = []
            layout = take_apart(captured.output, leaves)
            return cls(captured, inputs, call.result, leaves, layout)
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

    def replay(self, call: RunningCall, form: CallArguments) -> Any:
        """Run it with the numbers of this call; its output, which the next replay leaves alone."""
        for own, tensor in zip(self._inputs, form.inputs, strict=True):
            own.copy_(tensor)
        self.captured.replay()
        call.result = self._result.copy()
        return put_together(self._layout, map(_own, self._leaves))


def cloned(output: Any) -> Any:
    """An output whose tensors no replay overwrites."""
    leaves: list[Any] = []
    layout = take_apart(output, leaves)
    return put_together(layout, map(_own, leaves))


def _own(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
