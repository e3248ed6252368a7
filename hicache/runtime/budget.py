"""Which recorder a denoiser's calls get: the finest that is known, fits the memory and proves right."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from hicache.adapters.base import ModuleAdapter
from hicache.runtime.clock import StepClock
from hicache.runtime.context import MAX_CONTEXTS, BegunCall, Context, Contexts
from hicache.runtime.gate_rank import GATE_TOLERANCE
from hicache.runtime.low_rank import LowRankRecorder
from hicache.runtime.memory_room import Graphs, MemoryRoom
from hicache.runtime.module_recorder import ModuleRecorder
from hicache.runtime.output_recorder import OutputRecorder
from hicache.runtime.recorders import Recorder, StackRecorder
from hicache.runtime.token_layout import layout_check, token_layout
from hicache.stats import LowRankStats
from hicache.weights import only_in_their_blocks

_COARSE: Final = ("stack", "output")  # what takes no modules


@dataclass(frozen=True)
class Policy:
    """What a user wants cached.

    ``"module"``, ``"low-rank"``, ``"stack"``, or ``"auto"``: the first of them that fits the budget; or
    ``"output"``.
    """

    granularity: str
    memory_budget: int  # bytes
    gate_tolerance: float = GATE_TOLERANCE  # what gates of low rank may be off by, relative
    max_contexts: int = MAX_CONTEXTS
    why: str = "asked for"  # this granularity

    @property
    def by_module(self) -> bool:
        """Whether modules may be recorded, each or in weighed sums."""
        return self.granularity not in _COARSE


class RecorderChoice:
    """The recorder of a denoiser's calls, and why it is that one.

    Args:
        model: name of the transformer's class, for messages.
        policy: what the user wants.
        modules: records by module; None where nobody knows the modules.
        contexts: whose histories the budget is for.
        warn: tells the user, once.
        adapter: says which tokens are drawn, whatever is cached of them; None where nobody knows the model.
        graphs: of the denoiser, if it has some.
    """

    def __init__(
        self,
        model: str,
        policy: Policy,
        modules: ModuleRecorder | None,
        contexts: Contexts,
        warn: Callable[[str], None],
        adapter: ModuleAdapter | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        self._model = model
        self.adapter = adapter
        self._policy = policy
        self._contexts = contexts
        self.warn = warn
        self._room = MemoryRoom(policy.memory_budget, graphs, warn)
        whole = policy.granularity == "output"
        # where modules cannot be had
        self.coarse: Recorder = OutputRecorder() if whole else StackRecorder(adapter)
        self.modules = modules if policy.by_module else None
        self.low_rank: LowRankRecorder | None = None
        if self.modules is not None and policy.granularity != "module":
            self.low_rank = LowRankRecorder(self.modules, policy.gate_tolerance)
        self._why_coarse = f"no adapter knows the modules of {model}" if policy.by_module else policy.why
        self._why_not_modules: str | None = None  # in this run, by "auto"
        self.absent = False  # in this run: weights of the blocks are at hand in their own block only
        self.recorder: Recorder = self._finest()

    def _finest(self) -> Recorder:
        """What is tried first."""
        wanted = self.low_rank if self._policy.granularity == "low-rank" else self.modules
        return wanted or self.coarse

    def start_run(self) -> None:
        """A run starts: modules are tried anew."""
        self.absent = self.adapter is not None and only_in_their_blocks(self.adapter.module)
        for recorder in (self.modules, self.coarse):
            if recorder is not None:
                recorder.start_run(self.absent)
        self.recorder, self._why_not_modules = self._finest(), None

    @property
    def by_module(self) -> bool:
        """Whether modules are recorded at the moment, each or in weighed sums."""
        return self.recorder is not self.coarse

    def look_again(self, context: Context, model_kwargs: Mapping[str, Any]) -> None:
        """A context's first call in a run: its tokens may not be laid out as in an earlier run.

        May read the device.
        """
        form = context.form
        if form is None:
            return
        if token_layout(self.adapter, model_kwargs, form.entered) == form.layout:
            context.check = layout_check(self.adapter, form.layout, model_kwargs, form.entered)
        else:
            context.unlearn()

    def decide(self, begun: BegunCall, clock: StepClock, learning: bool = False) -> None:
        """At every full step: whether this run's contexts can be cached by module, or in low rank.

        Args:
            begun: the call.
            clock: counts the steps.
            learning: the call is learned from, and has come to its first block.

        Raises:
            RuntimeError: they cannot, and the user asked for it.
        """
        context, form = begun.context, begun.context.form
        assert form is not None
        if self.adapter is not None and (self.by_module or (form.embeds_ahead and not begun.replayed)):
            context.prefetch.meet(self.adapter, clock.rules, begun.step, begun.model_kwargs)
        if self.recorder is self.coarse or self.modules is None:
            return
        if self.modules.correctors is not None:
            self.modules.correctors.check(form, begun.model_kwargs, begun.compiled, self.absent)
        refusal = None if form.refusal is None else f"{self._model}: {form.refusal}"
        if refusal is None and self.recorder is self.modules and self._policy.granularity == "auto":
            wanted = context.planned_nbytes - context.engine.nbytes
            planned = self._contexts.planned_nbytes
            refusal = self._room.why_not("its modules' history", planned, wanted, form.device)
            if refusal is not None and self.low_rank is not None:
                self._release_recorded()
                self.recorder, self._why_not_modules = self.low_rank, refusal
                refusal = None
        if refusal is None and self.recorder is self.low_rank:
            refusal = self._low_rank_refusal(begun, clock, learning)
        if refusal is not None:
            self.fall_back(refusal)

    def _low_rank_refusal(self, begun: BegunCall, clock: StepClock, learning: bool) -> str | None:
        """Why a full step cannot be recorded in low rank; None when its context has a basis that fits."""
        assert self.low_rank is not None
        assert begun.context.form is not None
        refusal = self.low_rank.prepare(begun, clock, learning)
        if refusal is not None:
            refusal = f"{self._model}: {refusal}"
        elif self._policy.granularity == "auto":
            planned = self.low_rank.planned_nbytes(self._contexts.current)
            basis = begun.context.low_rank.basis
            assert basis is not None
            what = f"its history at rank {basis.rank}"
            held = self._contexts.current_nbytes + self._contexts.gates_nbytes
            refusal = self._room.why_not(what, planned, planned - held, begun.context.form.device)
        if refusal is not None and self._why_not_modules is not None:
            refusal = f"{self._why_not_modules}; {refusal}"
        return refusal

    def fall_back(self, reason: str) -> None:
        """Cache the stack for the rest of the run, in every context.

        Raises:
            RuntimeError: the user asked for modules.
        """
        wanted = self._policy.granularity
        if wanted != "auto":
            raise RuntimeError(
                f"hicache: granularity={wanted!r} cannot be had: {reason}; use granularity='stack' or 'auto'"
            )
        self.recorder, self._why_coarse = self.coarse, reason
        self.end()
        self._release_recorded()
        for context in self._contexts.current:
            context.low_rank.release()

    def _release_recorded(self) -> None:
        """Free what was recorded in this run: it is of another form than what comes.

        What an earlier run left is perhaps of that form, and stays where it is.
        """
        for context in self._contexts.current:
            if context.engine.differences.last_full is not None:
                context.engine.release()

    def end(self) -> None:
        """A call has ended, or never came to its end: let go of its tensors."""
        for recorder in (self.modules, self.low_rank):
            if recorder is not None:
                recorder.end()

    def give_up_modules(self, reason: str) -> None:
        """The sum over the modules is wrong: cache the stack from here on, in every run.

        Raises:
            RuntimeError: the user asked for modules.
        """
        self.fall_back(f"{self._model} {reason}")
        assert self.modules is not None
        self.modules.forget()
        self.modules = self.low_rank = None

    def describe(self) -> str:
        """What is cached of the current run's calls, and why."""
        if self.recorder is self.coarse:
            return f"{self.coarse.name}: {self._why_coarse}"
        planned, what = self._contexts.planned_nbytes, "module: "
        if self.recorder is self.low_rank:
            planned = self.low_rank.planned_nbytes(self._contexts.current)
            gates = self.gates()
            what = "low-rank: "
            if gates is not None:
                what += f"rank {gates.rank}, gates off by {gates.error:.2g}, by stack {gates.errors[0]:.2g}; "
        if self.modules is not None and self.modules.correctors is not None:
            what += f"{self.modules.correctors.describe()}; "
        if self._policy.granularity != "auto":
            return f"{what}{self._policy.why}; {planned:,} bytes"
        return f"{what}{planned:,} bytes fit memory_budget={self._policy.memory_budget:,}"

    def gates(self) -> LowRankStats | None:
        """What the gates of this run are, if they are of low rank."""
        found = [context.low_rank.basis for context in self._contexts.current]
        bases = [basis for basis in found if basis is not None]
        if not bases or self.recorder is not self.low_rank:
            return None
        # a context that began later has fewer steps, and so fewer directions
        ranks = itertools.zip_longest(*(basis.errors for basis in bases), fillvalue=0.0)
        errors = [max(errors) for errors in ranks]
        return LowRankStats(max(basis.rank for basis in bases), errors)
