"""Small transformers of classes that :mod:`tests.support.models` has none of, by the names of the classes.

Between them the two have every class that diffusers denoises with, but those that cannot be cached.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.support import models
from tests.support.models import TOKENS, WIDTH, Arguments, Built, Model, noise, positions

_HALF = WIDTH // 2
_VIDEO = (1, 4, 4, 4, 4)  # of as many tokens
_THOUSAND = models.MODELS["wan"].time
_ROPE: Arguments = {"axes_dims_rope": (4, 4, 8)}
_BLOCKS: Arguments = {"num_attention_heads": 2, "attention_head_dim": _HALF, "num_layers": 2}
_JOINT: Arguments = {**models.MODELS["bria"].config}
_WAN: Arguments = {**models.MODELS["wan"].config}
_COGVIDEOX: Arguments = {**models.MODELS["cogvideox"].config}


def _ones(tokens: int = TOKENS) -> Tensor:
    return torch.ones(1, tokens, dtype=torch.long)


def _rotary(tokens: int, channels: int = _HALF) -> tuple[Tensor, Tensor]:
    angles = noise(tokens, channels // 2).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def _drawn(*shape: int, text: int = TOKENS, **more: Any) -> Arguments:
    """A picture or a video, drawn for a prompt of ``text`` tokens, and more."""
    return {"hidden_states": noise(*shape), "encoder_hidden_states": noise(1, text, 8), **more}


def _on_grid(**more: Any) -> Arguments:
    return _drawn(1, TOKENS, 4, img_ids=positions(3), txt_ids=torch.zeros(TOKENS, 3), **more)


# What they are called with, where that takes more than a line.


def _allegro() -> Arguments:
    grid = torch.meshgrid(torch.arange(4), torch.arange(2), torch.arange(2), indexing="ij")
    rotary = [_rotary(4, 8) for _ in grid], [axis.reshape(1, -1) for axis in grid]
    return _drawn(*_VIDEO, image_rotary_emb=rotary, encoder_attention_mask=_ones())


def _cosmos3() -> Arguments:
    """A video after a prompt of five tokens, without a batch."""
    text, video = torch.arange(5), torch.arange(5, 13)
    return {
        "input_ids": text,
        "text_indexes": text,
        "position_ids": torch.arange(13).expand(3, -1),
        "und_len": 5,
        "sequence_length": 13,
        "vision_tokens": [noise(1, 4, 2, 4, 4)],
        "vision_token_shapes": [(2, 2, 2)],
        "vision_sequence_indexes": video,
        "vision_mse_loss_indexes": video,
        "vision_noisy_frame_indexes": [torch.arange(2)],
    }


def _frame_pack() -> Arguments:
    """With earlier frames, which go before the new ones."""
    return _drawn(
        *(1, 4, 2, 8, 8),
        encoder_attention_mask=_ones(),
        pooled_projections=noise(1, 8),
        guidance=torch.tensor([6000.0]),
        image_embeds=noise(1, 3, 8),
        indices_latents=torch.arange(2),
        latents_clean=noise(1, 4, 2, 8, 8),
        indices_latents_clean=torch.arange(2),
        latents_history_2x=noise(1, 4, 2, 8, 8),
        indices_latents_history_2x=torch.arange(2),
        latents_history_4x=noise(1, 4, 4, 8, 8),
        indices_latents_history_4x=torch.arange(4),
    )


def _glm_image() -> Arguments:
    dropped = torch.zeros(1, TOKENS, dtype=torch.bool)
    size = {"target_size": torch.tensor([[8.0, 8.0]]), "crop_coords": torch.zeros(1, 2)}
    return _drawn(*(1, 4, 8, 8), prior_token_id=torch.arange(TOKENS)[None], prior_token_drop=dropped, **size)


def _helios() -> Arguments:
    """With an earlier frame."""
    return _drawn(
        *_VIDEO,
        indices_hidden_states=torch.arange(1, 5)[None],
        indices_latents_history_short=torch.arange(1)[None],
        latents_history_short=noise(1, 4, 1, 4, 4),
    )


def _hunyuan_dit() -> Arguments:
    more = {"encoder_hidden_states_t5": noise(1, 6, 16), "text_embedding_mask_t5": _ones(6)}
    rotary = _rotary(TOKENS)
    return _drawn(1, 4, 8, 8, text=5, text_embedding_mask=_ones(5), image_rotary_emb=rotary, **more)


def _ideogram() -> Arguments:
    tokens = 5 + TOKENS
    return _drawn(
        *(1, tokens, 4),
        text=tokens,
        position_ids=torch.arange(tokens)[None, :, None].expand(-1, -1, 3),
        segment_ids=torch.zeros(1, tokens),
        indicator=torch.tensor([[3] * 5 + [2] * TOKENS]),
    )


def _krea() -> Arguments:
    """A prompt of five tokens, as two layers of the encoder have it."""
    ids = torch.cat([torch.zeros(5, 3), positions(3)])
    return {**_drawn(1, TOKENS, 4), "encoder_hidden_states": noise(1, 5, 2, 8), "position_ids": ids}


def _lumina() -> Arguments:
    angles = noise(4, 4, _HALF // 2)
    rotary = torch.complex(angles.cos(), angles.sin())
    return _drawn(1, 4, 8, 8, encoder_mask=_ones(), image_rotary_emb=rotary, cross_attention_kwargs={})


def _mini_max_h3() -> Arguments:
    """A video and its sound, which are one sequence of tokens."""
    return _drawn(
        *(1, 8, 16),
        text=5,
        audio_hidden_states=noise(1, 4, 4),
        timestep_indices=torch.zeros(17, dtype=torch.long),
        token_tags=torch.tensor([0] * 5 + [1] * 8 + [2] * 4),
        position_ids=torch.arange(17)[:, None].expand(-1, 3),
        text_indices=torch.arange(5),
        video_indices=torch.arange(5, 13),
        audio_indices=torch.arange(13, 17),
    )


def _omni_gen() -> Arguments:
    tokens = 5 + 1 + TOKENS
    return {
        "hidden_states": noise(1, 4, 8, 8),
        "input_ids": torch.arange(5)[None],
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(1, tokens, tokens),
        "position_ids": torch.arange(tokens)[None],
    }


def _qwen21() -> Arguments:
    slots = torch.tensor([[False] * 5 + [True] * (TOKENS // 4)])
    return _drawn(1, TOKENS, 4, text=5, img_shapes=[[(1, 4, TOKENS // 4)]], img_mask=slots)


class _Kept:
    """Keys and values of a layer, and of all layers: what WAN Animate 2 writes in its reference pass."""

    def get(self, index: int) -> _Kept:
        return self

    def store(self, key: Tensor, value: Tensor) -> None:
        pass


def _wan_animate2() -> Arguments:
    return {
        "hidden_states": [noise(4, 1, 4, 4)],
        "condition_latents": [noise(2, 1, 4, 4)],
        "encoder_hidden_states": [noise(5, 8)],
        "kv_cache": _Kept(),
        "kv_cache_mode": "extract",
        "seq_len": 4,
        "offset_grid_sizes": torch.tensor([[1, 2, 2]]),
    }


_JOY: Arguments = {
    "in_channels": 4,
    "hidden_size": WIDTH,
    "num_attention_heads": 2,
    "text_dim": 8,
    "num_layers": 2,
    "rope_dim_list": [4, 6, 6],
}
_CHANNELS = {str(2**power): 8 for power in range(2, 7)}
_MODELS: dict[str, tuple[Arguments, Any, Arguments]] = {
    # class → what differs from its defaults, its inputs, and the rest of what Model takes
    "AceStepTransformer1DModel": (
        {
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": _HALF,
            "in_channels": 12,
            "audio_acoustic_hidden_dim": 4,
            "encoder_hidden_size": 8,
            "sliding_window": 4,
        },
        lambda: _drawn(1, TOKENS, 4, timestep_r=torch.zeros(1), context_latents=noise(1, TOKENS, 8)),
        {},
    ),
    "AllegroTransformer3DModel": (
        {**_BLOCKS, "attention_head_dim": 24, "cross_attention_dim": 48, "caption_channels": 8},
        _allegro,
        {"time": _THOUSAND},
    ),
    "AnyFlowTransformer3DModel": (
        {name: value for name, value in _WAN.items() if name != "qk_norm"},
        lambda: _drawn(1, 2, 4, 4, 4, r_timestep=torch.zeros(1, 2)),
        {"time": _THOUSAND, "batch": (1, 2)},
    ),
    "BriaFibo2Transformer2DModel": (
        {
            "in_channels": 4,
            "dim": WIDTH,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": 8,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 4,
            "axes_dims": (4, 6, 6),
            "axes_lens": (32, 32, 32),
        },
        lambda: {**_drawn(1, 4, 8, 8), "encoder_hidden_states": noise(1, 2, 5, 8)},
        {},
    ),
    "BriaFiboTransformer2DModel": (
        {**_JOINT, "text_encoder_dim": 8},
        lambda: _on_grid(text_encoder_layers=[noise(1, TOKENS, 8)] * 4),
        {"time": _THOUSAND},
    ),
    "ChronoEditTransformer3DModel": (_WAN, lambda: _drawn(*_VIDEO), {"time": _THOUSAND}),
    "CogView3PlusTransformer2DModel": (
        {
            **{name: value for name, value in models.MODELS["cogview4"].config.items() if "rope" not in name},
            "pos_embed_max_size": 8,
        },
        models.MODELS["cogview4"].inputs,
        {"time": _THOUSAND},
    ),
    "ConsisIDTransformer3DModel": (
        {
            **_COGVIDEOX,
            "is_train_face": True,
            "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 8,
            "LFE_vit_dim": 16,
            "LFE_depth": 1,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 2,
            "LFE_num_querie": 4,
            "LFE_output_dim": 2 * WIDTH // 3,
            "LFE_num_scale": 1,
        },
        lambda: _drawn(*_VIDEO, id_cond=noise(1, 8), id_vit_hidden=[noise(1, 3, 16)]),
        {"time": _THOUSAND},
    ),
    "Cosmos3OmniTransformer": (
        {
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": _HALF,
            "num_hidden_layers": 2,
            "latent_channel": 4,
            "patch_latent_dim": 16,
            "vocab_size": 16,
            "rope_axes_dim": [4, 2, 2],
        },
        _cosmos3,
        {"time": _THOUSAND, "time_name": "vision_timesteps", "batch": 8},
    ),
    "CosmosTransformer3DModel": (
        {
            **_BLOCKS,
            "in_channels": 4,
            "out_channels": 4,
            "text_embed_dim": 8,
            "adaln_lora_dim": 4,
            "max_size": (4, 4, 4),
            "concat_padding_mask": False,  # its mask takes torchvision
        },
        lambda: _drawn(*_VIDEO),
        {},
    ),
    "DreamLiteTransformer2DModel": (
        {**_BLOCKS, "in_channels": WIDTH, "cross_attention_dim": 8, "norm_num_groups": 4},
        lambda: _drawn(1, WIDTH, 4, 4),
        {"time": _THOUSAND},
    ),
    "EasyAnimateTransformer3DModel": (
        {
            **_BLOCKS,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "mmdit_layers": 1,
            "time_embed_dim": 8,
            "text_embed_dim": 8,
        },
        lambda: _drawn(*_VIDEO),
        {"time": _THOUSAND},
    ),
    "ErnieImageTransformer2DModel": (
        {
            "hidden_size": WIDTH,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": WIDTH,
            "in_channels": 4,
            "out_channels": 4,
            "text_in_dim": 8,
            "rope_axes_dim": (4, 6, 6),
        },
        lambda: {
            "hidden_states": noise(1, 4, 4, 4),
            "text_bth": noise(1, 5, 8),
            "text_lens": torch.tensor([5]),
        },
        {"time": _THOUSAND},
    ),
    "Flux3Transformer2DModel": (
        {
            **_BLOCKS,
            "num_single_layers": 2,
            "in_channels": 4,
            "cond_in_channels": 4,
            "joint_attention_dim": 8,
            "timestep_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        lambda: {
            **_drawn(1, TOKENS, 4, img_ids=positions(4), txt_ids=torch.zeros(TOKENS, 4)),
            "image_cond_hidden_states": noise(1, TOKENS, 4),
            "image_cond_ids": positions(4),
        },
        {},
    ),
    "GlmImageTransformer2DModel": (
        {
            **_BLOCKS,
            "in_channels": 4,
            "out_channels": 4,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "prior_vq_quantizer_codebook_size": 16,
        },
        _glm_image,
        {"time": _THOUSAND},
    ),
    "HeliosTransformer3DModel": (
        {**{name: value for name, value in _WAN.items() if "rope" not in name}, "rope_dim": (4, 6, 6)},
        _helios,
        {"time": _THOUSAND},
    ),
    "HunyuanDiT2DModel": (
        {
            **_BLOCKS,
            "num_layers": 4,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 8,
            "hidden_size": WIDTH,
            "cross_attention_dim": 8,
            "cross_attention_dim_t5": 16,
            "pooled_projection_dim": 8,
            "text_len": 5,
            "text_len_t5": 6,
            "use_style_cond_and_image_meta_size": False,
        },
        _hunyuan_dit,
        {"time": _THOUSAND},
    ),
    "HunyuanImageTransformer2DModel": (
        {
            **_BLOCKS,
            "num_single_layers": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_refiner_layers": 1,
            "text_embed_dim": 8,
            "rope_axes_dim": (8, 8),
        },
        lambda: _drawn(1, 4, 4, 4, encoder_attention_mask=_ones()),
        {"time": _THOUSAND},
    ),
    "HunyuanVideoFramepackTransformer3DModel": (
        {
            **models.MODELS["hunyuan_video"].config,
            "has_image_proj": True,
            "image_proj_dim": 8,
            "has_clean_x_embedder": True,
        },
        _frame_pack,
        {"time": _THOUSAND},
    ),
    "Ideogram4Transformer2DModel": (
        {
            **_BLOCKS,
            "in_channels": 4,
            "intermediate_size": WIDTH,
            "adaln_dim": 8,
            "llm_features_dim": 8,
            "mrope_section": (4, 2, 2),
        },
        _ideogram,
        {},
    ),
    "JoyImageEditTransformer3DModel": (_JOY, lambda: _drawn(*_VIDEO), {"time": _THOUSAND}),
    "JoyImageEditPlusTransformer3DModel": (
        _JOY,
        lambda: _drawn(1, TOKENS, 4, 1, 2, 2, shape_list=[[(4, 2, 2)]]),
        {"time": _THOUSAND},
    ),
    "Kandinsky6SRTransformer3DModel": (
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "time_dim": 8,
            "model_dim": WIDTH,
            "ff_dim": WIDTH,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
        },
        lambda: {"hidden_states": noise(1, 1, 8, 8, 9)},
        {"time": _THOUSAND},
    ),
    "Krea2Transformer2DModel": (
        {
            **_BLOCKS,
            **_ROPE,
            "in_channels": 4,
            "num_key_value_heads": 1,
            "intermediate_size": WIDTH,
            "text_hidden_dim": 8,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 8,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
        },
        _krea,
        {},
    ),
    "LongCatAudioDiTTransformer": (
        {"dit_dim": WIDTH, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": 8, "latent_dim": 4},
        lambda: _drawn(1, TOKENS, 4, encoder_attention_mask=_ones()),
        {},
    ),
    "LongCatImageTransformer2DModel": (_JOINT, _on_grid, {}),
    "LuminaNextDiT2DModel": (
        {
            "hidden_size": WIDTH,
            "num_layers": 2,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "cross_attention_dim": 8,
        },
        _lumina,
        {},
    ),
    "MiniMaxH3Transformer3DModel": (
        {
            **_BLOCKS,
            "hidden_size": WIDTH,
            "num_refiner_layers": 1,
            "ffn_dim": WIDTH,
            "in_channels": 4,
            "audio_in_channels": 4,
            "text_dim": 8,
            "time_embed_hidden_dim": 8,
            "time_embed_dim": 8,
            "rope_freq_dim": 2,
        },
        _mini_max_h3,
        {"time": _THOUSAND},
    ),
    "MiniMaxMusic3Transformer1DModel": (
        {**_BLOCKS, "in_channels": 4, "condition_dim": 8, "ff_inner_dim": WIDTH, "rotary_dim": 8},
        lambda: _drawn(1, 4, TOKENS),
        {},
    ),
    "MotifVideoTransformer3DModel": (
        {
            **_BLOCKS,
            "num_single_layers": 2,
            "in_channels": 4,
            "out_channels": 4,
            "text_embed_dim": 8,
            "rope_axes_dim": (4, 6, 6),
        },
        lambda: _drawn(*_VIDEO),
        {"time": _THOUSAND},
    ),
    "NucleusMoEImageTransformer2DModel": (
        {
            **_BLOCKS,
            **_ROPE,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 5,  # the first three and the last are dense
            "joint_attention_dim": 8,
            "mlp_ratio": 8.0,
            "num_experts": 2,
            "moe_intermediate_dim": 8,
            "capacity_factors": 1.0,
        },
        lambda: _drawn(1, TOKENS, 16, img_shapes=[(1, 4, TOKENS // 4)]),
        {},
    ),
    "OmniGenTransformer2DModel": (
        {
            "hidden_size": WIDTH,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": WIDTH,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 16,
            "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
            "pos_embed_max_size": 8,
        },
        _omni_gen,
        {},
    ),
    "OvisImageTransformer2DModel": (_JOINT, _on_grid, {}),
    "PRXTransformer2DModel": (
        {
            "in_channels": 4,
            "context_in_dim": 8,
            "hidden_size": WIDTH,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [8, 8],
        },
        lambda: _drawn(1, 4, 8, 8),
        {},
    ),
    "PriorTransformer": (
        {**_BLOCKS, "embedding_dim": 8, "num_embeddings": 5},
        lambda: _drawn(1, 8, text=5, proj_embedding=noise(1, 8)),
        {"time": _THOUSAND},
    ),
    "QwenImage21Transformer2DModel": (
        {**_BLOCKS, **_ROPE, "in_channels": 4, "out_channels": 4, "context_in_dim": 8},
        _qwen21,
        {},
    ),
    "SanaVideoTransformer3DModel": (
        {**models.MODELS["sana"].config, "sample_size": 4},
        lambda: _drawn(*_VIDEO, encoder_attention_mask=_ones()),
        {"time": _THOUSAND},
    ),
    "SanaWMTransformer3DModel": (
        {
            "in_channels": 4,
            "num_layers": 2,
            "hidden_size": WIDTH,
            "num_attention_heads": 2,
            "softmax_every_n": 2,
            "linear_head_dim": _HALF,
            "caption_channels": 8,
        },
        lambda: _drawn(*_VIDEO, encoder_attention_mask=_ones()),
        {"time": _THOUSAND, "batch": (1, 1, 4)},
    ),
    "SkyReelsV2Transformer3DModel": (_WAN, lambda: _drawn(*_VIDEO), {"time": _THOUSAND}),
    "StableAudioDiTModel": (
        {
            **_BLOCKS,
            "in_channels": 4,
            "out_channels": 4,
            "num_key_value_attention_heads": 1,
            "cross_attention_dim": _HALF,
            "time_proj_dim": 8,
            "global_states_input_dim": 8,
            "cross_attention_input_dim": 8,
        },
        lambda: _drawn(
            *(1, 4, TOKENS), global_hidden_states=noise(1, 1, 8), rotary_embedding=_rotary(TOKENS + 1, 8)
        ),
        {},
    ),
    "StableAudio3DiTModel": (
        {
            "io_channels": 4,
            "embed_dim": WIDTH,
            "depth": 2,
            "num_heads": 2,
            "cond_token_dim": 8,
            "global_cond_dim": 8,
            "local_add_cond_dim": 4,
            "num_memory_tokens": 4,
        },
        lambda: _drawn(1, 4, TOKENS, global_hidden_states=noise(1, 8)),
        {},
    ),
    "Transformer2DModel": (
        {**_BLOCKS, "in_channels": WIDTH, "cross_attention_dim": 8, "norm_num_groups": 4},
        lambda: _drawn(1, WIDTH, 4, 4),
        {"time": _THOUSAND},
    ),
    "TransformerTemporalModel": (
        {**_BLOCKS, "in_channels": WIDTH, "norm_num_groups": 4},
        lambda: {"hidden_states": noise(2, WIDTH, 4, 4), "num_frames": 2},
        {"time": _THOUSAND},
    ),
    "WanAnimateTransformer3DModel": (
        {
            **_WAN,
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 8,
            "motion_encoder_channel_sizes": _CHANNELS,
            "motion_encoder_size": 8,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 8,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 1,
        },
        lambda: _drawn(
            *(1, 12, 4, 4, 4),
            pose_hidden_states=noise(1, 4, 3, 4, 4),
            face_pixel_values=noise(1, 3, 12, 8, 8),
        ),
        {"time": _THOUSAND},
    ),
    "WanAnimate2Transformer3DModel": (
        {
            "text_len": 8,
            "in_dim": 6,
            "dim": WIDTH,
            "ffn_dim": 16,
            "freq_dim": 8,
            "text_dim": 8,
            "out_dim": 4,
            "num_heads": 2,
            "num_layers": 2,
            "use_img_emb": False,
        },
        _wan_animate2,
        {"time": _THOUSAND},
    ),
}
MODELS = {name: Model(name, config, inputs, **more) for name, (config, inputs, more) in _MODELS.items()}


def build(name: str, changes: Arguments | None = None) -> Built:
    """A model by the name of its class, as :func:`tests.support.models.build` does."""
    return models.build_model(MODELS[name], **(changes or {}))
