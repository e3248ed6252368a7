"""Every module's output before its gate, a feature each: the paper's granularity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from torch import Tensor

from hicache.adapters.base import ModuleAdapter
from hicache.adapters.gates import deferred
from hicache.adapters.layers import layers_of
from hicache.engine import Sum
from hicache.hooks.module_outputs import ModuleOutputs, watched
from hicache.runtime.call_form import CallForm
from hicache.runtime.clock import StepClock
from hicache.runtime.context import BegunCall
from hicache.runtime.corrector import Correctors
from hicache.runtime.gate_prefetch import Ahead, come_out_alike, foretold, with_ones
from hicache.runtime.late_gates import LateGates
from hicache.runtime.recorders import Recorder, fetch, fetch_afterwards
from hicache.runtime.residuals import write_total
from hicache.runtime.sum_check import Unfit, check_sum
from hicache.step_plan import FullStep, RunningCall, SkippedStep
from hicache.token_view import TokenView

_CANNOT_PREFETCH: Final = (
    "its weights are there in their own blocks only, and gates of the steps to come cannot be prefetched: "
    "they need a scheduler whose timesteps the model is called with"
)


class ModuleRecorder(Recorder):
    """The paper's: a family's features, each with the gate of the current timestep.

    Args:
        adapter: the family's.
        call: the transformer's running call.
        correctors: make what a context's skipped steps do beside their sums; None: they do nothing.
    """

    name = "module"

    def __init__(
        self, adapter: ModuleAdapter, call: RunningCall, correctors: Correctors | None = None
    ) -> None:
        self.adapter = adapter
        self.correctors = correctors
        self._call = call
        self._outputs: ModuleOutputs | None = None
        self._slots: tuple[Tensor, ...] = ()  # of the family's features
        self._added: Tensor | None = None  # slot of what a ControlNet adds between the blocks
        self._view: TokenView | None = None  # that the slots have of the hidden state
        # Of a call learned from: what to check the sum against.
        self.base: Tensor | None = None
        self._block_kwargs: Mapping[str, Any] = {}
        self.between: Sequence[Tensor] = ()
        self._model_kwargs: Mapping[str, Any] = {}
        self._verified: set[Any] = set()  # how many features, and which tokens of the hidden state
        self._can_prefetch = True  # whether gates of coming steps come out as those of the step itself
        # gates of this step, and the same as those of coming steps are computed; None: not computed yet
        self._gates: tuple[Tensor, Tensor | None] | None = None
        self.late: LateGates | None = None  # of a model whose weights are at hand in its blocks only

    def start_run(self, absent: bool) -> None:
        if absent != (self.late is not None):
            self.late = LateGates() if absent else None

    def plan_full(self, begun: BegunCall) -> FullStep:
        form = begun.context.form
        assert form is not None
        outputs = self.watch(form.view)
        shapes = [form.shape] * form.num_features
        engine = begun.context.engine
        layers = self._layers(form.num_features) if engine.config.by_feature else None
        slots = tuple(engine.open(shapes, form.dtype, form.device, layers))
        self._slots = slots[: form.num_outputs]
        self._added = slots[-1] if form.ones else None
        outputs.bind(self._slots, form.view)
        memory: tuple[Tensor, ...] = ()
        if self.correctors is not None:
            corrector = begun.context.corrector = self.correctors.watch(begun.context.corrector, form)
            memory = corrector.memory
        return FullStep(slots, view=form.view, corrected_by=memory)

    def _layers(self, num_features: int) -> list[str | None]:
        """The block of each feature; None of those that no one block makes."""
        known = layers_of(self.adapter)[:num_features]
        return [*known, *[None] * (num_features - len(known))]

    def watch(self, view: TokenView | None) -> ModuleOutputs:
        """Record the outputs of the family's modules; LoRA may have put others in their places since.

        Args:
            view: of the hidden state that features have; None: all of it.
        """
        self._view = view
        self._outputs = watched(self._outputs, self._call, self.adapter.outputs())
        return self._outputs

    def plan_skipped(self, begun: BegunCall, total: Sum) -> SkippedStep:
        form = begun.context.form
        assert form is not None
        between = () if form.ones else tuple(self.adapter.between(begun.model_kwargs))
        ahead, corrector = self._prefetched(begun), begun.context.corrector
        correction = None if corrector is None else corrector.correct(begun.local_step, form)
        return SkippedStep(
            total, ahead.gates, True, between, form.ones, form.view, correction, ahead.embedded
        )

    def _prefetched(self, begun: BegunCall) -> Ahead:
        read = self.late is not None  # without them no step is skipped: worth a look at the device
        return begun.context.prefetch.ahead(begun.step, begun.model_kwargs, read)

    def can_skip(self, begun: BegunCall) -> bool:
        return self.late is None or not self.late.needed or self._prefetched(begun).gates is not None

    def gates(self, block_kwargs: Mapping[str, Any], base: Tensor, ones: int = 0) -> Tensor:
        """The gates of this step, of samples or groups of tokens; the last ``ones`` are of one."""
        return with_ones(as_blocks_do(self.adapter.gates(block_kwargs, base), base), ones)

    def learn(self, hidden: Tensor, block_kwargs: Mapping[str, Any], model_kwargs: Mapping[str, Any]) -> None:
        between = list(self.adapter.between(model_kwargs))
        if self._kind not in self._verified:
            if (view := self._view) is not None:
                hidden, between = view.drawn(hidden), [view.drawn(residual) for residual in between]
            self.base, self._block_kwargs, self.between = hidden.clone(), dict(block_kwargs), between
            self._model_kwargs = model_kwargs
            if self.late is not None:
                with deferred(self.adapter) as later:
                    self._gates = self._both_gates(self._grouped(hidden))
                self.late.add(later)

    @property
    def _kind(self) -> tuple[Any, ...]:
        """What calls have in common of which one has to be verified."""
        view = self._view
        return (len(self._slots), *(() if view is None else (view.part is None, view.groups is None)))

    def _grouped(self, drawn: Tensor) -> Tensor:
        return drawn if self._view is None else self._view.grouped(drawn)

    def _both_gates(self, base: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gates of a call that is learned from, and the same computed as those of coming steps are."""
        own = self.adapter.gates(self._block_kwargs, base)
        if self.late is None:
            own = own.clone()  # the adapter uses its memory again
        like = base[:, :1]
        return own, foretold(self.adapter, self._block_kwargs, self._model_kwargs, like)

    def verify(self, hidden: Tensor, form: CallForm) -> None:
        """Checks that base + Σ gate ⊙ feature is what the blocks made: once a form of call, with a host sync.

        Also takes in which features have no output.

        Raises:
            Unfit: it is not.
            NotFinite: what the blocks made is NaN or infinite: it may still be.
        """
        self.take_missing(form)
        if self.base is None:
            return
        assert self._outputs is not None
        base = self._grouped(self.base)
        self._outputs.finish(self._slots, form.missing)
        self._call.result.partial_sums.clear()
        own, again = self._gates or self._both_gates(base)
        gates = as_blocks_do(own, base)
        self.check_sum(hidden, self._slots, gates, self.between)
        if again is None and self.adapter.foretell:  # in this form: those of others are not known yet
            return
        self._verified.add(self._kind)
        self._can_prefetch = again is not None and come_out_alike(again, gates)

    def take_missing(self, form: CallForm) -> None:
        """Take in which features of a call that was learned from have no output.

        Raises:
            Unfit: a module gave something that is no feature.
        """
        assert self._outputs is not None
        try:
            form.missing = self._outputs.missing(form.num_outputs)
        except ValueError as error:
            raise Unfit(f"cannot be cached module by module: {error}") from error

    def check_sum(
        self, hidden: Tensor, slots: Sequence[Tensor], gates: Tensor, between: Sequence[Tensor]
    ) -> None:
        """Checks that features with these gates make what the blocks made, see :meth:`verify`."""
        assert self.base is not None
        base = self._grouped(self.base)
        hidden = self._grouped(hidden if self._view is None else self._view.drawn(hidden))
        features = [self._grouped(slot) for slot in slots]
        check_sum(base, hidden, features, gates, [self._grouped(residual) for residual in between])

    def finish(self, form: CallForm, model_kwargs: Mapping[str, Any]) -> None:
        assert self._outputs is not None
        self._outputs.finish(self._slots, form.missing)
        if self._added is not None:
            write_total(self.adapter.between(model_kwargs), self._added, form.view)

    def foresee(self, begun: BegunCall, clock: StepClock) -> None:
        if self.late is not None:
            with deferred(self.adapter) as later:
                if self._can_prefetch:
                    fetch(self.adapter, begun, clock, gates=True)
            self.late.add(later)

    def prefetch(self, begun: BegunCall, clock: StepClock) -> str | None:
        prefetch, late, form = begun.context.prefetch, self.late, begun.context.form
        if late is None and self._can_prefetch:
            fetch_afterwards(self.adapter, begun, clock, gates=True)
        assert form is not None
        if late is not None and late.needed:
            done = late.complete or bool(form.missing)  # blocks that are left out write no gates
            coming = not begun.context.is_full(begun.step + 1) and begun.step + 1 != clock.num_steps
            known = self._can_prefetch and prefetch.knows_timesteps
            if not (known and done and (prefetch.fetched or not coming)):
                return _CANNOT_PREFETCH
        prefetch.own(form.ones)
        prefetch.settle(self.adapter)
        return None

    def end(self) -> None:
        if self._outputs is not None:
            self._outputs.unbind()
        if self.correctors is not None:
            self.correctors.end()
        self._slots, self.between, self._block_kwargs, self.base = (), (), {}, None
        self._added = self._view = None
        self._model_kwargs, self._gates = {}, None
        if self.late is not None:
            self.late.drop()

    def forget(self) -> None:
        """Check its sum anew, and record after hooks that others put there."""
        self._verified.clear()
        if self._outputs is not None:
            self._outputs.remove()
        self._outputs = None
        if self.correctors is not None:
            self.correctors.forget()


def as_blocks_do(gates: Tensor, base: Tensor) -> Tensor:
    """Gates broadcast and cast to a hidden state, contiguous; mostly this changes nothing.

    One timestep may serve several pictures, and autocast may leave embeddings of higher precision.
    """
    return gates.expand(-1, len(base), -1).to(base.device, base.dtype).contiguous()
