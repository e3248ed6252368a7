"""Small pipelines whose denoiser is a U-Net, with random weights: they run offline on a CPU in a second.

``build(name)`` returns ``(pipe, arguments)``, for :func:`tests.support.pipelines.draw`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from tests.support.models import Arguments
from tests.support.pipelines import Built, autoencoder, plain_picture

_BLOCKS = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "cross_attention_dim": 8,
}
_DOWN, _UP = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
_XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
}


def unet(**changes: Any) -> diffusers.UNet2DConditionModel:
    """A U-Net of a picture's latents."""
    given = {**_BLOCKS, "in_channels": 4, "out_channels": 4, "down_block_types": _DOWN, "up_block_types": _UP}
    return diffusers.UNet2DConditionModel(**{**given, **changes}).eval()


def controlnet() -> diffusers.ControlNetModel:
    """A ControlNet of :func:`unet`, whose residuals are not zero."""
    made = diffusers.ControlNetModel(
        **{name: value for name, value in _BLOCKS.items() if name != "sample_size"},
        in_channels=4,
        down_block_types=_DOWN,
        conditioning_embedding_out_channels=(4, 4, 4, 8),
    ).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.05)
    return made


def _pipeline(kind: str, model: nn.Module, scheduler: Any, **parts: Any) -> Any:
    cls = getattr(diffusers, kind)
    required = [p.name for p in inspect.signature(cls).parameters.values() if p.default is p.empty]
    given = {"scheduler": scheduler, "unet": model, "vae": autoencoder(4), **parts}
    return cls(**{**dict.fromkeys(required), **given})


def _text_encoder(projected: bool = False) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=8,
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return kind(config).eval()


def _prompts(encoder: Any, batch: int) -> tuple[Arguments, Arguments]:
    """Embeddings of prompts and of negative ones; and pooled ones, where the encoder has them."""
    embeds: Arguments = {}
    pooled: Arguments = {}
    for index, name in enumerate(("", "negative_")):
        tokens = torch.arange(batch * 6).view(batch, 6) * (index + 3) % 31
        with torch.no_grad():
            output = encoder(tokens, output_hidden_states=True)
        embeds[f"{name}prompt_embeds"] = output.hidden_states[-1]
        pooled[f"{name}pooled_prompt_embeds"] = getattr(output, "text_embeds", None)
    return embeds, pooled


def sd15(
    kind: str = "StableDiffusionPipeline",
    scheduler: Callable[[], Any] = diffusers.DDIMScheduler,
    guided: bool = True,
    batch: int = 1,
    channels: int = 4,
    nets: int = 0,
    **more: Any,
) -> Built:
    """Stable Diffusion 1.5.

    Args:
        kind: of pipeline.
        scheduler: makes one.
        guided: with classifier-free guidance: one call a step of twice the batch.
        batch: prompts drawn at once.
        channels: that the U-Net takes.
        nets: ControlNets.
        **more: what the pipeline is called with, besides.
    """
    encoder = _text_encoder()
    parts: Arguments = {"requires_safety_checker": False} if "Control" not in kind else {}
    if nets:
        found = [controlnet() for _ in range(nets)]
        parts["controlnet"] = found[0] if nets == 1 else diffusers.MultiControlNetModel(found)
    pipe = _pipeline(kind, unet(in_channels=channels), scheduler(), text_encoder=encoder, **parts)
    embeds, _ = _prompts(encoder, batch)
    if not guided:
        embeds.pop("negative_prompt_embeds")
    return pipe, {**embeds, "guidance_scale": 5.0 if guided else 1.0, "output_type": "latent", **more}


def sdxl(
    kind: str = "StableDiffusionXLPipeline",
    scheduler: Callable[[], Any] = diffusers.EulerDiscreteScheduler,
    guided: bool = True,
    batch: int = 1,
    **more: Any,
) -> Built:
    """Stable Diffusion XL: arguments as of :func:`sd15`."""
    encoder = _text_encoder(projected=True)
    pipe = _pipeline(kind, unet(**_XL), scheduler(), text_encoder_2=encoder)
    embeds, pooled = _prompts(encoder, batch)
    prompts = {**embeds, **pooled}
    if not guided:
        prompts = {name: value for name, value in prompts.items() if not name.startswith("negative")}
    return pipe, {**prompts, "guidance_scale": 5.0 if guided else 1.0, "output_type": "latent", **more}


_SIZE: Arguments = {"height": 64, "width": 64}
_GIVEN: Arguments = {"image": plain_picture(), "strength": 0.75}
_MASK = plain_picture("black")
_MASK.paste("white", (0, 0, 32, 64))
_MASKED: Arguments = {**_GIVEN, "mask_image": _MASK, **_SIZE}
_dpm = functools.partial(diffusers.DPMSolverMultistepScheduler, use_karras_sigmas=True)

PIPELINES: dict[str, Callable[..., Built]] = {
    "sd15": functools.partial(sd15, **_SIZE),
    "sd15_unguided": functools.partial(sd15, guided=False, **_SIZE),
    "sd15_many": functools.partial(sd15, batch=2, **_SIZE),
    "sd15_euler": functools.partial(sd15, scheduler=diffusers.EulerDiscreteScheduler, **_SIZE),
    "sd15_dpm": functools.partial(sd15, scheduler=_dpm, **_SIZE),
    "sd15_heun": functools.partial(sd15, scheduler=diffusers.HeunDiscreteScheduler, **_SIZE),
    "sd15_img2img": functools.partial(sd15, "StableDiffusionImg2ImgPipeline", **_GIVEN),
    "sd15_inpaint": functools.partial(sd15, "StableDiffusionInpaintPipeline", channels=9, **_MASKED),
    "sdxl": functools.partial(sdxl, **_SIZE),
    "sdxl_unguided": functools.partial(sdxl, guided=False, **_SIZE),
    "sdxl_dpm": functools.partial(sdxl, scheduler=_dpm, **_SIZE),
    "sdxl_heun": functools.partial(sdxl, scheduler=diffusers.HeunDiscreteScheduler, **_SIZE),
    "sdxl_img2img": functools.partial(sdxl, "StableDiffusionXLImg2ImgPipeline", **_GIVEN),
    "sdxl_inpaint": functools.partial(sdxl, "StableDiffusionXLInpaintPipeline", **_MASKED),
}
CONTROLNETS: dict[str, Callable[..., Built]] = {
    "sd15_controlnet": functools.partial(
        sd15, "StableDiffusionControlNetPipeline", nets=1, image=plain_picture("red"), **_SIZE
    ),
    "sd15_controlnets": functools.partial(
        sd15,
        "StableDiffusionControlNetPipeline",
        nets=2,
        image=[plain_picture("red"), plain_picture("blue")],
        controlnet_conditioning_scale=[0.7, 0.4],
        **_SIZE,
    ),
}


def build(name: str, **changes: Any) -> Built:
    """A pipeline from a fixed seed, and what it is called with."""
    torch.manual_seed(0)
    pipe, arguments = {**PIPELINES, **CONTROLNETS}[name](**changes)
    pipe.set_progress_bar_config(disable=True)
    return pipe, arguments
