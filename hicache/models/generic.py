"""The stack adapter: caches what a whole stack of blocks adds to the hidden state, for any model that
iterates over its blocks.

On a full step it reads the hidden state before the first block and before the output head; the model runs
untouched. On a skipped step the first list of blocks yields one stand-in that returns base + forecast in the
block's own return order, and the later lists yield nothing. Caching the stack's residual equals caching every
block's gated residual (docs/algorithm.md, "Telescoping").
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from hicache.models import rotary

# In run order; the names diffusers and most others use.
BLOCK_LISTS: Final = (
    "joint_transformer_blocks",
    "double_stream_blocks",
    "double_blocks",
    "transformer_blocks",
    "single_transformer_blocks",
    "single_stream_blocks",
    "single_blocks",
    "blocks",
    "layers",
)
# The first module after the blocks: its input is the hidden state the stack produced, text tokens cut off.
HEADS: Final = ("norm_final", "norm_out", "final_layer", "all_final_layer", "final_norm", "head")
# Arguments that only feed the blocks: their effect is in the cached residual already. A list of ControlNet
# residuals would be added a second time, and skip-layer guidance would leave out the stand-in.
BLOCK_ONLY_ARGUMENTS: Final = (
    "controlnet_block_samples",
    "controlnet_single_block_samples",
    "block_controlnet_hidden_states",
    "skip_layers",
)
# Where blocks that return a tuple keep the image, for those diffusers' TransformerBlockRegistry does not
# know.
_IMAGE_INDEX: Final = {
    "AuraFlowJointTransformerBlock": 1,
    "ChromaTransformerBlock": 1,
    "HiDreamImageTransformerBlock": 0,
    "HiDreamBlock": 0,
    "HunyuanVideo15TransformerBlock": 0,
}

UNCACHED: Final = "call Handle.remove() to run it uncached"


class Recorder(Protocol):
    """What the adapter calls back during one call of the model."""

    @property
    def skipping(self) -> bool:
        """Whether the current call is a skipped step."""

    @property
    def remembered(self) -> list[Any]:
        """What the model's rotary embeddings gave at the context's last full step, call by call."""

    def base(self, hidden: Tensor, call: Mapping[str, Any]) -> None:
        """Full step: the hidden state that enters the first block, and its arguments by name."""

    def result(self, hidden: Tensor) -> None:
        """Full step: the hidden state that leaves the last block."""

    def forecast(self, base: Tensor, call: Mapping[str, Any]) -> Tensor:
        """Skipped step: the hidden state that would leave the last block, of the first one's arguments."""


class _BlockList(nn.ModuleList):
    """A list of blocks that can be skipped. Lists get this class while hooked, and their own back after."""

    _hicache_stand_in: Callable[[], list[Any] | None] | None = None

    def __iter__(self) -> Iterator[nn.Module]:
        stand_in = self._hicache_stand_in() if self._hicache_stand_in is not None else None
        return super().__iter__() if stand_in is None else iter(stand_in)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice) and self._hicache_stand_in is not None:
            # some models run their blocks in slices, and offloading takes slices outside of any call
            blocks = list(self._modules.values())
            stand_in = self._hicache_stand_in()
            if stand_in is None:
                return nn.ModuleList(blocks[index])
            return stand_in if blocks and blocks[0] in blocks[index] else []
        return super().__getitem__(index)


class _StandIn:
    """Takes the first block's place in a skipped step; other attributes are the block's."""

    def __init__(self, adapter: StackAdapter) -> None:
        self._adapter = adapter

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._adapter.run_stand_in(args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapter.first_block, name)


