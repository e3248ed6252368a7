"""Pipelines that share a transformer, in turn and at a time."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import torch
from torch import Tensor

import hicache.fast
from tests.compatibility.checks import (
    CONFIG,
    FRESH,
    Drawn,
    Outcome,
    afterwards,
    apply,
    draw,
    plain_run,
    require,
    same,
)
from tests.compatibility.registry import Theme
from tests.compatibility.situations.requests import other_prompt
from tests.compatibility.subjects import FAMILIES, MOST, Subject, build
from tests.support import pipelines

THEME: Final = Theme("Shared transformers, servers, threads")
_FEW: Final = ("flux_cfg", "qwen", "sd3", "wan22", "hunyuan", "pixart")


def another(subject: Subject) -> Subject:
    """A pipeline of the same parts with a scheduler of its own: the recipe for servers."""
    scheduler = subject.pipe.scheduler.from_config(subject.pipe.scheduler.config)
    pipe = type(subject.pipe).from_pipe(subject.pipe, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return Subject(pipe, dict(subject.arguments), subject.loop, subject.steps)


def _drawn_by(pipe: Subject, handle: hicache.fast.Handle, name: str) -> Outcome:
    drawn = draw(pipe, handle)
    fresh, held_to = plain_run(name)
    same(drawn, fresh)
    return Outcome(f"{FRESH}, {held_to}", fresh.granularity)


@THEME.situation("a pipeline of `from_pipe`", "Made after `apply()`, with a scheduler of its own.", FAMILIES)
def _from_pipe(name: str) -> Outcome:
    subject = build(name)
    with apply(subject) as handle:
        return _drawn_by(another(subject), handle, name)


@THEME.situation("two pipelines in turn", "Run by run, of other prompts, with a shared transformer.", _FEW)
def _in_turn(name: str) -> Outcome:
    subject = build(name)
    with apply(subject) as handle:
        other = another(subject)
        other_prompt(other)
        for _ in range(2):
            draw(other, handle)
            outcome = _drawn_by(subject, handle, name)
        return outcome


@THEME.situation(
    "a run inside another", "A callback draws with another pipeline in the middle of a run.", _FEW
)
def _inside(name: str) -> Outcome:
    subject = build(name)
    with apply(subject) as handle:
        inner = another(subject)
        other_prompt(inner)

        def callback(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
            if step in (2, 5):
                inner.draw()
            return tensors

        outer = another(subject)
        if name == "pixart":  # has callbacks of the older kind
            outer.arguments["callback"] = lambda step, timestep, latents: callback(None, step, timestep, None)
        else:
            outer.arguments["callback_on_step_end"] = callback
        drawn = draw(outer, handle)
    fresh, held_to = plain_run(name)
    require(torch.equal(drawn.picture, fresh.picture), "off the fresh run")
    return Outcome(f"{FRESH}, {held_to}", fresh.granularity)


def _request(subject: Subject, number: int) -> Tensor:
    """The picture of a request with a pipeline of its own."""
    made = another(subject)
    if number % 2:
        other_prompt(made)
    generator = torch.Generator().manual_seed(0)
    return torch.as_tensor(
        made.pipe(num_inference_steps=made.steps, generator=generator, **made.arguments)[0]
    )


@THEME.situation("two threads, three requests each", "Every request has a pipeline of its own.", _FEW)
def _threads(name: str) -> Outcome:
    subject = build(name)
    alone = []
    for number in range(2):
        with apply(subject):
            alone.append(_request(subject, number))
    with apply(subject) as handle, ThreadPoolExecutor(2) as pool:
        drawn = list(pool.map(functools.partial(_request, subject), range(6)))
        require(handle.stats.skipped_steps > 0, "nothing was skipped")
        granularity = handle.stats.granularity
    for number, picture in enumerate(drawn):
        require(torch.equal(picture, alone[number % 2]), f"request {number} is off")
    return Outcome(FRESH, granularity)


@THEME.situation(
    "a server's requests, some called off", "One after the other; every third is interrupted.", _FEW
)
def _server(name: str) -> Outcome:
    def event(subject: Subject, handle: hicache.fast.Handle) -> None:
        for number in range(5):
            made = another(subject)
            if number % 3 == 1:
                stop = functools.partial(_stop, at=4)
                key = "callback" if name == "pixart" else "callback_on_step_end"
                made.arguments[key] = stop
                try:
                    made.draw()
                except KeyboardInterrupt:
                    continue
                raise AssertionError("the request was not called off")
            other_prompt(made)
            made.draw()

    return afterwards(event, name)


def _stop(*given: Any, at: int) -> Any:
    if at in given[:2]:
        raise KeyboardInterrupt
    return given[-1]


@THEME.situation("a copied pipeline object", "Its attributes in a new object, another scheduler.", _FEW)
def _twin(name: str) -> Outcome:
    subject = build(name)
    with apply(subject) as handle:
        twin = object.__new__(type(subject.pipe))
        twin.__dict__.update(vars(subject.pipe))
        twin.scheduler = subject.pipe.scheduler.from_config(subject.pipe.scheduler.config)
        return _drawn_by(Subject(twin, subject.arguments, subject.loop, subject.steps), handle, name)


@THEME.situation(
    "`apply(pipe.transformer)`",
    "Only the transformer is given; the pipeline calls it.",
    [n for n in MOST if n in FAMILIES and n != "wan22"],
)
def _transformer(name: str) -> Outcome:
    subject = build(name)
    with hicache.fast.apply(subject.pipe.transformer, CONFIG) as handle:
        return _drawn_by(subject, handle, name)


@THEME.situation(
    "one of two transformers", "`apply(pipe.transformer_2)`: the other one runs uncached.", ("wan22",)
)
def _second_only(name: str) -> Outcome:
    def one(subject: Subject) -> Drawn:
        with hicache.fast.apply(subject.pipe.transformer_2, CONFIG) as handle:
            return draw(subject, handle)

    lived = build(name)
    one(lived)
    drawn = one(lived)
    fresh = one(build(name))
    same(drawn, fresh)
    return Outcome(FRESH, fresh.granularity)


@THEME.situation(
    "`pipe.transformer` replaced, and `apply()` again",
    "Another transformer is put into the cached pipeline.",
    _FEW,
)
def _replaced_again(name: str) -> Outcome:
    subject = build(name)
    draw(subject, apply(subject))
    subject.pipe.register_modules(transformer=build(name).pipe.transformer)
    with apply(subject) as handle:
        return _drawn_by(subject, handle, name)


@THEME.situation(
    "`pipe.transformer` replaced",
    "Another transformer is put into the cached pipeline, and nothing is done.",
    _FEW,
)
def _replaced(name: str) -> Outcome:
    subject = build(name)
    plain = subject.draw()
    with apply(subject) as handle:
        draw(subject, handle)
        subject.pipe.register_modules(
            **{part: getattr(build(name).pipe, part) for part in pipelines.denoisers(subject.pipe)}
        )
        drawn = draw(subject, handle)
    require(torch.equal(drawn.picture, plain), "off the uncached run")
    require(bool(drawn.warned), "no warning")
    return Outcome(f"uncached bits, warns: {drawn.warned[0]}")
