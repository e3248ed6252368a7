"""Pipelines of every family whose modules are known, with random weights that make every gate count.

Each builder returns ``(pipe, arguments)`` as those of :mod:`tiny` do. :func:`record` notes the calls a
pipeline makes of its transformer, :func:`replay` makes them again, of any dtype.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import diffusers
import tiny
import torch
import zoo
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterTimeImageProjection,
    MultiIPAdapterImageProjection,
)
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from PIL import Image
from tiny import Built, builder, flow_matching, noise
from torch import Tensor, nn

# (args, kwargs) of one call; the calls of one step; those of a run
Call = tuple[tuple[Any, ...], dict[str, Any]]
Run = list[list[Call]]


def lively(model: nn.Module) -> nn.Module:
    """Draw weights anew: gates, tables, biases and norms of a size that shows in the output."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith("scale_shift_table"):
            values = values * 0.5
        elif parameter.ndim >= 2:
            values = values * 0.8 * (parameter.shape[0] / parameter.numel()) ** 0.5
        else:
            values = values * 0.2 + ("norm" in name and name.endswith("weight"))
        parameter.data.copy_(values)
    return model


# Pipelines that tiny has not.


def _kl(latent_channels: int) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=1,
        shift_factor=0.1,
    ).eval()


def _text_encoders(count: int) -> dict[str, None]:
    names = ("", "_2", "_3")[:count]
    return {f"{part}{name}": None for name in names for part in ("text_encoder", "tokenizer")}


@builder
def flux_kontext() -> Built:
    """The given picture's tokens follow those of the picture drawn."""
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    ).eval()
    pipe = diffusers.FluxKontextPipeline(
        scheduler=flow_matching(), vae=None, transformer=transformer, **_text_encoders(2)
    )
    _, arguments = tiny.flux()
    return pipe, {**arguments, "image": noise(1, 16, 8, 8), "max_area": 64 * 64, "_auto_resize": False}


@builder
def flux_controlnet(xlabs: bool = False) -> Built:
    """Residuals after the doubles and singles; those of XLabs' controlnets repeat over the blocks."""
    transformer = tiny.flux_transformer(3, 3)
    config = {**transformer.config, "num_layers": 2, "num_single_layers": 0 if xlabs else 2}
    if xlabs:
        config |= {"conditioning_embedding_channels": 1, "patch_size": 2}
    controlnet = diffusers.FluxControlNetModel.from_config(config)
    pipe = diffusers.FluxControlNetPipeline(
        scheduler=flow_matching(),
        vae=_kl(1),
        transformer=transformer,
        controlnet=lively(controlnet.eval()),
        **_text_encoders(2),
    )
    _, arguments = tiny.flux()
    return pipe, {**arguments, "control_image": Image.new("RGB", (64, 64), "teal")}


@builder
def flux_ip_adapter() -> Built:
    """Attentions of the doubles give a third output, which is added without a gate."""
    pipe, arguments = tiny.flux_cfg()
    projection = ImageProjection(image_embed_dim=8, cross_attention_dim=32, num_image_text_embeds=4)
    pipe.transformer.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    for block in pipe.transformer.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(32, 32))
    pictures = {
        "ip_adapter_image_embeds": [noise(1, 1, 8)],
        "negative_ip_adapter_image_embeds": [-noise(1, 1, 8)],
    }
    return pipe, {**arguments, **pictures}


@builder
def flux_many() -> Built:
    """Two prompts."""
    pipe, arguments = tiny.flux_cfg()
    return pipe, {
        **arguments,
        "prompt_embeds": noise(2, 6, 32),
        "pooled_prompt_embeds": noise(2, 32),
        "negative_prompt_embeds": noise(2, 6, 32) * 0.5,
        "negative_pooled_prompt_embeds": noise(2, 32) * 0.5,
    }


@builder
def qwen_many() -> Built:
    """Two prompts of different lengths, masked, with two pictures each."""
    pipe, arguments = tiny.qwen()
    lengths = torch.tensor([[5], [3]])
    return pipe, {
        **arguments,
        "prompt_embeds": noise(2, 5, 16),
        "prompt_embeds_mask": (torch.arange(5) < lengths).long(),
        "negative_prompt_embeds": noise(2, 4, 16) * 0.5,
        "negative_prompt_embeds_mask": (torch.arange(4) < lengths - 1).long(),
        "num_images_per_prompt": 2,
    }


def _qwen_vae() -> Any:
    pipe, _ = tiny.qwen_edit()
    return pipe.vae


