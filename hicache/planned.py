"""What :func:`hicache.fast.plan` tells: bytes and launches of every transformer, and of all together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hicache.planned_memory import GraphsPlan


@dataclass(frozen=True)
class DenoiserPlan:
    """What caching one transformer takes."""

    granularity: str  # "module", "low-rank" or "stack", as apply() would choose, or "output"
    contexts: int  # calls a step, each with a history of its own
    # what is recorded of a call's hidden state: batch, tokens, channels; of a U-Net, of what it returns
    hidden: tuple[int, int, int]
    num_features: int  # of a history by module; a history of the stack has one
    module_bytes: int  # of all contexts; 0 for a U-Net, as stack_bytes
    stack_bytes: int
    # at rank 1, 2, …, with what features are added up in; none where gates cannot be taken in low rank
    low_rank_bytes: tuple[int, ...] = ()
    # with gates of low rank, the highest that fits. A run's gates say which one they need; where it does not
    # fit, "auto" takes the stack.
    rank: int = 0
    output_bytes: int = 0  # 0 where it is not known what the model returns
    low_rank_wanted: tuple[int, ...] = ()  # what must fit the budget at every rank: with the gates of a run
    gates_bytes: int = 0  # of all contexts: gates of steps to come, of low rank of the whole run
    # where the family's adapter says what the model is called with; else None
    kept_bytes: int | None = None  # coefficients, embeddings and copies of prompts
    sums_bytes: int | None = None  # by module: what a full step adds features up in, while it runs
    graphs: GraphsPlan | None = None  # CUDA graphs on a GPU; an estimate
    not_estimated: str | None = None  # why these three are None

    @property
    def history_bytes(self) -> int:
        """Bytes of history a run holds, or with gates of low rank holds at most."""
        if self.granularity == "low-rank":
            return self.low_rank_bytes[self.rank - 1]
        by_name = {"module": self.module_bytes, "stack": self.stack_bytes, "output": self.output_bytes}
        return by_name[self.granularity]

    @property
    def graphs_nbytes(self) -> int:
        """Bytes that CUDA graphs take, estimated; 0 where nothing is captured, or it is not known."""
        return 0 if self.graphs is None else self.graphs.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes that caching takes at most, but for what is not known: :attr:`graphs_nbytes` is estimated."""
        full = self.graphs is not None and self.graphs.captured.startswith(("full", "blocks"))
        sums = 0 if full else self.sums_bytes or 0  # in the graphs' pool, then
        held = self.history_bytes + self.gates_bytes + (self.kept_bytes or 0)
        return held + sums + self.graphs_nbytes

    @property
    def terms(self) -> int:
        """The name :attr:`num_features` had."""
        return self.num_features

    @property
    def launches(self) -> int:
        """Cache kernels a skipped step launches: one a context."""
        return self.contexts


@dataclass(frozen=True)
class Plan:
    """What caching a pipeline takes: the plans of its transformers by name."""

    denoisers: Mapping[str, DenoiserPlan]
    steps: int = 0  # of a run
    full_steps: int = 0  # of those; at most, where a schedule decides as it goes

    @property
    def history_bytes(self) -> int:
        """Bytes of history a run holds at most: of all transformers together."""
        return sum(plan.history_bytes for plan in self.denoisers.values())

    @property
    def nbytes(self) -> int:
        """Bytes that caching takes at most, estimated: see :attr:`DenoiserPlan.nbytes`."""
        return sum(plan.nbytes for plan in self.denoisers.values())

    def __str__(self) -> str:
        lines = [f"{name}: {_described(plan)}" for name, plan in self.denoisers.items()]
        return "\n".join([*lines, f"at most {self.full_steps} of {self.steps} steps are full"])


def _described(plan: DenoiserPlan) -> str:
    chosen = plan.granularity
    if plan.rank:
        chosen = f"{chosen} of at most rank {plan.rank}"
    sizes = []
    if plan.module_bytes:
        sizes.append(f"module {plan.module_bytes:,} in {plan.num_features} features")
    if plan.low_rank_bytes:
        sizes.append(f"low-rank {plan.low_rank_bytes[0]:,} at rank 1")
    if plan.stack_bytes:
        sizes.append(f"stack {plan.stack_bytes:,}")
    if plan.output_bytes:
        sizes.append(f"output {plan.output_bytes:,}")
    graphs = "of CUDA graphs what is not estimated,"
    if plan.graphs is not None:
        graphs = f"about {plan.graphs_nbytes:,} of CUDA graphs ({plan.graphs.captured})"
    kernels = f"{plan.launches} cache kernel{'s' if plan.launches > 1 else ''}"
    return (
        f"{chosen}, {plan.history_bytes:,} bytes of history ({', '.join(sizes)}), {plan.contexts} x "
        f"{list(plan.hidden)}, {kernels} a skipped step; "
        f"with {plan.gates_bytes:,} of gates and {graphs} about {plan.nbytes:,} in all"
    )
