"""Objects of a few settings as plain data, to and from JSON: a class name and the fields."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any


def to_plain(value: Any) -> dict[str, Any]:
    """``{"kind": "Hermite", "sigma": 0.5}``; of a class that has ``to_plain()``, what that gives.

    Raises:
        TypeError: it is no dataclass, so that nobody knows its fields.
    """
    kind = type(value).__name__
    own = getattr(value, "to_plain", None)
    if own is not None:
        return {"kind": kind, **own()}
    if not dataclasses.is_dataclass(value):
        raise TypeError(f"hicache: expected {kind} to be a dataclass or to have to_plain(), to be saved")
    fields = [field.name for field in dataclasses.fields(value) if field.init]
    return {"kind": kind, **{name: getattr(value, name) for name in fields}}


def from_plain(
    data: Mapping[str, Any], base: Any, what: str, elsewhere: Mapping[str, str] | None = None
) -> Any:
    """What :func:`to_plain` was given.

    Args:
        data: the plain data.
        base: whose subclasses, by name, may come.
        what: the data is of, for messages.
        elsewhere: kinds that may not be imported yet → their modules.

    Raises:
        ValueError: no such class, or other fields than its own.
    """
    elsewhere = elsewhere or {}
    if data.get("kind") in elsewhere:
        importlib.import_module(elsewhere[data["kind"]])
    kinds: dict[str, Any] = {kind.__name__: kind for kind in subclasses(base)}
    fields = {name: value for name, value in data.items() if name != "kind"}
    kind = kinds.get(str(data.get("kind")))
    if kind is None:
        raise ValueError(
            f"{what}: expected a kind of {', '.join(sorted({*kinds, *elsewhere}))}, got {data.get('kind')!r}"
        )
    own = getattr(kind, "from_plain", None)
    try:
        return kind(**fields) if own is None else own(**fields)
    except TypeError as error:
        raise ValueError(f"{what}: cannot make {kind.__name__} of {fields}: {error}") from error


def subclasses(base: Any) -> list[Any]:
    """All subclasses that exist, those of subclasses included, the later of a name last."""
    found: list[Any] = []
    for kind in base.__subclasses__():
        found += [kind, *subclasses(kind)]
    return found
