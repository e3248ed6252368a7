"""Diffusers pipelines with random weights that run offline on a CPU in well under a second.

``build(name)`` returns ``(pipe, arguments)``; ``draw(pipe, arguments, steps)`` runs the pipeline and returns
its latents. ``build_randomized(name)`` is the same with weights that make every gate count.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterTimeImageProjection,
    MultiIPAdapterImageProjection,
)
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from diffusers.pipelines.qwenimage import (
    pipeline_qwenimage_edit,
    pipeline_qwenimage_edit_plus,
    pipeline_qwenimage_layered,
)
from PIL import Image
from torch import Tensor, nn

from tests.support.models import Arguments, flux_transformer, noise, transformer
from tests.support.schedulers import flow_matching

Built = tuple[Any, Arguments]


def draw(pipe: Any, arguments: Arguments, steps: int = 12, **more: Any) -> Tensor:
    """Run a pipeline from a fixed seed; its first output as a tensor."""
    generator = torch.Generator().manual_seed(0)
    output = pipe(num_inference_steps=steps, generator=generator, **arguments, **more)[0]
    drawn = output if torch.is_tensor(output) else output[0]
    # DiTPipeline of diffusers before 0.42 returns an array when asked for a tensor
    return torch.as_tensor(drawn)


def offload_groups(pipe: Any) -> None:
    """Offload the transformer block by block, onto the CPU itself."""
    if torch.accelerator.current_accelerator() is None and diffusers_before(0, 41):
        pytest.skip(f"diffusers {diffusers.__version__} offloads groups from an accelerator only")
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(
        onload_device=cpu, offload_type="block_level", num_blocks_per_group=1
    )


def diffusers_before(*version: int) -> bool:
    """Whether an older diffusers is installed than this."""
    return tuple(int(part) for part in diffusers.__version__.split(".")[:2]) < version


def randomize(model: Any) -> Any:
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


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The transformers of a pipeline, by the names of their parts."""
    parts = {name: getattr(pipe, name, None) for name in ("transformer", "transformer_2")}
    return {name: part for name, part in parts.items() if part is not None}


# What pipelines are made of and called with.


def _pipeline(kind: str, transformer: Any, **parts: Any) -> Any:
    """A pipeline without what is not given: text encoders, tokenizers, an autoencoder."""
    cls = getattr(diffusers, kind)
    required = [p.name for p in inspect.signature(cls).parameters.values() if p.default is p.empty]
    given = {"scheduler": flow_matching(), "transformer": transformer, **parts}
    return cls(**{**dict.fromkeys(required), **given})


def _latent(size: int, guidance: float | None = None, frames: int | None = None) -> Arguments:
    """A square picture or video, as latents."""
    wanted = {"guidance_scale": guidance, "num_frames": frames}
    given = {name: value for name, value in wanted.items() if value is not None}
    return {"height": size, "width": size, "output_type": "latent", **given}


def _prompts(*shape: int, pooled: int | None = None, negative: int | None = None) -> Arguments:
    """Embeddings of a prompt and of a negative one.

    Args:
        *shape: of the prompt's, ``[batch, tokens, channels]``.
        pooled: channels of the pooled embeddings, if there are such.
        negative: tokens of the negative prompt, if it has fewer.
    """
    batch, tokens, channels = shape
    made = {
        "prompt_embeds": noise(*shape),
        "negative_prompt_embeds": noise(batch, negative or tokens, channels) * 0.5,
    }
    if pooled:
        made["pooled_prompt_embeds"] = noise(batch, pooled)
        made["negative_pooled_prompt_embeds"] = noise(batch, pooled) * 0.5
    return made


def _unguided(arguments: Arguments) -> Arguments:
    return {name: value for name, value in arguments.items() if not name.startswith("negative")}


def _masks(mask: Tensor, negative: Tensor | None = None) -> Arguments:
    return {
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": mask if negative is None else negative,
    }


def plain_picture(color: str = "teal", size: int = 64) -> Image.Image:
    """A picture of one colour."""
    return Image.new("RGB", (size, size), color)


