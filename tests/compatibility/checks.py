"""What is asked of a situation, and how the answer is worded.

Every answer is a fact about bits, or about a bound that is written down here: nothing measured is in it, so
that it is the same on every machine.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

import hicache.fast
import hicache.reference
from hicache import HiCacheConfig
from tests.compatibility.subjects import Subject, build
from tests.support.comparisons import relative_rms

CONFIG: Final = HiCacheConfig(interval=3)
FRESH: Final = "same as a fresh run"
INTERVAL_1: Final = "uncached bits at interval 1"
# relative root mean square, of pictures in a dtype
BOUNDS: Final = {torch.float32: "2e-5", torch.bfloat16: "0.05", torch.float16: "0.01"}

Change = Callable[[Subject], Any]


class Wrong(Exception):
    """A situation that is not handled: nothing to put down as an outcome."""


@dataclass(frozen=True)
class Outcome:
    """What stands in a row of the page.

    Args:
        text: what came of it.
        cached_by: what was cached, where something was.
    """

    text: str
    cached_by: str = "–"


@dataclass(frozen=True)
class Drawn:
    """A picture, and what the cache says of its run."""

    picture: Tensor
    counts: dict[str, tuple[int, int]]
    granularity: str
    warned: tuple[str, ...]


def require(condition: bool, what: str) -> None:
    """Stop here if something is not as it should be."""
    if not condition:
        raise Wrong(what)


def apply(subject: Subject, config: HiCacheConfig = CONFIG, **options: Any) -> hicache.fast.Handle:
    """Cache a subject."""
    return hicache.fast.apply(subject.pipe, config, **options)


def draw(subject: Subject, handle: hicache.fast.Handle, **changes: Any) -> Drawn:
    """Draw with a cached subject, some of whose steps must be skipped."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        picture = subject.draw(**changes)
    stats = handle.stats
    counts = {name: (found.full_steps, found.skipped_steps) for name, found in stats.contexts.items()}
    said = tuple(str(one.message) for one in caught if str(one.message).startswith("hicache"))
    return Drawn(picture.detach().clone(), counts, stats.granularity, said)


def draw_alone(subject: Subject, config: HiCacheConfig = CONFIG, **options: Any) -> Drawn:
    """Cache a subject that was never cached, and draw."""
    with apply(subject, config, **options) as handle:
        return draw(subject, handle)


def same(lived: Drawn, alone: Drawn) -> None:
    """Make sure that a run is bit by bit another one, and that both skipped steps."""
    require(not lived.warned, f"warns {lived.warned}")
    require(not alone.warned, f"the fresh run warns {alone.warned}")
    require(lived.counts == alone.counts, f"steps: {lived.counts}, in the fresh run {alone.counts}")
    require(lived.granularity == alone.granularity, f"by {lived.granularity}, not {alone.granularity}")
    require(any(skipped for _, skipped in lived.counts.values()), f"nothing was skipped: {lived.counts}")
    require(bool(alone.picture.isfinite().all()), "the fresh run is not finite")
    require(lived.picture.shape == alone.picture.shape, "another shape than the fresh run")
    if not torch.equal(lived.picture, alone.picture):
        raise Wrong(
            f"off the fresh run by {relative_rms(lived.picture.double(), alone.picture.double()):.1e}"
        )


def judge(subject: Subject, drawn: Drawn, config: HiCacheConfig = CONFIG) -> str:
    """Hold a fresh run to the reference, or, of what the reference does not know, to the uncached run."""
    require(not drawn.warned, f"warns {drawn.warned}")
    require(any(skipped for _, skipped in drawn.counts.values()), f"nothing was skipped: {drawn.counts}")
    if drawn.granularity == "module":
        bound = BOUNDS[subject.dtype]
        with hicache.reference.apply(subject.pipe, config):
            expected = subject.draw().double()
        off = relative_rms(drawn.picture.double(), expected)
        require(off <= float(bound), f"off the reference by {off:.1e}")
        return f"within {bound} of the reference"
    plain = subject.draw()
    with apply(subject, HiCacheConfig(interval=1)):
        require(torch.equal(subject.draw(), plain), "interval 1 is not the uncached run")
    require(not torch.equal(plain, drawn.picture), "skipped steps changed nothing")
    return INTERVAL_1


def between(change: Change, name: str, before: Change | None = None) -> Outcome:
    """A cached pipeline draws, is changed, and draws: as one that was changed before it was cached.

    Args:
        change: of the cached pipeline, after its first run; what it raises in a run must be its own.
        name: of the model.
        before: what is done with both before anything is cached.
    """
    lived, alone = build(name), build(name)
    for subject in (lived, alone):
        if before is not None:
            before(subject)
    with apply(lived) as handle:
        draw(lived, handle)
        change(lived)
        drawn = draw(lived, handle)
    change(alone)
    fresh = draw_alone(alone)
    same(drawn, fresh)
    return Outcome(f"{FRESH}, {judge(alone, fresh)}", fresh.granularity)


def afterwards(event: Callable[[Subject, hicache.fast.Handle], Any], name: str) -> Outcome:
    """Something happens to a cached pipeline that is not to reach its next run."""
    lived = build(name)
    with apply(lived) as handle:
        event(lived, handle)
        drawn = draw(lived, handle)
    return _as_plain(drawn, name)


def _as_plain(drawn: Drawn, name: str) -> Outcome:
    fresh, held_to = plain_run(name)
    same(drawn, fresh)
    return Outcome(f"{FRESH}, {held_to}", fresh.granularity)


@functools.cache
def plain_run(name: str) -> tuple[Drawn, str]:
    """The first run of a model that nothing happened to, and what it was held to."""
    subject = build(name)
    drawn = draw_alone(subject)
    return drawn, judge(subject, drawn)


def as_reference(prepare: Change, name: str, config: HiCacheConfig = CONFIG) -> Outcome:
    """A pipeline is prepared, cached, and draws."""
    subject = build(name)
    prepare(subject)
    drawn = draw_alone(subject, config)
    require(not torch.equal(subject.draw(), drawn.picture), "skipped steps changed nothing")
    return Outcome(judge(subject, drawn, config), drawn.granularity)


def refused(attempt: Callable[[Subject], Any], name: str, cached: bool) -> Outcome:
    """Something is refused, and changes nothing.

    Args:
        attempt: what is tried.
        name: of the model.
        cached: whether it is tried with a cached pipeline, which then draws on as before.
    """
    subject = build(name)
    handle = apply(subject) if cached else None
    first = draw(subject, handle) if handle is not None else None
    try:
        attempt(subject)
    except (TypeError, ValueError, RuntimeError) as error:
        message = " ".join(str(error).split())
    else:
        raise Wrong("was not refused")
    require("hicache" in message, f"another error: {message}")
    if handle is not None and first is not None:
        same(draw(subject, handle), first)
        handle.remove()
    return Outcome(f"refused: {message}", first.granularity if first is not None else "–")
