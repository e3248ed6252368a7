"""Embedders whose output is known at skipped steps, and which do not run there.

What only the blocks read is not computed: rotary embeddings, and text embedded for them.

Rotary embeddings are dozens of small operations a call; a text's embedder is a layer or two, or blocks of its
own. On a skipped step what the context's first full step had of them stands in: code before and after the
blocks (joining tokens of text and image, say) finds the shapes it expects, in the same memory at every step.
Nothing of their numbers reaches what a model returns, so it does not matter that another prompt has others.

The embedding of a timestep, which the head reads too, was computed at the full step before
(hicache/runtime/gate_prefetch.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

from torch import nn

from hicache import compat
from hicache.mixin import mix_in

# diffusers' classes whose output goes to the blocks and nowhere else
ROTARY: Final = (
    "FluxPosEmbed",
    "Flux2PosEmbed",
    "HunyuanVideoRotaryPosEmbed",
    "LTXVideoRotaryPosEmbed",
    "QwenEmbedRope",
    "WanRotaryPosEmbed",
)
# diffusers' models → those of their children whose output does; in a subclass it may go elsewhere, too
TEXT: Final = {
    "ChromaTransformer2DModel": ("context_embedder",),
    "Flux2Transformer2DModel": ("context_embedder",),
    "FluxTransformer2DModel": ("context_embedder",),
    "HunyuanVideoTransformer3DModel": ("context_embedder",),
    "LTXVideoTransformer3DModel": ("caption_projection",),
    "PixArtTransformer2DModel": ("caption_projection",),
    "QwenImageTransformer2DModel": ("txt_norm", "txt_in"),
    "SD3Transformer2DModel": ("context_embedder",),
    "SanaTransformer2DModel": ("caption_projection", "caption_norm"),
}
_KEY: Final = "_hicache_recall"

# (the module's own forward, args, kwargs) -> its output, or a remembered one
Recall = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class _Recalling(nn.Module):
    """Mixed into a module's class while it is hooked."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[_KEY](super().forward, args, kwargs)


def hook(module: nn.Module, recall: Recall) -> list[Callable[[], None]]:
    """Route children that only the blocks read through ``recall``; returns what undoes it."""
    return [undo for child in for_blocks_alone(module) for undo in route(child, recall)]


def route(child: nn.Module, recall: Recall) -> list[Callable[[], None]]:
    """Route a child of a model through ``recall``; returns what undoes it."""
    compat.leave_sizes_open(child)
    return [mix_in(child, _Recalling, _KEY, recall), partial(compat.fix_sizes, child)]


def for_blocks_alone(module: nn.Module) -> Iterator[nn.Module]:
    """The children of a model whose output only its blocks read."""
    cls = type(module)
    texts = TEXT.get(cls.__name__, ()) if cls.__module__.startswith("diffusers.") else ()
    for name, child in module.named_children():
        if name in texts or type(child).__name__ in ROTARY:
            yield child
