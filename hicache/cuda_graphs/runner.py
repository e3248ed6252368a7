"""CUDA graphs of whole calls: one launch by the host for all kernels of a full or a skipped step.

A call is captured the second time it comes in the same form (the first runs eagerly and warms up libraries
and kernels) and replayed from then on, with its inputs copied into the graph's own memory and its outputs
cloned out of it. What a call reads besides its inputs is fixed memory: the history, and buffers for
coefficients and gates. So one graph of a skipped step serves every distance, one of a full step every gap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn

from hicache.cuda_graphs.block_graphs import NoRoom
from hicache.cuda_graphs.call_graph import CallArguments, cloned
from hicache.cuda_graphs.capture import CaptureBackend
from hicache.cuda_graphs.captures import LIMIT, Captures, first_line
from hicache.cuda_graphs.model_state import ModelState
from hicache.hooks.hooked import HookedModule
from hicache.mixin import mix_in
from hicache.step_plan import FullStep, SkippedStep

# What a user may ask for besides True and False: with "full", full steps whatever memory their graphs take.
CHOICES: Final = ("auto", "full", "skipped")
_KEY: Final = "_hicache_graphs"
_COMPILED: Final = (
    "torch.compile makes its graphs itself (mode='reduce-overhead'); pass cuda_graphs=False, or "
    "compile_repeated_blocks() in its place"
)


class _Replayable(nn.Module):
    """Mixed into the transformer's class while its calls are replayed."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        runner: GraphRunner = self.__dict__[_KEY]
        if not runner.due:
            return super().forward(*args, **kwargs)
        return runner.run(super().forward, args, kwargs)


class GraphRunner:
    """The graphs of one transformer.

    Args:
        transformer: watched; what runs outside its blocks may be run eagerly around captured ones.
        backend: what captures.
        choice: of :data:`CHOICES`, or True: warn where graphs cannot be had unless it is ``"auto"``.
        limit: live graphs; the least recently used is dropped.
        why_not_full: why full steps are to run eagerly, whatever the choice; None where they are not.
    """

    def __init__(
        self,
        transformer: HookedModule,
        backend: CaptureBackend,
        choice: bool | str = "auto",
        limit: int = LIMIT,
        why_not_full: str | None = None,
    ) -> None:
        self._module, self._call = transformer.module, transformer.call
        self._backend = backend
        self._choice = choice
        self._model = ModelState(transformer.module, transformer.lists)
        self._undo: Callable[[], None] | None = None
        self.due = False  # whether the current call is to be replayed: set where it begins and ends
        self.captures = Captures(transformer, backend, choice, limit, why_not_full)
        self.stats, self.memory = self.captures.stats, self.captures.memory
        self._scope = self.captures.scope  # of the current run

    def start_run(self, changed: bool, whole: bool = False) -> None:
        """A run starts.

        Args:
            changed: parts of the model are not what they were.
            whole: nothing of the model runs at its skipped steps.
        """
        self._model.start_run()
        self.captures.start_run(changed, whole)
        self._scope = self.captures.scope
        before = self.stats.eager
        self.stats.eager = self._scope.why_not_at_all or self._model.why_eager(self._backend)
        if self._choice != "auto" and self.stats.eager not in (None, before):
            self.captures.warn(f"runs without CUDA graphs: {self.stats.eager}")
        if self.stats.eager is None and self._undo is None:
            # it is the class that makes forward ours: from the next call on, as this one has looked its up
            self._undo = mix_in(self._module, _Replayable, _KEY, self)

    def begin_call(self, compiled: bool) -> bool:
        """A call begins: whether it is replayed; it was learned from, then, and wants no gradients.

        Args:
            compiled: as a whole.
        """
        if compiled:
            self.refuse("the transformer is compiled as a whole")
        call = self._call
        self.due = (
            self.stats.eager is None
            and call.plan is not None
            and call.lesson is None
            and not call.verifying
            and not torch.is_grad_enabled()
            and not self._module.training
            and (self._scope.why_not_full is None or not isinstance(call.plan, FullStep))
        )
        return self.due

    @property
    def replays_skipped(self) -> bool:
        """Whether skipped steps of this run are replayed, once they have been captured."""
        scope = self._scope
        return self.stats.eager is None and scope.why_not_whole is None and scope.no_room is None

    def refuse(self, reason: str) -> None:
        """This run goes without.

        Raises:
            RuntimeError: graphs were asked for and cannot be had.
        """
        if self._choice != "auto":
            raise RuntimeError(f"hicache: cuda_graphs={self._choice!r}, but {reason}: {_COMPILED}")
        self.stats.eager = reason

    def remove(self) -> None:
        """Leave the transformer as it was, and forget all graphs."""
        if self._undo is not None:
            self._undo()
            self._undo = None
        self.drop()

    def drop(self) -> None:
        """Forget all graphs, and free their memory."""
        self.captures.drop()

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the transformer: eagerly the first time in this form, captured the second, then replayed.

        Args:
            forward: the transformer's own.
            args: of the call.
            kwargs: of the call.
        """
        plan = self._call.plan
        computes = (
            not isinstance(plan, SkippedStep)
            or (plan.gated and plan.gates is None)
            or plan.correction is not None
        )
        if self._model.changed(blocks=computes):
            self.drop()
        if self._scope.why_not_whole is not None:
            return self._run_blocks(forward, args, kwargs)
        form = CallArguments.of(self._call, args, kwargs)
        key = form.key
        if key is None:
            return forward(*args, **kwargs)
        graph = self.captures.held(key)
        if graph is None:
            if not self.captures.looked_at(key):
                return self.captures.look(key, lambda: forward(*args, **kwargs))
            graph = self.captures.made(key, forward, form)
        return forward(*args, **kwargs) if graph is None else graph.replay(self._call, form)

    def _run_blocks(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Around captured blocks all is eager; a skipped step has no blocks."""
        if not isinstance(self._call.plan, FullStep):
            return forward(*args, **kwargs)
        self.captures.blocks.begin()
        self._call.run_block = self._run_block
        return cloned(forward(*args, **kwargs))

    def _run_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._scope.why_not_at_all is None and self._scope.no_room is None:
            result = self._call.result
            sums = dict(result.partial_sums)
            try:
                return self.captures.blocks.run(block, args, kwargs)
            except NoRoom as error:
                result.partial_sums = sums
                self._scope.over_budget(str(error), all_of_it=True)
                self.captures.drop_graphs()
            except Exception as error:
                result.partial_sums = sums
                self.captures.give_up(f"a capture failed: {first_line(error)}")
        return block(*args, **kwargs)
