"""What diffusers and accelerate put on modules, and have on record of them (0.37 – 0.42; 1.15)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Final

from torch import nn

# what the hooks of diffusers' caches are called, those without "cache" in their names
_CACHE_HOOKS: Final = ("fbc_", "pyramid_attention_broadcast")


def block_metadata(block: nn.Module) -> Any:
    """diffusers' record of what a block takes and returns (``TransformerBlockRegistry``), or None."""
    try:
        from diffusers.hooks._helpers import TransformerBlockRegistry
    except ImportError:
        return None
    try:
        return TransformerBlockRegistry.get(type(block))
    except ValueError:
        return None


def guider_prediction(variables: Mapping[str, Any]) -> str | None:
    """Which prediction the block of a modular pipeline is calling for: ``"pred_uncond"``.

    Of ``guider_state_batch``, as every one calls it, under the key ``BaseGuidance._identifier_key``.
    """
    batch = variables.get("guider_state_batch")
    return None if batch is None else getattr(batch, "__guidance_identifier__", None)


def split_for_rank(
    block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The part of a block's arguments that this process has, where diffusers splits them at the block itself.

    Context parallelism puts a ``ContextParallelSplitHook`` among the ``hooks`` of ``_diffusers_hook``.
    """
    registry = block.__dict__.get("_diffusers_hook")
    for hook in getattr(registry, "hooks", {}).values():
        if type(hook).__name__ == "ContextParallelSplitHook":
            args, kwargs = hook.pre_forward(block, *args, **kwargs)
    return args, kwargs


def attention_backend() -> Any:
    """diffusers' choice for processors that have none of their own (``_AttentionBackendRegistry``)."""
    dispatch: Any = sys.modules.get("diffusers.models.attention_dispatch")
    registry = getattr(dispatch, "_AttentionBackendRegistry", None)
    return getattr(registry, "_active_backend", None)


def processor_attention_backend(processor: Any) -> str:
    """A processor's own choice (``_attention_backend``)."""
    return str(getattr(processor, "_attention_backend", None))


def is_context_parallel(processor: Any) -> bool:
    """Whether an attention has a part of the tokens on each rank (a processor's ``_parallel_config``)."""
    return getattr(processor, "_parallel_config", None) is not None


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate (``_hf_hook``) or diffusers (``_diffusers_hook``) run code around its forward."""
    registry = module.__dict__.get("_diffusers_hook")  # may be there without any hook in it
    return bool(
        "forward" in module.__dict__ or "_hf_hook" in module.__dict__ or getattr(registry, "hooks", None)
    )


def is_offloaded_by_blocks(module: nn.Module) -> bool:
    """Whether diffusers brings weights of a model to the device for as long as a group of its blocks runs.

    Its hook is called ``group_offloading`` in the registry ``_diffusers_hook``.
    """
    registries = (part.__dict__.get("_diffusers_hook") for part in module.modules())
    return any("group_offloading" in getattr(registry, "hooks", ()) for registry in registries)


def diffusers_cache(module: nn.Module) -> str | None:
    """Which of diffusers' caches a model has, by ``enable_cache`` or by its own function; None for none.

    ``CacheMixin._cache_config``, and the names of hooks in the registries ``_diffusers_hook``.
    """
    config = getattr(module, "_cache_config", None)
    if config is not None:
        return type(config).__name__
    registries = (part.__dict__.get("_diffusers_hook") for part in module.modules())
    names = (str(name) for registry in registries for name in getattr(registry, "hooks", ()))
    return next((name for name in names if "cache" in name or name.startswith(_CACHE_HOOKS)), None)


def kept_in_fp32(model: Any) -> set[str]:
    """Names of the parts of a model whose weights stay in fp32, whatever dtype it is loaded in."""
    return set(getattr(model, "_keep_in_fp32_modules", None) or ())


def pipeline_kind(index: Mapping[str, Any]) -> str | None:
    """The class that a ``model_index.json`` says its pipeline is of (``_class_name``); None: it says none."""
    kind = index.get("_class_name")
    return kind if isinstance(kind, str) else None
