"""Calibrating a pipeline: full runs, a fit, a judgement on held-out pictures, one file."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from hicache.basis import Basis
from hicache.calibration.file import Calibration, Entry
from hicache.calibration.matching import guidance_of, model_keys
from hicache.calibration.rules import Fitted
from hicache.checks import check_whole
from hicache.config import HiCacheConfig
from hicache.fitting import closed_form, trajectory
from hicache.fitting.judge import Judge, Verdict
from hicache.fitting.pictures import Pictures
from hicache.fitting.placing import Placing, freed
from hicache.fitting.replay import Replay
from hicache.fitting.rows import Layout
from hicache.fitting.trajectory import Search
from hicache.pipeline import find_denoisers
from hicache.schedule import Steps

#: How rows are fitted, the best first: gradients of the final error through heads and full steps; through
#: heads alone, with full steps as constants; by ridge regression on full runs, without gradients.
METHODS: Final = ("trajectory", "heads", "closed-form")
#: Where the full steps of a config are: where its schedule has them; where forecasts from them miss least.
PLACES: Final = ("given", "searched")
HELD_OUT: Final = 16  # pictures that judge, where nothing else is said
CHOOSING: Final = 50  # that choose between places, which few pictures cannot
_SHARES: Final = (1.0, 0.5)  # of what was fitted over the prior, tried in turn
_TRIAL: Final = 4  # places are tried with so many times fewer iterations

Rows = dict[str, dict[int, Tensor]]


class CalibrationRefused(RuntimeError):
    """What was fitted draws held-out pictures no better than what it was fitted from."""


@dataclass(frozen=True)
class Progress:
    """Where a calibration is."""

    config: HiCacheConfig
    iteration: int
    iterations: int
    loss: float


def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    configs: Sequence[HiCacheConfig] | None = None,
    num_inference_steps: int = 50,
    call: Mapping[str, Any] | None = None,
    method: str = "trajectory",
    places: str = "given",
    granularity: str = "stack",
    held_out: Sequence[str] | None = None,
    held_out_pictures: int = HELD_OUT,
    search: Search | None = None,
    batch: int = 8,
    seed: int = 0,
    out: str | Path | None = None,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Calibration:
    """Fit rows of coefficients to a model, for the full steps of every config.

    Args:
        pipe: a diffusers pipeline that draws prompts, not cached.
        prompts: to fit to, each with noise of its own; 48 of them serve well.
        configs: settings whose full steps get rows; their bases are where rows begin. None: the defaults.
        num_inference_steps: of the runs the rows are for.
        call: other arguments of the pipeline.
        method: of :data:`METHODS`.
        places: of :data:`PLACES`: ``"searched"`` takes of a config's schedule how many steps are full, and
            searches their places; where those do not draw other pictures better, the schedule's are kept.
        granularity: of :data:`hicache.fitting.features.GRANULARITIES`: ``"stack"``, a row serves all that a
            model computes; ``"module"``, every module's output has rows of its own; ``"output"``, what the
            model returns, as U-Nets need. Places are searched by what the model returns there, else by the
            stack's residual.
        held_out: prompts that judge and are not fitted to; None: ``prompts``, with other noise.
        held_out_pictures: how many pictures judge.
        search: how gradients move rows; of no use to ``"closed-form"``.
        batch: pictures a call of the pipeline where nothing is differentiated.
        seed: of the first picture's noise, and of the order they are taken in; the same file from the same.
        out: the file, written entry by entry. One that is there, of the same settings, is gone on with.
        progress: told how far it is.

    Returns:
        Calibration: with an entry for every config that drew held-out pictures better.

    Raises:
        CalibrationRefused: none did. Nothing is written.
        TypeError, ValueError: bad arguments, or a pipeline that cannot be fitted. It is left as it was.
    """
    if method not in METHODS:
        raise ValueError(f"hicache: expected method to be one of {', '.join(METHODS)}, got {method!r}")
    if places not in PLACES:
        raise ValueError(f"hicache: expected places to be one of {', '.join(PLACES)}, got {places!r}")
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"hicache: expected prompts to be a sequence of strings, got {prompts!r}")
    for name, value in {"held_out_pictures": held_out_pictures, "batch": batch}.items():
        check_whole(f"hicache: {name}", value)
    check_whole("hicache: num_inference_steps", num_inference_steps, 2)
    configs = [HiCacheConfig()] if configs is None else list(configs)
    search = replace(search or Search(), seed=seed, through_full_steps=method == "trajectory")
    arguments = {"num_inference_steps": num_inference_steps, **(call or {})}
    pictures = Pictures(
        tuple(prompts), tuple(range(seed, seed + len(prompts))), arguments, min(batch, len(prompts))
    )
    judging = _others(pictures, held_out or prompts, held_out_pictures, 1)
    choosing = _others(pictures, prompts, CHOOSING, 2) if places == "searched" else None
    work = _Work(pipe, pictures, judging, choosing, method, granularity, search, progress)
    settings = {**work.settings(), "seed": seed}
    entries = _done(out, settings)
    calibration: Calibration | None = None
    # rows begin as what a basis makes of the gaps that may come of it
    begun = [config if choosing is None else freed(config, num_inference_steps) for config in configs]
    priors = {config.weighed_by for config in begun}
    if len(priors) != 1:
        raise ValueError(f"hicache: expected configs of one basis, got {', '.join(map(str, priors))}")
    [prior] = priors
    for asked, config in zip(configs, begun, strict=True):
        layout = work.layout(config)
        if any(_same(entry, layout, choosing is not None) for entry in entries):
            continue
        entry = work.entry(asked, config, layout)
        if entry is None:
            continue
        entries.append(entry)
        calibration = work.file(prior, entries, settings)
        if out is not None:
            calibration.save(out)
    if not entries:
        raise CalibrationRefused(f"hicache: {'; '.join(work.refusals)}: nothing is written")
    return calibration or work.file(prior, entries, settings)


class _Work:
    """What all entries of a calibration share."""

    def __init__(
        self,
        pipe: Any,
        pictures: Pictures,
        judging: Pictures,
        choosing: Pictures | None,
        method: str,
        granularity: str,
        search: Search,
        progress: Callable[[Progress], None],
    ) -> None:
        self._pipe = pipe
        self._pictures = pictures
        self._judging = judging
        self._choosing = choosing
        self._method = method
        self._granularity = granularity
        self._features = Replay(pipe, granularity).features
        self._search = search
        self._progress = progress
        self._target: trajectory.Target | None = None
        self._placing: Placing | None = None
        self._keys = model_keys(find_denoisers(pipe, unets=granularity == "output"))
        self._sigmas: tuple[float, ...] | None = None
        self.refusals: list[str] = []

    def settings(self) -> dict[str, Any]:
        """What the file says of how it was made; no prompts."""
        pictures = self._pictures
        digest = hashlib.sha256("\n".join(pictures.prompts).encode()).hexdigest()[:16]
        plain = {name: value for name, value in pictures.call.items() if _is_plain(value)}
        return {
            "method": self._method,
            "places": "given" if self._choosing is None else "searched",
            **({} if self._features is None else {"features": self._features}),
            "call": plain,
            "prompts": len(pictures),
            "prompts sha256": digest,
            **({} if self._method == "closed-form" else {"search": asdict(self._search)}),
        }

    def layout(self, config: HiCacheConfig) -> Layout:
        """The full steps of a config, and the form of its rows."""
        return Layout.of(config, self._pictures.call["num_inference_steps"], self._features)

    def entry(self, asked: HiCacheConfig, config: HiCacheConfig, layout: Layout) -> Entry | None:
        """What was fitted for a config; None where it is refused.

        Args:
            asked: the config that it is to be better than.
            config: the one that rows are fitted for; its places may be given up for others.
            layout: its full steps.
        """
        if not layout.positions:
            raise ValueError(f"hicache: expected a config that skips steps, got {asked}")
        if self._choosing is not None:
            config = self._better_places(config, layout)
            layout = self.layout(config)
        prior = config.weighed_by
        rows = self._fit(config, layout, self._search)
        before = self._judge.psnr(asked)
        best: tuple[Verdict, Entry] | None = None
        for share in _SHARES:
            entry = self._entry(layout, _towards(rows, layout, prior, share))
            verdict = Verdict(before, self._judge.psnr(self._settings(config, entry)))
            if verdict.better and (best is None or verdict.gain > best[0].gain):
                best = verdict, replace(entry, scores=verdict.scores())
        if best is None:
            self.refusals.append(
                f"rows for {len(layout.full_steps)} full steps change held-out pictures by "
                f"{verdict.gain:+.2f} dB in the mean, which is no gain"
            )
            warnings.warn(f"hicache: {self.refusals[-1]}: they are left out", RuntimeWarning, stacklevel=3)
            return None
        return best[1]

    def _better_places(self, config: HiCacheConfig, layout: Layout) -> HiCacheConfig:
        """The config, or one with other places if that draws better; both with rows of a short fit."""
        with Replay(self._pipe, "output" if self._granularity == "output" else "stack") as replay:
            if self._placing is None:
                self._placing = Placing(replay, self._pictures)
                self._target = self._placing.target
        found = self._placing.found(config)
        if self.layout(found).full_steps == layout.full_steps:
            return config
        search = replace(self._search, iterations=max(1, self._search.iterations // _TRIAL))
        drawn = []
        for one in (config, found):
            own = self.layout(one)
            entry = self._entry(own, self._fit(one, own, search))
            drawn.append(self._chooser.psnr(self._settings(one, entry)))
        return found if Verdict(*drawn).better else config

    @cached_property
    def _judge(self) -> Judge:
        """Whose word goes into the file."""
        return Judge(self._pipe, self._judging, self._granularity)

    @cached_property
    def _chooser(self) -> Judge:
        """Chooses between places."""
        assert self._choosing is not None
        return Judge(self._pipe, self._choosing, self._granularity)

    def _entry(self, layout: Layout, rows: Rows) -> Entry:
        plain = trajectory.plain(rows)
        places = layout.full_steps
        return Entry(layout.num_steps, layout.order, layout.warmup, places, plain, self._sigmas)

    def _settings(self, config: HiCacheConfig, entry: Entry) -> HiCacheConfig:
        """As users will run it."""
        fitted = Fitted(self.file(config.weighed_by, [entry], {}))
        return replace(config, basis=fitted, schedule=Steps(*entry.full_steps))

    def file(self, prior: Basis, entries: Sequence[Entry], settings: Mapping[str, Any]) -> Calibration:
        """The file of some entries."""
        guidance, granularity = guidance_of(self._pipe), self._granularity
        return Calibration(self._keys, guidance, prior, tuple(entries), settings, granularity)

    def _fit(self, config: HiCacheConfig, layout: Layout, search: Search) -> Rows:
        prior = config.weighed_by
        with Replay(self._pipe, self._granularity) as replay:
            if self._method == "closed-form":
                rows = closed_form.fit(replay, layout, prior, self._pictures)
                self._sigmas = replay.sigmas
                return rows
            if self._target is None:
                self._target = trajectory.full_runs(replay, self._pictures)
            self._sigmas = self._target.sigmas

            def told(iteration: int, loss: float) -> None:
                self._progress(Progress(config, iteration, search.iterations, loss))

            return trajectory.fit(replay, layout, prior, self._pictures, self._target, search, told)


def _towards(rows: Rows, layout: Layout, prior: Basis, share: float) -> Rows:
    """Rows between the prior's and what was fitted."""
    return {
        context: {
            step: layout.row(prior, step) + share * (row - layout.row(prior, step))
            for step, row in own.items()
        }
        for context, own in rows.items()
    }


