"""Arguments of a transformer that only feed its blocks: ControlNet residuals, and which layers to skip.

At a skipped step nobody needs them: their effect is in what is cached. By module that of a ControlNet which
is watched is a feature of its own; residuals of which nobody knows where they come from are added as they
come (``ModuleAdapter.between``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from hicache.compat import pytree
from hicache.hooks.deferred import real
from hicache.runtime.context import BegunCall
from hicache.token_view import TokenView
from hicache.trees import tensors_of

# what transformers and U-Nets call the residuals of a ControlNet
_RESIDUALS: Final = (
    "controlnet_block_samples",
    "controlnet_single_block_samples",
    "block_controlnet_hidden_states",
    "down_block_additional_residuals",
    "mid_block_additional_residual",
)
# A list of residuals would be added a second time, and skip-layer guidance would leave out the stand-in.
BLOCK_ONLY_ARGUMENTS: Final = (*_RESIDUALS, "skip_layers")
# under this name a tensor has the scale of the watched ControlNet that gave it
_SCALE: Final = "_hicache_scale"

# how much each ControlNet counts in a call: residuals are proportional to it
Scale = tuple[float, ...]
NO_RESIDUALS: Final[Scale] = ()  # of a call that is given none


def mark(output: Any, scale: Scale) -> None:
    """A watched ControlNet gives this: it is to be known where it turns up."""
    for tensor in tensors_of(output):
        setattr(tensor, _SCALE, scale)


def scale_of(model_kwargs: Mapping[str, Any]) -> Scale | None:
    """The scale of the residuals a call is given; None where they are no watched ControlNet's, untouched."""
    given = [model_kwargs[name] for name in _RESIDUALS if model_kwargs.get(name) is not None]
    found = {getattr(leaf, _SCALE, None) for leaf in tensors_of(given)} if given else None
    if not found:
        return NO_RESIDUALS
    return found.pop() if len(found) == 1 else None


def given_to_blocks(begun: BegunCall, names: Sequence[str], full: bool) -> BegunCall:
    """A call with what its blocks need: the residuals that a ControlNet is made to give now, or nothing.

    Args:
        begun: the call.
        names: of its positional arguments.
        full: whether the blocks run.
    """
    given = [name for name in BLOCK_ONLY_ARGUMENTS if begun.model_kwargs.get(name) is not None]
    if not given:
        return begun
    values = {
        name: (pytree.tree_map(real, value) if full else None) if name in given else value
        for name, value in begun.model_kwargs.items()
    }
    args = tuple(values[name] for name, _ in zip(names, begun.args, strict=False))
    kwargs = {name: values[name] for name in begun.kwargs}
    # what is known to be added between blocks, and left out on skipped steps, is not looked for
    begun = replace(begun, args=args, kwargs=kwargs, checked=False)
    return replace(begun, model_kwargs=values) if full else begun


def write_total(between: Iterable[Tensor], out: Tensor, view: TokenView | None = None) -> None:
    """Write the sum of what is added between blocks, each of few residuals perhaps after many of them.

    Args:
        between: of the hidden state's shape, or one that broadcasts to it.
        out: ``[batch, drawn tokens, channels]``; summed in fp32 (float64 for float64) and rounded once.
        view: of the hidden state that ``out`` has; None: all of it.
    """
    counts: dict[int, tuple[Tensor, int]] = {}
    for residual in between:
        counts[id(residual)] = residual, counts.get(id(residual), (residual, 0))[1] + 1
    dtypes = [torch.promote_types(residual.dtype, torch.float32) for residual, _ in counts.values()]
    dtype = max((torch.float32, *dtypes), key=lambda dtype: dtype.itemsize)
    summed = torch.zeros(out.shape, dtype=dtype, device=out.device)
    for residual, count in counts.values():
        drawn = residual if view is None else view.drawn(residual)
        summed.add_(drawn.to(out.device), alpha=count)
    out.copy_(summed)
