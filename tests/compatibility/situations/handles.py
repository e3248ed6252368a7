"""Runs as they are, and what can be done with a handle."""

from __future__ import annotations

import tempfile
from typing import Any, Final

import torch

import hicache.fast
from hicache import HiCacheConfig
from tests.compatibility.checks import (
    FRESH,
    Outcome,
    afterwards,
    apply,
    as_reference,
    draw,
    draw_alone,
    plain_run,
    refused,
    require,
    same,
)
from tests.compatibility.registry import Theme
from tests.compatibility.subjects import (
    BARE,
    FEW,
    MOST,
    PIPELINES,
    UNSKIPPABLE,
    Subject,
    build,
)
from tests.support.comparisons import snapshot
from tests.support.runs import blocks_of

THEME: Final = Theme("Runs and handles")


@THEME.situation("a run", "`apply()`, and a picture.", (*PIPELINES, *BARE))
def _run(name: str) -> Outcome:
    drawn, held_to = plain_run(name)
    return Outcome(held_to, drawn.granularity)


@THEME.situation(
    "a transformer that cannot be skipped",
    "Of a class of diffusers whose blocks have no stand-in.",
    UNSKIPPABLE,
)
def _unskippable(name: str) -> Outcome:
    def attempt(subject: Subject) -> None:
        apply(subject)

    return refused(attempt, name, cached=False)


@THEME.situation("interval 1", "Every step is full: what is drawn is what is drawn uncached.", MOST)
def _interval_1(name: str) -> Outcome:
    subject = build(name)
    plain = subject.draw()
    with apply(subject, HiCacheConfig(interval=1)) as handle:
        require(torch.equal(subject.draw(), plain), "off the uncached run")
        return Outcome("uncached bits", handle.stats.granularity)


@THEME.situation("a second run", "Nothing of the first is in it.", MOST)
def _second(name: str) -> Outcome:
    return afterwards(draw, name)


@THEME.situation(
    "`remove()`",
    "Classes, attributes, hooks and `state_dict` are as they were, and so is the uncached picture.",
    (*MOST, "dit", "cogvideox", "ltx", "chroma", "mochi", "kandinsky5", "bria"),
)
def _remove(name: str) -> Outcome:
    subject = build(name)
    plain = subject.draw()
    before = [snapshot(part) for part in subject.transformers]
    handle = apply(subject)
    drawn = draw(subject, handle)
    handle.remove()
    require([snapshot(part) for part in subject.transformers] == before, "something is left")
    require(torch.equal(subject.draw(), plain), "draws something else")
    return Outcome("as if never cached", drawn.granularity)


@THEME.situation("`release()` between runs", "The history is freed and allocated anew.", FEW)
def _release(name: str) -> Outcome:
    def event(subject: Subject, handle: hicache.fast.Handle) -> None:
        draw(subject, handle)
        handle.release()
        require(handle.stats.history_bytes == 0, "history is held")

    return afterwards(event, name)


@THEME.situation("`apply()` again, other settings", "The later settings are those of the next run.", FEW)
def _again(name: str) -> Outcome:
    lived = build(name)
    draw(lived, apply(lived, HiCacheConfig(interval=2, order=1), granularity="stack"))
    with apply(lived) as handle:
        drawn = draw(lived, handle)
    fresh, held_to = plain_run(name)
    same(drawn, fresh)
    return Outcome(f"{FRESH}, {held_to}", fresh.granularity)


@THEME.situation(
    "`apply()` inside `with apply()`", "The inner one replaces the outer one, which then leaves nothing.", FEW
)
def _nested(name: str) -> Outcome:
    lived = build(name)
    plain = lived.draw()
    with apply(lived, HiCacheConfig(interval=2)) as outer:
        draw(lived, outer)
        with apply(lived) as inner:
            drawn = draw(lived, inner)
    require(torch.equal(lived.draw(), plain), "the pipeline is still cached")
    fresh, held_to = plain_run(name)
    same(drawn, fresh)
    return Outcome(f"{FRESH}, {held_to}", fresh.granularity)


@THEME.situation("`last_step_full=True`", "The last step runs its blocks.", FEW)
def _last_step(name: str) -> Outcome:
    return as_reference(lambda subject: None, name, HiCacheConfig(interval=3, last_step_full=True))