def _others(pictures: Pictures, prompts: Sequence[str], count: int, kind: int) -> Pictures:
    """Pictures with noise that nothing was fitted to, and that those of another kind do not have."""
    drawn = [prompts[index % len(prompts)] for index in range(count)]
    first = max(pictures.seeds) + kind * 1_000_003
    return replace(
        pictures,
        prompts=tuple(drawn),
        seeds=tuple(range(first, first + count)),
        batch=min(pictures.batch, count),
    )


def _done(out: str | Path | None, settings: Mapping[str, Any]) -> list[Entry]:
    """The entries of a file that is there.

    Raises:
        ValueError: it was made with other settings.
    """
    from hicache.calibration.reader import load

    if out is None or not Path(out).exists():
        return []
    held = load(out)
    if json.loads(json.dumps(dict(held.settings))) != json.loads(json.dumps(dict(settings))):
        raise ValueError(f"hicache: {out} was made with other settings: {dict(held.settings)}")
    return list(held.entries)


def _same(entry: Entry, layout: Layout, searched: bool) -> bool:
    """Whether an entry is of these full steps, or of as many where their places were searched."""
    if len(entry.full_steps) != len(layout.full_steps):
        return False
    mine = (layout.num_steps, layout.order, layout.warmup)
    same = searched or entry.full_steps == layout.full_steps
    return same and (entry.num_steps, entry.order, entry.warmup) == mine


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
