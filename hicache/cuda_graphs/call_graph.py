"""One captured call: its own memory for what a call is given, and what its code left behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hicache.compat import pytree
from hicache.cuda_graphs.capture import CaptureBackend, Captured, describe, like, modes, tensors
from hicache.cuda_graphs.graph_memory import leaves
from hicache.cuda_graphs.live_bytes import nbytes
from hicache.step_plan import CallResult, FullStep, RunningCall, SkippedStep


@dataclass(frozen=True)
class CallArguments:
    """The arguments of a call, as leaves of a tree."""

    leaves: Sequence[Any]
    layout: Any

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallArguments:
        """Take a call's arguments apart."""
        return cls(*pytree.tree_flatten((args, kwargs)))

    def key(self, call: RunningCall) -> Any:
        """What must be equal for a graph to serve; None where that cannot be told."""
        plan = call.plan
        described = describe([*self.leaves, *plan_inputs(call)])
        if described is None:
            return None
        # fixed memory: the history, and what the first full step left for skipped ones
        fixed: list[Tensor | None] = []
        if isinstance(plan, SkippedStep):
            fixed += [plan.sum.orders, *tensors(pytree.tree_leaves(call.rotary))]
        elif isinstance(plan, FullStep):
            fixed += [plan.base, plan.weights, *plan.slots]
        return (
            type(plan),
            self.layout,
            described,
            # the form too: a history may be followed by a smaller one in the same place
            tuple(None if tensor is None else (tensor.data_ptr(), tensor.shape) for tensor in fixed),
            # what a skipped step does: compute gates or read them, update so many differences or none
            isinstance(plan, SkippedStep)
            and (plan.gates is None, plan.ones, plan.sum.inv_gap is None, plan.sum.filled),
            None if plan is None or plan.view is None else plan.view.form,
            *modes(),
        )


@dataclass(frozen=True)
class CallGraph:
    """A captured call."""

    captured: Captured
    _inputs: list[Tensor]  # memory of the graph, for the call's tensors and its plan's
    _result: CallResult

    @classmethod
    def capture(
        cls, backend: CaptureBackend, call: RunningCall, forward: Callable[..., Any], form: CallArguments
    ) -> CallGraph:
        """Capture the running call, which is afterwards as it was before.

        Raises:
            Exception: whatever the capture raised.
        """
        plan, result = call.plan, call.result
        given = tensors(form.leaves)
        inputs = [like(tensor).copy_(tensor) for tensor in [*given, *plan_inputs(call)]]
        queue = iter(inputs)
        own = [next(queue) if isinstance(leaf, Tensor) else leaf for leaf in form.leaves]
        args, kwargs = pytree.tree_unflatten(own, form.layout)
        if isinstance(plan, SkippedStep):
            call.plan = plan.with_inputs(list(queue))
        call.result, call.rotary_index = CallResult(), 0
        try:
            captured = backend.capture(lambda: forward(*args, **kwargs))
            return cls(captured, inputs, call.result)
        finally:
            call.plan, call.result, call.rotary_index = plan, result, 0

    @property
    def input_nbytes(self) -> int:
        """Bytes of its memory for what a call is given."""
        return sum(map(nbytes, self._inputs))

    @property
    def given(self) -> list[Tensor]:
        """What it gives, in the memory of its pool."""
        return [*leaves(self.captured.output), *self._result.partial_sums.values()]

    def replay(self, call: RunningCall, form: CallArguments) -> Any:
        """Run it with the numbers of this call; its output, which the next replay leaves alone."""
        given = [*tensors(form.leaves), *plan_inputs(call)]
        for own, tensor in zip(self._inputs, given, strict=True):
            own.copy_(tensor)
        self.captured.replay()
        call.result = self._result.copy()
        return cloned(self.captured.output)


def plan_inputs(call: RunningCall) -> list[Tensor]:
    """The tensors of a call's plan whose numbers differ from call to call."""
    return call.plan.inputs if isinstance(call.plan, SkippedStep) else []


def cloned(output: Any) -> Any:
    """An output whose tensors no replay overwrites."""
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)
