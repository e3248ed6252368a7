"""Random-weight diffusers transformers, without a pipeline, that run on a CPU in well under a second.

Each builder returns ``(model, call)``; ``call(t)`` gives the arguments of a forward call at time ``t`` in
(0, 1], 1 being pure noise. All but the time is fixed. Models of two streams get as many text tokens as image
tokens, of one width: no shape tells the streams apart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

Call = Callable[[float | Tensor], dict[str, Any]]
Built = tuple[nn.Module, Call]

TOKENS = 16  # of the image, and of the text
WIDTH = 32  # of every hidden state
HEADS = {"num_attention_heads": 2, "attention_head_dim": WIDTH // 2}

ZOO: dict[str, Callable[[], Built]] = {}
PIPED: dict[str, Callable[[], Built]] = {}  # more; the tests of whole pipelines draw with these
UNSKIPPABLE: dict[str, Callable[[], Built]] = {}  # more than the blocks changes the hidden state, or two do


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def thousand(t: float) -> float:
    return 1000 * t


def builder(
    models: dict[str, Callable[[], Built]],
    time: Callable[[float], float] = float,
    name: str = "timestep",
    batch: int = 1,
) -> Callable[[Callable[[], tuple[nn.Module, dict[str, Any]]]], Callable[[], Built]]:
    """Register a function that gives a model and its fixed arguments.

    Args:
        models: where to register it.
        time: what the model wants for t.
        name: of that argument.
        batch: length of that argument.
    """

    def decorate(function: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> Callable[[], Built]:
        @functools.wraps(function)
        def build() -> Built:
            torch.manual_seed(0)
            model, fixed = function()

            def call(t: float | Tensor) -> dict[str, Any]:
                return {**fixed, name: torch.full((batch,), time(float(t))), "return_dict": False}

            return model.eval(), call

        models[function.__name__] = build
        return build

    return decorate


def ids(axes: int, height: int = 4, width: int = TOKENS // 4) -> Tensor:
    """Positions of image tokens, [height * width, axes]: row and column in the second and third axis."""
    positions = torch.zeros(height, width, axes)
    positions[..., 1] = torch.arange(height)[:, None]
    positions[..., 2] = torch.arange(width)
    return positions.view(-1, axes)


def mask(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.long)


# FLUX and its like: doubles, then singles.


@builder(ZOO)
def flux() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.FluxTransformer2DModel(
        **HEADS,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return model, {
        "hidden_states": noise(1, TOKENS, 4),
        "encoder_hidden_states": noise(1, TOKENS, 8),
        "pooled_projections": noise(1, 8),
        "img_ids": ids(3),
        "txt_ids": torch.zeros(TOKENS, 3),
        "guidance": torch.tensor([3.5]),
    }


@builder(PIPED)
def kontext() -> tuple[nn.Module, dict[str, Any]]:
    """FLUX with the tokens of a given picture after those of the picture drawn."""
    model, call = flux()
    fixed = call(1.0)
    given = ids(3)
    given[:, 0] = 1
    return model, {
        **fixed,
        "hidden_states": noise(1, 2 * TOKENS, 4),
        "img_ids": torch.cat([fixed["img_ids"], given]),
    }


@builder(ZOO)
def flux2() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.Flux2Transformer2DModel(
        **HEADS,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=8,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    return model, {
        "hidden_states": noise(1, TOKENS, 4),
        "encoder_hidden_states": noise(1, TOKENS, 8),
        "img_ids": ids(4),
        "txt_ids": torch.zeros(TOKENS, 4),
        "guidance": torch.tensor([3.5]),
    }


@builder(ZOO)
def chroma() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.ChromaTransformer2DModel(
        **HEADS,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return model, {
        "hidden_states": noise(1, TOKENS, 4),
        "encoder_hidden_states": noise(1, TOKENS, 8),
        "img_ids": ids(3),
        "txt_ids": torch.zeros(TOKENS, 3),
    }


@builder(ZOO)
def auraflow() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.AuraFlowTransformer2DModel(
        **HEADS,
        sample_size=8,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        joint_attention_dim=8,
        caption_projection_dim=WIDTH,
        pos_embed_max_size=TOKENS,
    )
    # eight register tokens join the text's
    return model, {"hidden_states": noise(1, 4, 8, 8), "encoder_hidden_states": noise(1, TOKENS - 8, 8)}


@builder(ZOO, thousand, name="timesteps")
def hidream() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.HiDreamImageTransformer2DModel(
        **HEADS,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        caption_channels=[8, 12],
        text_emb_dim=8,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(8, 8),
        llama_layers=[0, 1, 2, 3],
    )
    return model, {
        "hidden_states": noise(1, 4, 8, 8),
        "encoder_hidden_states_t5": noise(1, 6, 8),
        # appended once for good and once for each block: 6 + 5 + 5 text tokens
        "encoder_hidden_states_llama3": noise(4, 1, 5, 12),
        "pooled_embeds": noise(1, 8),
    }


@builder(ZOO, thousand)
def hunyuan_video() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.HunyuanVideoTransformer3DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=8,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    return model, {
        "hidden_states": noise(1, 4, 4, 4, 4),
        "encoder_hidden_states": noise(1, TOKENS, 8),
        "encoder_attention_mask": mask(1, TOKENS),
        "pooled_projections": noise(1, 8),
        "guidance": torch.tensor([6000.0]),
    }


# Doubles only.


@builder(ZOO, thousand)
def hunyuan_video15() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.HunyuanVideo15Transformer3DModel(
        **HEADS,
        in_channels=9,
        out_channels=4,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=8,
        text_embed_2_dim=8,
        image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    return model, {
        "hidden_states": noise(1, 9, 4, 2, 2),
        "encoder_hidden_states": noise(1, 7, 8),
        "encoder_attention_mask": mask(1, 7),
        "encoder_hidden_states_2": noise(1, 5, 8),
        "encoder_attention_mask_2": mask(1, 5),
        "image_embeds": torch.zeros(1, 4, 8),  # as in text to video
    }


@builder(ZOO, thousand)
def sd3() -> tuple[nn.Module, dict[str, Any]]:
    """SD 3.5: its first blocks have a second attention, its last returns no text."""
    model = diffusers.SD3Transformer2DModel(
        **HEADS,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        joint_attention_dim=8,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    return model, {
        "hidden_states": noise(1, 4, 8, 8),
        "encoder_hidden_states": noise(1, TOKENS, 8),
        "pooled_projections": noise(1, 8),
    }


def _qwen_image(**config: Any) -> nn.Module:
    model: nn.Module = diffusers.QwenImageTransformer2DModel(
        **HEADS,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 6, 6),
        **config,
    )
    return model


def _qwen_arguments() -> dict[str, Any]:
    return {
        "hidden_states": noise(1, TOKENS, 16),
        "encoder_hidden_states": noise(1, TOKENS, 8),
        "img_shapes": [[(1, 4, TOKENS // 4)]],
    }


@builder(PIPED)
def qwen_image() -> tuple[nn.Module, dict[str, Any]]:
    """Without a mask: pipelines drop one that lets all of the text through."""
    return _qwen_image(), _qwen_arguments()


@builder(PIPED)
def qwen_image_mask() -> tuple[nn.Module, dict[str, Any]]:
    """A prompt shorter than another one."""
    return _qwen_image(), {
        **_qwen_arguments(),
        "encoder_hidden_states_mask": (torch.arange(TOKENS) < TOKENS - 3)[None].long(),
    }


@builder(PIPED)
def qwen_image_edit() -> tuple[nn.Module, dict[str, Any]]:
    """Of 2511: the given picture's tokens are modulated as at timestep zero."""
    return _qwen_image(zero_cond_t=True), {
        **_qwen_arguments(),
        "hidden_states": noise(1, 2 * TOKENS, 16),
        "img_shapes": [[(1, 4, TOKENS // 4)] * 2],
    }


@builder(ZOO, thousand)
def cogvideox() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.CogVideoXTransformer3DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        time_embed_dim=8,
        text_embed_dim=8,
        sample_width=4,
        sample_height=4,
        sample_frames=13,
        max_text_seq_length=TOKENS,
    )
    return model, {"hidden_states": noise(1, 4, 4, 4, 4), "encoder_hidden_states": noise(1, TOKENS, 8)}


@builder(ZOO, thousand)
def cogview4() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.CogView4Transformer2DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        text_embed_dim=8,
        time_embed_dim=8,
        condition_dim=4,
        sample_size=8,
        rope_axes_dim=(8, 8),
    )
    size = torch.tensor([[64.0, 64.0]])
    return model, {
        "hidden_states": noise(1, 4, 8, 8),
        "encoder_hidden_states": noise(1, TOKENS, 8),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros(1, 2),
    }


@builder(ZOO, thousand)
def mochi() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.MochiTransformer3DModel(
        **HEADS,
        in_channels=4,
        num_layers=3,  # the last drops the text
        pooled_projection_dim=WIDTH,
        text_embed_dim=8,
        time_embed_dim=8,
        max_sequence_length=TOKENS,
    )
    return model, {
        "hidden_states": noise(1, 4, 4, 4, 4),
        "encoder_hidden_states": noise(1, TOKENS, 8),
        "encoder_attention_mask": mask(1, TOKENS).bool(),
    }


# One stream.


@builder(PIPED, thousand)
def wan() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.WanTransformer3DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=16,
    )
    return model, {"hidden_states": noise(1, 4, 2, 4, 4), "encoder_hidden_states": noise(1, TOKENS, 8)}