def autoencoder(latent_channels: int) -> diffusers.AutoencoderKL:
    """A small autoencoder of pictures."""
    return diffusers.AutoencoderKL(
        sample_size=32,
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=1,
        shift_factor=0.1,
    ).eval()


def _controls(nets: int, size: int = 64) -> Arguments:
    """What ControlNets are given: a picture each, and how much each counts."""
    if nets == 1:
        return {"control_image": plain_picture(size=size)}
    pictures = [plain_picture(color, size) for color in ("teal", "red")]
    return {"control_image": pictures, "controlnet_conditioning_scale": [0.7, 0.4]}


# FLUX.


def flux(doubles: int = 2, singles: int = 2, tokens: int = 6) -> Built:
    """FLUX.1 of a depth, with a prompt of a length."""
    pipe = _pipeline("FluxPipeline", flux_transformer(num_layers=doubles, num_single_layers=singles))
    return pipe, {**_unguided(_prompts(1, tokens, 32, pooled=32)), **_latent(64, 3.5)}


def flux_cfg(batch: int = 1) -> Built:
    """FLUX with true classifier-free guidance: two calls a step, one inside each cache context."""
    pipe, arguments = flux()
    return pipe, {**arguments, **_prompts(batch, 6, 32, pooled=32), "true_cfg_scale": 3.0}


def flux_kontext() -> Built:
    """The given picture's tokens follow those of the picture drawn."""
    pipe = _pipeline("FluxKontextPipeline", flux_transformer(in_channels=64))
    more = {"image": noise(1, 16, 8, 8), "max_area": 64 * 64, "_auto_resize": False}
    return pipe, {**flux()[1], **more}


def flux_controlnet(xlabs: bool = False, kind: str = "FluxControlNetPipeline", nets: int = 1) -> Built:
    """Residuals after the doubles and singles; those of XLabs' controlnets repeat over the blocks.

    Args:
        xlabs: one of theirs.
        kind: of the pipeline.
        nets: how many ControlNets: several add up.
    """
    model = flux_transformer(num_layers=3, num_single_layers=3)
    config = {**model.config, "num_layers": 2, "num_single_layers": 0 if xlabs else 2}
    if xlabs:
        config |= {"conditioning_embedding_channels": 1, "patch_size": 2}
    made = [randomize(diffusers.FluxControlNetModel.from_config(config).eval()) for _ in range(nets)]
    pipe = _pipeline(kind, model, vae=autoencoder(1), controlnet=made[0] if nets == 1 else made)
    modes = {"control_mode": [0] * nets} if nets > 1 else {}
    return pipe, {**flux()[1], **_controls(nets), **modes}


def flux_controlnet_cfg() -> Built:
    """Both calls of a step are given the residuals of one call of the ControlNet."""
    pipe, arguments = flux_controlnet()
    return pipe, {**arguments, **_prompts(1, 6, 32, pooled=32), "true_cfg_scale": 3.0}


def flux_controlnet_img2img() -> Built:
    """Begins with a given picture, in the middle of the scheduler's timesteps."""
    pipe, arguments = flux_controlnet(kind="FluxControlNetImg2ImgPipeline")
    return pipe, {**arguments, "image": plain_picture("red"), "strength": 0.8}


def flux_controlnet_inpaint() -> Built:
    """Draws a part of a given picture anew."""
    pipe, arguments = flux_controlnet(kind="FluxControlNetInpaintPipeline")
    given = {"image": plain_picture("red"), "mask_image": Image.new("L", (64, 64), 255), "strength": 0.8}
    return pipe, {**arguments, **given}


def flux_ip_adapter() -> Built:
    """Attentions of the doubles give a third output, which is added without a gate."""
    pipe, arguments = flux_cfg()
    projection = ImageProjection(image_embed_dim=8, cross_attention_dim=32, num_image_text_embeds=4)
    pipe.transformer.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    for block in pipe.transformer.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(32, 32))
    pictures = {
        "ip_adapter_image_embeds": [noise(1, 1, 8)],
        "negative_ip_adapter_image_embeds": [-noise(1, 1, 8)],
    }
    return pipe, {**arguments, **pictures}


