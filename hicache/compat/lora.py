"""LoRA layers of peft 0.18 – 0.21; its names are public, but its classes are not always installed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


def is_lora(module: nn.Module) -> bool:
    """Whether a module is a LoRA layer around another one."""
    return isinstance(getattr(module, "scaling", None), dict)


def lora_settings(layer: Any) -> tuple[Any, ...]:
    """How a LoRA layer weighs its adapters, which of them are active, and which are merged.

    Weights are rounded: diffusers multiplies them by a call's scale and divides them by it afterwards.
    """
    return (
        *((name, f"{scale:.6g}") for name, scale in layer.scaling.items()),
        str(getattr(layer, "active_adapters", None)),
        bool(getattr(layer, "disable_adapters", False)),
        str(getattr(layer, "merged_adapters", None)),
    )


@contextlib.contextmanager
def lora_scaled(module: nn.Module, scale: float) -> Iterator[None]:
    """Inside, LoRA layers weigh as in a call with this ``scale``, by the functions diffusers' models use."""
    scaled = scale != 1 and any(map(is_lora, module.modules()))
    if scaled:
        from diffusers.utils import scale_lora_layers, unscale_lora_layers

        scale_lora_layers(module, scale)
    try:
        yield
    finally:
        if scaled:
            unscale_lora_layers(module, scale)
