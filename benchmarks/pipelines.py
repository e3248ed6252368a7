"""Whole denoising loops, uncached and cached, timed in one run: ``python -m benchmarks.pipelines``.

The transformers have their true size and random weights on a GPU, and are small ones of the same classes on a
CPU; there is no text encoder and no autoencoder. Correctness first: with ``interval=1`` the cached loop must
equal the uncached one bit for bit, and replayed graphs the same steps run eagerly. Then whole loops are
timed in turn, after a warm-up each, and the steps of a further loop one by one.

A variant that fails its check is not timed. The clock is watched: a model whose loops do not fit has its
steps timed alone, and what was left out is said.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
from torch import Tensor

import hicache.fast
from benchmarks.denoisers import MODELS, Model, build, denoise, random_inputs
from benchmarks.gate import WrongResult
from benchmarks.machine import available_bytes
from benchmarks.pipeline_rows import Row, line, page, place, write_csv
from hicache import HiCacheConfig
from hicache.cuda_graphs.runner import GraphRunner
from hicache.schedule import bound, full_steps
from hicache.stats import GraphStats

_DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
_PROVED = 2  # steps the gate compares with interval=1: one that is learned from, one that is not
_LEAST = {"cuda": 30.0, "cpu": 3.0}  # seconds left, below which no model is begun
_MARGIN = 1.15  # over what full steps alone take


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


@dataclass(frozen=True)
class Variant:
    """A way to run a loop."""

    granularity: str | None  # None: uncached
    graphs: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        parts = [self.granularity or "uncached"]
        parts += ["CUDA graphs"] * self.graphs + ["compiled"] * self.compiled
        return ", ".join(parts)


@dataclass
class Taken:
    """What was measured of one variant."""

    seconds: list[float] = field(default_factory=list)
    full_ms: float | None = None
    skipped_ms: float | None = None
    cache_ms: float | None = None
    history_bytes: int = 0
    peak_bytes: int | None = None


class Marks:
    """Milliseconds between calls, each of which waits until the device is idle."""

    def __init__(self, device: str) -> None:
        self.ms: list[float] = []
        self._device = device
        self._last: Any = None

    def __call__(self) -> None:
        now: Any
        if self._device == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
            now.synchronize()
            if self._last is not None:
                self.ms.append(self._last.elapsed_time(now))
        else:
            now = time.perf_counter()
            if self._last is not None:
                self.ms.append((now - self._last) * 1e3)
        self._last = now


class Bench:
    """One model, its inputs and its loop.

    Args:
        model: of ``MODELS``.
        config: the cache's settings.
        steps: of a whole loop.
        device: ``"cuda"`` or ``"cpu"``.
        deadline: of ``time.monotonic()``.
    """

    def __init__(self, model: Model, config: HiCacheConfig, steps: int, device: str, deadline: float) -> None:
        self.model, self.config, self.steps, self.device = model, config, steps, device
        self._deadline = deadline
        dtype = _DTYPES[device]
        self.transformer = build(model, device, dtype)
        self.inputs = random_inputs(model, self.transformer, device, dtype)
        self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.full = full_steps(config, steps)
        self.reset_peak()
        weights = self.peak()
        marks = Marks(device)
        self.reference = self.run(_PROVED, marks)
        self.activations = self.peak() - weights
        self.full_seconds = marks.ms[-1] / 1e3

    def run(self, stop: int | None = None, mark: Callable[[], None] | None = None) -> Tensor:
        """The loop, or its first steps."""
        return denoise(self.transformer, self.inputs, self.scheduler, self.steps, stop, mark)

    def timed(self) -> tuple[Tensor, float]:
        """A whole loop, and its seconds."""
        self._synchronize()
        start = time.perf_counter()
        latents = self.run()
        self._synchronize()
        return latents, time.perf_counter() - start

    def step_ms(self, stop: int) -> tuple[float | None, float | None]:
        """Milliseconds of a full and of a skipped step of a loop's first ``stop`` steps, medians."""
        marks = Marks(self.device)
        self.run(stop, marks)
        full = [ms for step, ms in enumerate(marks.ms) if step in self.full]
        skipped = [ms for step, ms in enumerate(marks.ms) if step not in self.full]
        return _median(full[1:] or full), _median(skipped)

    def apply(self, variant: Variant, config: HiCacheConfig | None = None) -> hicache.fast.Handle:
        """Cache the transformer as a variant does."""
        assert variant.granularity is not None
        return hicache.fast.apply(
            self.transformer,
            config or self.config,
            scheduler=self.scheduler,
            granularity=variant.granularity,
            cuda_graphs=variant.graphs,
        )

    def first_steps(self, variant: Variant, whole: bool) -> int:
        """Steps a variant is warmed up with; those that are then timed by themselves.

        Of a cached one, beside whole loops: over two intervals, as full steps are captured at the second
        time and skipped ones after that. Without: to the last skipped step after the warm-up.
        """
        if variant.granularity is None:
            return _PROVED
        warmup, interval = self.config.warmup, self.config.interval
        return min(self.steps, warmup + 2 * interval + 1 if whole else warmup + max(1, interval - 1))

    def cost(self, variant: Variant, whole: bool) -> int:
        """Full steps of :func:`measure_variant`."""
        first = self.first_steps(variant, whole)
        if variant.granularity is None:
            return first + _PROVED + 1 + self.steps * whole
        runs = 3 if variant.graphs else 2
        return runs * sum(step < first for step in self.full) + len(self.full) * whole

    def affords(self, steps: float) -> bool:
        """Whether there is time for so many full steps."""
        return time.monotonic() + _MARGIN * self.full_seconds * steps <= self._deadline

    def module_fits(self) -> bool:
        """Whether the history of module granularity fits beside the activations, a graph's included."""
        self.free()
        plan = hicache.fast.plan(
            self.transformer,
            self.config,
            **self.model.drawn,
            granularity="module",
            dtype=_DTYPES[self.device],
        )
        return plan.history_bytes + 2 * self.activations <= 0.9 * available_bytes(self.device)

    def free(self) -> None:
        """Give back memory that nobody uses."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def reset_peak(self) -> None:
        """Count the bytes allocated at most from here on."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Bytes allocated at most since :meth:`reset_peak`; 0 on a CPU, where nobody counts."""
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else 0

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def prove(bench: Bench, granularity: str) -> None:
    """The gate: a cache that skips nothing changes nothing.

    Raises:
        WrongResult: it does.
    """
    config = HiCacheConfig(interval=1, order=bench.config.order)
    with bench.apply(Variant(granularity), config):
        _compare(f"{bench.model.name}, {granularity}, interval=1", bench.run(_PROVED), bench.reference)


