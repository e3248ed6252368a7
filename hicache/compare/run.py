"""Draws the same pictures in full and by every variant, and keeps the numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import hicache.fast
from hicache.compare.clock import LoopClock
from hicache.compare.metrics import Batch, Metric, Score
from hicache.compare.pictures import Array, as_arrays, as_image, data_uri, size_text
from hicache.compare.trail import Callback, Distance, Trail, can_be_watched
from hicache.compare.variants import Variant
from hicache.demo.compare import keep_freed_memory
from hicache.fitting.pictures import Pictures


@dataclass
class Measured:
    """The full run, or a variant.

    Args:
        variant: its settings; None is the full run.
    """

    variant: Variant | None
    seconds: list[float] = field(default_factory=list)  # of all denoising loops, a round each
    full_steps: int = 0
    skipped_steps: int = 0
    places: tuple[int, ...] = ()  # which steps were full
    history_bytes: int = 0
    scores: dict[str, list[float]] = field(default_factory=dict)  # key of a metric → a number a picture
    # of latents after each step, squares summed: of the error, of the full run's; none where not handed out
    squares: list[tuple[float, float]] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)  # as addresses with the data in them

    @property
    def name(self) -> str:
        return "full run" if self.variant is None else self.variant.name

    @property
    def least_seconds(self) -> float:
        """Of the fastest round: what else a machine does only ever adds to them."""
        return min(self.seconds)

    @property
    def errors(self) -> list[float]:
        """Of latents after each step, ``|x - full| / |full|``; none where they are not handed out."""
        return [math.sqrt(off / size) if size else 0.0 for off, size in self.squares]

    def add(self, other: Measured) -> None:
        """Take in what was measured of further pictures."""
        self.seconds = [mine + its for mine, its in zip(self.seconds, other.seconds, strict=True)]
        self.squares = [
            (off + its_off, size + its_size)
            for (off, size), (its_off, its_size) in zip(self.squares, other.squares, strict=True)
        ]
        self.history_bytes = max(self.history_bytes, other.history_bytes)
        for key, numbers in other.scores.items():
            self.scores[key] += numbers
        self.pictures += other.pictures

    def mean(self, key: str) -> float:
        """Of a metric's numbers: infinite where one is, of a picture that equals the full run's."""
        return statistics.fmean(self.scores[key])

    @property
    def bound(self) -> float:
        """Steps / full steps."""
        return (self.full_steps + self.skipped_steps) / max(1, self.full_steps)


@dataclass
class Comparison:
    """A full run beside its variants, on the same prompts and noise.

    Args:
        asked: prompts, seeds and the pipeline's other arguments.
        metrics: those measured.
        full: the full run.
        variants: the others, as they were asked for.
        size: of a picture, in words.
    """

    asked: Pictures
    metrics: Sequence[Metric]
    full: Measured
    variants: list[Measured]
    size: str = ""

    def speedup(self, measured: Measured) -> float:
        """Wall clock, of denoising loops."""
        return self.full.least_seconds / measured.least_seconds

    def add(self, other: Comparison) -> None:
        """Take in a comparison of further pictures, by the same variants."""
        asked, further = self.asked, other.asked
        self.asked = replace(
            asked, prompts=asked.prompts + further.prompts, seeds=asked.seeds + further.seeds
        )
        for mine, its in zip((self.full, *self.variants), (other.full, *other.variants), strict=True):
            mine.add(its)

    def worst_first(self, measured: Measured | None = None) -> list[int]:
        """Indices of pictures, by PSNR of one variant or, with None, by the lowest of any."""
        of = self.variants if measured is None else [measured]
        return sorted(range(len(self.asked)), key=lambda at: min(one.scores["psnr"][at] for one in of))


def compare(
    pipe: Any,
    asked: Pictures,
    variants: Sequence[Variant],
    metrics: Mapping[Metric, Score],
    *,
    rounds: int = 3,
    granularity: str = "auto",
    backend: str = "auto",
    on_step: Callable[[], None] = lambda: None,
) -> Comparison:
    """Draw, time and judge.

    In each round every variant has its turn, batch by batch, beside the full run of the same batch; before
    what is timed comes an untimed run, in which threads are started and histories allocated. Pictures and
    latents are those of the first round's untimed runs; of latents one batch is held at a time.

    Args:
        pipe: a pipeline of diffusers, not cached.
        asked: what is drawn. ``call`` has the number of steps.
        variants: what is compared.
        metrics: what judges, PSNR among it.
        rounds: how often each is timed.
        granularity: as for :func:`hicache.fast.apply`.
        backend: as there.
        on_step: called after every step of any run.

    Raises:
        RuntimeError: a variant failed; the message names it. The pipeline is left as it was.
    """
    keep_freed_memory()
    comparison = Comparison(asked, list(metrics), Measured(None), [Measured(one) for one in variants])
    drawing = _Drawing(pipe, comparison, metrics, granularity, backend)
    clock = LoopClock(pipe, on_step)
    try:
        for first in [True] + [False] * (rounds - 1):
            for measured in (comparison.full, *comparison.variants):
                measured.seconds.append(0.0)
            for batch in asked.batches():
                drawing.batch(batch, clock, first)
    finally:
        clock.stop()
    return comparison


class _Drawing:
    """Draws one batch of pictures after the other by everything that is compared."""

    def __init__(
        self,
        pipe: Any,
        comparison: Comparison,
        metrics: Mapping[Metric, Score],
        granularity: str,
        backend: str,
    ) -> None:
        self._pipe = pipe
        self._comparison = comparison
        self._metrics = metrics
        self._granularity, self._backend = granularity, backend
        self._watched = can_be_watched(pipe)
        self._trail = Trail()
        self._distances = [Distance() for _ in comparison.variants]

    def batch(self, batch: Sequence[int], clock: LoopClock, first: bool) -> None:
        """The full run and all variants; pictures are judged in the first round."""
        comparison = self._comparison
        self._trail.forget()
        full = self._timed(comparison.full, batch, clock, self._trail.keep if first else None)
        if first:
            comparison.size = comparison.size or size_text(full)
            self._judge(comparison.full, batch, full, full)
        for measured, distance in zip(comparison.variants, self._distances, strict=True):
            try:
                callback = distance.against(self._trail) if first else None
                pictures = self._timed(measured, batch, clock, callback)
            except Exception as error:
                raise RuntimeError(f"{measured.name}: {error}") from error
            if first:
                self._judge(measured, batch, pictures, full)
                measured.squares = distance.read()

    def _timed(
        self, measured: Measured, batch: Sequence[int], clock: LoopClock, callback: Callback | None
    ) -> list[Array]:
        """Pictures of an untimed run; seconds are those of the one after it."""
        variant = measured.variant
        cached = (
            nullcontext()
            if variant is None
            else hicache.fast.apply(
                self._pipe, variant.config, granularity=self._granularity, backend=self._backend
            )
        )
        with cached as handle:
            pictures = self._draw(batch, callback)
            clock.read()
            self._draw(batch, None)
            measured.seconds[-1] += clock.read()
            if handle is not None:
                stats = handle.stats
                measured.full_steps, measured.skipped_steps = stats.full_steps, stats.skipped_steps
                measured.places = stats.places
                measured.history_bytes = max(measured.history_bytes, stats.history_bytes)
            else:
                measured.full_steps = self._comparison.asked.call["num_inference_steps"]
        return pictures

    def _draw(self, batch: Sequence[int], callback: Callback | None) -> list[Array]:
        arguments = self._comparison.asked.arguments(batch, "np")
        if callback is not None and self._watched:
            arguments["callback_on_step_end"] = callback
        return as_arrays(self._pipe(**arguments)[0])

    def _judge(
        self, measured: Measured, batch: Sequence[int], pictures: list[Array], full: list[Array]
    ) -> None:
        judged = Batch(pictures, full, [self._comparison.asked.prompts[index] for index in batch])
        for metric, score in self._metrics.items():
            if measured.variant is not None or not metric.compares:
                measured.scores.setdefault(metric.key, []).extend(score(judged))
        measured.pictures += [data_uri(as_image(picture)) for picture in pictures]
