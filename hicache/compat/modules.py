"""What modules hold: parts, weights and hooks (torch 2.11 – 2.13)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from torch import nn

# Under this key a module has the hook that records its output. The same on every module: with the key that
# register_forward_hook() counts up, each block would be another block to torch.compile.
OUTPUT_HOOK: Final[Any] = "hicache"


def children_of_list(blocks: nn.ModuleList) -> list[nn.Module]:
    """The modules of a list, whatever its class makes of iteration (``Module._modules``)."""
    return [block for block in blocks._modules.values() if block is not None]


def children_by_name(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's children as it has them: what is put in a place is in here (``Module._modules``)."""
    return module._modules


def weights_by_name(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own weights as it has them (``Module._parameters``)."""
    return module._parameters


def add_output_hook(module: nn.Module, hook: Callable[..., None]) -> None:
    """Call ``hook(module, args, output)`` after the module's forward (``Module._forward_hooks``)."""
    module._forward_hooks[OUTPUT_HOOK] = hook
    leave_sizes_open(module)


def remove_output_hook(module: nn.Module) -> None:
    """Undo :func:`add_output_hook`."""
    module._forward_hooks.pop(OUTPUT_HOOK, None)
    fix_sizes(module)


def leave_sizes_open(module: nn.Module) -> None:
    """Have torch.compile take what is found by way of a module for something else than weights.

    It fixes the shapes of all tensors that it finds by way of a module of torch's own (by ``__module__``):
    those that a hook reads or writes as well, so that every height would be another graph.
    """
    module.__dict__["__module__"] = __name__


def fix_sizes(module: nn.Module) -> None:
    """Undo :func:`leave_sizes_open`."""
    module.__dict__.pop("__module__", None)


def hook_keys(module: nn.Module) -> tuple[list[Any], list[Any]]:
    """Keys of the forward hooks others put on a module, and of its pre-hooks: torch never uses one again."""
    return [key for key in module._forward_hooks if key != OUTPUT_HOOK], list(module._forward_pre_hooks)


def hooks_by_key(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    """A module's forward hooks and pre-hooks as it has them (``_forward_hooks``, ``_forward_pre_hooks``)."""
    return module._forward_hooks, module._forward_pre_hooks


def is_hooked(module: nn.Module) -> bool:
    """Whether a module does more than its class's forward."""
    return bool("forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks)
