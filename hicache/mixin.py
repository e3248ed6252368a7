"""Gives one object a class of its own: what it is called by changes, and nothing else of its class does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from torch import nn


def mix_in(module: nn.Module, mixin: type, key: str, value: Any) -> Callable[[], None]:
    """Give one object a subclass of its class that ``mixin`` comes first in; returns what undoes it.

    The object keeps its identity, and every other object of its class stays as it is.

    Args:
        module: the object.
        mixin: a subclass of ``nn.Module`` or of the object's class.
        key: of the object's ``__dict__``, where ``mixin`` finds ``value``.
        value: see ``key``.
    """
    cls = type(module)
    module.__class__ = _mixed(cls, mixin)
    module.__dict__[key] = value

    def undo() -> None:
        module.__class__ = cls
        module.__dict__.pop(key, None)

    return undo


# one class for all objects alike: torch.compile tells blocks and lists apart by theirs
_MIXED: Final[dict[tuple[int, type], type]] = {}


class _AsItsBase(type):
    """Of a class that is equal to the one it was mixed into: diffusers asks for ``type(module) in types``."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other == cls.__bases__[1]

    def __hash__(cls) -> int:
        return hash(cls.__bases__[1])


def _mixed(cls: type, mixin: type) -> type:
    key = id(cls), mixin
    if key not in _MIXED:
        meta = type(cls)
        if not issubclass(meta, _AsItsBase):
            meta = type("_AsItsBase", (_AsItsBase, meta), {})
        _MIXED[key] = meta(cls.__name__, (mixin, cls), {"__module__": cls.__module__})
    return _MIXED[key]