@builder(PIPED, thousand)
def ltx() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.LTXVideoTransformer3DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=WIDTH,
        num_layers=2,
        caption_channels=8,
    )
    return model, {
        "hidden_states": noise(1, TOKENS, 4),
        "encoder_hidden_states": noise(1, TOKENS, 8),
        "encoder_attention_mask": mask(1, TOKENS),
        "num_frames": 4,
        "height": 2,
        "width": 2,
        "rope_interpolation_scale": (0.3, 32, 32),
    }


@builder(PIPED, thousand)
def pixart() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.PixArtTransformer2DModel(
        **HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=WIDTH,
        caption_channels=8,
        sample_size=8,
        patch_size=2,
        use_additional_conditions=False,
    )
    return model, {
        "hidden_states": noise(1, 4, 8, 8),
        "encoder_hidden_states": noise(1, TOKENS, 8),
        "encoder_attention_mask": mask(1, TOKENS),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


@builder(PIPED, thousand)
def dit() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.DiTTransformer2DModel(
        **HEADS, in_channels=4, out_channels=8, num_layers=2, sample_size=8, patch_size=2
    )
    return model, {"hidden_states": noise(1, 4, 8, 8), "class_labels": torch.tensor([1])}


@builder(ZOO, thousand)
def sana() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.SanaTransformer2DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=WIDTH // 2,
        cross_attention_dim=WIDTH,
        caption_channels=8,
        sample_size=4,
    )
    return model, {
        "hidden_states": noise(1, 4, 4, 4),
        "encoder_hidden_states": noise(1, TOKENS, 8),
        "encoder_attention_mask": mask(1, TOKENS),
    }


