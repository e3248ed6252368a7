"""Tiny text encoders and tokenizers of a few words, for pipelines that are called with prompts.

Vocabularies are single letters and what templates need; weights are random.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Final

import transformers

_LETTERS: Final = [chr(code) for code in range(33, 127)]
_SPECIAL: Final = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def clip(width: int = 32) -> tuple[Any, Any]:
    """CLIP's text encoder and tokenizer.

    Args:
        width: of what it returns, pooled.
    """
    words = [*_LETTERS, *(letter + "</w>" for letter in _LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )
    return config, tokenizer


def clip_text(width: int = 32) -> tuple[Any, Any]:
    """With the hidden states of every token and their pool."""
    config, tokenizer = clip(width)
    return transformers.CLIPTextModel(config).eval(), tokenizer


def clip_projected(width: int = 32) -> tuple[Any, Any]:
    """With a projection."""
    config, tokenizer = clip(width)
    return transformers.CLIPTextModelWithProjection(config).eval(), tokenizer


def _t5_tokenizer() -> Any:
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -1.0),
        *((letter, -2.0) for letter in _LETTERS),
    ]
    return transformers.T5TokenizerFast(vocab=pieces, extra_ids=0)


def _t5_settings(width: int) -> dict[str, Any]:
    return {
        "vocab_size": 4 + len(_LETTERS),
        "d_model": width,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
    }


def t5(width: int = 32) -> tuple[Any, Any]:
    """T5's encoder and tokenizer, of a width."""
    return transformers.T5EncoderModel(transformers.T5Config(**_t5_settings(width))).eval(), _t5_tokenizer()


def umt5(width: int = 32) -> tuple[Any, Any]:
    """The same with a table of places in every layer, as Wan has it."""
    return transformers.UMT5EncoderModel(
        transformers.UMT5Config(**_t5_settings(width))
    ).eval(), _t5_tokenizer()


def llama(width: int = 16) -> tuple[Any, Any]:
    """Llama and its tokenizer, as HunyuanVideo has it."""
    words = ["<unk>", "<s>", "</s>", "▁", *_LETTERS]
    tokenizer = transformers.LlamaTokenizerFast(
        vocab={word: index for index, word in enumerate(words)}, merges=[], pad_token="</s>"
    )
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=2,
    )
    return transformers.LlamaModel(config).eval(), tokenizer


def qwen(width: int = 16) -> tuple[Any, Any]:
    """Qwen2.5-VL and its tokenizer."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    words = [*sorted(bytes_to_unicode().values()), *_SPECIAL]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=vocabulary, merges=[], extra_special_tokens=list(_SPECIAL[1:]), model_max_length=2048
    )
    ids = {
        "image_token_id": vocabulary["<|image_pad|>"],
        "video_token_id": vocabulary["<|video_pad|>"],
        "vision_start_token_id": vocabulary["<|vision_start|>"],
        "vision_end_token_id": vocabulary["<|vision_end|>"],
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": width,
            "intermediate_size": width,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
            "rope_theta": 1000000.0,
            "vocab_size": len(words),
            "bos_token_id": 0,
            "eos_token_id": vocabulary["<|endoftext|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": width,
            "intermediate_size": width,
            "num_heads": 2,
            "out_hidden_size": width,
            "fullatt_block_indexes": [1],
        },
        **ids,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval(), tokenizer


class _WithoutVideos(transformers.Qwen2VLProcessor):
    """The processor without the part for videos, which needs torchvision: the same for pictures."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        super().__init__(image_processor, tokenizer, None, chat_template)


def allow_no_torchvision(patch: Any) -> None:
    """Where torchvision is not installed, have transformers' processor of Qwen2.5-VL load without it.

    Args:
        patch: pytest's ``monkeypatch``, or a class with its ``setattr``.
    """
    if importlib.util.find_spec("torchvision") is None:
        _WithoutVideos.__name__ = transformers.Qwen2VLProcessor.__name__
        _WithoutVideos.__module__ = transformers.Qwen2VLProcessor.__module__
        patch.setattr(transformers, "Qwen2VLProcessor", _WithoutVideos)


def qwen_processor(tokenizer: Any) -> Any:
    """What gives Qwen2.5-VL pictures."""
    pictures = transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56)
    if importlib.util.find_spec("torchvision") is None:
        return transformers.Qwen2VLProcessor(pictures, tokenizer)
    return transformers.Qwen2VLProcessor(pictures, tokenizer, transformers.Qwen2VLVideoProcessor())
