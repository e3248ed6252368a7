"""Whole tiny pipelines in folders, as models of the hub are: one for each family of ``hicache generate``.

``save(name, folder)`` makes one of the pipelines of :mod:`tests.support.pipelines` whole, with text encoders,
tokenizers and an autoencoder, and saves it. :data:`CALLS` has what each is drawn with.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import diffusers
import torch

from tests.support import pipelines, text_models
from tests.support.models import Arguments

Parts = dict[str, Any]

#: Settings of :class:`hicache.launch.settings.Settings` for pictures of a few pixels.
CALLS: Final[dict[str, Arguments]] = {
    "flux": {"width": 32, "height": 32},
    "flux-kontext": {"width": 32, "height": 32, "more": {"max_area": 32 * 32, "_auto_resize": False}},
    "qwen-image": {"width": 32, "height": 32},
    "qwen-image-edit": {"width": 32, "height": 32},
    "sd3": {"width": 32, "height": 32},
    "hunyuan-video": {
        "width": 16,
        "height": 16,
        "frames": 9,
        "more": {"prompt_template": {"template": "{}", "crop_start": 0}, "max_sequence_length": 16},
    },
    "wan": {"width": 16, "height": 16, "frames": 9},
    "ltx": {"width": 32, "height": 32, "frames": 9},
    "cogvideox": {"width": 16, "height": 16, "frames": 9, "more": {"max_sequence_length": 16}},
    "dit": {},
}


def _clip_and_t5(width: int = 32) -> Parts:
    (first, first_words), (second, second_words) = text_models.clip_text(), text_models.t5(width)
    return {
        "text_encoder": first,
        "tokenizer": first_words,
        "text_encoder_2": second,
        "tokenizer_2": second_words,
    }


def _one(made: tuple[Any, Any]) -> Parts:
    return {"text_encoder": made[0], "tokenizer": made[1]}


def _flux() -> Parts:
    return {"vae": pipelines.autoencoder(1), **_clip_and_t5()}


def _flux_kontext() -> Parts:
    return {"vae": pipelines.autoencoder(16), **_clip_and_t5()}


def _qwen() -> Parts:
    return {"vae": pipelines.qwen_autoencoder(), **_one(text_models.qwen())}


def _qwen_edit() -> Parts:
    parts = _qwen()
    return {**parts, "processor": text_models.qwen_processor(parts["tokenizer"])}


def _sd3() -> Parts:
    parts: Parts = {"vae": pipelines.autoencoder(4)}
    for suffix, made in (
        ("", text_models.clip_projected()),
        ("_2", text_models.clip_projected()),
        ("_3", text_models.t5()),
    ):
        parts |= {f"text_encoder{suffix}": made[0], f"tokenizer{suffix}": made[1]}
    return parts


def _hunyuan() -> Parts:
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=1
    )
    second = text_models.clip_text(8)
    return {
        "vae": vae,
        **_one(text_models.llama()),
        "text_encoder_2": second[0],
        "tokenizer_2": second[1],
    }


def _wan() -> Parts:
    return _one(text_models.umt5())


def _ltx() -> Parts:
    return {"vae": pipelines.ltx_vae(), **_one(text_models.t5())}


def _cogvideox() -> Parts:
    vae = diffusers.AutoencoderKLCogVideoX(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return {"vae": vae, **_one(text_models.t5(8))}


_PARTS: Final[dict[str, tuple[str, Callable[[], Parts]]]] = {
    "flux": ("flux", _flux),
    "flux-kontext": ("flux_kontext", _flux_kontext),
    "qwen-image": ("qwen", _qwen),
    "qwen-image-edit": ("qwen_edit", _qwen_edit),
    "sd3": ("sd3", _sd3),
    "hunyuan-video": ("hunyuan", _hunyuan),
    "wan": ("wan", _wan),
    "ltx": ("ltx", _ltx),
    "cogvideox": ("cogvideox", _cogvideox),
    "dit": ("dit", dict),
}
FAMILIES: Final = tuple(_PARTS)


def save(name: str, folder: Path) -> Path:
    """A family's tiny pipeline, in a folder; every gate of its transformer counts."""
    torch.manual_seed(0)
    base, parts = _PARTS[name]
    pipe, _ = pipelines.build_randomized(base)
    whole = type(pipe)(**{**pipe.components, **_settings(pipe), **parts()})
    whole.save_pretrained(folder)
    return folder


def _settings(pipe: Any) -> Parts:
    """What a pipeline is made with that is no part of it."""
    return {name: pipe.config[name] for name in ("boundary_ratio", "expand_timesteps") if name in pipe.config}
