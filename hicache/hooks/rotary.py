"""Rotary embeddings on skipped steps: only the blocks read them, so they need not be computed anew.

They are dozens of small operations a call. On a skipped step the ones of the context's first full step stand
in: what uses them before the blocks (joining those of text and image, say) finds the shapes it expects, in
the same memory at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from torch import nn

from hicache.mixin import mix_in

# diffusers' classes whose output goes to the blocks and nowhere else
_CLASSES: Final = (
    "FluxPosEmbed",
    "Flux2PosEmbed",
    "HunyuanVideoRotaryPosEmbed",
    "LTXVideoRotaryPosEmbed",
    "QwenEmbedRope",
    "WanRotaryPosEmbed",
)
_KEY: Final = "_hicache_recall"

# (the module's own forward, args, kwargs) -> its output, or a remembered one
Recall = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class _Recalling(nn.Module):
    """Mixed into a module's class while it is hooked."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[_KEY](super().forward, args, kwargs)


def hook(module: nn.Module, recall: Recall) -> list[Callable[[], None]]:
    """Route the rotary embeddings among a model's children through ``recall``; returns what undoes it."""
    return [
        mix_in(child, _Recalling, _KEY, recall)
        for child in module.children()
        if type(child).__name__ in _CLASSES
    ]