@builder(ZOO, lambda t: 1 - t, name="t", batch=2)
def z_image() -> tuple[nn.Module, dict[str, Any]]:
    """Two pictures of different captions, as lists; time runs from 0 up."""
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=WIDTH,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=8,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 16, 16],
    )
    return model, {"x": [*noise(2, 4, 1, 8, 8)], "cap_feats": [noise(5, 8), noise(40, 8)]}


@builder(ZOO, lambda t: 1 - t, batch=2)
def lumina2() -> tuple[nn.Module, dict[str, Any]]:
    """Two captions of different lengths; time runs from 0 up."""
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=WIDTH,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(32, 16, 16),
        cap_feat_dim=8,
    )
    lengths = torch.tensor([[5], [9]])
    return model, {
        "hidden_states": noise(2, 4, 8, 8),
        "encoder_hidden_states": noise(2, 9, 8),
        "encoder_attention_mask": (torch.arange(9) < lengths).long(),
    }


# Those whose blocks cannot be skipped as a whole.


@builder(UNSKIPPABLE, thousand)
def wan_vace() -> tuple[nn.Module, dict[str, Any]]:
    """Adds the hints of a control video between its blocks."""
    model = diffusers.WanVACETransformer3DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=16,
        vace_layers=[0, 1],
        vace_in_channels=4,
    )
    return model, {
        "hidden_states": noise(1, 4, 2, 4, 4),
        "encoder_hidden_states": noise(1, TOKENS, 8),
        "control_hidden_states": noise(1, 4, 2, 4, 4),
        "control_hidden_states_scale": torch.ones(2),
    }


@builder(UNSKIPPABLE, thousand)
def ltx2() -> tuple[nn.Module, dict[str, Any]]:
    """Draws a video and its sound: two streams leave its blocks."""
    model = diffusers.LTX2VideoTransformer3DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=WIDTH,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=WIDTH // 2,
        audio_cross_attention_dim=WIDTH,
        num_layers=2,
        caption_channels=8,
    )
    return model, {
        "hidden_states": noise(1, TOKENS, 4),
        "audio_hidden_states": noise(1, 6, 4),
        "encoder_hidden_states": noise(1, 5, 8),
        "audio_encoder_hidden_states": noise(1, 5, 8),
        "num_frames": 4,
        "height": 2,
        "width": 2,
        "audio_num_frames": 6,
    }
