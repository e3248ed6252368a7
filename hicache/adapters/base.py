"""Module granularity: what one family of models computes before its gates, and what the gates are.

Every family is a subclass of :class:`ModuleAdapter` in a file of its own; docs/adding-a-model.md shows one.
All of them say the same of a model: its blocks only ever add to the hidden state, so that
``h_L = h_0 + Σ_i gate_i(t) ⊙ F_i`` (docs/algorithm.md, "A skipped step is one sum").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

#: What gate inputs call the embedding of timesteps, ``[steps · batch, width]``: as diffusers' models do.
EMBEDDED: Final = "temb"

# (index of a feature, what gives the constant factor [channels] on the output, or None for one)
Features = tuple[tuple[int, Callable[[], Tensor] | None], ...]


@dataclass(frozen=True)
class ModuleOutput:
    """One tensor that a module of a block computes, and the features it is recorded in.

    Args:
        module: computes it in its forward.
        features: indices of the features it is part of, each with a function that gives a constant factor
            ``[channels]``, or None for a factor of one. Outputs that share a feature are added up as they are
            recorded: that is what constant parts of gates are for (docs/algorithm.md, "Shared gates
            collapse"). The factor is asked for right after the module has run: an offloaded weight is at hand
            then, and only then.
        element: where the module returns a tuple, which element; a tuple that is too short has none.
        joint: where the module works on text and image tokens together, the image's place: ``"first"`` or
            ``"last"``.
        view: turns the output into ``[batch, tokens, channels]`` where it is something else.
    """

    module: nn.Module
    features: Features
    element: int | None = None
    joint: str | None = None
    view: Callable[[Tensor], Tensor] | None = None

    def read(self, output: Any, shape: torch.Size) -> Tensor | None:
        """The part of a module's output that is recorded; None where there is none.

        Args:
            output: what the module returned.
            shape: of the hidden state, ``[batch, tokens, channels]``.

        Raises:
            ValueError: the output is no hidden state.
        """
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

    A subclass writes :meth:`outputs` and :meth:`gates`, and the others where its family needs them.
    ``block_kwargs`` are always the arguments of the first block by name, in every step; ``model_kwargs`` are
    those of the model. List the blocks in ``__init__``: on a skipped step the model's own lists are empty.

    Args:
        module: the transformer. It is only looked at.
    """

    #: Arguments of the model, besides the timestep, that gates depend on.
    gate_arguments: tuple[str, ...] = ()
    #: Calls a step and samples a picture in a call when guided: (2, 1) for separate calls, (1, 2) for one
    #: batch, (1, 1) for guidance distilled into the model.
    guidance: tuple[int, int] = (1, 1)
    #: Frames a latent frame and pixels a latent pixel, of the family's usual autoencoder.
    compression: tuple[int, int] = (1, 8)
    #: Tokens of a prompt, as the family's pipeline pads it or cuts it off.
    text_tokens: int = 512
    #: Tensors among the model's arguments whose numbers :meth:`drawn` reads.
    drawn_arguments: tuple[str, ...] = ()
    #: Whether :meth:`drawn` leaves out the tokens of given pictures.
    edits: bool = False

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    def outputs(self) -> Sequence[ModuleOutput]:
        """All outputs that are recorded, of all blocks: what reaches the output head, not the text stream."""
        raise NotImplementedError

    def num_features(self, block_kwargs: Mapping[str, Any]) -> int:
        """How many features a call like this has."""
        last: int = max(feature for output in self.outputs() for feature, _ in output.features)
        return last + 1

    def gates(self, block_kwargs: Mapping[str, Any], base: Tensor) -> Tensor:
        """The gates of this step: ``[num_features, batch, channels]``, contiguous, like ``base``.

        ``base`` is what is recorded of the hidden state, ``[batch, tokens, channels]``; with
        :meth:`token_timesteps`, ``[batch · groups, tokens of a group, channels]``.

        Made by :class:`~hicache.adapters.gates.Gates`, kept as an attribute, where they need weights of
        blocks: those may be offloaded.
        """
        raise NotImplementedError

    def gate_inputs(
        self,
        block_kwargs: Mapping[str, Any],
        model_kwargs: Mapping[str, Any],
        timesteps: Tensor,
        steps: int,
        like: Tensor,
    ) -> Mapping[str, Any]:
        """What :meth:`gates` reads, for several steps at once; for adapters that :attr:`foretell`.

        Args:
            block_kwargs: the first block's arguments now.
            model_kwargs: the model's arguments now.
            timesteps: the model's ``timestep`` of all those steps, ``[steps · batch]``, step by step.
            steps: how many: other arguments repeat as often.
            like: ``[batch, ..., channels]``, of the hidden state's dtype and device.
        """
        raise NotImplementedError

    def embedding_modules(self) -> Sequence[nn.Module]:
        """Modules whose weights ``"temb"`` is made of; for adapters with an :attr:`embedder`."""
        return ()

    def gate_modules(self) -> Sequence[nn.Module]:
        """Modules whose weights gates are made of; for adapters that :attr:`foretell`."""
        return ()

    @property
    def embedder(self) -> nn.Module | None:
        """The child of the model whose one call in a step gives what :meth:`gate_inputs` calls ``"temb"``.

        For blocks and head alone to read. At skipped steps it does not run, where its output turns out to be
        that; but by stack in a CUDA graph. None: there is no such child.
        """
        return None

    @property
    def foretell(self) -> bool:
        """Whether gates of other timesteps than a call's own can be computed."""
        return bool(self.gate_arguments)

    def drawn(self, model_kwargs: Mapping[str, Any], tokens: int) -> range:
        """Which of a call's image tokens reach the picture: the first, the last, or all.

        Those of pictures given to an editing model do not: its pipeline cuts them off what the model returns.
        They are neither recorded nor forecast. Asked once a run and context. It may go by shapes, by what is
        in lists, by the model's configuration, and by the numbers of :attr:`drawn_arguments`.

        Args:
            model_kwargs: the model's arguments.
            tokens: of the hidden state that enters the first block: all of them are drawn where that is
                another number than the arguments promise, as where tokens are spread over processes.
        """
        return range(tokens)

    def token_timesteps(self, model_kwargs: Mapping[str, Any]) -> Tensor | None:
        """The timesteps of all image tokens, ``[batch, tokens]``; None where a sample has one.

        Tokens alike in it have the same gates. Where they are so in groups of neighbours, a frame each,
        :meth:`gates` is asked for gates of groups.
        """
        return None

    def refusal(self, block_kwargs: Mapping[str, Any], model_kwargs: Mapping[str, Any]) -> str | None:
        """Why a call like this cannot be cached module by module; None when it can."""
        return None

    def between(self, model_kwargs: Mapping[str, Any]) -> Iterable[Tensor]:
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

    @property
    def returned(self) -> int:
        """Channels of a token as the model returns it, its patch and all; 0 where that is not known."""
        return int(getattr(getattr(self.module, "proj_out", None), "out_features", 0))

    def tokens(self, latent_shape: Sequence[int]) -> int:
        """Image tokens for latents ``[frames, height, width]``; for :func:`hicache.fast.plan`."""
        patch = self.module.config.patch_size
        if not isinstance(patch, (tuple, list)):
            patch = (getattr(self.module.config, "patch_size_t", None) or 1, patch, patch)
        return math.prod(size // step for size, step in zip(latent_shape, patch, strict=True))

    def example(self, latents: Sequence[int], batch: int, text: int, like: Tensor) -> dict[str, Any] | None:
        """Arguments of the model as its pipeline gives them, without numbers: for :func:`hicache.fast.plan`.

        Args:
            latents: their frames, height and width.
            batch: samples of one call.
            text: tokens of the prompt.
            like: makes them, ``new_empty``: of the model's dtype, on the device they are to be on.

        Returns:
            None: nobody has said what they are; then memory that only a run of the model tells is not
            planned.
        """
        return None


def repeated(value: Tensor | None, steps: int) -> Tensor | None:
    """A per-sample argument ``[batch, ...]`` for several steps: ``[steps · batch, ...]``."""
    return None if value is None else value.repeat(steps, *[1] * (value.ndim - 1))


def doubles_and_singles(module: Any, joint: str) -> list[ModuleOutput]:
    """Flux's outputs, a feature each: attention and MLP of the doubles, the singles' fused output.

    Args:
        module: has ``transformer_blocks`` and ``single_transformer_blocks``.
        joint: where the image stands in the singles' stream.
    """
    found: list[ModuleOutput] = []
    for block in module.transformer_blocks:
        found.append(ModuleOutput(block.attn, ((len(found), None),), element=0))
        found.append(ModuleOutput(block.ff, ((len(found), None),)))
    for block in module.single_transformer_blocks:
        found.append(ModuleOutput(block.proj_out, ((len(found), None),), joint=joint))
    return found


def packed(latent_shape: Sequence[int]) -> int:
    """Image tokens where the pipeline, not the model, packs 2 × 2 latents ``[1, height, width]`` into one."""
    _, height, width = latent_shape
    return (height // 2) * (width // 2)
