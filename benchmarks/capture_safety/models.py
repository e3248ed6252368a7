"""The models that are looked at: small, with random weights, as the tests build them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

from torch import nn

from tests.support import models

# a model, and what gives the arguments of its call at a time in (0, 1]
Build = Callable[[], tuple[nn.Module, Callable[[float], dict[str, Any]]]]

# as in the table → in tests.support.models
MODELS: Final = {
    "FLUX.1": "flux",
    "FLUX.1 Kontext": "kontext",
    "FLUX.2": "flux2",
    "Qwen-Image": "qwen_image",
    "Qwen-Image, masked": "qwen_image_mask",
    "Qwen-Image-Edit, `zero_cond_t`": "qwen_image_edit",
    "SD3, SD3.5": "sd3",
    "HunyuanVideo": "hunyuan_video",
    "HunyuanVideo 1.5": "hunyuan_video15",
    "Wan 2.1, 2.2": "wan",
    "Wan VACE": "wan_vace",
    "LTX": "ltx",
    "CogVideoX": "cogvideox",
    "CogView4": "cogview4",
    "PixArt": "pixart",
    "DiT": "dit",
    "Sana": "sana",
    "HiDream": "hidream",
    "Chroma": "chroma",
    "Z-Image": "z_image",
    "Lumina2": "lumina2",
    "Mochi": "mochi",
    "AuraFlow": "auraflow",
    "Kandinsky 5": "kandinsky5",
    "Bria": "bria",
}


def builders() -> dict[str, Build]:
    """Return what builds the models, by their names in the table."""
    return {title: functools.partial(models.build, name) for title, name in MODELS.items()}