def flux2(klein: bool = False, edit: bool = False) -> Built:
    """Klein has no guidance embedding: two calls a step. To edit, two pictures are given."""
    model = transformer("flux2", guidance_embeds=not klein)
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4,) * 4, layers_per_block=1, latent_channels=1, norm_num_groups=1
    )
    pipe = _pipeline("Flux2KleinPipeline" if klein else "Flux2Pipeline", model, vae=vae.eval())
    prompts = _prompts(1, 6, 8, negative=4)
    more = {"image": [plain_picture("teal", 64), plain_picture("red", 64)]} if edit else {}
    return pipe, {**(prompts if klein else _unguided(prompts)), **_latent(64, 4.0), **more}


def chroma() -> Built:
    """Padded prompts of different lengths."""
    pipe = _pipeline("ChromaPipeline", transformer("chroma"))
    masks = _masks(torch.tensor([[1, 1, 1, 1, 0, 0]]).bool(), torch.tensor([[1, 1, 0, 0]]).bool())
    return pipe, {**_prompts(1, 6, 8, negative=4), **masks, **_latent(64, 5.0)}


# Qwen-Image.


def _qwen_transformer(**changes: Any) -> Any:
    return transformer(
        "qwen_image", num_attention_heads=3, joint_attention_dim=16, axes_dims_rope=(8, 4, 4), **changes
    )