@builder
def qwen_controlnet() -> Built:
    transformer = tiny.qwen_transformer()
    controlnet = diffusers.QwenImageControlNetModel.from_transformer(
        transformer, num_layers=1, attention_head_dim=16, num_attention_heads=3, extra_condition_channels=0
    )
    pipe = diffusers.QwenImageControlNetPipeline(
        scheduler=flow_matching(),
        vae=_qwen_vae(),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        controlnet=lively(controlnet.eval()),
    )
    size = {"height": 32, "width": 32}
    return pipe, {**tiny.qwen_prompts(), **size, "control_image": Image.new("RGB", (32, 32), "teal")}


@builder
def sd3_many() -> Built:
    """Two prompts, the two branches in one batch."""
    pipe, arguments = tiny.sd3()
    return pipe, {
        **arguments,
        "prompt_embeds": noise(2, 6, 32),
        "pooled_prompt_embeds": noise(2, 64),
        "negative_prompt_embeds": noise(2, 6, 32) * 0.5,
        "negative_pooled_prompt_embeds": noise(2, 64) * 0.5,
    }


@builder
def sd3_controlnet() -> Built:
    pipe, arguments = tiny.sd3()
    controlnet = diffusers.SD3ControlNetModel.from_transformer(
        pipe.transformer,
        num_layers=2,
        num_extra_conditioning_channels=0,
        load_weights_from_transformer=False,
    )
    pipe = diffusers.StableDiffusion3ControlNetPipeline(
        scheduler=flow_matching(),
        vae=_kl(4),
        transformer=pipe.transformer,
        controlnet=lively(controlnet.eval()),
        **_text_encoders(3),
    )
    return pipe, {**arguments, "control_image": Image.new("RGB", (64, 64), "teal")}


@builder
def cogvideox() -> Built:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        time_embed_dim=8,
        text_embed_dim=8,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=6,
        use_rotary_positional_embeddings=True,
    ).eval()
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=transformer,
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )
    return pipe, {
        "prompt_embeds": noise(1, 6, 8),
        "negative_prompt_embeds": noise(1, 6, 8) * 0.5,
        "height": 32,
        "width": 32,
        "num_frames": 9,
        "guidance_scale": 5.0,
        "output_type": "latent",
    }


@builder
def chroma() -> Built:
    model, _ = zoo.chroma()
    pipe = diffusers.ChromaPipeline(
        scheduler=flow_matching(), vae=None, text_encoder=None, tokenizer=None, transformer=model
    )
    return pipe, {
        "prompt_embeds": noise(1, 6, 8),
        "prompt_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]).bool(),
        "negative_prompt_embeds": noise(1, 4, 8) * 0.5,
        "negative_prompt_attention_mask": torch.tensor([[1, 1, 0, 0]]).bool(),
        "height": 64,
        "width": 64,
        "guidance_scale": 5.0,
        "output_type": "latent",
    }


@builder
def sana() -> Built:
    model, _ = zoo.sana()
    pipe = diffusers.SanaPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=model, scheduler=flow_matching()
    )
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    return pipe, {
        "prompt_embeds": noise(1, 6, 8),
        "prompt_attention_mask": mask,
        "negative_prompt": None,
        "negative_prompt_embeds": noise(1, 6, 8) * 0.5,
        "negative_prompt_attention_mask": mask,
        "use_resolution_binning": False,
        "height": 128,
        "width": 128,
        "guidance_scale": 4.5,
        "output_type": "latent",
    }


@builder
def flux2(klein: bool = False) -> Built:
    """Klein has no guidance embedding: two calls a step."""
    model, _ = zoo.flux2()
    if klein:
        model = type(model).from_config({**model.config, "guidance_embeds": False}).eval()
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4,) * 4, layers_per_block=1, latent_channels=1, norm_num_groups=1
    )
    cls = diffusers.Flux2KleinPipeline if klein else diffusers.Flux2Pipeline
    pipe = cls(
        scheduler=flow_matching(), vae=vae.eval(), text_encoder=None, tokenizer=None, transformer=model
    )
    arguments = {
        "prompt_embeds": noise(1, 6, 8),
        "height": 64,
        "width": 64,
        "guidance_scale": 4.0,
        "output_type": "latent",
    }
    if klein:
        arguments["negative_prompt_embeds"] = noise(1, 4, 8) * 0.5
    return pipe, arguments


@builder
def qwen_edit_plus() -> Built:
    """The first version of it, whose given pictures have the timestep of the one drawn; two are given."""
    pipe, arguments = tiny.qwen_edit(plus=True)
    pipe.register_modules(transformer=tiny.qwen_transformer())
    return pipe, {**arguments, "image": [Image.new("RGB", (32, 32), color) for color in ("teal", "red")]}


