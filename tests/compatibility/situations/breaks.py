"""Runs that are broken off, and callbacks that change what is drawn."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import torch

import hicache.fast
from hicache import HiCacheConfig
from tests.compatibility.checks import (
    FRESH,
    INTERVAL_1,
    Outcome,
    afterwards,
    apply,
    as_reference,
    draw,
    draw_alone,
    require,
    same,
)
from tests.compatibility.registry import Theme
from tests.compatibility.situations import weights
from tests.compatibility.situations.requests import other_prompt
from tests.compatibility.subjects import FAMILIES, FEW, MOST, Subject, build
from tests.support.runs import blocks_of

THEME: Final = Theme("Runs that are broken off, and callbacks")
# pipelines whose callbacks are of the newer kind
_CALLBACKS: Final = tuple(name for name in MOST if name in FAMILIES and name not in ("dit", "pixart"))
Callback = Callable[..., Any]


class _Stopped(Exception):
    """A run is called off."""


def _at(step: int, do: Callable[[Any, dict[str, Any]], None]) -> Callback:
    """A callback that does something once."""

    def callback(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index == step:
            do(pipe, tensors)
        return tensors

    return callback


def _interrupt(pipe: Any, tensors: Any) -> None:
    pipe._interrupt = True


def _raise(error: type[BaseException], pipe: Any, tensors: Any) -> None:
    raise error


def _called_off(how: Callable[[Any, Any], None], step: int, name: str) -> Outcome:
    def event(subject: Subject, handle: hicache.fast.Handle) -> None:
        kept = dict(subject.arguments)
        other_prompt(subject)
        try:
            subject.draw(callback_on_step_end=_at(step, how))
        except (_Stopped, KeyboardInterrupt):
            pass
        else:
            require(how is _interrupt, "nothing was raised")
        subject.arguments = kept

    return afterwards(event, name)


for _name, _how in {
    "`pipe._interrupt`": _interrupt,
    "an exception in a callback": functools.partial(_raise, _Stopped),
    "KeyboardInterrupt in a callback": functools.partial(_raise, KeyboardInterrupt),
}.items():
    THEME.situation(_name, "In the middle of a run of another prompt; the next run is whole.", _CALLBACKS)(
        functools.partial(_called_off, _how, 4)
    )


def _broken_in_a_block(error: type[BaseException], name: str) -> Outcome:
    def event(subject: Subject, handle: hicache.fast.Handle) -> None:
        blocks = blocks_of(subject.transformer)
        for calls, block in ((1, blocks[0]), (3, blocks[-1])):
            left = [calls]

            def broken(*_: Any, left: list[int] = left) -> None:
                left[0] -= 1
                if left[0] == 0:
                    raise error

            hook = block.register_forward_pre_hook(broken)
            try:
                subject.draw()
            except error:
                pass
            else:
                raise AssertionError("nothing was raised")
            finally:
                hook.remove()

    return afterwards(event, name)


THEME.situation(
    "KeyboardInterrupt in a block", "In the first block at the first step, in the last at a later one.", MOST
)(functools.partial(_broken_in_a_block, KeyboardInterrupt))
THEME.situation(
    "out of memory in a block", "`torch.OutOfMemoryError`, in the first and in the last block.", FEW
)(functools.partial(_broken_in_a_block, torch.OutOfMemoryError))


# Callbacks that change what is drawn.


def _with_callback(do: Callable[[Any, dict[str, Any]], None], *tensors: str) -> dict[str, Any]:
    return {
        "callback_on_step_end": _at(4, do),
        "callback_on_step_end_tensor_inputs": ["latents", *tensors],
    }


def _louder(pipe: Any, tensors: dict[str, Any]) -> None:
    tensors["latents"] = tensors["latents"] * 1.1


@THEME.situation("a callback that changes latents", "After the fifth step.", _CALLBACKS)
def _latents(name: str) -> Outcome:
    return as_reference(lambda subject: subject.arguments.update(_with_callback(_louder)), name)


def _reworded(pipe: Any, tensors: dict[str, Any]) -> None:
    tensors["prompt_embeds"] = tensors["prompt_embeds"] * -0.5


@THEME.situation(
    "a callback that changes the prompt",
    "Other embeddings after the fifth step.",
    ("flux", "flux_cfg", "flux2", "qwen", "sd3", "wan", "wan22", "ltx", "cogvideox"),
)
def _prompt(name: str) -> Outcome:
    lived, alone = build(name), build(name)
    for subject in (lived, alone):
        subject.arguments.update(_with_callback(_reworded, "prompt_embeds"))
    with apply(lived) as handle:
        first = draw(lived, handle)
        drawn = draw(lived, handle)
    fresh = draw_alone(alone)
    same(drawn, fresh)
    same(first, fresh)
    plain = alone.draw()
    with apply(alone, HiCacheConfig(interval=1)):
        require(torch.equal(alone.draw(), plain), "interval 1 is not the uncached run")
    return Outcome(f"{FRESH}, {INTERVAL_1}", fresh.granularity)


def _weigh(pipe: Any, tensors: dict[str, Any]) -> None:
    pipe.transformer.set_adapters(["default"], weights=[0.3])


@THEME.situation(
    "a callback that weighs LoRA anew",
    "`set_adapters(..., weights=0.3)` after the fifth step; the next run is as a fresh one of that weight.",
    ("flux", "qwen", "sd3", "hunyuan", "wan"),
)
def _lora(name: str) -> Outcome:
    lived, alone = build(name), build(name)
    for subject in (lived, alone):
        weights.add(subject, name)
    with apply(lived) as handle:
        lived.draw(**_with_callback(_weigh))
        drawn = draw(lived, handle)
    _weigh(alone.pipe, {})
    fresh = draw_alone(alone)
    same(drawn, fresh)
    return Outcome(FRESH, fresh.granularity)


@THEME.situation(
    "a callback that turns guidance off",
    "`pipe._guidance_scale = 0` after the fifth step, as diffusers' documentation has it.",
    ("qwen", "wan", "cogvideox"),
)
def _guidance(name: str) -> Outcome:
    def off(pipe: Any, tensors: dict[str, Any]) -> None:
        pipe._guidance_scale = 1.0

    return as_reference(lambda subject: subject.arguments.update(_with_callback(off)), name)
