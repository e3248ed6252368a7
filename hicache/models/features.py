"""Module granularity: what one family of models computes before its gates, and what the gates are.

Every family is a subclass of :class:`ModuleAdapter` in a file of its own; docs/adding-a-model.md shows one.
All of them say the same of a model: its blocks only ever add to the hidden state, so that
``h_L = h_0 + Σ_i gate_i(t) ⊙ F_i`` (docs/algorithm.md, "A skipped step is one sum").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Feature:
    """One tensor that a module of a block computes, and the terms of the sum it belongs to.

    Args:
        module: computes it in its forward.
        terms: indices of the terms it is part of, each with what gives a constant factor ``[channels]``, or
            None for one. Features that share a term are added up as they are recorded: that is what constant
            parts of gates are for (docs/algorithm.md, "Shared gates collapse"). The factor is asked for right
            after the module has run: an offloaded weight is at hand then, and only then.
        element: where the module returns a tuple, which element; a tuple that is too short has none.
        joint: where the module works on text and image tokens together, the image's place: ``"first"`` or
            ``"last"``.
        view: turns the output into ``[batch, tokens, channels]`` where it is something else.
    """

    module: nn.Module
    terms: tuple[tuple[int, Callable[[], Tensor] | None], ...]
    element: int | None = None
    joint: str | None = None
    view: Callable[[Tensor], Tensor] | None = None

    def read(self, output: Any, shape: torch.Size) -> Tensor | None:
        """The feature in a module's output, of the hidden state's shape; None where the output has none."""
        if self.element is not None:
            if not isinstance(output, (tuple, list)) or len(output) <= self.element:
                return None
            output = output[self.element]
        if not isinstance(output, Tensor):
            raise ValueError(
                f"expected {type(self.module).__name__} to give a tensor, got {type(output).__name__}"
            )
        value: Tensor = output if self.view is None else self.view(output)
        if self.joint is not None and value.ndim == len(shape):
            tokens = shape[1]
            value = value[:, -tokens:] if self.joint == "last" else value[:, :tokens]
        if value.shape != shape:
            raise ValueError(
                f"expected {type(self.module).__name__} to give a hidden state {tuple(shape)}, got "
                f"{tuple(value.shape)}"
            )
        return value


class ModuleAdapter:
    """The features and gates of one family of models.

    A subclass writes :meth:`features` and :meth:`gates`, and the others where its family needs them. ``call``
    is always the arguments of the first block by name (in every step), ``named`` those of the model. Blocks
    are to be listed in ``__init__``: on a skipped step the model's own lists are empty.

    Args:
        module: the transformer. It is only looked at.
    """

    #: Arguments of the model, besides the timestep, that gates depend on; empty: they are not foreseen.
    constants: tuple[str, ...] = ()
    #: Calls a step and samples a picture in a call when guided: (2, 1) for separate calls, (1, 2) for one
    #: batch, (1, 1) for guidance distilled into the model.
    guidance: tuple[int, int] = (1, 1)
    #: Frames a latent frame and pixels a latent pixel, of the family's usual autoencoder.
    compression: tuple[int, int] = (1, 8)

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    def features(self) -> Sequence[Feature]:
        """All features of all blocks. Only what reaches the output head: no features of the text stream."""
        raise NotImplementedError

    def terms(self, call: Mapping[str, Any]) -> int:
        """Terms of the sum in a call like this."""
        last: int = max(term for feature in self.features() for term, _ in feature.terms)
        return last + 1

    def gates(self, call: Mapping[str, Any], base: Tensor) -> Tensor:
        """The gates of this step: ``[terms, batch, channels]``, contiguous, of base's dtype and device."""
        raise NotImplementedError

    def coming(
        self, call: Mapping[str, Any], named: Mapping[str, Any], timesteps: Tensor, steps: int, like: Tensor
    ) -> Mapping[str, Any]:
        """What :meth:`gates` reads, for several steps at once. Wanted where :attr:`constants` are named.

        Args:
            call: the first block's arguments now.
            named: the model's arguments now.
            timesteps: the model's ``timestep`` of all those steps, ``[steps · batch]``, step by step.
            steps: how many: other arguments repeat as often.
            like: ``[batch, ..., channels]``, of the hidden state's dtype and device.
        """
        raise NotImplementedError

    def refusal(self, call: Mapping[str, Any]) -> str | None:
        """Why a call like this cannot be cached module by module; None when it can."""
        return None

    def between(self, named: Mapping[str, Any]) -> Iterable[Tensor]:
        """What the model itself adds to the hidden state between its blocks: ControlNet residuals."""
        return ()

    def hooks(self) -> list[Callable[[], None]]:
        """Install what the family needs besides recording; returns what undoes it."""
        return []

    @property
    def channels(self) -> int:
        """Channels of the hidden state."""
        config = self.module.config
        return int(config.num_attention_heads * config.attention_head_dim)

    def tokens(self, latent_shape: Sequence[int]) -> int:
        """Image tokens for latents ``[frames, height, width]``; for :func:`hicache.fast.plan`."""
        patch = self.module.config.patch_size
        if not isinstance(patch, (tuple, list)):
            patch = (getattr(self.module.config, "patch_size_t", None) or 1, patch, patch)
        return math.prod(size // step for size, step in zip(latent_shape, patch, strict=True))


def repeated(value: Tensor | None, steps: int) -> Tensor | None:
    """A per-sample argument ``[batch, ...]`` for several steps: ``[steps · batch, ...]``."""
    return None if value is None else value.repeat(steps, *[1] * (value.ndim - 1))


def doubles_and_singles(module: Any, joint: str) -> list[Feature]:
    """Flux's features, one term each: attention and MLP of the doubles, the singles' fused output.

    Args:
        module: has ``transformer_blocks`` and ``single_transformer_blocks``.
        joint: where the image stands in the singles' stream.
    """
    found: list[Feature] = []
    for block in module.transformer_blocks:
        found.append(Feature(block.attn, ((len(found), None),), element=0))
        found.append(Feature(block.ff, ((len(found), None),)))
    for block in module.single_transformer_blocks:
        found.append(Feature(block.proj_out, ((len(found), None),), joint=joint))
    return found


def packed(latent_shape: Sequence[int]) -> int:
    """Image tokens where the pipeline, not the model, packs 2 × 2 latents ``[1, height, width]`` into one."""
    _, height, width = latent_shape
    return (height // 2) * (width // 2)
