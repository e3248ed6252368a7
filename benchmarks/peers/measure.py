"""Measures one method at one setting, beside the uncached loop of the same process."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.judging import Subject
from benchmarks.common.machine import place
from benchmarks.peers import counting
from benchmarks.peers.counting import BlockCounter
from benchmarks.peers.method import Method
from benchmarks.peers.models import MODELS, load
from benchmarks.peers.rows import Row
from hicache.demo.compare import keep_freed_memory, psnr, ssim
from hicache.demo.pipeline import ShapesPipeline

_TOGETHER = 8  # pictures in a loop


class Bench:
    """A model, what it draws in full, and what that takes.

    Args:
        name: of the model.
        subjects: what is drawn.
        full: file that keeps the pictures drawn in full, for processes to come.

    Raises:
        RuntimeError: the file's pictures are not what is drawn here.
    """

    def __init__(self, name: str, subjects: Sequence[Subject], full: Path) -> None:
        keep_freed_memory()
        self._name, self.subjects = name, subjects
        self._steps = MODELS[name].steps
        self._plain = load(name)
        self._full = self._draw_in_full(full)
        self._operators = statistics.median(counting.operators_of(self._plain, subjects[:1], self._steps))
        before = counting.held_bytes_at_rest()
        self._bytes = counting.most_bytes_of(self._plain, subjects[:1], self._steps) - before

    def _draw_in_full(self, path: Path) -> list[Tensor]:
        kept: list[Tensor] = torch.load(path) if path.exists() else []
        first = counting.draw(self._plain, self.subjects[:1], self._steps)
        if kept and not torch.equal(kept[0], first):
            raise RuntimeError(
                f"{path}: its first picture is not the one that is drawn here; remove the file"
            )
        missing = self.subjects[len(kept) :]
        if missing:
            kept += [counting.draw(self._plain, [subject], self._steps) for subject in missing]
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(kept, path)
        return kept[: len(self.subjects)]

    def row(self, method: Method, setting: float, old: Row | None, judge: bool, rounds: int) -> Row:
        """Measure a setting; where the method does not apply, the row says why.

        Args:
            method: what caches.
            setting: of its knob.
            old: its row so far: what is not measured now stays.
            judge: compare pictures, count operators and bytes.
            rounds: of timing, over as many pictures; none at 0.
        """
        row = old or Row(method.name, method.package, method.knob, setting, method.runs_blocks)
        pipe = load(self._name)
        before = counting.held_bytes_at_rest()
        counter = BlockCounter(pipe.transformer)
        try:
            method.apply(pipe, setting, self._steps)
            drawn = self.subjects if judge else self.subjects[:rounds]
            if judge:
                most = counting.most_bytes_of(pipe, self.subjects[:1], self._steps) - before
            latents, shares = self._drawn(pipe, counter, drawn, 1 if method.looks else _TOGETHER)
            if judge:
                row = self._judged(row, latents, shares)
                operators = counting.operators_of(pipe, self.subjects[:1], self._steps)
                row = replace(
                    row,
                    skipped_operators=_of_skipped([operators], shares),
                    full_operators=self._operators,
                    cache_bytes=max(0, most - self._bytes),
                )
            if rounds:
                row = self._timed(row, pipe, shares[:rounds])
        except Exception as error:  # a peer's limits are a result; ours has none here, and a test says so
            row = replace(row, note=f"{type(error).__name__}: {error}".split("\n")[0])
        return replace(row, **place("cpu", "diffusers", "cache-dit", "hicache-pp")._asdict())

    def counted(self, method: Method, setting: float, row: Row) -> Row:
        """A row with its operators counted anew, of one picture; the rest stays."""
        pipe = load(self._name)
        counter = BlockCounter(pipe.transformer)
        method.apply(pipe, setting, self._steps)
        _, shares = self._drawn(pipe, counter, self.subjects[:1], 1)
        operators = counting.operators_of(pipe, self.subjects[:1], self._steps)
        return replace(
            row, skipped_operators=_of_skipped([operators], shares), full_operators=self._operators
        )

    def _drawn(
        self, pipe: ShapesPipeline, counter: BlockCounter, subjects: Sequence[Subject], together: int
    ) -> tuple[Tensor, list[list[float]]]:
        """Draw pictures, a few in a loop; latents of all, and of each the share of the blocks by step."""
        latents, shares = [], []
        for start in range(0, len(subjects), together):
            some = subjects[start : start + together]
            drawn, steps = counting.shares_of(pipe, counter, some, self._steps)
            latents.append(drawn)
            shares += [steps] * len(some)
        return torch.cat(latents), shares

    def _judged(self, row: Row, latents: Tensor, shares: Sequence[Sequence[float]]) -> Row:
        full_steps = [sum(map(counting.is_full, steps)) for steps in shares]
        row = replace(
            row,
            note="",
            pictures=len(latents),
            full_steps=statistics.mean(full_steps),
            blocks_run=statistics.mean(statistics.mean(steps) for steps in shares),
        )
        if not MODELS[self._name].judged:
            return row
        full, cached = (self._plain.decode(each, "np") for each in (torch.cat(self._full), latents))
        closeness, likeness = psnr(full, cached), ssim(full, cached)
        return replace(
            row,
            psnr_mean=float(np.mean(closeness)),
            psnr_worst=min(closeness),
            ssim_mean=float(np.mean(likeness)),
            ssim_worst=min(likeness),
        )

    def _timed(self, row: Row, pipe: ShapesPipeline, shares: Sequence[Sequence[float]]) -> Row:
        """Time both loops in turn, a picture a round."""
        pairs = []
        for subject in self.subjects[: len(shares)]:
            pairs.append(
                [counting.step_seconds_of(one, [subject], self._steps) for one in (self._plain, pipe)]
            )
        plain, cached = ([pair[index] for pair in pairs] for index in (0, 1))
        full_seconds, seconds = (statistics.median(map(sum, loops)) for loops in (plain, cached))
        skipped = _of_skipped(cached, shares)
        return replace(
            row,
            seconds=seconds,
            full_seconds=full_seconds,
            speedup=full_seconds / seconds,
            skipped_ms=None if skipped is None else 1e3 * skipped,
            full_ms=1e3 * statistics.median(second for loop in plain for second in loop),
        )


def _of_skipped(values: Sequence[Sequence[float]], shares: Sequence[Sequence[float]]) -> float | None:
    """Return the median over the steps at which not all blocks ran; None without any."""
    found = [
        value
        for steps, ran in zip(values, shares, strict=False)
        for value, share in zip(steps, ran, strict=True)
        if not counting.is_full(share)
    ]
    return statistics.median(found) if found else None
