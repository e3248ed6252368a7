"""Random-weight diffusers pipelines that run offline on a CPU in well under a second.

Each builder returns ``(pipe, arguments)``; ``draw(pipe, arguments, steps)`` runs it and returns latents.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from PIL import Image

Built = tuple[Any, dict[str, Any]]


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def draw(pipe: Any, arguments: dict[str, Any], steps: int = 12, **more: Any) -> torch.Tensor:
    """Run a pipeline from a fixed seed; its first output as a tensor."""
    generator = torch.Generator().manual_seed(0)
    output = pipe(num_inference_steps=steps, generator=generator, **arguments, **more)[0]
    return output if torch.is_tensor(output) else output[0]


def builder(function: Callable[..., Built]) -> Callable[..., Built]:
    @functools.wraps(function)
    def build(*args: Any, **kwargs: Any) -> Built:
        torch.manual_seed(0)
        pipe, arguments = function(*args, **kwargs)
        pipe.set_progress_bar_config(disable=True)
        return pipe, arguments

    return build


def flow_matching(**kwargs: Any) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(**kwargs)


def flux_transformer(doubles: int = 2, singles: int = 2) -> diffusers.FluxTransformer2DModel:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=doubles,
        num_single_layers=singles,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    ).eval()


@builder
def flux(doubles: int = 2, singles: int = 2, tokens: int = 6) -> Built:
    pipe = diffusers.FluxPipeline(
        scheduler=flow_matching(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=flux_transformer(doubles, singles),
    )
    return pipe, {
        "prompt_embeds": noise(1, tokens, 32),
        "pooled_prompt_embeds": noise(1, 32),
        "height": 64,
        "width": 64,
        "guidance_scale": 3.5,
        "output_type": "latent",
    }


@builder
def flux_cfg() -> Built:
    """FLUX with true classifier-free guidance: two calls a step, one inside each cache context."""
    pipe, arguments = flux()
    return pipe, {
        **arguments,
        "negative_prompt_embeds": noise(1, 6, 32) * 0.5,
        "negative_pooled_prompt_embeds": noise(1, 32) * 0.5,
        "true_cfg_scale": 3.0,
    }


def qwen_transformer(zero_cond_t: bool = False) -> diffusers.QwenImageTransformer2DModel:
    return diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
        zero_cond_t=zero_cond_t,
    ).eval()


def qwen_prompts() -> dict[str, Any]:
    mask = torch.ones(1, 5, dtype=torch.long)
    return {
        "prompt_embeds": noise(1, 5, 16),
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds": noise(1, 4, 16) * 0.5,
        "negative_prompt_embeds_mask": mask[:, :4],
        "true_cfg_scale": 4.0,
        "output_type": "latent",
    }


@builder
def qwen() -> Built:
    pipe = diffusers.QwenImagePipeline(
        scheduler=flow_matching(), vae=None, text_encoder=None, tokenizer=None, transformer=qwen_transformer()
    )
    return pipe, {**qwen_prompts(), "height": 64, "width": 64}


@builder
def qwen_edit(plus: bool = False) -> Built:
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

    # the pipelines scale their input picture to a megapixel
    pipeline_qwenimage_edit.calculate_dimensions = lambda area, ratio: (32, 32, None)
    pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE = pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE = 32 * 32
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()
    cls = diffusers.QwenImageEditPlusPipeline if plus else diffusers.QwenImageEditPipeline
    pipe = cls(
        scheduler=flow_matching(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        processor=None,
        transformer=qwen_transformer(zero_cond_t=plus),
    )
    return pipe, {**qwen_prompts(), "image": Image.new("RGB", (32, 32)), "height": 32, "width": 32}


@builder
def sd3() -> Built:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        dual_attention_layers=(0,),
    ).eval()
    pipe = diffusers.StableDiffusion3Pipeline(
        scheduler=flow_matching(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
        transformer=transformer,
    )
    return pipe, {
        "prompt_embeds": noise(1, 6, 32),
        "pooled_prompt_embeds": noise(1, 64),
        "negative_prompt_embeds": noise(1, 6, 32) * 0.5,
        "negative_pooled_prompt_embeds": noise(1, 64) * 0.5,
        "height": 64,
        "width": 64,
        "guidance_scale": 5.0,
        "output_type": "latent",
    }


@builder
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


@builder
def wan(two: bool = False) -> Built:
    def transformer() -> diffusers.WanTransformer3DModel:
        return diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=256,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        ).eval()

    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    pipe = diffusers.WanPipeline(
        scheduler=flow_matching(shift=7.0),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer(),
        transformer_2=transformer() if two else None,
        boundary_ratio=0.875 if two else None,
    )
    return pipe, {
        "prompt_embeds": noise(1, 6, 32),
        "negative_prompt_embeds": noise(1, 6, 32) * 0.5,
        "height": 16,
        "width": 16,
        "num_frames": 9,
        "guidance_scale": 5.0,
        "output_type": "latent",
    }


@builder
def hunyuan() -> Built:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    ).eval()
    pipe = diffusers.HunyuanVideoPipeline(
        scheduler=flow_matching(shift=7.0),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    return pipe, {
        "prompt_embeds": noise(1, 6, 16),
        "prompt_attention_mask": torch.ones(1, 6, dtype=torch.long),
        "pooled_prompt_embeds": noise(1, 8),
        "height": 16,
        "width": 16,
        "num_frames": 9,
        "output_type": "latent",
    }


@builder
def ltx() -> Built:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    ).eval()
    pipe = diffusers.LTXPipeline(
        scheduler=flow_matching(), vae=None, text_encoder=None, tokenizer=None, transformer=transformer
    )
    mask = torch.ones(1, 6, dtype=torch.long)
    return pipe, {
        "prompt_embeds": noise(1, 6, 32),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": noise(1, 6, 32) * 0.5,
        "negative_prompt_attention_mask": mask,
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "guidance_scale": 3.0,
        "output_type": "latent",
    }


@builder
def dit() -> Built:
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=4,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        num_embeds_ada_norm=1000,
    ).eval()
    vae = diffusers.AutoencoderKL(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
    ).eval()
    pipe = diffusers.DiTPipeline(transformer=transformer, vae=vae, scheduler=diffusers.DDIMScheduler())
    return pipe, {"class_labels": [1], "guidance_scale": 4.0, "output_type": "pt"}


@builder
def pixart() -> Built:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
    ).eval()
    pipe = diffusers.PixArtAlphaPipeline(
        transformer=transformer,
        vae=None,
        scheduler=diffusers.DDIMScheduler(),
        text_encoder=None,
        tokenizer=None,
    )
    mask = torch.ones(1, 6, dtype=torch.long)
    return pipe, {
        "prompt": None,
        "negative_prompt": None,
        "prompt_embeds": noise(1, 6, 32),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": noise(1, 6, 32) * 0.5,
        "negative_prompt_attention_mask": mask,
        "use_resolution_binning": False,
        "height": 64,
        "width": 64,
        "guidance_scale": 4.5,
        "output_type": "latent",
    }


PIPELINES: dict[str, Callable[[], Built]] = {
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
