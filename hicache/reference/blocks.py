"""Which submodules of which blocks are cached: the one table of :mod:`hicache.reference`.

A feature is the output of a submodule before the block multiplies it by a gate (docs/algorithm.md, "Words"),
of the image and of the text stream. Source: the ``forward`` of each block named here, in diffusers 0.42.1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from torch import nn

# The models' lists of blocks.
_LISTS: Final = (
    "joint_transformer_blocks",
    "transformer_blocks",
    "single_transformer_blocks",
    "double_stream_blocks",
    "single_stream_blocks",
    "blocks",
    "layers",
)


@dataclass(frozen=True)
class Cached:
    """What of a block is cached.

    Args:
        features: submodules whose outputs are cached features, in the order of the block's gates.
        idle: submodules that only feed a feature, so that a skipped step needs nothing of them.
        text: features of the text alone.
        joined: where features are of text and picture together, the picture's place: ``"first"``, ``"last"``.
    """

    features: tuple[str, ...]
    idle: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    joined: str = "last"


# Two streams: attention gives (image, text), or (image, text, image prompt) with an IP-Adapter.
_TWO_STREAMS: Final = Cached(("attn", "ff", "ff_context"), text=("ff_context",))
# Attention and MLP side by side, one projection of both, one gate: the projection's output is the feature.
_FUSED: Final = Cached(("proj_out",), idle=("attn", "proj_mlp", "act_mlp"))
# Self-attention, cross-attention, MLP.
_CROSS: Final = Cached(("attn1", "attn2", "ff"))

# Class of the model -> class of the block -> what is cached of it.
MODELS: Final[dict[str, dict[str, Cached]]] = {
    # The block adds only gate · ff to its input; what attention gives is read by ff alone.
    "AuraFlowTransformer2DModel": {
        "AuraFlowJointTransformerBlock": Cached(("ff", "ff_context"), idle=("attn",)),
        "AuraFlowSingleTransformerBlock": Cached(("ff",), idle=("attn",)),
    },
    "ChromaTransformer2DModel": {
        "ChromaTransformerBlock": _TWO_STREAMS,
        "ChromaSingleTransformerBlock": _FUSED,
    },
    # One MLP on the text and image tokens, joined.
    "CogVideoXTransformer3DModel": {"CogVideoXBlock": Cached(("attn1", "ff"))},
    # One MLP, called for the image and then for the text.
    "CogView4Transformer2DModel": {"CogView4TransformerBlock": Cached(("attn1", "ff"))},
    "DiTTransformer2DModel": {"BasicTransformerBlock": _CROSS},
    "FluxTransformer2DModel": {
        "FluxTransformerBlock": _TWO_STREAMS,
        "FluxSingleTransformerBlock": _FUSED,
    },
    # The attention of single blocks has the MLP inside.
    "Flux2Transformer2DModel": {
        "Flux2TransformerBlock": _TWO_STREAMS,
        "Flux2SingleTransformerBlock": Cached(("attn",)),
    },
    "HiDreamImageTransformer2DModel": {
        "HiDreamImageTransformerBlock": Cached(("attn1", "ff_i", "ff_t"), text=("ff_t",)),
        "HiDreamImageSingleTransformerBlock": Cached(("attn1", "ff_i")),
    },
    "HunyuanVideoTransformer3DModel": {
        "HunyuanVideoTransformerBlock": _TWO_STREAMS,
        "HunyuanVideoSingleTransformerBlock": replace(_FUSED, joined="first"),
        "HunyuanVideoTokenReplaceTransformerBlock": _TWO_STREAMS,
        "HunyuanVideoTokenReplaceSingleTransformerBlock": replace(_FUSED, joined="first"),
    },
    "HunyuanVideo15Transformer3DModel": {"HunyuanVideo15TransformerBlock": _TWO_STREAMS},
    "LTXVideoTransformer3DModel": {"LTXVideoTransformerBlock": _CROSS},
    # Norms stand between the outputs and their gates: the normalized outputs are the features.
    "Lumina2Transformer2DModel": {
        "Lumina2TransformerBlock": Cached(("norm2", "ffn_norm2"), idle=("attn", "feed_forward")),
    },
    "PixArtTransformer2DModel": {"BasicTransformerBlock": _CROSS},
    "QwenImageTransformer2DModel": {
        "QwenImageTransformerBlock": Cached(("attn", "img_mlp", "txt_mlp"), text=("txt_mlp",))
    },
    "SanaTransformer2DModel": {"SanaTransformerBlock": _CROSS},
    # 3.5 has a second attention on the image; its last block has no text MLP.
    "SD3Transformer2DModel": {
        "JointTransformerBlock": Cached(("attn", "ff", "attn2", "ff_context"), text=("ff_context",))
    },
    "WanTransformer3DModel": {"WanTransformerBlock": Cached(("attn1", "attn2", "ffn"))},
    # As Lumina2.
    "ZImageTransformer2DModel": {
        "ZImageTransformerBlock": Cached(
            ("attention_norm2", "ffn_norm2"), idle=("attention", "feed_forward")
        ),
    },
}


@dataclass(frozen=True)
class Part:
    """One submodule that a skipped step does not run."""

    path: str  # within the model
    module: nn.Module
    is_feature: bool  # else idle
    layer: str  # path of its block
    picture: str | None  # where the picture's tokens are among those of its first tensor; None: nowhere


def cached_parts(model: nn.Module) -> list[Part]:
    """The submodules of a model that skipped steps do not run, in the order of its blocks.

    Raises:
        ValueError: the model, or a class of blocks in it, is not in the table; or a block is not built as the
            table says.
    """
    name = type(model).__name__
    blocks = next((MODELS[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in MODELS), None)
    if blocks is None:
        raise ValueError(
            f"hicache.reference: unknown model {name}, with blocks "
            f"{', '.join(_block_classes(model)) or 'none'}; known models: {', '.join(MODELS)}"
        )
    parts: dict[nn.Module, Part] = {}
    for list_name in _LISTS:
        for index, outer in enumerate(getattr(model, list_name, ())):
            path, block = f"{list_name}.{index}", outer
            if type(outer).__name__ == "HiDreamBlock":  # nothing but a wrapper
                path, block = f"{path}.block", outer.block
            cached = blocks.get(type(block).__name__)
            if cached is None:
                raise ValueError(
                    f"hicache.reference: unknown block {type(block).__name__} in {name}.{list_name}; known "
                    f"blocks of this model: {', '.join(blocks)}"
                )
            for part in (*cached.features, *cached.idle):
                if not hasattr(block, part):
                    raise ValueError(
                        f"hicache.reference: expected {type(block).__name__} in {name}.{list_name} to have "
                        f"a submodule {part!r}, got {', '.join(dict(block.named_children()))}"
                    )
                module = getattr(block, part)
                if module is not None:  # blocks set to None what their model does not use
                    picture = None if part in cached.text else cached.joined
                    feature = part in cached.features
                    parts[module] = Part(f"{path}.{part}", module, feature, f"{list_name}.{index}", picture)
    if not parts:
        raise ValueError(f"hicache.reference: {name} has no blocks; expected {', '.join(blocks)}")
    return list(parts.values())


def _block_classes(model: nn.Module) -> list[str]:
    lists = (getattr(model, list_name, ()) for list_name in _LISTS)
    return list(dict.fromkeys(type(block).__name__ for blocks in lists for block in blocks))
