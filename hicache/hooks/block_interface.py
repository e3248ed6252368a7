"""Where the hidden state is among the arguments and results of a transformer's blocks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor, nn

from hicache import compat

# Where blocks that return a tuple keep the image, for those that diffusers has no record of, or a wrong one.
_IMAGE_INDEX: Final = {
    "AuraFlowJointTransformerBlock": 1,
    "BriaFiboTransformerBlock": 1,
    "BriaTransformerBlock": 1,
    "ChromaTransformerBlock": 1,
    "CogView3PlusTransformerBlock": 0,
    "ConsisIDBlock": 0,
    "EasyAnimateTransformerBlock": 0,
    "Flux2TransformerBlock": 1,  # diffusers has a record of it from 0.42 on
    "GlmImageTransformerBlock": 0,
    "HiDreamImageTransformerBlock": 0,
    "HiDreamBlock": 0,
    "HunyuanImageTransformerBlock": 0,
    "HunyuanVideo15TransformerBlock": 0,
    "JoyImageEditPlusTransformerBlock": 0,
    "JoyImageTransformerBlock": 0,
    "LongCatImageTransformerBlock": 1,
    "MotifVideoTransformerBlock": 0,
    "OvisImageTransformerBlock": 1,
}
# What blocks call the hidden state and the text, where it is neither the usual name nor in diffusers' record.
_STREAMS: Final = {"Cosmos3VLTextMoTDecoderLayer": ("gen_seq", "und_seq")}

UNCACHED: Final = "call Handle.remove() to run it uncached"


class BlockInterface:
    """Arguments and results of the blocks of one transformer, by the first of them.

    Args:
        model: name of the transformer's class, for messages.
        block: the first block.
    """

    def __init__(self, model: str, block: nn.Module) -> None:
        self._model = model
        self._block = type(block).__name__
        self._names = positional_parameters(block)
        metadata = compat.block_metadata(block)
        hidden, text = _STREAMS.get(self._block, ("hidden_states", "encoder_hidden_states"))
        self._hidden_name = getattr(metadata, "hidden_states_argument_name", None) or hidden
        self._text_name = getattr(metadata, "encoder_hidden_states_argument_name", None) or text
        image = getattr(metadata, "return_hidden_states_index", None)
        self._image_index: int | None = _IMAGE_INDEX.get(self._block, image)
        # One entry an element returned: "image", the argument passed through, or None; () for a tensor.
        self.layout: tuple[str | None, ...] | None = None  # None: no block has been seen to return

    def arguments(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """The hidden state among a block's arguments, and all of them by name.

        Of tokens spread over several processes, those that this one has.

        Raises:
            RuntimeError: there is none.
        """
        args, kwargs = compat.split_for_rank(block, args, kwargs)
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        hidden = named.get(self._hidden_name, named.get(self._names[0]) if self._names else None)
        if not isinstance(hidden, Tensor):
            raise RuntimeError(
                f"hicache: {self._model}: expected {self._block} to take a hidden state as "
                f"{self._hidden_name!r} or as its first argument, got {sorted(named)}"
            )
        return hidden, named

    def image(self, output: Any) -> Tensor | None:
        """The hidden state among what a block returned; None where it is not as the first was."""
        if isinstance(output, Tensor):
            return output
        if not self.layout or len(output) != len(self.layout):
            return None
        image = output[self.layout.index("image")]
        return image if isinstance(image, Tensor) else None

    def returned(self, image: Tensor, block_kwargs: Mapping[str, Any]) -> Any:
        """What a block would return with this hidden state, its other streams passed through."""
        assert self.layout is not None
        if not self.layout:
            return image
        return tuple(
            image if name == "image" else _as_many(block_kwargs[name], image) if name else None
            for name in self.layout
        )

    def learn(self, hidden: Tensor, block_kwargs: Mapping[str, Any], output: Any) -> None:
        """Read the layout of what a block returned for this hidden state.

        Raises:
            RuntimeError: it cannot be told which element is the hidden state, or there are further streams.
        """
        if isinstance(output, Tensor):
            self.layout = ()
            return
        if not isinstance(output, (tuple, list)):
            raise RuntimeError(
                f"hicache: {self._model}: {self._block} returns {type(output).__name__}, no tensor"
            )
        others = [name for name in self._names if name.endswith("hidden_states") and name in block_kwargs]
        streams = [name for name in others if name not in ("hidden_states", "encoder_hidden_states")]
        image = self._image_index
        if image is None:
            alike = [i for i, o in enumerate(output) if isinstance(o, Tensor) and o.shape == hidden.shape]
            image = alike[0] if len(alike) == 1 else None
        text = block_kwargs.get(self._text_name)
        layout: list[str | None] = []
        for index, element in enumerate(output):
            if index == image:
                layout.append("image")
            elif element is None:
                layout.append(None)
            elif _like_text(element, text):
                layout.append(self._text_name)
            else:
                image = None
        if image is None or streams:
            raise RuntimeError(
                f"hicache: {self._model}: cannot tell what {self._block} returns: expected the hidden state "
                f"and at most the text stream, got "
                f"{[tuple(o.shape) if isinstance(o, Tensor) else o for o in output]} for a hidden state "
                f"{tuple(hidden.shape)}"
                + (f" and further streams {', '.join(streams)}" if streams else "")
                + f"; {UNCACHED}"
            )
        self.layout = tuple(layout)


def _as_many(text: Tensor, image: Tensor) -> Tensor:
    """One prompt for several pictures, as blocks broadcast it; but not tokens without a batch."""
    if text.dim() < 3 or text.shape[0] == image.shape[0]:
        return text
    return text.expand(image.shape[0], *text.shape[1:])


def _like_text(element: Any, text: Any) -> bool:
    return isinstance(element, Tensor) and isinstance(text, Tensor) and element.shape[1:] == text.shape[1:]


def positional_parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the positional arguments of a module's forward."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    # of the class: accelerate and diffusers replace an instance's forward
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind in kinds)
