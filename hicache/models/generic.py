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
from hicache.models.call import TAP, Call, Mode

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

    def base(self, hidden: Tensor, call: Mapping[str, Any]) -> None:
        """A full step to learn from: the hidden state that enters the first block, its arguments by name."""

    def result(self, hidden: Tensor) -> None:
        """The same step: the hidden state that leaves the last block."""

    def forecast(self, base: Tensor, call: Mapping[str, Any]) -> Tensor:
        """Skipped step: the hidden state that would leave the last block, of the first one's arguments."""


class _BlockList(nn.ModuleList):
    """A list of blocks that can be skipped. Lists get this class while hooked, and their own back after."""

    _hicache: _Entrance | None = None

    def __iter__(self) -> Iterator[Any]:
        entrance = self._hicache
        # an empty iterator of the list itself while a copy of the list is being made
        return super().__iter__() if entrance is None else entrance.blocks(super().__iter__)

    def __getitem__(self, index: Any) -> Any:
        entrance = self._hicache
        if isinstance(index, slice) and entrance is not None:
            # some models run their blocks in slices, and offloading takes slices outside of any call
            return entrance.slice(list(self._modules.values()), index)
        return super().__getitem__(index)


class _Entrance:
    """What a list of blocks gives when it is iterated over: itself, or what stands in for it."""

    def __init__(self, adapter: StackAdapter, first: bool, blocks: nn.ModuleList) -> None:
        self._adapter = adapter
        self._call = adapter.call
        self._stand_in: list[Any] = [_StandIn(adapter)] if first else []
        self._first = first
        self._watched = [_Watched(adapter, block, first) for block in blocks]

    def refresh(self, blocks: nn.ModuleList) -> None:
        """Watch the blocks that are in the list now."""
        current = list(blocks._modules.values())
        if [watched.block for watched in self._watched] != current:
            self._watched = [_Watched(self._adapter, b, self._first) for b in current if b is not None]

    def blocks(self, own: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        call = self._call
        mode = call.mode
        if mode >= Mode.VERIFY:
            return iter(self._stand_in)
        if mode == Mode.FULL and (self._first or call.run_block is not None):
            return iter(self._watched)
        if mode == Mode.LEARN:
            self._adapter.iterated = True
        return own()

    def slice(self, blocks: list[nn.Module], index: slice) -> Any:
        mode = self._call.mode
        if mode >= Mode.VERIFY:
            return self._stand_in if blocks and blocks[0] in blocks[index] else []
        if mode == Mode.FULL and (self._first or self._call.run_block is not None):
            return self._watched[index]
        if mode == Mode.LEARN:
            self._adapter.iterated = True
        return nn.ModuleList(blocks[index])


class _Watched:
    """A block on a full step: the first that runs is where the hidden state enters."""

    def __init__(self, adapter: StackAdapter, block: nn.Module, first: bool) -> None:
        self._adapter = adapter
        self._call = adapter.call
        self._first = first  # in the first list
        self.block = block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        adapter, call = self._adapter, self._call
        if self._first and not call.entered:
            call.entered = True
            if call.base is not None:
                hidden, _ = adapter.hidden(args, kwargs)
                call.base.copy_(hidden.detach())
        elif adapter.left is not None:
            adapter.check(adapter.hidden(args, kwargs)[0])
        if call.run_block is not None:
            output = call.run_block(self.block, args, kwargs)
        else:
            output = self.block(*args, **kwargs)
        if self._first and adapter.checked and not call.quiet:
            adapter.leave_block(output)
        return output

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # a copy in the making has no block yet
            raise AttributeError(name)
        return getattr(self.block, name)


class _StandIn:
    """Takes the first block's place in a skipped step; other attributes are the block's."""

    def __init__(self, adapter: StackAdapter) -> None:
        self._adapter = adapter

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._adapter.run_stand_in(args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
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
        self._hidden_name = getattr(self._metadata, "hidden_states_argument_name", None) or "hidden_states"
        self.call = Call()
        self._recorder: Recorder | None = None
        self._undo: list[Callable[[], None]] = []
        self._unlearn: list[Callable[[], None]] = []
        self.iterated = (
            False  # whether the call has iterated over its blocks: only such models can be skipped
        )
        self.checked = False  # whether nothing but the blocks may change the hidden state in this call
        self.left: Any = None  # what a block returned
        self._expected: Tensor | None = None  # what the stand-in returned, until it is seen to reach the head
        self.verified = False  # whether it once did

    def install(self, recorder: Recorder) -> None:
        """Hook the model. :meth:`remove` undoes it exactly."""
        self._recorder = recorder
        for position, block_list in enumerate(self.lists):
            self._undo.append(functools.partial(setattr, block_list, "__class__", block_list.__class__))
            entrance = _Entrance(self, position == 0, block_list)
            block_list.__class__ = _skippable(type(block_list))
            block_list.__dict__["_hicache"] = entrance
            self._undo.append(functools.partial(block_list.__dict__.pop, "_hicache"))
        self._undo += rotary.hook(self.module, self._recall)
        if self.heads:
            for head in self.heads:
                self._undo.append(head.register_forward_pre_hook(self._before_head, with_kwargs=True).remove)
        else:
            last = list(self.lists[-1])[-1]
            self._undo.append(last.register_forward_hook(self._after_last, with_kwargs=True).remove)

    def remove(self) -> None:
        """Leave the model as it was before :meth:`install`."""
        self.end()
        while self._undo:
            self._undo.pop()()
        self._recorder = None

    def learn(self) -> None:
        """The call that begins is learned from; :meth:`end` ends it."""
        # on every block of the first list: skip-layer guidance may leave out the very first
        for block in self.lists[0]._modules.values():
            assert block is not None
            self._unlearn.append(block.register_forward_pre_hook(self._before_block, with_kwargs=True).remove)
            self._unlearn.append(block.register_forward_hook(self._after_block, with_kwargs=True).remove)

    def fingerprint(self) -> list[Any]:
        """What of the model is not weights: equal as long as nobody puts parts of it in others' places."""
        return [
            part
            for module in self.module.modules()
            for part in (
                id(module),
                id(module.__dict__.get("forward")),
                id(module.__dict__.get("processor")),
                type(module.__dict__.get("processor")),  # an id may be that of one long gone
                str(getattr(module.__dict__.get("processor"), "_attention_backend", None)),
                [key for key in module._forward_hooks if key != TAP],  # torch numbers them
                list(module._forward_pre_hooks),
            )
        ]

    def refresh(self) -> None:
        """Blocks may have been put in others' places since."""
        for block_list in self.lists:
            entrance: _Entrance = block_list.__dict__["_hicache"]
            entrance.refresh(block_list)

    def end(self) -> None:
        """A call has ended, or never came to its end: let go of its tensors."""
        while self._unlearn:
            self._unlearn.pop()()
        self.iterated = self.checked = False
        self.left = self._expected = None
        self.call.clear()

    def _recall(self, compute: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self.call
        index = call.recalled
        call.recalled = index + 1
        if call.mode >= Mode.VERIFY and index < len(call.remembered):
            return call.remembered[index]
        output = compute(*args, **kwargs)
        if call.mode == Mode.FULL and index < len(call.remembered):
            call.remembered[index] = output
        elif call.mode == Mode.LEARN:
            call.remembered[index:] = [output]
        return output

    def hidden(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The hidden state among a block's arguments, and all of them by name."""
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        hidden = named.get(self._hidden_name, named.get(self._names[0]) if self._names else None)
        if not isinstance(hidden, Tensor):
            raise RuntimeError(
                f"hicache: {self.name}: expected {type(self.first_block).__name__} to take a hidden state as "
                f"{self._hidden_name!r} or as its first argument, got {sorted(named)}"
            )
        return hidden, named

    def _before_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._recorder is not None
        hidden, named = self.hidden(args, kwargs)
        if not self.call.entered:
            self.call.entered = True
            self._recorder.base(hidden, named)
        elif self.left is not None:
            self.check(hidden)

    def _after_block(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if self._layout is None:
            self._layout = self._read_layout(*self.hidden(args, kwargs), output)
        if self.checked:
            self.leave_block(output)

    def leave_block(self, output: Any) -> None:
        """Keep what a block returned, until the next one is seen to take it."""
        self.left = output[self._layout.index("image")] if self._layout else output

    def check(self, hidden: Tensor) -> None:
        """Make sure that a block takes what the last one returned: nothing else changes the hidden state."""
        # the same object, but for models that rewrap it: only those are compared by value
        if hidden is not self.left and not _equal(hidden, self.left):
            raise self._changed()
        self.left = None

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
        call = self.call
        if call.mode == Mode.FULL:
            call.left = True
            if call.base is not None and call.slot is not None:
                torch.sub(hidden.detach().to(call.slot.device), call.base, out=call.slot)
        elif call.mode == Mode.LEARN:
            assert self._recorder is not None
            self._recorder.result(hidden)
        elif self._expected is not None:
            # Once a model: nothing but the blocks may stand between the stand-in and the head either. What
            # else is added there is in the cached residual, and would be added again.
            same = _equal(hidden, self._expected)
            self._expected = None
            if not same:
                raise self._changed()
            self.verified = True

    def run_stand_in(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the first block returns on a skipped step."""
        assert self._recorder is not None
        assert self._layout is not None
        hidden, named = self.hidden(args, kwargs)
        image = self._recorder.forecast(hidden, named)
        if self.call.mode == Mode.VERIFY:
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
