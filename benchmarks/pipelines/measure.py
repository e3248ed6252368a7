"""Parity first, then times: what is measured of every variant of a model, and what is left out."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

import hicache.fast
from benchmarks.kernels.parity import WrongResult
from benchmarks.pipelines.bench import DTYPES, PARITY_STEPS, Bench, Variant, compiled_blocks, median, release
from benchmarks.pipelines.models import MODELS
from benchmarks.pipelines.rows import Row
from hicache import HiCacheConfig
from hicache.schedule import bound
from hicache.stats import GraphStats

_LEAST = {"cuda": 30.0, "cpu": 3.0}  # seconds left, below which no model is begun


class Notes:
    """What was not timed, and why; said on stderr as it happens."""

    def __init__(self) -> None:
        self.left_out: list[str] = []
        self.failed: list[str] = []

    def leave(self, what: str, why: str) -> None:
        """There was no time, no memory or no such thing."""
        self._say(self.left_out, f"{what}: left out: {why}")

    def fail(self, what: str, error: Exception) -> None:
        """It drew something wrong, or broke off."""
        traceback.print_exception(error)
        self._say(self.failed, f"{what}: FAILED: {type(error).__name__}: {error}")

    @staticmethod
    def _say(kind: list[str], note: str) -> None:
        kind.append(note)
        print(note, file=sys.stderr, flush=True)


@dataclass
class Measured:
    """What was measured of one variant."""

    seconds: list[float] = field(default_factory=list)
    full_ms: float | None = None
    skipped_ms: float | None = None
    cache_ms: float | None = None
    history_bytes: int = 0
    peak_bytes: int | None = None
    graphs_bytes: int | None = None


def check_parity(bench: Bench, granularity: str) -> None:
    """Check that a cache that skips nothing changes nothing.

    Raises:
        WrongResult: it does.
    """
    config = HiCacheConfig(interval=1, order=bench.config.order)
    with bench.apply(Variant(granularity), config):
        _compare(f"{bench.model.name}, {granularity}, interval=1", bench.run(PARITY_STEPS), bench.reference)


def measure_variant(
    bench: Bench,
    variant: Variant,
    taken: Measured,
    known: dict[tuple[Variant, int | None], Tensor],
    whole: bool,
) -> str | None:
    """Run a variant once more: warm up, time a whole loop and, the first time, its steps.

    Args:
        bench: the model.
        variant: how to run it.
        taken: what was measured before; added to.
        known: latents of earlier loops, which these must equal; added to.
        whole: whether there is time for whole loops.

    Returns:
        str | None: why it could not be measured, if so.

    Raises:
        WrongResult: graphs draw something else than the same steps run eagerly, a loop something else than
            the one before, or the full steps are not the schedule's.
    """
    cached = variant.granularity is not None
    stop = bench.first_steps(variant, whole)
    bench.reset_peak()
    with compiled_blocks(bench.transformer) if variant.compiled else nullcontext():
        if variant.graphs and (variant, stop) not in known:
            with bench.apply(variant):
                known[variant, stop] = bench.run(stop, replay=False)
        with bench.apply(variant) if cached else nullcontext() as handle:
            warm = bench.run(stop)
            if variant.graphs and (reason := _graphs(handle).eager) is not None:
                return reason
            _compare("first steps", warm, known.setdefault((variant, stop), warm))
            if whole:
                captures = _graphs(handle).captures
                latents, seconds = bench.timed()
                if _graphs(handle).captures > captures:  # that loop was still a warm-up
                    latents, seconds = bench.timed()
                _compare("whole loop", latents, known.setdefault((variant, None), latents))
                taken.seconds.append(seconds)
            if handle is not None:
                stats = handle.stats
                taken.history_bytes = stats.history_bytes
                taken.cache_ms = stats.cache_ms if whole else None
                expected = len([step for step in bench.full if whole or step < stop])
                if stats.full_steps != expected:
                    raise WrongResult(f"expected {expected} full steps, got {stats.full_steps}")
            if taken.full_ms is None:
                taken.full_ms, taken.skipped_ms = bench.step_ms(stop if cached else PARITY_STEPS + 1)
            taken.peak_bytes = bench.peak() or None
            if variant.graphs:
                if not _graphs(handle).replays:
                    return "nothing was captured"
                taken.graphs_bytes = _graphs(handle).nbytes
    return None


def variants_of(bench: Bench, compiled: bool, notes: Notes) -> list[Variant]:
    """List the variants that a model can be run in here, and that pass their parity check."""
    granularities = []
    for granularity in ("stack", "module"):
        name = f"{bench.model.name}, {granularity}"
        if granularity == "module" and not bench.module_fits():
            notes.leave(name, "its history does not fit in memory")
        elif not bench.affords(PARITY_STEPS):
            notes.leave(name, "out of time")
        else:
            try:
                check_parity(bench, granularity)
                granularities.append(granularity)
            except Exception as error:
                notes.fail(f"{name}, interval=1", error)
    graphs: tuple[bool | str, ...] = (False, "skipped", "full") if bench.device == "cuda" else (False,)
    found = [Variant(None), *(Variant(g, graph) for graph in graphs for g in granularities)]
    if compiled:
        found.append(Variant(None, compiled=True))
        graphs = tuple(graph for graph in graphs if graph != "skipped")
        found += [Variant("stack", graph, compiled=True) for graph in graphs if "stack" in granularities]
    return found


def measure_model(bench: Bench, compiled: bool, rounds: int, notes: Notes) -> dict[Variant, Measured]:
    """Measure every variant of a model, as far as there is time and memory."""
    name = bench.model.name
    variants = variants_of(bench, compiled, notes)
    whole = bench.affords(sum(bench.cost(variant, whole=True) for variant in variants))
    if not whole:
        notes.leave(f"{name}, whole loops", "out of time; steps are timed alone")
    taken: dict[Variant, Measured] = {}
    if not whole:  # the second step of the parity check is all that is needed of the uncached loop
        taken[variants.pop(0)] = Measured(full_ms=bench.full_seconds * 1e3)
    dropped: set[Variant] = set()
    known: dict[tuple[Variant, int | None], Tensor] = {(Variant(None), PARITY_STEPS): bench.reference}
    for index in range(rounds if whole else 1):
        # there and back: whoever comes after a hot moment is not always the same
        for variant in variants if index % 2 == 0 else variants[::-1]:
            if variant in dropped:
                continue
            if not bench.affords(bench.cost(variant, whole)):
                notes.leave(f"{name}, {variant}, round {index + 1}", "out of time")
                continue
            found = taken.setdefault(variant, Measured())
            try:
                reason = measure_variant(bench, variant, found, known, whole)
                if reason is not None:
                    notes.leave(f"{name}, {variant}", reason)
                    dropped.add(variant)
            except torch.OutOfMemoryError:
                notes.leave(f"{name}, {variant}", "out of memory")
                dropped.add(variant)
            except Exception as error:  # what else was found is worth more than a clean end
                notes.fail(f"{name}, {variant}", error)
                dropped.add(variant)
            release(bench.device)
    return {variant: found for variant, found in taken.items() if variant not in dropped}


def measure(
    device: str,
    models: Sequence[str],
    config: HiCacheConfig,
    steps: int,
    notes: Notes,
    *,
    compiled: bool = False,
    rounds: int = 2,
    deadline: float = float("inf"),
) -> Iterator[list[Row]]:
    """Yield the rows of every variant, model by model.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        models: names in ``MODELS[device]``.
        config: the cache's settings.
        steps: of a whole loop.
        notes: takes what does not fit, and what fails.
        compiled: also run with compiled blocks: uncached and the stack.
        rounds: whole loops of each variant, at most.
        deadline: of ``time.monotonic()``, past which nothing more is begun.
    """
    if device == "cpu":
        notes.leave("CUDA graphs", "a CPU has none")
    for key in models:
        model = MODELS[device][key]
        if time.monotonic() + _LEAST[device] > deadline:
            notes.leave(model.name, "out of time")
            continue
        try:
            bench = Bench(model, config, steps, device, deadline)
            yield rows_of(bench, measure_model(bench, compiled, rounds, notes))
            del bench
        except torch.OutOfMemoryError:
            notes.leave(model.name, "it does not fit in memory")
        except Exception as error:  # the other models are still worth their time
            notes.fail(model.name, error)
        if compiled:
            torch.compiler.reset()  # or the next model's blocks count as other shapes of this one's
        release(device)


def rows_of(bench: Bench, taken: dict[Variant, Measured]) -> list[Row]:
    """Make a row of every variant that was measured."""
    parameters = sum(parameter.numel() for parameter in bench.transformer.parameters())
    seconds = {variant: median(found.seconds) for variant, found in taken.items()}

    def over(baseline: Variant, variant: Variant) -> float | None:
        slow, fast = seconds.get(baseline), seconds[variant]
        return None if slow is None or fast is None else slow / fast

    rows = []
    for variant, found in taken.items():
        limit = bound(bench.config, bench.steps) if variant.granularity else 1.0
        alike = over(Variant(None, compiled=variant.compiled), variant)
        rows.append(
            Row(
                bench.model.name,
                bench.model.size,
                parameters,
                str(DTYPES[bench.device]).removeprefix("torch."),
                str(variant),
                bench.config.interval,
                bench.config.order,
                bench.config.warmup,
                bench.steps,
                len(bench.full) if variant.granularity else bench.steps,
                len(found.seconds),
                seconds[variant],
                over(Variant(None), variant),
                limit,
                alike / limit if variant.granularity and alike is not None else None,
                found.full_ms,
                found.skipped_ms,
                found.cache_ms,
                found.history_bytes,
                found.peak_bytes,
                found.graphs_bytes,
                bench.planned_graphs_bytes(variant) if variant.graphs else None,
            )
        )
    return rows


def _graphs(handle: hicache.fast.Handle | None) -> GraphStats:
    return GraphStats() if handle is None else handle.stats.graphs.get("transformer", GraphStats())


def _compare(what: str, latents: Tensor, expected: Tensor) -> None:
    if not torch.isfinite(latents).all():
        raise WrongResult(f"{what}: its latents are not finite")
    if not torch.equal(latents, expected):
        worst = (latents.double() - expected.double()).abs().max()
        raise WrongResult(f"{what}: its latents differ by up to {worst:.3g} where they must be equal")
