"""Schedulers other than a family's own, and runs that begin or go otherwise."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Final

import diffusers
import numpy as np
from PIL import Image

from tests.compatibility.checks import Change, Outcome, as_reference, between
from tests.compatibility.registry import Theme
from tests.compatibility.situations.requests import with_arguments
from tests.compatibility.subjects import STEPS, Subject, build
from tests.support.models import Arguments
from tests.support.schedulers import flow_matching

THEME: Final = Theme("Schedulers, and runs of other timesteps")

_FLOW: Final = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
# A scheduler, and the models that take it.
_SCHEDULERS: Final[dict[str, tuple[Callable[[], Any], tuple[str, ...]]]] = {
    "Euler, flow matching, shifted": (
        lambda: flow_matching(shift=3.0),
        ("flux", "flux2", "chroma", "qwen", "sd3", "wan", "wan22", "hunyuan", "ltx", "sana"),
    ),
    "Euler, flow matching, stochastic": (
        lambda: flow_matching(stochastic_sampling=True),
        ("flux", "qwen", "sd3", "hunyuan", "sana"),
    ),
    "Heun, flow matching (two calls a step)": (
        diffusers.FlowMatchHeunDiscreteScheduler,
        ("sd3", "wan", "sana"),
    ),
    "LCM, flow matching": (diffusers.FlowMatchLCMScheduler, ("flux", "sd3", "qwen")),
    "UniPC": (
        lambda: diffusers.UniPCMultistepScheduler(**_FLOW, flow_shift=3.0),
        ("flux", "qwen", "sd3", "wan", "wan22", "hunyuan", "ltx", "sana"),
    ),
    "DPM++ 2M": (
        lambda: diffusers.DPMSolverMultistepScheduler(**_FLOW, flow_shift=3.0),
        ("sd3", "wan", "wan22", "sana"),
    ),
    "DPM++ 2M, noise prediction": (diffusers.DPMSolverMultistepScheduler, ("dit", "pixart")),
    "UniPC, noise prediction": (diffusers.UniPCMultistepScheduler, ("dit", "pixart")),
    "Euler, noise prediction": (diffusers.EulerDiscreteScheduler, ("dit", "pixart")),
    "Euler ancestral": (diffusers.EulerAncestralDiscreteScheduler, ("dit", "pixart")),
    "Heun, noise prediction (two calls a step)": (diffusers.HeunDiscreteScheduler, ("dit", "pixart")),
    "DDPM": (diffusers.DDPMScheduler, ("dit", "pixart")),
    "LCM": (diffusers.LCMScheduler, ("pixart",)),
    "DPM of CogVideoX": (diffusers.CogVideoXDPMScheduler, ("cogvideox",)),
}


def _put_in(make: Callable[[], Any]) -> Change:
    def change(subject: Subject) -> None:
        subject.pipe.scheduler = make()

    return change


def _of(make: Callable[[], Any], name: str) -> Outcome:
    return as_reference(_put_in(make), name)


for _name, (_make, _models) in _SCHEDULERS.items():
    THEME.situation(f"scheduler: {_name}", "In the pipeline before it is cached.", _models)(
        functools.partial(_of, _make)
    )


@THEME.situation(
    "a scheduler put in after `apply()`",
    "Another object, with another shift or of another class, after the first run.",
    ("flux", "flux2", "qwen", "sd3", "wan", "wan22", "hunyuan", "ltx", "sana", "pixart", "dit"),
)
def _swapped(name: str) -> Outcome:
    other = {"pixart": diffusers.EulerDiscreteScheduler, "dit": diffusers.DPMSolverMultistepScheduler}
    return between(_put_in(other.get(name, lambda: flow_matching(shift=3.0))), name)


_SIGMAS: Final = np.linspace(1.0, 0.15, STEPS).tolist()


@THEME.situation(
    "sigmas of one's own",
    "`sigmas=` in the call.",
    ("flux", "flux_cfg", "flux_kontext", "flux2", "flux2_klein", "chroma", "qwen", "sd3", "hunyuan", "sana"),
)
def _sigmas(name: str) -> Outcome:
    return as_reference(with_arguments(sigmas=_SIGMAS), name)


@THEME.situation("timesteps of one's own", "`timesteps=` in the call.", ("pixart", "sana"))
def _timesteps(name: str) -> Outcome:
    def prepare(subject: Subject) -> None:
        if name == "pixart":
            subject.pipe.scheduler = diffusers.DPMSolverMultistepScheduler()
        subject.arguments["timesteps"] = np.linspace(999, 90, STEPS).astype(int).tolist()

    return as_reference(prepare, name)


# The pipeline that draws from a given picture or video, whose autoencoder it takes, and what it is given.
_GIVEN: Final[dict[str, tuple[str, str, Callable[[], Arguments]]]] = {
    "flux": ("FluxImg2ImgPipeline", "flux_controlnet", lambda: {"image": _picture(64)}),
    "sd3": ("StableDiffusion3Img2ImgPipeline", "sd3_controlnet", lambda: {"image": _picture(64)}),
    "qwen": ("QwenImageImg2ImgPipeline", "qwen_edit", lambda: {"image": _picture(64)}),
    "wan": ("WanVideoToVideoPipeline", "wan", lambda: {"video": [_picture(64)] * 9}),
}


def _picture(size: int) -> Image.Image:
    return Image.new("RGB", (size, size), "teal")


def _from_a_picture(strength: float, subject: Subject, name: str) -> None:
    kind, lender, given = _GIVEN[name]
    cls = getattr(diffusers, kind)
    wanted = inspect.signature(cls).parameters
    parts = {key: part for key, part in subject.pipe.components.items() if key in wanted}
    subject.pipe = cls(**{**parts, "vae": build(lender).pipe.vae})
    subject.pipe.set_progress_bar_config(disable=True)
    subject.steps = 12
    subject.arguments.update(strength=strength, **given())
    for argument in set(subject.arguments) - set(inspect.signature(cls.__call__).parameters):
        del subject.arguments[argument]


@THEME.situation("a run that begins late", "Image to image, or video to video, with `strength=0.7`.", _GIVEN)
def _strength(name: str) -> Outcome:
    return as_reference(lambda subject: _from_a_picture(0.7, subject, name), name)


@THEME.situation("another strength", "0.9 after 0.7.", _GIVEN)
def _strengths(name: str) -> Outcome:
    return between(
        with_arguments(strength=0.9), name, before=lambda subject: _from_a_picture(0.7, subject, name)
    )
