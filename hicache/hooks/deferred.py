"""A call that is made when somebody needs what it gives, and never where nobody does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hicache import compat
from hicache.compat import pytree


class DeferredCall:
    """A call of a module that waits.

    What it was given is held by the tensors that stand for what it gives, and by nothing else.

    Args:
        call: makes it, in the modes of now.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call: Callable[[], Any] | None = call
        self._modes = _modes()
        self._leaves: list[Any] = []

    def leaf(self, place: int) -> Any:
        """One of the leaves of what the call gives; made once, by whoever asks first."""
        if self._call is not None:
            with contextlib.ExitStack() as stack:
                for mode in self._modes:
                    stack.enter_context(mode)
                self._leaves = pytree.tree_leaves(self._call())
            self._call = None
        return self._leaves[place]


def _modes() -> list[contextlib.AbstractContextManager[Any]]:
    """What switches gradients and autocast to what they are now."""
    kinds = [kind for kind in ("cpu", "cuda") if torch.amp.is_autocast_available(kind)]
    casts = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
    return [
        torch.inference_mode(torch.is_inference_mode_enabled()),
        torch.enable_grad() if torch.is_grad_enabled() else torch.no_grad(),
        *(torch.autocast(kind, dtype if enabled else None, enabled) for kind, enabled, dtype in casts),
    ]


class DeferredTensor(Tensor):
    """Stands for a tensor that a call will give: of its shape, dtype and device, without memory.

    Whatever is done with it is done with what the call gives, which is then made: somebody who adds, casts or
    copies it notices nothing. ``numpy()`` raises.
    """

    __torch_function__ = compat.no_torch_function  # type: ignore[assignment]
    call: DeferredCall
    place: int  # among the leaves of what the call gives

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = pytree.tree_map(real, (args, kwargs or {}))
        return function(*args, **kwargs)


def real(value: Any) -> Any:
    """What a deferred tensor stands for; anything else as it is."""
    return value.call.leaf(value.place) if isinstance(value, DeferredTensor) else value


class OutputForm:
    """The form of what a call gave, of which placeholders for later calls are made.

    Args:
        output: tensors and plain values, in lists, tuples and dictionaries.

    Raises:
        TypeError: there is something else in it, which may have tensors inside; or it cannot be put together
            from its parts, as diffusers' outputs with a field that is None.
    """

    def __init__(self, output: Any) -> None:
        leaves, self._layout = pytree.tree_flatten(output)
        for leaf in leaves:
            if leaf is not None and not isinstance(leaf, (Tensor, int, float, str)):
                raise TypeError(f"hicache: expected tensors and plain values, got {type(leaf).__name__}")
        pytree.tree_unflatten(leaves, self._layout)
        # one number a leaf, which no step has to write anew
        self._leaves = [
            (torch.zeros((), dtype=leaf.dtype, device=leaf.device), leaf.shape)
            if isinstance(leaf, Tensor)
            else leaf
            for leaf in leaves
        ]

    def defer(self, call: Callable[[], Any]) -> Any:
        """What stands for the output of a call that waits."""
        waiting = DeferredCall(call)
        return pytree.tree_unflatten(
            [self._placeholder(leaf, waiting, place) for place, leaf in enumerate(self._leaves)],
            self._layout,
        )

    def _placeholder(self, leaf: Any, call: DeferredCall, place: int) -> Any:
        if not isinstance(leaf, tuple):
            return leaf
        number, shape = leaf
        placeholder = number.expand(shape).as_subclass(DeferredTensor)
        placeholder.call, placeholder.place = call, place
        return placeholder