def measure_variant(
    bench: Bench, variant: Variant, taken: Taken, known: dict[tuple[Variant, int | None], Tensor], whole: bool
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
    with _compiled(bench.transformer) if variant.compiled else nullcontext():
        if variant.graphs and (variant, stop) not in known:
            with mock.patch.object(GraphRunner, "usable", return_value=False), bench.apply(variant):
                known[variant, stop] = bench.run(stop)
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
                taken.full_ms, taken.skipped_ms = bench.step_ms(stop if cached else _PROVED + 1)
            taken.peak_bytes = bench.peak() or None
            if variant.graphs and not _graphs(handle).replays:
                return "nothing was captured"
    return None


def variants_of(bench: Bench, compiled: bool, notes: Notes) -> list[Variant]:
    """All variants that a model can be run in here, and that pass the gate."""
    granularities = []
    for granularity in ("stack", "module"):
        name = f"{bench.model.name}, {granularity}"
        if granularity == "module" and not bench.module_fits():
            notes.leave(name, "its history does not fit in memory")
        elif not bench.affords(_PROVED):
            notes.leave(name, "out of time")
        else:
            try:
                prove(bench, granularity)
                granularities.append(granularity)
            except Exception as error:
                notes.fail(f"{name}, interval=1", error)
    graphs = (False, True) if bench.device == "cuda" else (False,)
    found = [Variant(None), *(Variant(g, graph) for graph in graphs for g in granularities)]
    if compiled:
        found.append(Variant(None, compiled=True))
        found += [Variant("stack", graph, compiled=True) for graph in graphs if "stack" in granularities]
    return found


def measure_model(bench: Bench, compiled: bool, rounds: int, notes: Notes) -> dict[Variant, Taken]:
    """What was measured of every variant of a model, as far as there was time and memory."""
    name = bench.model.name
    variants = variants_of(bench, compiled, notes)
    whole = bench.affords(sum(bench.cost(variant, whole=True) for variant in variants))
    if not whole:
        notes.leave(f"{name}, whole loops", "out of time; steps are timed alone")
    taken: dict[Variant, Taken] = {}
    if not whole:  # the gate's second step is all that is needed of the uncached loop
        taken[variants.pop(0)] = Taken(full_ms=bench.full_seconds * 1e3)
    dropped: set[Variant] = set()
    known: dict[tuple[Variant, int | None], Tensor] = {(Variant(None), _PROVED): bench.reference}
    for index in range(rounds if whole else 1):
        # there and back: whoever comes after a hot moment is not always the same
        for variant in variants if index % 2 == 0 else variants[::-1]:
            if variant in dropped:
                continue
            if not bench.affords(bench.cost(variant, whole)):
                notes.leave(f"{name}, {variant}, round {index + 1}", "out of time")
                continue
            found = taken.setdefault(variant, Taken())
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
            bench.free()
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
    """Rows of every variant, model by model.

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
            yield _rows(bench, measure_model(bench, compiled, rounds, notes))
            del bench
        except torch.OutOfMemoryError:
            notes.leave(model.name, "it does not fit in memory")
        except Exception as error:  # the other models are still worth their time
            notes.fail(model.name, error)
        if compiled:
            torch.compiler.reset()  # or the next model's blocks count as other shapes of this one's
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def _rows(bench: Bench, taken: dict[Variant, Taken]) -> list[Row]:
    parameters = sum(parameter.numel() for parameter in bench.transformer.parameters())
    seconds = {variant: _median(found.seconds) for variant, found in taken.items()}

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
                str(_DTYPES[bench.device]).removeprefix("torch."),
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


@contextmanager
def _compiled(transformer: Any) -> Iterator[None]:
    """Its blocks compiled, for as long as this lasts; what is compiled once is kept by torch."""
    # compile_repeated_blocks() does the same where the class names its blocks, which SD3's does not
    lists = [part for part in transformer.children() if isinstance(part, torch.nn.ModuleList)]
    blocks = [block for part in lists for block in part]
    for block in blocks:
        block.compile()
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None  # what compile() set


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def run(
    device: str,
    models: Sequence[str],
    config: HiCacheConfig,
    steps: int,
    minutes: float,
    *,
    compiled: bool = False,
    rounds: int = 2,
    csv: Path | None = None,
    markdown: Path | None = None,
) -> Notes:
    """Measure, print and write, model by model: what was found is kept, come what may.

    Returns:
        Notes: what was left out, and what failed.
    """
    deadline = time.monotonic() + 60 * minutes
    print("; ".join(place(device)), flush=True)
    notes, rows = Notes(), list[Row]()
    for block in measure(
        device, models, config, steps, notes, compiled=compiled, rounds=rounds, deadline=deadline
    ):
        for row in block:
            print(line(row), flush=True)
        rows += block
        if csv:
            write_csv(csv, rows, device)
        if markdown:
            markdown.write_text(page(rows, [*notes.failed, *notes.left_out], device))
    return notes


def main() -> None:
    known = {device: list(models) for device, models in MODELS.items()}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU where there is one")
    parser.add_argument("--models", nargs="+", help=f"default: all, in this order: {known}")
    parser.add_argument("--steps", type=int, default=50, help="of a loop")
    parser.add_argument("--interval", type=int, default=7)
    parser.add_argument("--order", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2, help="loops of each variant, at most; medians count")
    parser.add_argument("--compiled", action="store_true", help="also run with compiled blocks")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything, about")
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    options = parser.parse_args()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: no CUDA device")
    models = options.models or known[device]
    if unknown := sorted(set(models) - set(known[device])):
        parser.error(
            f"--models: unknown on {device}: {', '.join(unknown)}; known: {', '.join(known[device])}"
        )
    if options.steps <= _PROVED or options.rounds < 1:
        parser.error(f"expected --steps > {_PROVED} and --rounds >= 1")
    notes = run(
        device,
        models,
        HiCacheConfig(interval=options.interval, order=options.order, warmup=options.warmup),
        options.steps,
        options.minutes,
        compiled=options.compiled,
        rounds=options.rounds,
        csv=options.csv,
    )
    if notes.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
