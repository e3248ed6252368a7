"""What one call of a transformer will do, decided before it runs, and what came of it.

A plan is immutable. Hooks (hicache/hooks) carry it out, note what came of it in a :class:`CallResult`, and
decide nothing. In between, code that may be compiled or captured sees tensors and the plan: torch.compile
makes one graph of a full step and one of a skipped step, whatever the step, the context or the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor, nn

from hicache import compat
from hicache.engine import Sum
from hicache.token_view import TokenView


@dataclass(frozen=True)
class FullStep:
    """The blocks run, and their features are recorded.

    Args:
        slots: the inboxes that are written to, a feature each, ``[batch, tokens, channels]``; with gates of
            low rank, what is added up before it goes there, too. Empty: nothing inside is recorded.
        base: by stack, memory for the hidden state that enters the first block; may be the slot itself. The
            slot then receives the residual. By module None: the modules' outputs are recorded.
        view: of the hidden state that the features have; None: all of it.
        weights: with gates of low rank, what outputs are weighed with before they are added up.
        corrected_by: what else is written to, for corrections of the skipped steps to come.
    """

    slots: tuple[Tensor, ...]
    base: Tensor | None = None
    view: TokenView | None = None
    weights: Tensor | None = None
    corrected_by: tuple[Tensor, ...] = ()

    def drawn(self, hidden: Tensor) -> Tensor:
        """What of a hidden state is recorded."""
        return hidden if self.view is None else self.view.drawn(hidden)


class Correction(Protocol):
    """What a skipped step does beside its sum: immutable, and like it of tensors and numbers alone."""

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors whose numbers differ from step to step."""

    def with_inputs(self, tensors: list[Tensor]) -> Correction:
        """The same correction with other tensors in the places of :attr:`inputs`."""

    @property
    def form(self) -> tuple[Any, ...]:
        """What of it is part of a CUDA graph, hashable."""

    @property
    def fixed(self) -> list[Tensor]:
        """Memory with a fixed place that it reads or writes, the history apart."""

    def __call__(self, total: Sum, base: Tensor, gates: Tensor, block_kwargs: Mapping[str, Any]) -> Tensor:
        """The hidden state after the blocks, ``[batch, tokens, channels]``.

        Args:
            total: the step's sum, which is to be made once, of the same history.
            base: ``[batch, tokens, channels]``.
            gates: ``[num_features, batch, channels]``.
            block_kwargs: the first block's arguments by name.
        """


@dataclass(frozen=True)
class SkippedStep:
    """A sum over the history stands for the blocks.

    Args:
        sum: orders and coefficients.
        gates: ``[num_features, batch, channels]`` where they were prefetched.
        gated: whether they are computed where they were not; without, gates are one.
        between: what the model itself adds to the hidden state between its blocks.
        ones: features after those of the blocks, whose gates are one.
        view: of the hidden state that the features have; None: all of it, with a gate a sample.
        correction: what is done beside the sum; None: nothing.
        embedded: what the model's embedder of timesteps would give; None: it runs.
    """

    sum: Sum
    gates: Tensor | None = None
    gated: bool = False
    between: tuple[Tensor, ...] = ()
    ones: int = 0
    view: TokenView | None = None
    correction: Correction | None = None
    embedded: Tensor | None = None

    def of_any_size(self) -> SkippedStep:
        """The same plan for torch.compile, which makes one graph of it whatever the picture's size."""
        total = replace(self.sum, orders=compat.of_any_size(self.sum.orders))
        view = None if self.view is None else self.view.of_any_size()
        return replace(self, sum=total, between=compat.of_any_size(self.between), view=view)

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors whose numbers differ from step to step, as :meth:`with_inputs` takes them."""
        found = [self.sum.coeffs]
        if self.sum.inv_gap is not None:
            found.append(self.sum.inv_gap)
        if self.gates is not None:
            found.append(self.gates)
        if self.embedded is not None:
            found.append(self.embedded)
        corrected = [] if self.correction is None else self.correction.inputs
        return [*found, *corrected, *self.between]

    def with_inputs(self, tensors: list[Tensor]) -> SkippedStep:
        """The same plan with other tensors in the places of :attr:`inputs`."""
        coeffs, *others = tensors
        inv_gap = None if self.sum.inv_gap is None else others.pop(0)
        gates = None if self.gates is None else others.pop(0)
        embedded = None if self.embedded is None else others.pop(0)
        correction = self.correction
        if correction is not None:
            count = len(correction.inputs)
            correction, others = correction.with_inputs(others[:count]), others[count:]
        total = replace(self.sum, coeffs=coeffs, inv_gap=inv_gap)
        more = replace(self, sum=total, gates=gates, embedded=embedded)
        return replace(more, between=tuple(others), correction=correction)


@dataclass(frozen=True)
class OutputStep:
    """Nothing of the denoiser runs: the forecast of what it returns is what a call of it gives.

    Args:
        output: that, whatever it is wrapped in.
    """

    output: Any


@dataclass
class CallResult:
    """What came of a call."""

    entered: bool = False  # whether a block has run
    head_reached: bool = False
    # features that several outputs make up, in fp32 or float64: added up as they come
    partial_sums: dict[int, Tensor] = field(default_factory=dict)

    def copy(self) -> CallResult:
        """A result of the same tensors."""
        return CallResult(self.entered, self.head_reached, dict(self.partial_sums))


class Lesson(Protocol):
    """Looks on while a form of call runs for the first time, and makes its plan once the form is known."""

    unfit: str | None  # why nothing could be recorded

    def first_block(self, hidden: Tensor, block_kwargs: Mapping[str, Any]) -> FullStep:
        """The hidden state enters the first block: the plan of this call."""

    def head(self, plan: FullStep, hidden: Tensor) -> FullStep | None:
        """The hidden state leaves the last block: the plan, another one if that cannot be had, or None."""


class RunningCall:
    """The call of one transformer that runs now."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """A call ends, or never came to its end: let go of its tensors."""
        self.plan: FullStep | SkippedStep | None = None  # None: the call runs uncached, or has no plan yet
        self.left_out: OutputStep | None = None  # the plan of a call that is not made at all
        self.result = CallResult()
        # full, the first of its form: shapes, layout and order are read and checked
        self.lesson: Lesson | None = None
        # full: what is done as the hidden state enters the first block, once its plan is there
        self.on_entry: Callable[[], None] | None = None
        # skipped, the first of its form: nothing but the blocks may stand between stand-in and head
        self.verifying = False
        self.checked = False  # whether nothing but the blocks may change the hidden state
        self.opaque = False  # compiled, captured or replayed: nothing inside can be timed or compared
        # runs a block, given it and its arguments, where blocks are captured one by one
        self.run_block: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any] | None = None
        # full, the first of its form: what the embedder of timesteps gave, in each call of it
        self.embedded: list[Any] = []
        # what only blocks read, as the context's first full step had it, and how much this call has asked for
        self.recalled: list[Any] = []
        self.recall_index = 0

    @property
    def recording(self) -> bool:
        """Whether this is a full step, and something inside the transformer is to be recorded."""
        if self.lesson is not None:
            return True
        # torch 2.11 compiles the length of a tuple, not what bool() makes of one
        return isinstance(self.plan, FullStep) and len(self.plan.slots) > 0

    @property
    def skipping(self) -> bool:
        """Whether a sum stands for the blocks."""
        return isinstance(self.plan, SkippedStep)
