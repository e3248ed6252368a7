"""Which attentions of which models can be sparse: a table. Another family is another row.

Source: the ``forward`` of the models named here, in diffusers 0.42.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from hicache import compat
from hicache.companions.sparse.layer import Tokens
from hicache.companions.sparse.order import grid_positions, square_order


@dataclass(frozen=True)
class Family:
    """A family of models.

    Args:
        lists: of blocks, as the model runs them.
        attention: the name of the attention in a block, of all tokens to all tokens.
        processor: the class of processor that is understood: it asks for one attention, of all tokens.
        positions: frame, row and column of every token of the picture, ``[tokens, 3]``.
        text: tokens of text before those of the picture.
    """

    lists: tuple[str, ...]
    attention: str
    processor: str
    positions: Callable[[nn.Module, Mapping[str, Any]], Tensor]
    text: Callable[[Mapping[str, Any]], int]

    def tokens(self, denoiser: nn.Module, model_kwargs: Mapping[str, Any]) -> Tokens:
        """How the tokens of a call lie; never waits for the device."""
        text, order = self.text(model_kwargs), square_order(self.positions(denoiser, model_kwargs))
        before = torch.arange(text, device=order.device)
        return Tokens(text, torch.cat([before, order + text]))


def _flux_positions(denoiser: nn.Module, model_kwargs: Mapping[str, Any]) -> Tensor:
    positions: Tensor = model_kwargs["img_ids"]
    return positions[0] if positions.ndim == 3 else positions


def _wan_positions(denoiser: nn.Module, model_kwargs: Mapping[str, Any]) -> Tensor:
    latents: Tensor = model_kwargs["hidden_states"]
    patch: tuple[int, ...] = denoiser.config.patch_size  # type: ignore[union-attr,assignment]
    frames, rows, columns = (size // side for size, side in zip(latents.shape[2:], patch, strict=True))
    return grid_positions(frames, rows, columns, latents.device)


FAMILIES: Final[dict[str, Family]] = {
    "FluxTransformer2DModel": Family(
        ("transformer_blocks", "single_transformer_blocks"),
        "attn",
        "FluxAttnProcessor",
        _flux_positions,
        lambda model_kwargs: int(model_kwargs["encoder_hidden_states"].shape[1]),
    ),
    # the text is attended to apart
    "WanTransformer3DModel": Family(
        ("blocks",), "attn1", "WanAttnProcessor", _wan_positions, lambda model_kwargs: 0
    ),
}


def family_of(denoiser: nn.Module) -> Family:
    """The family of a model.

    Raises:
        ValueError: none.
    """
    names = [kind.__name__ for kind in type(denoiser).__mro__]
    found = next((FAMILIES[name] for name in names if name in FAMILIES), None)
    if found is None:
        raise ValueError(
            f"hicache: sparse full steps know {' and '.join(FAMILIES)}, and got {type(denoiser).__name__}"
        )
    return found


def attentions(denoiser: nn.Module, family: Family) -> list[nn.Module]:
    """The attentions of a model that may be sparse, in the order in which they run."""
    blocks = [block for name in family.lists for block in getattr(denoiser, name)]
    return [getattr(block, family.attention) for block in blocks]


def check_attentions(denoiser: nn.Module, family: Family) -> None:
    """Check that a model's attentions are what the table says.

    Raises:
        ValueError: another processor (an IP-Adapter's), context parallelism, or a compiled model.
    """
    name = type(denoiser).__name__
    for attention in attentions(denoiser, family):
        processor = getattr(attention, "processor", None)
        if type(processor).__name__ != family.processor:
            raise ValueError(
                f"hicache: sparse full steps expect {family.processor} in the attentions of {name}, got "
                f"{type(processor).__name__}: an IP-Adapter or another processor computes more than one "
                "attention"
            )
        if compat.is_context_parallel(processor):
            raise ValueError(
                f"hicache: sparse full steps expect whole sequences, and {name} runs in context parallel: "
                "a column's place would be another's on every rank"
            )
    if compat.is_compiled(denoiser):
        raise ValueError(
            f"hicache: sparse full steps expect {name} to run eagerly, got it or a part of it compiled: "
            "attention does something else at every kind of full step"
        )
