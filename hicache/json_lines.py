"""Where in a JSON text a value stands, for messages about files that people may have edited."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Final

_BLANK: Final = re.compile(r"[\s,:]*")
_decode: Final = json.JSONDecoder().raw_decode


def line_of(text: str, path: Sequence[str | int]) -> int:
    """The line, from 1, of the value at a path of keys and indexes, or of the last part of it that exists.

    Args:
        text: valid JSON.
        path: such as ``["entries", 0, "rows"]``.
    """
    at = _skip(text, 0)
    for part in path:
        found = _child(text, at, part)
        if found is None:
            break
        at = found
    return text.count("\n", 0, at) + 1


def _child(text: str, at: int, part: str | int) -> int | None:
    """Where a member of the object, or an element of the list, that begins there begins."""
    keyed = text[at] == "{"
    if not keyed and text[at] != "[":
        return None
    at, index = _skip(text, at + 1), 0
    while text[at] not in "]}":
        key: str | int = index
        if keyed:
            key, at = _decode(text, at)
            at = _skip(text, at)
        if key == part:
            return at
        _, at = _decode(text, at)
        at, index = _skip(text, at), index + 1
    return None


def _skip(text: str, at: int) -> int:
    """The end of blanks and separators."""
    found = _BLANK.match(text, at)
    assert found is not None
    return found.end()
