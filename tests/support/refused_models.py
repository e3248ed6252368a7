"""Small transformers of the classes of diffusers that cannot be cached, and why."""

from __future__ import annotations

import diffusers
from torch import nn

from tests.support import models
from tests.support.models import WIDTH, Arguments

_HEADS: Arguments = {"num_attention_heads": 2, "attention_head_dim": WIDTH // 2, "num_layers": 2}
_SOUND: Arguments = {
    "audio_in_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": WIDTH // 2,
    "audio_cross_attention_dim": WIDTH,
    "cross_attention_dim": WIDTH,
    "caption_channels": 8,
}
_WAN = models.MODELS["wan"].config
# class → the configuration of a small one, and why it is refused
REFUSED: dict[str, tuple[Arguments, str]] = {
    "AnyFlowFARTransformer3DModel": (
        _WAN,
        "cannot be cached: its blocks keep keys and values for the next part",
    ),
    "Kandinsky6Transformer3DModel": (
        {
            "in_visual_dim": 4,
            "in_text_dim": 8,
            "in_text_dim2": 8,
            "time_dim": 8,
            "model_dim": WIDTH,
            "ff_dim": WIDTH,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
        },
        "cannot be cached: two streams go through its blocks",
    ),
    "LTX2VideoTransformer3DModel": (
        {**_HEADS, **_SOUND, "in_channels": 4},
        "cannot be cached: two streams go through its blocks",
    ),
    "LatteTransformer3DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "sample_size": 8,
            "patch_size": 2,
            "caption_channels": 8,
            "video_length": 2,
        },
        "cannot be cached: its blocks take turns with those of temporal_transformer_blocks",
    ),
    "RFD4ProteinaTransformer": (
        {"nlayers": 2, "token_dim": WIDTH, "nheads": 2, "dim_cond": 8, "pair_repr_dim": 8, "tri_mult_c": 8},
        "nothing to hook in RFD4ProteinaTransformer",
    ),
    "SanaWMLTX2RefinerTransformer3DModel": (
        {**_HEADS, **_SOUND, "in_channels": 4},
        "cannot be cached: its blocks keep keys and values for the next part",
    ),
    "UVit2DModel": (
        {
            "hidden_size": WIDTH,
            "cond_embed_dim": 8,
            "micro_cond_embed_dim": 8,
            "encoder_hidden_size": 8,
            "vocab_size": 16,
            "codebook_size": 8,
            "in_channels": 8,
            "block_out_channels": 8,
            "num_res_blocks": 1,
            "block_num_heads": 1,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": WIDTH,
        },
        "nothing to hook in UVit2DModel",
    ),
}


def build(name: str) -> nn.Module:
    """A model by the name of its class."""
    model: nn.Module = getattr(diffusers, name)(**REFUSED[name][0])
    return model.eval()
