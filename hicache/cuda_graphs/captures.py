"""The graphs of one transformer: a form of call is looked at, then captured, and kept if there is room."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Final

import torch

from hicache import compat
from hicache.cuda_graphs.block_graphs import BlockGraphs
from hicache.cuda_graphs.call_graph import CallArguments, CallGraph
from hicache.cuda_graphs.capture import CaptureBackend, describe
from hicache.cuda_graphs.capture_safety import INSIDE, unsafe_ops
from hicache.cuda_graphs.graph_memory import Expected, GraphMemory, expected
from hicache.cuda_graphs.live_bytes import LiveBytes, nbytes
from hicache.cuda_graphs.scope import Scope
from hicache.hooks.hooked import HookedModule
from hicache.stats import GraphStats
from hicache.step_plan import FullStep
from hicache.trees import leaves_of

LIMIT: Final = 16  # live graphs of one transformer


class Captures:
    """The graphs of one transformer, and what of its calls is not captured.

    Args:
        transformer: watched.
        backend: what captures.
        choice: what the user asked for; other than ``"auto"``: warn where graphs cannot be had.
        limit: live graphs; the least recently used is dropped.
        why_not_full: why full steps are to run eagerly, whatever the user asked for; None where they are not.
    """

    def __init__(
        self,
        transformer: HookedModule,
        backend: CaptureBackend,
        choice: bool | str,
        limit: int = LIMIT,
        why_not_full: str | None = None,
    ) -> None:
        self._module, self._call, self._block_lists = transformer.module, transformer.call, transformer.lists
        self._backend = backend
        self._choice = choice
        self.limit = limit
        self.graphs: dict[Any, CallGraph] = {}
        self._warmed: dict[Any, Expected] = {}
        self._let_go: set[Any] = set()  # in this run, for others
        self._sums = 0  # bytes that a full step adds features up in
        self._stale = False  # whether there are graphs of earlier runs
        self.stats = GraphStats()
        self._why_not_full = why_not_full or ("asked for" if choice == "skipped" else None)
        self.scope = Scope(self.stats, self._why_not_full)
        self._scopes = {False: self.scope}  # by whether skipped steps have nothing to capture
        self.memory = GraphMemory(self.stats, unlimited=choice == "full")
        self.blocks = BlockGraphs(self._call, backend, self.memory, limit=8 * limit)

    def start_run(self, changed: bool, whole: bool = False) -> None:
        """A run starts.

        Args:
            changed: parts of the model are not what they were.
            whole: nothing of the model runs at its skipped steps.
        """
        if whole not in self._scopes:
            self._scopes[whole] = Scope(self.stats, self._why_not_full, full_only=whole)
        self.scope = self._scopes[whole]
        self.scope.start_run()
        for graph in self.graphs.values():
            graph.start_run()
        self._let_go.clear()
        self._stale = self.stats.nbytes > 0
        if changed:
            self.drop()

    def held(self, key: Any) -> CallGraph | None:
        """The graph of the current call, to be replayed; None where there is none.

        Args:
            key: of the call's form.
        """
        graph = self.graphs.get(key)
        if graph is not None:
            self.stats.replays += 1
            graph.used = self.stats.replays
        return graph

    def made(self, key: Any, forward: Callable[..., Any], form: CallArguments) -> CallGraph | None:
        """Capture the current call; its graph, to be replayed, or None where it cannot be had.

        Args:
            key: of its form; :meth:`looked_at`.
            forward: the transformer's own.
            form: its arguments.
        """
        if key in self._let_go:
            # they come in turn, as tiles do: each would be captured again at every step
            self.give_up(f"a run has calls of more than {self.limit} forms")
            return None
        graph = self._capture(key, forward, form)
        if graph is None:
            return None
        self._add(key, graph)
        return self.held(key)

    def looked_at(self, key: Any) -> bool:
        """Whether a call of this form has run by :meth:`look`, and has no graph."""
        return key in self._warmed

    def look(self, key: Any, run: Callable[[], Any]) -> Any:
        """The first call of a form, and whether it may be captured: best not to begin what will fail."""
        if len(self._warmed) > 8 * self.limit:
            self._warmed.clear()
        self._warmed[key] = Expected()
        if self.memory.overdrawn() is not None:  # histories have grown
            self.drop_graphs()
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
            self.give_up(str(next(op for op in found if op.place == INSIDE)))
        elif found:
            self._capture_blocks_only(str(found[0]))
        return output[0]

    def _capture(self, key: Any, forward: Callable[..., Any], form: CallArguments) -> CallGraph | None:
        """The graph of the current call; None where it cannot be had."""
        full = isinstance(self._call.plan, FullStep)
        reason = self.scope.no_room or self._why_no_room(key, form)
        if reason is not None:
            self._over_budget(full, reason)
            return None
        try:
            graph = CallGraph.capture(self._backend, self._call, forward, form)
        except torch.OutOfMemoryError as error:
            if full:
                self._capture_skipped_only(first_line(error))
            else:
                self.give_up(f"a capture failed: {first_line(error)}")
            return None
        except Exception as error:
            self._capture_blocks_only(first_line(error))
            return None
        captured = graph.captured
        if describe(leaves_of(captured.output)) is None:  # the next replay would overwrite its tensors
            given = type(captured.output).__name__
            self.give_up(f"a capture failed: TypeError: expected tensors, got {given}")
            return None
        if full and self._choice != "full" and captured.nbytes > captured.free:
            taken = f"that of a full step takes {captured.nbytes:,} bytes, and {captured.free:,} are left"
            self._capture_skipped_only(taken)
            return None
        self.memory.took(captured, graph.given, graph.input_nbytes)
        reason = self.memory.overdrawn()
        if reason is not None:  # more than was expected
            self._warmed[key].peak = max(captured.nbytes, self._warmed[key].peak)
            self.drop_graphs()
            self._over_budget(full, reason)
            return None
        return graph

    def _add(self, key: Any, graph: CallGraph) -> None:
        """Keep a graph, in place of the one whose last replay is longest ago if there are too many."""
        if len(self.graphs) == self.limit:
            oldest = min(self.graphs, key=lambda key: self.graphs[key].used)
            self.memory.let_go(self.graphs.pop(oldest).input_nbytes)
            self._let_go.add(oldest)
        self.graphs[key] = graph

    def _why_no_room(self, key: Any, form: CallArguments) -> str | None:
        """Why the budget has no room for a graph of this call; graphs of earlier runs are given up for it."""
        beside = sum(map(nbytes, form.inputs))
        if self.scope.why_not_full is not None:
            beside += self._sums
        reason = self.memory.why_not(self._warmed[key], beside)
        if reason is not None and self._stale:
            self.drop_graphs()
            reason = self.memory.why_not(self._warmed[key], beside)
        return reason

    def _over_budget(self, full: bool, reason: str) -> None:
        """There is no room for a graph: those of full steps are given up first."""
        all_of_it = not full and self.scope.why_not_full is not None
        if not full and not all_of_it:
            self.drop_graphs()
        self.scope.over_budget(reason, all_of_it)
        if self._choice != "auto":
            self.warn(self.stats.partly or reason)

    def _capture_skipped_only(self, reason: str) -> None:
        self.scope.leave_out_full(reason)
        self.drop()

    def _capture_blocks_only(self, reason: str) -> None:
        self.scope.leave_out_surroundings(reason)
        self.drop()

    def give_up(self, reason: str) -> None:
        """Nothing is captured, ever: all runs eagerly."""
        self.scope.leave_out_all(reason)
        self.drop()
        self.warn(f"runs without CUDA graphs, as {self.stats.eager}")

    def drop(self) -> None:
        """Forget all graphs, and free their memory."""
        self._warmed.clear()
        self.drop_graphs()

    def drop_graphs(self) -> None:
        """Free the memory of all graphs; their calls need not be warmed up again."""
        self.graphs.clear()
        self.blocks.drop()  # and with it the backend's pool
        self._stale = False

    def warn(self, what: str) -> None:
        """Tell the user."""
        warnings.warn(f"hicache: {type(self._module).__name__} {what}", RuntimeWarning, stacklevel=3)


def first_line(error: Exception) -> str:
    """What an error says, in a line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
