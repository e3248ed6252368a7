"""What calls are given and give, taken apart into leaves and put together again.

As torch's trees do it, and in the same order; but calls are made of plain tuples, lists and dictionaries, and
those are taken apart here in a few microseconds. What else torch's trees know is left to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from torch import Tensor, nn

from hicache.compat import pytree

# plain leaves, which nobody can register as containers
_LEAVES: Final = frozenset({Tensor, nn.Parameter, type(None), bool, int, float, str})

# None is a leaf; (kind, keys, layouts) a plain container; else what torch's trees call it
Layout = Any


def take_apart(value: Any, leaves: list[Any]) -> Layout:
    """Append the leaves of a tree to a list; what is equal for trees that differ in their leaves alone."""
    kind = type(value)
    if kind is not dict and kind is not tuple and kind is not list:
        found, spec = pytree.tree_flatten(value)
        leaves += found
        return None if len(found) == 1 and found[0] is value else spec
    layouts: list[Layout] = []
    for part in value.values() if kind is dict else value:
        if type(part) in _LEAVES:  # most are: no call for each
            leaves.append(part)
            layouts.append(None)
        else:
            layouts.append(take_apart(part, leaves))
    return kind, tuple(value) if kind is dict else None, tuple(layouts)


def put_together(layout: Layout, leaves: Iterator[Any]) -> Any:
    """The tree of a layout whose leaves come next."""
    if layout is None:
        return next(leaves)
    if not isinstance(layout, tuple):
        return pytree.tree_unflatten([next(leaves) for _ in range(layout.num_leaves)], layout)
    kind, keys, parts = layout
    made = [put_together(part, leaves) for part in parts]
    return dict(zip(keys, made, strict=True)) if kind is dict else kind(made)


def leaves_of(value: Any) -> list[Any]:
    """The leaves of a tree, in order."""
    leaves: list[Any] = []
    take_apart(value, leaves)
    return leaves


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors among the leaves of a tree."""
    return [leaf for leaf in leaves_of(value) if isinstance(leaf, Tensor)]
