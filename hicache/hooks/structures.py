"""What the names of a transformer's children do not tell of how it runs its blocks: a table, by class.

A class that is not in it is taken to run the lists of :data:`~hicache.hooks.block_lists.BLOCK_LISTS` one
after the other, and then one of :data:`~hicache.hooks.block_lists.HEADS` on what they return.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, nn


@dataclass(frozen=True)
class Structure:
    """How a class of transformers runs its blocks.

    Args:
        lists: paths of its block lists, the one that the hidden state enters first, in whatever order they
            run; empty: those that have the usual names.
        heads: paths of the modules that take what the blocks return, one of which runs; empty: something is
            done to it before any module takes it, so that it is taken from the last block; None: those that
            have the usual names.
        side_lists: path of a list whose modules make what is added to the hidden state between blocks → what
            one of them returns, given its arguments, for nothing to be added.
        begins_again: whether the last blocks of its last list, which it takes as a slice, begin with what
            entered the first block: on a skipped step it is for them that the stand-in is given.
        refusal: why its blocks cannot be skipped as a whole; None where they can.
        refused: whether ``refusal`` holds of this one.
        keeps: whether ``refusal`` is that its calls do more than to return something: none can be left out.
    """

    lists: tuple[str, ...] = ()
    heads: tuple[str, ...] | None = None
    side_lists: dict[str, Callable[..., Any]] | None = None
    begins_again: Callable[[Any], bool] = lambda module: False
    refusal: str | None = None
    refused: Callable[[Any], bool] = lambda module: True
    keeps: bool = False


def _nothing(*args: Any, **kwargs: Any) -> Tensor:
    """A number that is added to every element in place of a module's output."""
    given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return given.new_zeros(())


def _no_hint(hidden: Tensor, text: Tensor, control: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """No hint, and the stream of hints as it came."""
    return _nothing(hidden), control


_FROM_THE_LAST_BLOCK: Final = Structure(heads=())
_KEYS_AND_VALUES: Final = Structure(
    refusal="its blocks keep keys and values for the next part of the video, and a skipped step has none",
    keeps=True,
)
_TWO_STREAMS: Final = Structure(
    refusal="two streams go through its blocks, the picture's and the sound's, and both are what it returns"
)

# class of the model → how it runs its blocks; subclasses are known with it
STRUCTURES: Final[dict[str, Structure]] = {
    "AnyFlowFARTransformer3DModel": _KEYS_AND_VALUES,
    "BriaFibo2Transformer2DModel": _FROM_THE_LAST_BLOCK,  # the head has the picture's tokens alone
    "ConsisIDTransformer3DModel": Structure(
        heads=(),  # text tokens are put before the picture's once more
        side_lists={"perceiver_cross_attention": _nothing},
        refusal="it adds a face to the hidden state after the last of its blocks",
        refused=lambda m: m.is_train_face and (m.config.num_layers - 1) % m.config.cross_attn_interval == 0,
    ),
    "Cosmos3OmniTransformer": Structure(heads=("norm_moe_gen",)),
    "Flux3Transformer2DModel": Structure(
        lists=(
            "mode_blocks.image",
            "txt_mode_blocks",
            "mode_blocks.image_cond",
            "single_transformer_blocks",
        ),
    ),
    "HunyuanVideoFramepackTransformer3DModel": _FROM_THE_LAST_BLOCK,  # the head has the new frames alone
    "Kandinsky6SRTransformer3DModel": _FROM_THE_LAST_BLOCK,  # tokens are put in another order
    "Kandinsky6Transformer3DModel": _TWO_STREAMS,
    "Krea2Transformer2DModel": _FROM_THE_LAST_BLOCK,  # the head has the picture's tokens alone
    "LTX2VideoTransformer3DModel": _TWO_STREAMS,
    "LongCatAudioDiTTransformer": _FROM_THE_LAST_BLOCK,  # what entered the blocks is added
    "MotifVideoTransformer3DModel": Structure(begins_again=lambda m: m.config.num_decoder_layers > 0),
    "OmniGenTransformer2DModel": Structure(heads=("norm",)),  # of all tokens; its norm_out has the picture's
    "SanaWMLTX2RefinerTransformer3DModel": _KEYS_AND_VALUES,
    "WanAnimateTransformer3DModel": Structure(side_lists={"face_adapter": _nothing}),
    "WanVACETransformer3DModel": Structure(side_lists={"vace_blocks": _no_hint}),
}

_USUAL: Final = Structure()


def structure_of(module: nn.Module) -> Structure:
    """How a transformer runs its blocks."""
    known = (STRUCTURES.get(cls.__name__) for cls in type(module).__mro__)
    return next((structure for structure in known if structure is not None), _USUAL)
