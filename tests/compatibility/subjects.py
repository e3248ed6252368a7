"""What situations are tried with: small pipelines of every family, and transformers without one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from tests.support import models, pipelines, refused_models
from tests.support.comparisons import cast, flat
from tests.support.models import Arguments
from tests.support.refused_models import REFUSED

STEPS: Final = 7


@dataclass
class Subject:
    """Something that draws pictures, and all that a situation may change of it.

    Args:
        pipe: what ``apply()`` is given: a pipeline or a transformer.
        arguments: what it is called with.
        steps: of a run.
        loop: makes a run of it.
    """

    pipe: Any
    arguments: Arguments
    loop: Callable[[Subject, Arguments], Tensor]
    steps: int = STEPS
    dtype: torch.dtype = torch.float32
    notes: Arguments = field(default_factory=dict)  # what a situation keeps of it

    @property
    def transformer(self) -> Any:
        """The first denoiser."""
        return self.pipe if isinstance(self.pipe, nn.Module) else self.pipe.transformer

    @property
    def transformers(self) -> list[Any]:
        """All denoisers."""
        return [self.pipe] if isinstance(self.pipe, nn.Module) else [*pipelines.denoisers(self.pipe).values()]

    def draw(self, **changes: Any) -> Tensor:
        """Its picture, from a fixed seed."""
        torch.manual_seed(0)  # some pipelines encode their input picture at random
        return self.loop(self, {**self.arguments, **changes})

    def to(self, dtype: torch.dtype) -> None:
        """Move its weights and arguments to another dtype."""
        self.pipe.to(dtype)
        self.arguments = cast(self.arguments, dtype)
        self.dtype = dtype


def _draw_with_pipeline(subject: Subject, arguments: Arguments) -> Tensor:
    return pipelines.draw(subject.pipe, arguments, subject.steps)


def _draw_what_the_transformer_says(said: list[Tensor], subject: Subject, arguments: Arguments) -> Tensor:
    said.clear()
    pipelines.draw(subject.pipe, arguments, subject.steps)
    return torch.stack(said)


def _draw_in_a_loop(call: models.Call, subject: Subject, arguments: Arguments) -> Tensor:
    """All that the transformer says at falling times."""
    said = []
    for t in torch.linspace(1, 0.1, subject.steps):
        with torch.set_grad_enabled(torch.is_grad_enabled() and subject.notes.get("gradients", False)):
            said.append(flat(subject.pipe(**{**cast(call(t), subject.dtype), **arguments})))
    return torch.stack(said)


# of which some are skipped with either transformer
_MORE_STEPS: Final = {"wan22": 12}


def _pipeline(name: str) -> Subject:
    pipe, arguments = pipelines.build_randomized(name)
    return Subject(pipe, arguments, _draw_with_pipeline, _MORE_STEPS.get(name, STEPS))


def _dit() -> Subject:
    """Its pipeline returns pictures that are clamped, in which little shows."""
    subject, said = _pipeline("dit"), list[Tensor]()
    subject.transformer.register_forward_hook(lambda module, args, output: said.append(output[0].clone()))
    subject.loop = functools.partial(_draw_what_the_transformer_says, said)
    return subject


def _bare(name: str) -> Subject:
    model, call = models.build(name)
    pipelines.randomize(model)
    fixed = {key: value for key, value in call(1.0).items() if key != models.MODELS[name].time_name}
    return Subject(model, fixed, functools.partial(_draw_in_a_loop, call))


def _refused(name: str) -> Subject:
    def draw(subject: Subject, arguments: Arguments) -> Tensor:
        raise NotImplementedError(f"{name} is refused")

    return Subject(refused_models.build(name), {}, draw)


@dataclass(frozen=True)
class Model:
    """What stands in the page's column of models.

    Args:
        title: its name there.
        make: builds it anew, the same every time.
    """

    title: str
    make: Callable[[], Subject]


_PIPELINES: Final = {
    "flux": "FLUX.1",
    "flux_cfg": "FLUX.1, true CFG",
    "flux_many": "FLUX.1, true CFG, two prompts",
    "flux_kontext": "FLUX.1 Kontext",
    "flux_controlnet": "FLUX.1 ControlNet",
    "flux_controlnet_xlabs": "FLUX.1 ControlNet of XLabs",
    "flux_ip_adapter": "FLUX.1 IP-Adapter",
    "flux2": "FLUX.2",
    "flux2_many": "FLUX.2, two pictures",
    "flux2_klein": "FLUX.2 Klein",
    "chroma": "Chroma",
    "qwen": "Qwen-Image",
    "qwen_many": "Qwen-Image, two prompts, two pictures each",
    "qwen_controlnet": "Qwen-Image ControlNet",
    "qwen_edit": "Qwen-Image-Edit",
    "qwen_edit_2509": "Qwen-Image-Edit 2509, two pictures given",
    "qwen_edit_plus": "Qwen-Image-Edit 2511",
    "sd3": "SD3",
    "sd3_many": "SD3, two prompts",
    "sd3_skip_layer": "SD3, skip-layer guidance",
    "sd3_controlnet": "SD3 ControlNet",
    "sd3_ip_adapter": "SD3 IP-Adapter",
    "wan": "Wan 2.1",
    "wan_many": "Wan 2.1, two videos",
    "wan22": "Wan 2.2, two transformers",
    "hunyuan": "HunyuanVideo",
    "ltx": "LTX-Video",
    "cogvideox": "CogVideoX",
    "dit": "DiT",
    "pixart": "PixArt",
    "pixart_many": "PixArt, two pictures",
    "sana": "Sana",
    "sana_many": "Sana, two pictures",
}
_BARE: Final = {
    "z_image": "Z-Image, own loop",
    "lumina2": "Lumina2, own loop",
    "hidream": "HiDream, own loop",
    "auraflow": "AuraFlow, own loop",
    "mochi": "Mochi, own loop",
    "hunyuan_video15": "HunyuanVideo 1.5, own loop",
    "kandinsky5": "Kandinsky 5, own loop",
    "bria": "Bria, own loop",
    "cogview4": "CogView4, own loop",
    "wan_vace": "Wan-VACE, own loop",
}
_UNSKIPPABLE: Final = {name: name for name in REFUSED}

MODELS: Final[dict[str, Model]] = {
    **{name: Model(title, functools.partial(_pipeline, name)) for name, title in _PIPELINES.items()},
    **{name: Model(title, functools.partial(_bare, name)) for name, title in _BARE.items()},
    **{name: Model(title, functools.partial(_refused, name)) for name, title in _UNSKIPPABLE.items()},
}
MODELS["dit"] = Model(_PIPELINES["dit"], _dit)
# Sets of models that situations take.
PIPELINES: Final = tuple(_PIPELINES)
BARE: Final = tuple(_BARE)
UNSKIPPABLE: Final = tuple(_UNSKIPPABLE)
# one pipeline of every kind of call
FAMILIES: Final = tuple(name for name in PIPELINES if not name.endswith(("_many", "_xlabs", "_2509")))
ALL: Final = (*FAMILIES, *BARE)
# as many as show most of what sets models apart
MOST: Final = (
    *("flux", "flux2", "qwen", "qwen_edit_plus", "sd3", "wan22", "hunyuan", "pixart", "sana"),
    *("z_image", "hidream"),
)
# a few that have little in common: doubles and singles, two calls a step, one stream, two transformers, a
# table of gates, no adapter
FEW: Final = ("flux", "qwen", "sd3", "wan22", "pixart", "z_image")
VIDEO: Final = ("wan", "wan22", "hunyuan", "ltx", "cogvideox")


def build(name: str) -> Subject:
    """A model from a fixed seed, uncached."""
    return MODELS[name].make()
