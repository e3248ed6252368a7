"""Which adapter knows a model's modules: by the name of its class, imported when first asked for."""

from __future__ import annotations

import importlib
from typing import Final

from torch import nn

from hicache.adapters.base import ModuleAdapter

# class of the model → "module:class" of its adapter
_ADAPTERS: Final[dict[str, str | type[ModuleAdapter]]] = {
    "ChromaTransformer2DModel": "hicache.adapters.chroma:Chroma",
    "CogVideoXTransformer3DModel": "hicache.adapters.cogvideox:CogVideoX",
    "DiTTransformer2DModel": "hicache.adapters.dit:DiT",
    "Flux2Transformer2DModel": "hicache.adapters.flux2:Flux2",
    "FluxTransformer2DModel": "hicache.adapters.flux:Flux",
    "HunyuanVideoTransformer3DModel": "hicache.adapters.hunyuan_video:HunyuanVideo",
    "LTXVideoTransformer3DModel": "hicache.adapters.ltx:LTX",
    "PixArtTransformer2DModel": "hicache.adapters.pixart:PixArt",
    "QwenImageTransformer2DModel": "hicache.adapters.qwen_image:QwenImage",
    "SD3Transformer2DModel": "hicache.adapters.sd3:SD3",
    "SanaTransformer2DModel": "hicache.adapters.sana:Sana",
    "WanTransformer3DModel": "hicache.adapters.wan:Wan",
}


def register(model_class: type[nn.Module], adapter: type[ModuleAdapter]) -> None:
    """Teach hicache the modules of a model of your own (docs/adding-a-model.md).

    Args:
        model_class: the transformer's class; subclasses are known with it.
        adapter: its features and gates. Replaces an adapter already known for this class.

    Raises:
        TypeError: an argument is not such a class.
    """
    for name, given, base in (("model_class", model_class, nn.Module), ("adapter", adapter, ModuleAdapter)):
        if not (isinstance(given, type) and issubclass(given, base)):
            raise TypeError(f"hicache: expected {name} to be a subclass of {base.__name__}, got {given!r}")
    _ADAPTERS[model_class.__name__] = adapter


def known() -> tuple[str, ...]:
    """Names of the model classes whose modules are known."""
    return tuple(sorted(_ADAPTERS))


def find(module: nn.Module) -> ModuleAdapter | None:
    """The adapter of a model; None where its modules are not known."""
    for cls in type(module).__mro__:
        found = _ADAPTERS.get(cls.__name__)
        if isinstance(found, str):
            path, _, name = found.partition(":")
            loaded: type[ModuleAdapter] = getattr(importlib.import_module(path), name)
            return loaded(module)
        if found is not None:
            return found(module)
    return None
