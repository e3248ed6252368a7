"""CUDA graphs of whole calls: one launch by the host for all kernels of a full or a skipped step.

A call is captured the second time it comes in the same form (the first runs eagerly and warms up libraries
and kernels) and replayed from then on, with its inputs copied into the graph's own memory and its outputs
cloned out of it. What a call reads besides its inputs is fixed memory: the history, and buffers for
coefficients and gates. So one graph of a skipped step serves every distance, one of a full step every gap.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn

from hicache import compat
from hicache.cuda_graphs.block_graphs import BlockGraphs, NoRoom
from hicache.cuda_graphs.call_graph import CallArguments, CallGraph, cloned
from hicache.cuda_graphs.capture import CaptureBackend, describe
from hicache.cuda_graphs.capture_safety import INSIDE, unsafe_ops
from hicache.cuda_graphs.graph_memory import Expected, GraphMemory, expected
from hicache.cuda_graphs.live_bytes import LiveBytes, nbytes
from hicache.cuda_graphs.model_state import ModelState
from hicache.cuda_graphs.scope import Scope
from hicache.hooks.hooked import HookedModule
from hicache.mixin import mix_in
from hicache.stats import GraphStats
from hicache.step_plan import FullStep, SkippedStep
from hicache.trees import leaves_of

LIMIT: Final = 16  # live graphs of one transformer
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
    """

    def __init__(
        self,
        transformer: HookedModule,
        backend: CaptureBackend,
        choice: bool | str = "auto",
        limit: int = LIMIT,
    ) -> None:
        self._module = module = transformer.module
        self._call = call = transformer.call
        self._block_lists = transformer.lists
        self._backend = backend
        self._choice = choice
        self._limit = limit
        self._graphs: dict[Any, CallGraph] = {}
        self._warmed: dict[Any, Expected] = {}
        self._sums = 0  # bytes that a full step adds features up in
        self._stale = False  # whether there are graphs of earlier runs
        self._model = ModelState(module, transformer.lists)
        self._undo: Callable[[], None] | None = None
        self.due = False  # whether the current call is to be replayed: set where it begins and ends
        self.stats = GraphStats()
        self._scope = Scope(self.stats, choice == "skipped", full_only=transformer.skips_whole)
        self.memory = GraphMemory(self.stats, unlimited=choice == "full")
        self._blocks = BlockGraphs(call, backend, self.memory, limit=8 * limit)

    def start_run(self, changed: bool) -> None:
        """A run starts; ``changed`` says that parts of the model are not what they were."""
        self._model.start_run()
        self._scope.start_run()
        self._stale = self.stats.nbytes > 0
        if changed:
            self.drop()
        before = self.stats.eager
        self.stats.eager = self._scope.why_not_at_all or self._model.why_eager(self._backend)
        if self._choice != "auto" and self.stats.eager not in (None, before):
            self._warn(f"runs without CUDA graphs: {self.stats.eager}")
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
        self._warmed.clear()
        self._drop_graphs()

    def _drop_graphs(self) -> None:
        """Free the memory of all graphs; their calls need not be warmed up again."""
        self._graphs.clear()
        self._blocks.drop()  # and with it the backend's pool
        self._stale = False

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the transformer: eagerly the first time in this form, captured the second, then replayed.

        Args:
            forward: the transformer's own.
            args: of the call.
            kwargs: of the call.
        """
        plan = self._call.plan
        computes = not isinstance(plan, SkippedStep) or (plan.gated and plan.gates is None)
        if self._model.changed(blocks=computes):
            self.drop()
        if self._scope.why_not_whole is not None:
            return self._run_blocks(forward, args, kwargs)
        form = CallArguments.of(self._call, args, kwargs)
        key = form.key
        if key is None:
            return forward(*args, **kwargs)
        graph = self._graphs.get(key)
        if graph is None:
            if key not in self._warmed:
                return self._warm(key, lambda: forward(*args, **kwargs))
            graph = self._capture(key, forward, form)
            if graph is None:
                return forward(*args, **kwargs)
            self._add(key, graph)
        self.stats.replays += 1
        graph.used = self.stats.replays
        return graph.replay(self._call, form)

    def _add(self, key: Any, graph: CallGraph) -> None:
        """Keep a graph, in place of the one whose last replay is longest ago if there are too many."""
        if len(self._graphs) == self._limit:
            oldest = min(self._graphs, key=lambda key: self._graphs[key].used)
            self.memory.let_go(self._graphs.pop(oldest).input_nbytes)
        self._graphs[key] = graph

    def _warm(self, key: Any, run: Callable[[], Any]) -> Any:
        """The first call of a form, and whether it may be captured: best not to begin what will fail."""
        if len(self._warmed) > 8 * self._limit:
            self._warmed.clear()
        self._warmed[key] = Expected()
        if self.memory.overdrawn() is not None:  # histories have grown
            self._drop_graphs()
        if compat.is_compiled(self._module):  # compiled blocks have no operations to look at
            return self._backend.warm(run)
        output: list[Any] = []
        blocks = [block for blocks in self._block_lists for block in compat.children_of_list(blocks)]
        with LiveBytes(next(self._module.parameters()).device.type) as memory:
            found = unsafe_ops(lambda: output.append(self._backend.warm(run)), blocks)
        sums = self._call.result.partial_sums.values()
        self._warmed[key] = expected(memory, output, sums)
        self._sums = max(self._sums, sum(map(nbytes, sums)))
        if any(op.place == INSIDE for op in found):
            self._give_up(str(next(op for op in found if op.place == INSIDE)))
        elif found:
            self._capture_blocks_only(str(found[0]))
        return output[0]

    def _run_blocks(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Around captured blocks all is eager; a skipped step has no blocks."""
        if not isinstance(self._call.plan, FullStep):
            return forward(*args, **kwargs)
        self._blocks.begin()
        self._call.run_block = self._run_block
        return cloned(forward(*args, **kwargs))

    def _run_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._scope.why_not_at_all is None and self._scope.no_room is None:
            result = self._call.result
            sums = dict(result.partial_sums)
            try:
                return self._blocks.run(block, args, kwargs)
            except NoRoom as error:
                result.partial_sums = sums
                self._scope.over_budget(str(error), all_of_it=True)
                self._drop_graphs()
            except Exception as error:
                result.partial_sums = sums
                self._give_up(f"a capture failed: {_first_line(error)}")
        return block(*args, **kwargs)

    def _why_no_room(self, key: Any, form: CallArguments) -> str | None:
        """Why the budget has no room for a graph of this call; graphs of earlier runs are given up for it."""
        beside = sum(map(nbytes, form.inputs))
        if self._scope.why_not_full is not None:
            beside += self._sums
        reason = self.memory.why_not(self._warmed[key], beside)
        if reason is not None and self._stale:
            self._drop_graphs()
            reason = self.memory.why_not(self._warmed[key], beside)
        return reason

    def _over_budget(self, full: bool, reason: str) -> None:
        """There is no room for a graph: those of full steps are given up first."""
        all_of_it = not full and self._scope.why_not_full is not None
        if not full and not all_of_it:
            self._drop_graphs()
        self._scope.over_budget(reason, all_of_it)
        if self._choice != "auto":
            self._warn(self.stats.partly or reason)

    def _capture(self, key: Any, forward: Callable[..., Any], form: CallArguments) -> CallGraph | None:
        """The graph of the current call; None where it cannot be had."""
        full = isinstance(self._call.plan, FullStep)
        reason = self._scope.no_room or self._why_no_room(key, form)
        if reason is not None:
            self._over_budget(full, reason)
            return None
        try:
            graph = CallGraph.capture(self._backend, self._call, forward, form)
        except torch.OutOfMemoryError as error:
            if full:
                self._capture_skipped_only(_first_line(error))
            else:
                self._give_up(f"a capture failed: {_first_line(error)}")
            return None
        except Exception as error:
            self._capture_blocks_only(_first_line(error))
            return None
        captured = graph.captured
        if describe(leaves_of(captured.output)) is None:  # the next replay would overwrite its tensors
            given = type(captured.output).__name__
            self._give_up(f"a capture failed: TypeError: expected tensors, got {given}")
            return None
        if full and self._choice != "full" and captured.nbytes > captured.free:
            taken = f"that of a full step takes {captured.nbytes:,} bytes, and {captured.free:,} are left"
            self._capture_skipped_only(taken)
            return None
        self.memory.took(captured, graph.given, graph.input_nbytes)
        reason = self.memory.overdrawn()
        if reason is not None:  # more than was expected
            self._warmed[key].peak = max(captured.nbytes, self._warmed[key].peak)
            self._drop_graphs()
            self._over_budget(full, reason)
            return None
        return graph

    def _capture_skipped_only(self, reason: str) -> None:
        self._scope.leave_out_full(reason)
        self.drop()

    def _capture_blocks_only(self, reason: str) -> None:
        self._scope.leave_out_surroundings(reason)
        self.drop()

    def _give_up(self, reason: str) -> None:
        self._scope.leave_out_all(reason)
        self.drop()
        self._warn(f"runs without CUDA graphs, as {self.stats.eager}")

    def _warn(self, what: str) -> None:
        warnings.warn(f"hicache: {type(self._module).__name__} {what}", RuntimeWarning, stacklevel=3)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
