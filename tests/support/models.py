"""Diffusers transformers with random weights that run on a CPU in well under a second.

``build(name)`` returns ``(model, call)``; ``call(t)`` gives the arguments of a forward call at time ``t`` in
(0, 1], 1 being pure noise. All but the time is fixed. Models of two streams get as many text tokens as image
tokens, of one width: no shape tells the streams apart. ``transformer(name, **changes)`` is a model alone,
with another configuration where a pipeline needs one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

Arguments = dict[str, Any]
Call = Callable[[float | Tensor], Arguments]
Built = tuple[nn.Module, Call]

TOKENS = 16  # of the image, and of the text
WIDTH = 32  # of every hidden state

_HEADS = {"num_attention_heads": 2, "attention_head_dim": WIDTH // 2}
_DOUBLES = {**_HEADS, "in_channels": 4, "num_layers": 2}
_DOUBLES_AND_SINGLES = {**_DOUBLES, "num_single_layers": 2}


def noise(*shape: int) -> Tensor:
    """The same normally distributed numbers in every call of one shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def positions(axes: int) -> Tensor:
    """Positions of image tokens, ``[TOKENS, axes]``: row and column in the second and third axis."""
    found = torch.zeros(4, TOKENS // 4, axes)
    found[..., 1] = torch.arange(4)[:, None]
    found[..., 2] = torch.arange(TOKENS // 4)
    return found.view(-1, axes)


def _mask(tokens: int = TOKENS) -> Tensor:
    return torch.ones((1, tokens), dtype=torch.long)


def _inputs(*shape: int, text: int = TOKENS, **more: Any) -> Arguments:
    """A hidden state of a shape, a prompt of ``text`` tokens, and more."""
    return {"hidden_states": noise(*shape), "encoder_hidden_states": noise(shape[0], text, 8), **more}


@dataclass(frozen=True)
class Model:
    """A transformer and what it is called with.

    Args:
        kind: its class in diffusers.
        config: what differs from the class's defaults.
        inputs: the fixed arguments of its call.
        time: what the model wants for t.
        time_name: the name of that argument.
        batch: the length of that argument, or its shape.
    """

    kind: str
    config: Arguments
    inputs: Callable[[], Arguments]
    time: Callable[[float], float] = float
    time_name: str = "timestep"
    batch: int | tuple[int, ...] = 1

    def built(self, **changes: Any) -> Any:
        """It, its weights drawn from torch's own generator."""
        return getattr(diffusers, self.kind)(**{**self.config, **changes}).eval()


def _thousand(t: float) -> float:
    return 1000 * t


def _from_zero_up(t: float) -> float:
    return 1 - t


# FLUX and its like: doubles, then singles.


def _flux_inputs(axes: int = 3, **more: Any) -> Arguments:
    return _inputs(1, TOKENS, 4, img_ids=positions(axes), txt_ids=torch.zeros(TOKENS, axes), **more)


def _guided_flux_inputs() -> Arguments:
    return _flux_inputs(pooled_projections=noise(1, 8), guidance=torch.tensor([3.5]))


def _kontext_inputs() -> Arguments:
    """FLUX with the tokens of a given picture after those of the picture drawn."""
    given = positions(3)
    given[:, 0] = 1
    more: Arguments = {"hidden_states": noise(1, 2 * TOKENS, 4), "img_ids": torch.cat([positions(3), given])}
    return {**_guided_flux_inputs(), **more}


_FLUX = {
    **_DOUBLES_AND_SINGLES,
    "joint_attention_dim": 8,
    "pooled_projection_dim": 8,
    "axes_dims_rope": (4, 4, 8),
    "guidance_embeds": True,
}
_FLUX2 = {
    **_DOUBLES_AND_SINGLES,
    "joint_attention_dim": 8,
    "timestep_guidance_channels": 16,
    "axes_dims_rope": (4, 4, 4, 4),
}
_CHROMA = {
    **_DOUBLES_AND_SINGLES,
    "joint_attention_dim": 8,
    "axes_dims_rope": (4, 4, 8),
    "approximator_num_channels": 16,
    "approximator_hidden_dim": 16,
    "approximator_layers": 1,
}
_AURAFLOW = {
    **_HEADS,
    "sample_size": 8,
    "num_mmdit_layers": 2,
    "num_single_dit_layers": 2,
    "joint_attention_dim": 8,
    "caption_projection_dim": WIDTH,
    "pos_embed_max_size": TOKENS,
}
_HIDREAM = {
    **_DOUBLES_AND_SINGLES,
    "patch_size": 2,
    "caption_channels": [8, 12],
    "text_emb_dim": 8,
    "axes_dims_rope": (8, 4, 4),
    "max_resolution": (8, 8),
    "llama_layers": [0, 1, 2, 3],
}
_HUNYUAN_VIDEO = {
    **_DOUBLES_AND_SINGLES,
    "out_channels": 4,
    "num_refiner_layers": 1,
    "text_embed_dim": 8,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}


def _hidream_inputs() -> Arguments:
    return {
        "hidden_states": noise(1, 4, 8, 8),
        "encoder_hidden_states_t5": noise(1, 6, 8),
        # appended once for good and once for each block: 6 + 5 + 5 text tokens
        "encoder_hidden_states_llama3": noise(4, 1, 5, 12),
        "pooled_embeds": noise(1, 8),
    }


def _hunyuan_video_inputs() -> Arguments:
    more: Arguments = {"pooled_projections": noise(1, 8), "guidance": torch.tensor([6000.0])}
    return _inputs(1, 4, 4, 4, 4, encoder_attention_mask=_mask(), **more)


# Doubles only.

_HUNYUAN_VIDEO15 = {
    **_DOUBLES,
    "in_channels": 9,
    "out_channels": 4,
    "num_refiner_layers": 1,
    "text_embed_dim": 8,
    "text_embed_2_dim": 8,
    "image_embed_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}
# SD 3.5: its first blocks have a second attention, its last returns no text
_SD3 = {
    **_DOUBLES,
    "sample_size": 8,
    "out_channels": 4,
    "num_layers": 3,
    "joint_attention_dim": 8,
    "caption_projection_dim": WIDTH,
    "pooled_projection_dim": 8,
    "pos_embed_max_size": 8,
    "dual_attention_layers": (0, 1),
    "qk_norm": "rms_norm",
}
_QWEN_IMAGE = {
    **_DOUBLES,
    "in_channels": 16,
    "out_channels": 4,
    "joint_attention_dim": 8,
    "axes_dims_rope": (4, 6, 6),
}
_COGVIDEOX = {
    **_DOUBLES,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 8,
    "sample_width": 4,
    "sample_height": 4,
    "sample_frames": 13,
    "max_text_seq_length": TOKENS,
}
_COGVIEW4 = {
    **_DOUBLES,
    "out_channels": 4,
    "text_embed_dim": 8,
    "time_embed_dim": 8,
    "condition_dim": 4,
    "sample_size": 8,
    "rope_axes_dim": (8, 8),
}
_MOCHI = {
    **_DOUBLES,
    "num_layers": 3,  # the last drops the text
    "pooled_projection_dim": WIDTH,
    "text_embed_dim": 8,
    "time_embed_dim": 8,
    "max_sequence_length": TOKENS,
}


def _hunyuan_video15_inputs() -> Arguments:
    return {
        **_inputs(1, 9, 4, 2, 2, text=7, encoder_attention_mask=_mask(7)),
        "encoder_hidden_states_2": noise(1, 5, 8),
        "encoder_attention_mask_2": _mask(5),
        "image_embeds": torch.zeros(1, 4, 8),  # as in text to video
    }


def _qwen_inputs(pictures: int = 1, **more: Any) -> Arguments:
    return _inputs(1, pictures * TOKENS, 16, img_shapes=[[(1, 4, TOKENS // 4)] * pictures], **more)


def _qwen_mask_inputs() -> Arguments:
    """A prompt shorter than another one."""
    return _qwen_inputs(encoder_hidden_states_mask=(torch.arange(TOKENS) < TOKENS - 3)[None].long())


def _cogview4_inputs() -> Arguments:
    size = torch.tensor([[64.0, 64.0]])
    return _inputs(1, 4, 8, 8, original_size=size, target_size=size, crop_coords=torch.zeros(1, 2))


# One stream.

_WAN = {
    **_DOUBLES,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 8,
    "ffn_dim": 16,
    "rope_max_seq_len": 16,
}
_LTX = {**_DOUBLES, "out_channels": 4, "cross_attention_dim": WIDTH, "caption_channels": 8}
_PIXART = {
    **_DOUBLES,
    "out_channels": 8,
    "cross_attention_dim": WIDTH,
    "caption_channels": 8,
    "sample_size": 8,
    "patch_size": 2,
    "use_additional_conditions": False,
}
_DIT = {**_DOUBLES, "out_channels": 8, "sample_size": 8, "patch_size": 2}
_SANA = {
    **_DOUBLES,
    "out_channels": 4,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": WIDTH // 2,
    "cross_attention_dim": WIDTH,
    "caption_channels": 8,
    "sample_size": 4,
}
_Z_IMAGE = {
    "in_channels": 4,
    "dim": WIDTH,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 8,
    "axes_dims": [4, 6, 6],
    "axes_lens": [128, 16, 16],
}
_LUMINA2 = {
    "sample_size": 8,
    "in_channels": 4,
    "hidden_size": WIDTH,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "num_attention_heads": 2,
    "num_kv_heads": 1,
    "multiple_of": 16,
    "axes_dim_rope": (4, 6, 6),
    "axes_lens": (32, 16, 16),
    "cap_feat_dim": 8,
}
_LTX_SIZE = {"num_frames": 4, "height": 2, "width": 2}


def _ltx_inputs() -> Arguments:
    more: Arguments = {**_LTX_SIZE, "rope_interpolation_scale": (0.3, 32, 32)}
    return _inputs(1, TOKENS, 4, encoder_attention_mask=_mask(), **more)


def _pixart_inputs() -> Arguments:
    more: Arguments = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return _inputs(1, 4, 8, 8, encoder_attention_mask=_mask(), **more)


def _z_image_inputs() -> Arguments:
    """Two pictures of different captions, as lists."""
    return {"x": [*noise(2, 4, 1, 8, 8)], "cap_feats": [noise(5, 8), noise(40, 8)]}


def _lumina2_inputs() -> Arguments:
    """Two captions of different lengths."""
    lengths = torch.tensor([[5], [9]])
    return _inputs(2, 4, 8, 8, text=9, encoder_attention_mask=(torch.arange(9) < lengths).long())


def _wan_vace_inputs() -> Arguments:
    """With a control video, whose hints are added between the blocks."""
    hints: Arguments = {
        "control_hidden_states": noise(1, 4, 2, 4, 4),
        "control_hidden_states_scale": torch.ones(2),
    }
    return _inputs(1, 4, 2, 4, 4, **hints)


_KANDINSKY5: Arguments = {
    "in_text_dim": 8,
    "in_text_dim2": 8,
    "time_dim": 16,
    "model_dim": WIDTH,
    "ff_dim": WIDTH,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (8, 4, 4),
}


def _kandinsky5_inputs() -> Arguments:
    return {
        **_inputs(1, 2, 8, 8, 4),
        "pooled_projections": noise(1, 8),
        "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
        "text_rope_pos": torch.arange(TOKENS),
    }


_BRIA: Arguments = {**_DOUBLES_AND_SINGLES, "joint_attention_dim": 8, "axes_dims_rope": (4, 4, 8)}


MODELS = {
    "flux": Model("FluxTransformer2DModel", _FLUX, _guided_flux_inputs),
    "kontext": Model("FluxTransformer2DModel", _FLUX, _kontext_inputs),
    "flux2": Model("Flux2Transformer2DModel", _FLUX2, lambda: _flux_inputs(4, guidance=torch.tensor([3.5]))),
    "chroma": Model("ChromaTransformer2DModel", _CHROMA, _flux_inputs),
    # eight register tokens join the text's
    "auraflow": Model("AuraFlowTransformer2DModel", _AURAFLOW, lambda: _inputs(1, 4, 8, 8, text=TOKENS - 8)),
    "hidream": Model(
        "HiDreamImageTransformer2DModel", _HIDREAM, _hidream_inputs, _thousand, time_name="timesteps"
    ),
    "hunyuan_video": Model(
        "HunyuanVideoTransformer3DModel", _HUNYUAN_VIDEO, _hunyuan_video_inputs, _thousand
    ),
    "hunyuan_video15": Model(
        "HunyuanVideo15Transformer3DModel", _HUNYUAN_VIDEO15, _hunyuan_video15_inputs, _thousand
    ),
    "sd3": Model(
        "SD3Transformer2DModel",
        _SD3,
        lambda: _inputs(1, 4, 8, 8, pooled_projections=noise(1, 8)),
        _thousand,
    ),
    # without a mask: pipelines drop one that lets all of the text through
    "qwen_image": Model("QwenImageTransformer2DModel", _QWEN_IMAGE, _qwen_inputs),
    "qwen_image_mask": Model("QwenImageTransformer2DModel", _QWEN_IMAGE, _qwen_mask_inputs),
    # of 2511: the given picture's tokens are modulated as at timestep zero
    "qwen_image_edit": Model(
        "QwenImageTransformer2DModel", {**_QWEN_IMAGE, "zero_cond_t": True}, lambda: _qwen_inputs(2)
    ),
    "cogvideox": Model("CogVideoXTransformer3DModel", _COGVIDEOX, lambda: _inputs(1, 4, 4, 4, 4), _thousand),
    "cogview4": Model("CogView4Transformer2DModel", _COGVIEW4, _cogview4_inputs, _thousand),
    "mochi": Model(
        "MochiTransformer3DModel",
        _MOCHI,
        lambda: _inputs(1, 4, 4, 4, 4, encoder_attention_mask=_mask().bool()),
        _thousand,
    ),
    "wan": Model("WanTransformer3DModel", _WAN, lambda: _inputs(1, 4, 2, 4, 4), _thousand),
    "ltx": Model("LTXVideoTransformer3DModel", _LTX, _ltx_inputs, _thousand),
    "pixart": Model("PixArtTransformer2DModel", _PIXART, _pixart_inputs, _thousand),
    "dit": Model(
        "DiTTransformer2DModel",
        _DIT,
        lambda: {"hidden_states": noise(1, 4, 8, 8), "class_labels": torch.tensor([1])},
        _thousand,
    ),
    "sana": Model(
        "SanaTransformer2DModel",
        _SANA,
        lambda: _inputs(1, 4, 4, 4, encoder_attention_mask=_mask()),
        _thousand,
    ),
    "z_image": Model(
        "ZImageTransformer2DModel", _Z_IMAGE, _z_image_inputs, _from_zero_up, time_name="t", batch=2
    ),
    "lumina2": Model("Lumina2Transformer2DModel", _LUMINA2, _lumina2_inputs, _from_zero_up, batch=2),
    "kandinsky5": Model("Kandinsky5Transformer3DModel", _KANDINSKY5, _kandinsky5_inputs, _thousand),
    "bria": Model("BriaTransformer2DModel", _BRIA, _flux_inputs, _thousand),
    "wan_vace": Model(
        "WanVACETransformer3DModel",
        {**_WAN, "vace_layers": [0, 1], "vace_in_channels": 4},
        _wan_vace_inputs,
        _thousand,
    ),
}
# tested in whole pipelines
IN_PIPELINES = (
    "kandinsky5",
    "kontext",
    "qwen_image",
    "qwen_image_mask",
    "qwen_image_edit",
    "wan",
    "ltx",
    "pixart",
    "dit",
)
# tested without a pipeline
BARE = tuple(name for name in MODELS if name not in IN_PIPELINES)


def transformer(name: str, **changes: Any) -> Any:
    """A model with some of its configuration changed, its weights drawn from torch's own generator."""
    return MODELS[name].built(**changes)


def reconfigured(model: Any, **changes: Any) -> Any:
    """Another model of the same class with some of the configuration changed, as a fresh seed draws it."""
    # from_config drops changes of what was a default
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    torch.manual_seed(0)
    return type(model)(**{**config, **changes}).eval()


def build(name: str, **changes: Any) -> Built:
    """A model from a fixed seed, and what gives the arguments of its call."""
    return build_model(MODELS[name], **changes)


def build_model(model: Model, **changes: Any) -> Built:
    """The same for a model that is in another table."""
    torch.manual_seed(0)
    built, fixed = model.built(**changes), model.inputs()
    shape = (model.batch,) if isinstance(model.batch, int) else model.batch

    def call(t: float | Tensor) -> Arguments:
        now = torch.full(shape, model.time(float(t)))
        return {**fixed, model.time_name: now, "return_dict": False}

    return built, call


# the patches are said, or controlnets made of its configuration have their own default
flux_transformer = functools.partial(
    transformer, "flux", patch_size=1, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH
)
flux_transformer.__doc__ = "The transformer of the FLUX pipelines."


def flux_call(latents: Tensor, timestep: Tensor, **changes: Any) -> Arguments:
    """The arguments of one call of :func:`flux_transformer`: a prompt of six tokens, and a guidance of 3.5.

    Args:
        latents: ``[batch, tokens, 4]``.
        timestep: ``[]`` or ``[batch]``, in (0, 1].
        **changes: arguments in place of those.
    """
    return {
        "hidden_states": latents,
        "encoder_hidden_states": noise(1, 6, WIDTH),
        "pooled_projections": noise(1, WIDTH),
        "timestep": timestep.expand(len(latents)),
        "guidance": torch.full((len(latents),), 3.5),
        "img_ids": torch.zeros(latents.shape[1], 3),
        "txt_ids": torch.zeros(6, 3),
        "return_dict": False,
        **changes,
    }
