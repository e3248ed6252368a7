"""What cannot be, and is said so; the pipeline draws on as before."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any, Final

import diffusers
from torch import nn

import hicache.fast
import hicache.reference
from tests.compatibility.checks import Outcome, apply, refused
from tests.compatibility.registry import Theme
from tests.compatibility.subjects import FEW, Subject

THEME: Final = Theme("Refusals")
_CACHES: Final[dict[str, Callable[[], Any]]] = {
    "FirstBlockCache": lambda: diffusers.FirstBlockCacheConfig(threshold=0.1),
    "PyramidAttentionBroadcast": lambda: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
    "FasterCache": lambda: diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500, tensor_format="BCHW"
    ),
}
_CACHED_BY_DIFFUSERS: Final = ("flux", "qwen", "wan")


def _enable(make: Callable[[], Any], subject: Subject) -> None:
    subject.transformer.enable_cache(make())


def _enable_first(make: Callable[[], Any], subject: Subject) -> None:
    subject.transformer.enable_cache(make())
    apply(subject)


for _name, _make in _CACHES.items():
    for _when, _attempt, _cached in (("before", _enable_first, False), ("after", _enable, True)):
        THEME.situation(
            f"`enable_cache` of {_name}, {_when}",
            f"diffusers' own cache is put in {_when} this one.",
            _CACHED_BY_DIFFUSERS,
        )(functools.partial(refused, functools.partial(_attempt, _make), cached=_cached))


@THEME.situation("`hicache.reference` beside it", "One transformer, two caches.", FEW)
def _reference(name: str) -> Outcome:
    return refused(lambda subject: hicache.reference.apply(subject.pipe), name, cached=True)


for _verb, _copy in {"deepcopy": copy.deepcopy, "pickle": pickle.dumps}.items():

    def _run_copy(name: str, make: Callable[[Any], Any] = _copy) -> Outcome:
        return refused(lambda subject: make(subject.pipe), name, cached=True)

    THEME.situation(f"`{_verb}` of a cached pipeline", "A copy's hooks would reach into the original.", FEW)(
        _run_copy
    )


@THEME.situation("`copy.copy` of a cached transformer", "A copy's hooks would reach into the original.", FEW)
def _shallow(name: str) -> Outcome:
    return refused(lambda subject: copy.copy(subject.transformer), name, cached=True)


@THEME.situation("a pipeline without a transformer", "There is nothing to hook.", ("flux", "sd3"))
def _nothing(name: str) -> Outcome:
    def attempt(subject: Subject) -> None:
        apply(
            Subject(type("Pipeline", (), {"transformer": None, "vae": nn.Linear(1, 1)})(), {}, subject.loop)
        )

    return refused(attempt, name, cached=True)


@THEME.situation(
    '`granularity="module"` of a model without an adapter',
    "Nobody knows its modules.",
    ("z_image", "bria", "hidream"),
)
def _module(name: str) -> Outcome:
    return refused(lambda subject: apply(subject, granularity="module"), name, cached=True)


@THEME.situation("the class of a scheduler", "`scheduler=` is to be an object.", ("flux", "wan"))
def _class(name: str) -> Outcome:
    def attempt(subject: Subject) -> None:
        apply(subject, scheduler=diffusers.FlowMatchEulerDiscreteScheduler)

    return refused(attempt, name, cached=True)


@THEME.situation("an unknown option", '`granularity="block"`.', ("flux",))
def _option(name: str) -> Outcome:
    return refused(lambda subject: apply(subject, granularity="block"), name, cached=True)
