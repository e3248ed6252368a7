"""Puts attributes into one object, over its class's, which no copy of the object has.

What is put there knows its object, and would act on that one when it is called of a copy.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

_STATE: Final = "__getstate__"  # what copy, deepcopy and pickle ask an object for
_NOTHING: Final = object()


@dataclass(eq=False)
class _Shadow:
    """An attribute that was put over another."""

    name: str
    value: Any
    before: Any  # what the object itself had by this name; _NOTHING: its class's was in use


class _PlainState:
    """Put over an object's ``__getstate__``: its state as it would be without shadows.

    A class that copies itself by means of its own (``__deepcopy__``, ``__reduce__``) does not ask for it, and
    comes upon this among its attributes.

    Args:
        owner: the object, not kept alive.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = weakref.ref(owner)
        self.shadows = [_Shadow(_STATE, self, owner.__dict__.get(_STATE, _NOTHING))]

    def __call__(self) -> Any:
        owner: Any = self._owner()
        before = self.shadows[0].before
        of_class = getattr(type(owner), _STATE, None)
        if before is not _NOTHING:
            state = before()
        elif of_class is not None:
            state = of_class(owner)
        else:  # before Python 3.11 objects have none
            state = owner.__dict__
        # attributes, or a pair of them and of those in slots
        parts = state if isinstance(state, tuple) else (state,)
        plain = tuple(self._without(part) if isinstance(part, dict) else part for part in parts)
        return plain if isinstance(state, tuple) else plain[0]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"hicache: this {type(self._owner()).__name__} is watched, and copies or pickles itself by means "
            "of its own: remove() the handle first"
        )

    def _without(self, attributes: dict[str, Any]) -> dict[str, Any]:
        plain = dict(attributes)
        for shadow in reversed(self.shadows):
            if plain.get(shadow.name) is shadow.value:
                _put(plain, shadow.name, shadow.before)
        return plain

    def remove(self, shadow: _Shadow) -> None:
        """Take one away, from under others too; what somebody else put over it stays."""
        owner = self._owner()
        self.shadows.remove(shadow)
        if owner is None:
            return
        if owner.__dict__.get(shadow.name) is shadow.value:
            _put(owner.__dict__, shadow.name, shadow.before)
        for above in self.shadows:
            if above.before is shadow.value:
                above.before = shadow.before
        if len(self.shadows) == 1 and self.shadows[0] is not shadow:
            self.remove(self.shadows[0])


def _put(attributes: dict[str, Any], name: str, value: Any) -> None:
    if value is _NOTHING:
        del attributes[name]
    else:
        attributes[name] = value


def shadow(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Let ``owner.name`` be ``value`` until what is returned is called.

    Args:
        owner: an object with a ``__dict__`` that can be held weakly. Copies of it, deep or not, and what is
            pickled of it have what was there before.
        name: of the attribute.
        value: a call of it gets no ``self``.
    """
    state = owner.__dict__.get(_STATE)
    if not isinstance(state, _PlainState):
        state = _PlainState(owner)
        owner.__dict__[_STATE] = state
    put = _Shadow(name, value, owner.__dict__.get(name, _NOTHING))
    state.shadows.append(put)
    owner.__dict__[name] = value
    return lambda: state.remove(put)