class StackAdapter:
    """Finds the blocks and the head of a model, and hooks them for a :class:`Recorder`.

    Args:
        module: the model. It is only looked at until :meth:`install`.

    Raises:
        ValueError: there is nothing to hook; the message names the class.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.name = type(module).__name__
        children = dict(module.named_children())
        self.lists = [
            block_list
            for name in BLOCK_LISTS
            if isinstance(block_list := children.get(name), nn.ModuleList) and len(block_list) > 0
        ]
        if not self.lists:
            raise ValueError(
                f"hicache: nothing to hook in {self.name}: expected a non-empty ModuleList named "
                f"{', '.join(BLOCK_LISTS)}; its children are {', '.join(children) or 'none'}"
            )
        self.first_block: nn.Module = next(iter(self.lists[0]))
        head = next((children[name] for name in HEADS if name in children), None)
        self.heads = (
            [] if head is None else list(head.values()) if isinstance(head, nn.ModuleDict) else [head]
        )
        self._names = _parameters(self.first_block)
        self._metadata = _registered(self.first_block)
        # One entry an element the first block returns: "image", the argument passed through, or None; () for
        # a tensor.
        self._layout: tuple[str | None, ...] | None = None
        self._recorder: Recorder | None = None
        self._undo: list[Callable[[], None]] = []
        self._active = self._checked = self._iterated = self._entered = False
        self._recalled = 0  # rotary embeddings asked for in this call
        self._left: Tensor | None = None  # what a block returned, until the next one is seen to take it
        self._expected: Tensor | None = None  # what the stand-in returned, until it is seen to reach the head
        self._verified = False

    def install(self, recorder: Recorder) -> None:
        """Hook the model. :meth:`remove` undoes it exactly."""
        self._recorder = recorder
        for position, block_list in enumerate(self.lists):
            self._undo.append(functools.partial(setattr, block_list, "__class__", block_list.__class__))
            block_list.__class__ = _skippable(type(block_list))
            block_list.__dict__["_hicache_stand_in"] = functools.partial(self._stand_in, position)
            self._undo.append(functools.partial(block_list.__dict__.pop, "_hicache_stand_in"))
        self._undo += rotary.hook(self.module, self._recall)
        # on every block of the first list: skip-layer guidance may leave out the very first
        for block in list(self.lists[0]):
            self._undo.append(block.register_forward_pre_hook(self._before_block, with_kwargs=True).remove)
            self._undo.append(block.register_forward_hook(self._after_block, with_kwargs=True).remove)
        if self.heads:
            for head in self.heads:
                self._undo.append(head.register_forward_pre_hook(self._before_head, with_kwargs=True).remove)
        else:
            last = list(self.lists[-1])[-1]
            self._undo.append(last.register_forward_hook(self._after_last, with_kwargs=True).remove)

    def remove(self) -> None:
        """Leave the model as it was before :meth:`install`."""
        while self._undo:
            self._undo.pop()()
        self._recorder = None
        self.end()

    def begin(self, checked: bool) -> None:
        """A call of the model starts; :meth:`end` ends it. Between calls the hooks do nothing.

        Args:
            checked: on a full step, make sure that nothing but the blocks changes the hidden state. Not so
                with arguments that are known to be added between blocks, and dropped on skipped steps.
        """
        self.end()
        self._active = True
        self._checked = checked

    def end(self) -> None:
        """A call has ended, or never came to its end: let go of its tensors."""
        self._active = self._checked = self._iterated = self._entered = False
        self._left = self._expected = None
        self._recalled = 0

    @property
    def iterated(self) -> bool:
        """Whether the current call has iterated over a list of blocks: only such models can be skipped."""
        return self._iterated

    def _stand_in(self, position: int) -> list[Any] | None:
        self._iterated = True
        if self._recorder is None or not self._recorder.skipping:
            return None
        return [_StandIn(self)] if position == 0 else []

    def _recall(self, compute: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._recorder is None or not self._active:
            return compute(*args, **kwargs)
        remembered = self._recorder.remembered
        if not self._recorder.skipping:
            remembered[self._recalled :] = [compute(*args, **kwargs)]
        elif self._recalled >= len(remembered):
            return compute(*args, **kwargs)
        self._recalled += 1
        return remembered[self._recalled - 1]

    def _hidden(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        wanted = getattr(self._metadata, "hidden_states_argument_name", None) or "hidden_states"
        hidden = named.get(wanted, named.get(self._names[0]) if self._names else None)
        if not isinstance(hidden, Tensor):
            raise RuntimeError(
                f"hicache: {self.name}: expected {type(self.first_block).__name__} to take a hidden state as "
                f"{wanted!r} or as its first argument, got {sorted(named)}"
            )
        return hidden, named

    def _before_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._recorder is None or not self._active:
            return
        hidden, named = self._hidden(args, kwargs)
        if not self._entered:
            self._entered = True
            self._recorder.base(hidden, named)
        elif self._left is not None:
            # the same object, but for models that rewrap it: only those are compared by value
            if hidden is not self._left and not _equal(hidden, self._left):
                raise self._changed()
            self._left = None

    def _after_block(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if not self._active:
            return
        if self._layout is None:
            self._layout = self._read_layout(*self._hidden(args, kwargs), output)
        if self._checked:
            self._left = output[self._layout.index("image")] if self._layout else output

    def _changed(self) -> RuntimeError:
        return RuntimeError(
            f"hicache: {self.name} changes the hidden state between its blocks, so they cannot be skipped "
            f"as a whole; {UNCACHED}"
        )

    def _read_layout(self, hidden: Tensor, named: Mapping[str, Any], output: Any) -> tuple[str | None, ...]:
        block = type(self.first_block).__name__
        if isinstance(output, Tensor):
            return ()
        if not isinstance(output, (tuple, list)):
            raise RuntimeError(f"hicache: {self.name}: {block} returns {type(output).__name__}, no tensor")
        others = [name for name in self._names if name.endswith("hidden_states") and name in named]
        streams = [name for name in others if name not in ("hidden_states", "encoder_hidden_states")]
        image = getattr(self._metadata, "return_hidden_states_index", None)
        if image is None:
            image = _IMAGE_INDEX.get(block)
        if image is None:
            alike = [i for i, o in enumerate(output) if isinstance(o, Tensor) and o.shape == hidden.shape]
            image = alike[0] if len(alike) == 1 else None
        text_name = (
            getattr(self._metadata, "encoder_hidden_states_argument_name", None) or "encoder_hidden_states"
        )
        text = named.get(text_name)
        layout: list[str | None] = []
        for index, element in enumerate(output):
            if index == image:
                layout.append("image")
            elif element is None:
                layout.append(None)
            elif (
                isinstance(element, Tensor)
                and isinstance(text, Tensor)
                and element.shape[1:] == text.shape[1:]
            ):
                layout.append(text_name)
            else:
                image = None
        if image is None or streams:
            raise RuntimeError(
                f"hicache: {self.name}: cannot tell what {block} returns: expected the hidden state and at "
                "most the text stream, got "
                f"{[tuple(o.shape) if isinstance(o, Tensor) else o for o in output]} for a hidden state "
                f"{tuple(hidden.shape)}"
                + (f" and further streams {', '.join(streams)}" if streams else "")
                + f"; {UNCACHED}"
            )
        return tuple(layout)

    def _before_head(self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
        if isinstance(hidden, Tensor):
            self._leave(hidden)

    def _after_last(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        hidden = output
        if not isinstance(output, Tensor):
            layout = self._layout or ()
            hidden = output[layout.index("image")] if len(output) == len(layout) else None
        if isinstance(hidden, Tensor):
            self._leave(hidden)

    def _leave(self, hidden: Tensor) -> None:
        if self._recorder is None:
            return
        if not self._recorder.skipping:
            self._recorder.result(hidden)
        elif self._expected is not None:
            # Once a model: nothing but the blocks may stand between the stand-in and the head either. What
            # else is added there is in the cached residual, and would be added again.
            same = _equal(hidden, self._expected)
            self._expected = None
            if not same:
                raise self._changed()
            self._verified = True

    def run_stand_in(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the first block returns on a skipped step."""
        assert self._recorder is not None
        assert self._layout is not None
        hidden, named = self._hidden(args, kwargs)
        image = self._recorder.forecast(hidden, named)
        if not self._verified:
            self._expected = image
        if not self._layout:
            return image
        return tuple(
            # one prompt for several pictures: blocks broadcast it
            image
            if name == "image"
            else named[name].expand(len(image), *named[name].shape[1:])
            if name
            else None
            for name in self._layout
        )


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether a hidden state holds the numbers of an earlier one, but for a cast and a move."""
    if one.shape != other.shape:
        return False
    return torch.allclose(one, other.to(one.device, one.dtype), rtol=0, atol=0, equal_nan=True)


def _skippable(cls: type[nn.ModuleList]) -> type[nn.ModuleList]:
    if cls is nn.ModuleList:
        return _BlockList
    return type(cls.__name__, (_BlockList, cls), {"__module__": cls.__module__})


def _parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the positional arguments of a module's forward."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    # of the class: accelerate and diffusers replace an instance's forward
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind in kinds)


def _registered(block: nn.Module) -> Any:
    """diffusers' record of what this class of blocks takes and returns; None if it has none."""
    try:
        from diffusers.hooks._helpers import TransformerBlockRegistry
    except ImportError:  # a private module of diffusers: a later version may move it
        return None
    try:
        return TransformerBlockRegistry.get(type(block))
    except ValueError:
        return None