def _qwen_prompts(size: int) -> Arguments:
    mask = torch.ones(1, 5, dtype=torch.long)
    masks = {"prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask[:, :4]}
    return {**_prompts(1, 5, 16, negative=4), **masks, "true_cfg_scale": 4.0, **_latent(size)}


def qwen_autoencoder() -> diffusers.AutoencoderKLQwenImage:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()


def qwen() -> Built:
    """Two calls a step, of prompts of different lengths."""
    return _pipeline("QwenImagePipeline", _qwen_transformer()), _qwen_prompts(64)


def qwen_edit(plus: bool = False) -> Built:
    """A given picture. "Plus", as of 2511: its tokens are modulated as at timestep zero."""
    # the pipelines scale their input picture to a megapixel
    pipeline_qwenimage_edit.calculate_dimensions = lambda area, ratio: (32, 32, None)
    pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE = 32 * 32
    pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE = 32 * 32
    vae = qwen_autoencoder()
    kind = "QwenImageEditPlusPipeline" if plus else "QwenImageEditPipeline"
    pipe = _pipeline(kind, _qwen_transformer(zero_cond_t=plus), vae=vae)
    return pipe, {**_qwen_prompts(32), "image": plain_picture("black", 32)}


def qwen_edit_2509() -> Built:
    """The first "plus": given pictures have the timestep of the one drawn; two are given."""
    pipe, arguments = qwen_edit(plus=True)
    pipe.register_modules(transformer=_qwen_transformer())
    return pipe, {**arguments, "image": [plain_picture(color, 32) for color in ("teal", "red")]}


def qwen_layered() -> Built:
    """Three pictures are drawn, the layers and the whole; the last is given."""
    pipeline_qwenimage_layered.calculate_dimensions = lambda area, ratio: (32, 32)
    vae = qwen_autoencoder()
    model = _qwen_transformer(use_layer3d_rope=True, use_additional_t_cond=True)
    # of the text encoder its dtype is asked
    pipe = _pipeline("QwenImageLayeredPipeline", model, vae=vae, text_encoder=vae)
    arguments = {name: value for name, value in _qwen_prompts(32).items() if name not in ("height", "width")}
    # without a prompt it captions the picture, embeddings or not; latents it does not give
    more = {"prompt": "layers", "image": plain_picture("teal", 32), "layers": 2, "output_type": "pt"}
    return pipe, {**arguments, **more}


def qwen_many() -> Built:
    """Two prompts of different lengths, masked, with two pictures each."""
    pipe, arguments = qwen()
    lengths = torch.tensor([[5], [3]])
    return pipe, {
        **arguments,
        **_prompts(2, 5, 16, negative=4),
        "prompt_embeds_mask": (torch.arange(5) < lengths).long(),
        "negative_prompt_embeds_mask": (torch.arange(4) < lengths - 1).long(),
        "num_images_per_prompt": 2,
    }


def qwen_controlnet(union: bool = False) -> Built:
    """Residuals after the blocks. A union of ControlNets: one for two pictures."""
    model = _qwen_transformer()
    controlnet = diffusers.QwenImageControlNetModel.from_transformer(
        model, num_layers=1, attention_head_dim=16, num_attention_heads=3, extra_condition_channels=0
    )
    controlnet = randomize(controlnet.eval())
    if union:
        controlnet = diffusers.QwenImageMultiControlNetModel([controlnet])
    parts = {"vae": qwen_autoencoder(), "controlnet": controlnet}
    pipe = _pipeline("QwenImageControlNetPipeline", model, **parts)
    return pipe, {**_qwen_prompts(32), **_controls(1 + union, size=32)}


# SD3.


def sd3(batch: int = 1) -> Built:
    """The two branches of the guidance in one batch."""
    model = transformer(
        "sd3",
        sample_size=32,
        patch_size=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=96,
        dual_attention_layers=(0,),
        qk_norm=None,
    )
    pipe = _pipeline("StableDiffusion3Pipeline", model)
    return pipe, {**_prompts(batch, 6, 32, pooled=64), **_latent(64, 5.0)}


def sd3_skip_layer() -> Built:
    """SD3 with skip-layer guidance: a third, conditional-only call in the middle of the run."""
    pipe, arguments = sd3()
    return pipe, {
        **arguments,
        "skip_guidance_layers": [0],
        "skip_layer_guidance_scale": 2.8,
        "skip_layer_guidance_start": 0.1,
        "skip_layer_guidance_stop": 0.8,
    }


def sd3_controlnet(nets: int = 1) -> Built:
    """Residuals after the blocks; those of several ControlNets add up."""
    pipe, arguments = sd3()
    controlnets = [
        diffusers.SD3ControlNetModel.from_transformer(
            pipe.transformer,
            num_layers=2,
            num_extra_conditioning_channels=0,
            load_weights_from_transformer=False,
        )
        for _ in range(nets)
    ]
    controlnets = [randomize(controlnet.eval()) for controlnet in controlnets]
    parts = {"vae": autoencoder(4), "controlnet": controlnets[0] if nets == 1 else controlnets}
    pipe = _pipeline("StableDiffusion3ControlNetPipeline", pipe.transformer, **parts)
    return pipe, {**arguments, **_controls(nets)}


def sd3_ip_adapter() -> Built:
    """Image prompts are attended to inside the attention, and depend on the timestep."""
    pipe, arguments = sd3()
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


# Video.


def _wan_autoencoder() -> diffusers.AutoencoderKLWan:
    return diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def wan(two: bool = False) -> Built:
    """Two calls a step. Of Wan 2.2, with two: one transformer for high noise, one for low."""
    vae = _wan_autoencoder()
    wan_transformer = functools.partial(
        transformer,
        "wan",
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        rope_max_seq_len=32,
    )
    second: Arguments = {"transformer_2": None, "boundary_ratio": None}
    first = wan_transformer()
    if two:
        second = {"transformer_2": wan_transformer(), "boundary_ratio": 0.875}
    pipe = _pipeline("WanPipeline", first, scheduler=flow_matching(shift=7.0), vae=vae, **second)
    return pipe, {**_prompts(1, 6, 32), **_latent(16, 5.0, frames=9)}


def wan_ti2v(picture: bool = False) -> Built:
    """Wan 2.2 5B: a timestep for every token; that of a picture given, the first frame, is zero."""
    pipe, arguments = wan()
    parts = {"scheduler": flow_matching(shift=5.0), "vae": pipe.vae, "expand_timesteps": True}
    kind = "WanImageToVideoPipeline" if picture else "WanPipeline"
    more = {"image": plain_picture("teal", 32)} if picture else {}
    return _pipeline(kind, pipe.transformer, **parts), {**arguments, **_latent(32), **more}


def hunyuan(token_replace: bool = False) -> Built:
    """HunyuanVideo, whose guidance is embedded. A picture given stands for the tokens of the first frame."""
    changes: Arguments = {}
    if token_replace:
        changes = {"image_condition_type": "token_replace", "in_channels": 16, "out_channels": 16}
    model = transformer(
        "hunyuan_video",
        attention_head_dim=10,
        patch_size=1,
        text_embed_dim=16,
        rope_axes_dim=(2, 4, 4),
        **changes,
    )
    kind, parts, more = "HunyuanVideoPipeline", {}, {}
    if token_replace:
        vae = diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=16, block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=1
        )
        kind, more = "HunyuanVideoImageToVideoPipeline", {"image": plain_picture(size=16)}
        parts = {"vae": vae.eval()}
    pipe = _pipeline(kind, model, scheduler=flow_matching(shift=7.0), **parts)
    mask = {"prompt_attention_mask": torch.ones(1, 6, dtype=torch.long)}
    return pipe, {**_unguided(_prompts(1, 6, 16, pooled=8)), **mask, **_latent(16, frames=9), **more}