@builder
def sd3_ip_adapter() -> Built:
    """Image prompts are attended to inside the attention, and depend on the timestep."""
    pipe, arguments = tiny.sd3()
    width = pipe.transformer.inner_dim
    for block in pipe.transformer.transformer_blocks:
        processor = SD3IPAdapterJointAttnProcessor2_0(width, 16, head_dim=8, timesteps_emb_dim=16)
        block.attn.set_processor(processor)
    pipe.transformer.image_proj = IPAdapterTimeImageProjection(
        embed_dim=8,
        output_dim=16,
        hidden_dim=16,
        depth=1,
        dim_head=8,
        heads=2,
        num_queries=4,
        timestep_in_dim=16,
    )
    return pipe, {**arguments, "ip_adapter_image_embeds": noise(2, 3, 8)}


def many(build: Callable[[], Built], name: str = "num_images_per_prompt") -> Callable[[], Built]:
    """Two pictures, or videos, of the prompt of a pipeline."""

    def built() -> Built:
        pipe, arguments = build()
        return pipe, {**arguments, name: 2}

    return built


PIPELINES: dict[str, Callable[[], Built]] = {
    **{name: build for name, build in tiny.PIPELINES.items() if name != "qwen_edit_plus"},
    "qwen_edit_plus": qwen_edit_plus,
    "sd3_ip_adapter": sd3_ip_adapter,
    "pixart_many": many(tiny.pixart),
    "wan_many": many(tiny.wan, "num_videos_per_prompt"),
    "sana_many": many(sana),
    "flux2_many": many(flux2),
    "flux_kontext": flux_kontext,
    "flux_controlnet": flux_controlnet,
    "flux_controlnet_xlabs": functools.partial(flux_controlnet, xlabs=True),
    "flux_ip_adapter": flux_ip_adapter,
    "flux_many": flux_many,
    "qwen_many": qwen_many,
    "qwen_controlnet": qwen_controlnet,
    "sd3_many": sd3_many,
    "sd3_controlnet": sd3_controlnet,
    "cogvideox": cogvideox,
    "chroma": chroma,
    "sana": sana,
    "flux2": flux2,
    "flux2_klein": functools.partial(flux2, klein=True),
}


def build(name: str) -> Built:
    """A pipeline whose every gate counts."""
    pipe, arguments = PIPELINES[name]()
    for denoiser in denoisers(pipe).values():
        lively(denoiser)
    return pipe, arguments


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    parts = {name: getattr(pipe, name, None) for name in ("transformer", "transformer_2")}
    return {name: part for name, part in parts.items() if part is not None}


def draw(pipe: Any, arguments: dict[str, Any], steps: int = 9) -> Tensor:
    """All that the denoisers say in a run, and what comes of it, in one row of float64."""
    said: list[Tensor] = []
    hooks = [
        denoiser.register_forward_hook(lambda module, args, output: said.append(first(output)))
        for denoiser in denoisers(pipe).values()
    ]
    torch.manual_seed(0)  # some pipelines encode their input picture at random
    try:
        picture = tiny.draw(pipe, arguments, steps)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat([part.double().flatten() for part in (*said, picture)])


def first(output: Any) -> Tensor:
    """What a denoiser says."""
    found = output if isinstance(output, Tensor) else output[0]
    assert isinstance(found, Tensor)
    return found.clone()


def record(pipe: Any, arguments: dict[str, Any], steps: int = 12) -> Run:
    """The calls of ``pipe.transformer`` in an uncached run, step by step."""
    run: Run = []
    step_of = pipe.scheduler.step

    def step(*args: Any, **kwargs: Any) -> Any:
        run.append([])
        return step_of(*args, **kwargs)

    run.append([])
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: run[-1].append(copy.deepcopy((args, kwargs))), with_kwargs=True
    )
    pipe.scheduler.step = functools.wraps(step_of)(step)
    try:
        torch.manual_seed(0)
        tiny.draw(pipe, arguments, steps)
    finally:
        hook.remove()
        del pipe.scheduler.step
    return [calls for calls in run if calls]


class Steps:
    """A scheduler that only counts."""

    timesteps: Any = ()

    def set_timesteps(self, steps: int) -> None:
        self.timesteps = range(steps)

    def step(self) -> None:
        pass


def replay(model: nn.Module, run: Run, scheduler: Steps) -> Tensor:
    """What a denoiser says to the calls of a run, in one row of float64."""
    said: list[Tensor] = []
    scheduler.set_timesteps(len(run))
    for calls in run:
        for args, kwargs in calls:
            with torch.no_grad():
                said.append(first(model(*copy.deepcopy(args), **copy.deepcopy(kwargs))).double().flatten())
        scheduler.step()
    return torch.cat(said)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Arguments of calls in another floating dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: cast(part, dtype) for key, part in value.items()}
    return type(value)(cast(part, dtype) for part in value) if isinstance(value, (list, tuple)) else value


def off(one: Tensor, other: Tensor) -> float:
    """Relative root mean square of a difference."""
    return float(((one - other).norm() / other.norm()).detach())