@THEME.situation(
    "other bases", "`taylor`, `scaled_taylor` and `reuse`, one after the other.", ("flux", "wan", "sd3")
)
def _bases(name: str) -> Outcome:
    outcomes = {
        as_reference(lambda subject: None, name, HiCacheConfig(interval=3, basis=basis))
        for basis in ("taylor", "scaled_taylor", "reuse")
    }
    require(len(outcomes) == 1, "bases differ")
    return outcomes.pop()


@THEME.situation(
    '`granularity="stack"`', "The stack is cached where modules are known.", ("flux", "qwen", "sd3", "wan22")
)
def _stack(name: str) -> Outcome:
    def event(subject: Subject) -> Any:
        return draw_alone(subject, granularity="stack")

    subject = build(name)
    drawn = event(subject)
    again = event(subject)
    same(drawn, again)
    plain = subject.draw()
    with apply(subject, HiCacheConfig(interval=1), granularity="stack"):
        require(torch.equal(subject.draw(), plain), "interval 1 is not the uncached run")
    return Outcome("uncached bits at interval 1", drawn.granularity)


@THEME.situation(
    "`speedup=`",
    "As with the interval that it chooses, set by hand.",
    tuple(name for name in FEW if name not in (*BARE, "wan22")),
)
def _speedup(name: str) -> Outcome:
    lived = build(name)
    with hicache.fast.apply(lived.pipe, speedup=1.8) as handle:
        drawn = draw(lived, handle)
        chosen = handle.stats.config
    fresh = draw_alone(build(name), chosen)
    same(drawn, fresh)
    require(sum(fresh.counts["transformer[0]"]) == lived.steps, "not all steps are counted")
    return Outcome(FRESH, fresh.granularity)


@THEME.situation(
    "`speedup=` of a loop of one's own", "Nothing says how many steps a run has.", ("z_image", "bria")
)
def _speedup_of_a_loop(name: str) -> Outcome:
    return refused(lambda subject: hicache.fast.apply(subject.pipe, speedup=2.0), name, cached=True)


@THEME.situation("`save_pretrained()` while cached", "Keys and numbers of an uncached one are saved.", FEW)
def _save(name: str) -> Outcome:
    def event(subject: Subject, handle: hicache.fast.Handle) -> None:
        draw(subject, handle)
        kept = {key: value.clone() for key, value in subject.transformer.state_dict().items()}
        with tempfile.TemporaryDirectory() as folder:
            subject.transformer.save_pretrained(folder)
            loaded = type(subject.transformer).from_pretrained(folder).state_dict()
        expected = build(name).transformer.state_dict()
        require(list(kept) == list(loaded) == list(expected), "other keys")
        require(all(torch.equal(loaded[key], expected[key]) for key in expected), "other numbers")

    return afterwards(event, name)


@THEME.situation(
    "forty runs",
    "The history takes as many bytes after forty runs as after the first.",
    ("flux", "sd3", "z_image"),
)
def _forty(name: str) -> Outcome:
    def event(subject: Subject, handle: hicache.fast.Handle) -> None:
        subject.steps = 4
        draw(subject, handle)
        held = handle.stats.history_bytes
        for _ in range(39):
            subject.draw()
        require(handle.stats.history_bytes == held > 0, "it grew")
        subject.steps = build(name).steps

    return afterwards(event, name)


@THEME.situation(
    "an infinite feature in the run before",
    "One block gives NaN once; the run warns, the next is whole.",
    FEW,
)
def _nan(name: str) -> Outcome:
    def event(subject: Subject, handle: hicache.fast.Handle) -> None:
        def spoil(module: Any, args: Any, output: Any) -> Any:
            hook.remove()
            parts = output if isinstance(output, tuple) else (output,)
            spoiled = tuple(part if part is None else part * torch.nan for part in parts)
            return spoiled if isinstance(output, tuple) else spoiled[0]

        hook = blocks_of(subject.transformer)[-1].register_forward_hook(spoil)
        warned = draw(subject, handle).warned
        require(any("finite" in message for message in warned), f"no warning: {warned}")

    return afterwards(event, name)