def ltx(given: int = 0) -> Built:
    """The two branches of the guidance in one batch.

    With a picture given, the tokens of the first frame have another timestep; a second one has tokens of its
    own, before the video's, and a third timestep.
    """
    model = transformer(
        "ltx",
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        caption_channels=32,
    )
    masks = _masks(torch.ones(1, 6, dtype=torch.long))
    parts: Arguments = {}
    more: Arguments = {}
    kind = "LTXPipeline"
    if given:
        kind, parts, more = "LTXImageToVideoPipeline", {"vae": ltx_vae().eval()}, {"image": plain_picture()}
    if given > 1:
        kind = "LTXConditionPipeline"
        more = {
            "image": [plain_picture(), plain_picture("red")],
            "video": [None, None],
            "frame_index": [0, 8],
            "strength": [1.0, 0.7],
        }
    pipe = _pipeline(kind, model, **parts)
    return pipe, {**_prompts(1, 6, 32), **masks, **_latent(64, 3.0, frames=9), **more}


def cogvideox() -> Built:
    """With rotary embeddings, as its larger one."""
    model = transformer(
        "cogvideox", sample_frames=9, max_text_seq_length=6, use_rotary_positional_embeddings=True
    )
    pipe = _pipeline("CogVideoXPipeline", model, scheduler=diffusers.CogVideoXDDIMScheduler())
    return pipe, {**_prompts(1, 6, 8), **_latent(32, 5.0, frames=9)}


# Pictures by one stream.


def dit() -> Built:
    """Pictures of a class."""
    model = transformer("dit", sample_size=16, patch_size=4, attention_head_dim=8)
    vae = diffusers.AutoencoderKL(
        sample_size=32, block_out_channels=(4,), layers_per_block=1, norm_num_groups=1
    ).eval()
    pipe = _pipeline("DiTPipeline", model, vae=vae, scheduler=diffusers.DDIMScheduler())
    return pipe, {"class_labels": [1], "guidance_scale": 4.0, "output_type": "pt"}


def pixart() -> Built:
    """PixArt-α."""
    model = transformer(
        "pixart",
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        cross_attention_dim=24,
        use_additional_conditions=None,
    )
    pipe = _pipeline("PixArtAlphaPipeline", model, scheduler=diffusers.DDIMScheduler())
    prompts = {"prompt": None, "negative_prompt": None, **_prompts(1, 6, 32)}
    masks = _masks(torch.ones(1, 6, dtype=torch.long))
    return pipe, {**prompts, **masks, "use_resolution_binning": False, **_latent(64, 4.5)}


def sana() -> Built:
    """A padded prompt."""
    pipe = _pipeline("SanaPipeline", transformer("sana"))
    masks = _masks(torch.tensor([[1, 1, 1, 1, 0, 0]]))
    more = {"negative_prompt": None, "use_resolution_binning": False}
    return pipe, {**_prompts(1, 6, 8), **masks, **more, **_latent(128, 4.5)}


def _many(make: Callable[[], Built], name: str = "num_images_per_prompt") -> Callable[[], Built]:
    """Two pictures, or videos, of the prompt of a pipeline."""

    def made() -> Built:
        pipe, arguments = make()
        return pipe, {**arguments, name: 2}

    return made


