"""Guidance in other ways than a pipeline's own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Final

import diffusers
import torch
from diffusers.hooks import LayerSkipConfig, SmoothedEnergyGuidanceConfig
from diffusers.modular_pipelines.wan.denoise import WanDenoiseStep
from torch import Tensor

from hicache import HiCacheConfig
from tests.compatibility.checks import (
    FRESH,
    INTERVAL_1,
    Outcome,
    apply,
    as_reference,
    between,
    draw,
    draw_alone,
    require,
    same,
)
from tests.compatibility.registry import Theme
from tests.compatibility.situations.requests import with_arguments
from tests.compatibility.subjects import Subject, build
from tests.support.models import Arguments, noise
from tests.support.schedulers import flow_matching

THEME: Final = Theme("Guidance")

# Perturbed-attention guidance: a third prediction in the batch.
_PAG: Final = {
    "sd3": ("StableDiffusion3PAGPipeline", "transformer_blocks.1"),
    "pixart": ("PixArtSigmaPAGPipeline", "blocks.0"),
    "sana": ("SanaPAGPipeline", "transformer_blocks.0"),
}


@THEME.situation("perturbed attention (PAG)", "diffusers' PAG pipeline of the model.", _PAG)
def _pag(name: str) -> Outcome:
    kind, layers = _PAG[name]

    def prepare(subject: Subject) -> None:
        cls = getattr(diffusers, kind)
        wanted = inspect.signature(cls).parameters
        parts = {key: part for key, part in subject.pipe.components.items() if key in wanted}
        subject.pipe = cls(**parts, pag_applied_layers=[layers])
        subject.pipe.set_progress_bar_config(disable=True)
        subject.arguments["pag_scale"] = 2.0

    return as_reference(prepare, name)


@THEME.situation(
    "other layers skipped", "Skip-layer guidance of layer 0, then of layer 1.", ("sd3_skip_layer",)
)
def _layers(name: str) -> Outcome:
    return between(with_arguments(skip_guidance_layers=[1]), name)


@THEME.situation(
    "skip-layer guidance begins", "Not in the first run, but in the second.", ("sd3_skip_layer",)
)
def _layers_begin(name: str) -> Outcome:
    return between(
        with_arguments(skip_guidance_layers=[0]), name, before=with_arguments(skip_guidance_layers=None)
    )


@THEME.situation(
    "guidance embedded, another scale",
    "`guidance_scale` of a model that embeds it.",
    ("flux", "flux2", "hunyuan"),
)
def _embedded(name: str) -> Outcome:
    return between(with_arguments(guidance_scale=7.0), name)


@THEME.situation(
    "weight of the picture prompt",
    "`set_ip_adapter_scale` between runs.",
    ("flux_ip_adapter", "sd3_ip_adapter"),
)
def _ip_scale(name: str) -> Outcome:
    def change(subject: Subject) -> None:
        for processor in subject.transformer.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale = [0.3] if isinstance(processor.scale, list) else 0.3

    return between(change, name)


@THEME.situation(
    "weight of the control picture",
    "`controlnet_conditioning_scale` between runs.",
    ("flux_controlnet", "flux_controlnet_xlabs", "qwen_controlnet", "sd3_controlnet"),
)
def _control_scale(name: str) -> Outcome:
    return between(with_arguments(controlnet_conditioning_scale=0.3), name)


@THEME.situation(
    "control of some steps",
    "`control_guidance_start=0.2`, `control_guidance_end=0.7`, with a warm-up of one step.",
    ("flux_controlnet", "flux_controlnet_xlabs", "qwen_controlnet", "sd3_controlnet"),
)
def _control_interval(name: str) -> Outcome:
    interval = with_arguments(control_guidance_start=0.2, control_guidance_end=0.7)
    return as_reference(interval, name, HiCacheConfig(interval=3, warmup=1))


# Guiders of diffusers' modular pipelines.
_SKIP: Final = LayerSkipConfig([1], fqn="blocks")
_GUIDERS: Final[dict[str, Callable[[], Any]]] = {
    "ClassifierFreeGuidance": lambda: diffusers.ClassifierFreeGuidance(3.0),
    "ClassifierFreeGuidance, first half": lambda: diffusers.ClassifierFreeGuidance(3.0, stop=0.5),
    "ClassifierFreeGuidance, from 40% on": lambda: diffusers.ClassifierFreeGuidance(3.0, start=0.4),
    "ClassifierFreeZeroStarGuidance": lambda: diffusers.ClassifierFreeZeroStarGuidance(3.0),
    "AdaptiveProjectedGuidance": lambda: diffusers.AdaptiveProjectedGuidance(3.0),
    "TangentialClassifierFreeGuidance": lambda: diffusers.TangentialClassifierFreeGuidance(3.0),
    "SkipLayerGuidance": lambda: diffusers.SkipLayerGuidance(3.0, skip_layer_config=_SKIP),
    "AutoGuidance": lambda: diffusers.AutoGuidance(3.0, auto_guidance_config=_SKIP),
    "PerturbedAttentionGuidance": lambda: diffusers.PerturbedAttentionGuidance(
        3.0,
        perturbed_guidance_config=LayerSkipConfig(
            [1], fqn="blocks", skip_attention=False, skip_ff=False, skip_attention_scores=True
        ),
    ),
    "SmoothedEnergyGuidance": lambda: diffusers.SmoothedEnergyGuidance(
        3.0, seg_guidance_config=SmoothedEnergyGuidanceConfig([1], fqn="blocks")
    ),
}


def _modular(make: Callable[[], Any], subject: Subject, arguments: Arguments) -> Tensor:
    """A picture of Wan's modular denoising loop, with a new guider."""
    pipe = WanDenoiseStep().init_pipeline()
    pipe.blocks.set_progress_bar_config(disable=True)
    scheduler = flow_matching()
    scheduler.set_timesteps(subject.steps)
    pipe.update_components(transformer=subject.transformer, scheduler=scheduler, guider=make())
    prompts = {name: value for name, value in arguments.items() if name.endswith("prompt_embeds")}
    given = {"latents": noise(1, 16, 3, 2, 2), "dtype": torch.float32, **prompts}
    drawn = pipe(**given, timesteps=scheduler.timesteps, num_inference_steps=subject.steps, output="latents")
    assert isinstance(drawn, Tensor)
    return drawn


def _guided(make: Callable[[], Any], name: str) -> Outcome:
    lived, alone = build(name), build(name)
    for subject in (lived, alone):
        subject.loop = functools.partial(_modular, make)
    with apply(lived) as handle:
        draw(lived, handle)
        drawn = draw(lived, handle)
    fresh = draw_alone(alone)
    same(drawn, fresh)
    plain = alone.draw()
    with apply(alone, HiCacheConfig(interval=1)):
        require(torch.equal(alone.draw(), plain), "interval 1 is not the uncached run")
    return Outcome(f"{FRESH}, {INTERVAL_1}", fresh.granularity)


for _name, _make in _GUIDERS.items():
    THEME.situation(f"modular pipeline: {_name}", "A second run of the modular denoising loop.", ("wan",))(
        functools.partial(_guided, _make)
    )
