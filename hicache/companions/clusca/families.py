"""Which MLPs are computed for drawn tokens: those of the image stream in double blocks, by family.

Source: the ``forward`` of each block named here, in diffusers 0.42.1. All of them run the MLP on
``norm(h) · (1 + scale) + shift``, where shift and scale are the fourth and fifth vector of the block's
modulation of the current timestep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, nn

# what gives every block the activated embedding, [batch, width], that its modulation is made of
Embeddings = Callable[[Sequence[Any], Mapping[str, Any], Tensor], list[Callable[[], Tensor]]]


def _of_model(
    blocks: Sequence[Any], block_kwargs: Mapping[str, Any], like: Tensor
) -> list[Callable[[], Tensor]]:
    """All blocks are given one embedding."""
    embedding = block_kwargs["temb"]
    if block_kwargs.get("modulate_index") is not None:
        # zero_cond_t: the second half is of timestep zero, for the tokens of given pictures
        embedding = embedding.chunk(2)[0]
    activated = nn.functional.silu(embedding)
    return [lambda: activated] * len(blocks)


def _of_blocks(
    blocks: Sequence[Any], block_kwargs: Mapping[str, Any], like: Tensor
) -> list[Callable[[], Tensor]]:
    """Every block embeds timestep and class itself."""
    timestep, label = block_kwargs["timestep"], block_kwargs["class_labels"]

    def embedded(block: Any) -> Callable[[], Tensor]:
        return lambda: nn.functional.silu(block.norm1.emb(timestep, label, hidden_dtype=like.dtype))

    return [embedded(block) for block in blocks]


@dataclass(frozen=True)
class Family:
    """Where a family's blocks have what an MLP is computed with.

    Args:
        mlp: name of the image stream's MLP in a block.
        norm: of the norm before it.
        modulated: of the child of a block that has the modulation layer.
        layer: of that layer in the child.
        embeddings: what the layer is given.
        blocks: the model's list of double blocks; of models that have one stream, all blocks.
        image: which element of what a block returns is the image's hidden state; None: it returns that alone.
    """

    mlp: str = "ff"
    norm: str = "norm2"
    modulated: str = "norm1"
    layer: str = "linear"
    embeddings: Embeddings = _of_model
    blocks: str = "transformer_blocks"
    image: int | None = -1

    def image_of(self, output: Any) -> Tensor:
        """The image's hidden state in what a double block returns."""
        hidden: Tensor = output if self.image is None else output[self.image]
        return hidden


FAMILIES: Final[dict[str, Family]] = {
    "DiTTransformer2DModel": Family(norm="norm3", embeddings=_of_blocks, image=None),
    "FluxTransformer2DModel": Family(),
    "QwenImageTransformer2DModel": Family("img_mlp", "img_norm2", "img_mod", "1"),
    "SD3Transformer2DModel": Family(),
}


def find_family(model: nn.Module) -> Family:
    """The family of a model.

    Raises:
        ValueError: nobody has said which of its modules are MLPs of double blocks.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    raise ValueError(
        f"ClusCa: the MLPs of double blocks in {type(model).__name__} are not known; known models are "
        f"{', '.join(FAMILIES)}"
    )


def double_blocks(model: nn.Module) -> list[Any]:
    """The blocks whose MLPs are computed for drawn tokens, in the order they run in.

    Raises:
        ValueError: as :func:`find_family`.
    """
    return list(getattr(model, find_family(model).blocks).children())