# the pipelines that most tests draw with
_CORE: dict[str, Callable[..., Built]] = {
    "flux": flux,
    "flux_cfg": flux_cfg,
    "qwen": qwen,
    "qwen_edit": qwen_edit,
    "qwen_edit_plus": functools.partial(qwen_edit, plus=True),
    "sd3": sd3,
    "sd3_skip_layer": sd3_skip_layer,
    "wan": wan,
    "wan22": functools.partial(wan, two=True),
    "hunyuan": hunyuan,
    "ltx": ltx,
    "dit": dit,
    "pixart": pixart,
}
PIPELINES: dict[str, Callable[..., Built]] = {
    **_CORE,
    "qwen_edit_2509": qwen_edit_2509,
    "qwen_layered": qwen_layered,
    "qwen_many": qwen_many,
    "qwen_controlnet": qwen_controlnet,
    "flux_kontext": flux_kontext,
    "flux_controlnet": flux_controlnet,
    "flux_controlnet_xlabs": functools.partial(flux_controlnet, xlabs=True),
    "flux_ip_adapter": flux_ip_adapter,
    "flux_many": functools.partial(flux_cfg, batch=2),
    "flux2": flux2,
    "flux2_klein": functools.partial(flux2, klein=True),
    "flux2_many": _many(flux2),
    "flux2_edit": functools.partial(flux2, edit=True),
    "chroma": chroma,
    "sd3_many": functools.partial(sd3, batch=2),
    "sd3_controlnet": sd3_controlnet,
    "sd3_ip_adapter": sd3_ip_adapter,
    "wan_many": _many(wan, "num_videos_per_prompt"),
    "wan_ti2v": wan_ti2v,
    "wan_ti2v_picture": functools.partial(wan_ti2v, picture=True),
    "hunyuan_picture": functools.partial(hunyuan, token_replace=True),
    "ltx_picture": functools.partial(ltx, given=1),
    "ltx_pictures": functools.partial(ltx, given=2),
    "cogvideox": cogvideox,
    "pixart_many": _many(pixart),
    "sana": sana,
    "sana_many": _many(sana),
}
# that have a ControlNet, besides those above
CONTROLNETS: dict[str, Callable[..., Built]] = {
    "flux_controlnets": functools.partial(flux_controlnet, nets=2),
    "flux_controlnet_cfg": flux_controlnet_cfg,
    "flux_controlnet_img2img": flux_controlnet_img2img,
    "flux_controlnet_inpaint": flux_controlnet_inpaint,
    "sd3_controlnets": functools.partial(sd3_controlnet, nets=2),
    "qwen_controlnet_union": functools.partial(qwen_controlnet, union=True),
}
CORE = tuple(_CORE)
# whose transformer's modules an adapter knows, and can gate
BY_MODULE = tuple(PIPELINES)

# one pipeline a family
FAMILIES = (
    "flux",
    "flux2",
    "chroma",
    "qwen",
    "sd3",
    "hunyuan",
    "wan",
    "ltx",
    "cogvideox",
    "dit",
    "pixart",
    "sana",
)
# those of them whose features are of one layer each
BY_LAYER = ("flux", "sd3", "qwen", "dit", "hunyuan", "cogvideox", "chroma")


def build(name: str, **changes: Any) -> Built:
    """A pipeline from a fixed seed, and what it is called with."""
    torch.manual_seed(0)
    pipe, arguments = {**PIPELINES, **CONTROLNETS}[name](**changes)
    pipe.set_progress_bar_config(disable=True)
    return pipe, arguments


def build_randomized(name: str) -> Built:
    """A pipeline whose every gate counts."""
    pipe, arguments = build(name)
    for denoiser in denoisers(pipe).values():
        randomize(denoiser)
    return pipe, arguments


def in_float64(name: str) -> Built:
    """A pipeline in float64, and what it is called with."""
    pipe, arguments = build(name)
    doubled = {
        key: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in arguments.items()
    }
    return pipe.to(torch.float64), doubled


def ltx_vae() -> Any:
    """A small autoencoder of LTX's."""
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
    )
