"""Prompts of a file, one after the other: text, JSONL, CSV and TSV, with settings of their own.

A file is read twice: once to find what is wrong in it before a model is loaded, and once while pictures are
drawn. Neither holds more than a line of it.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from hicache.checks import is_number, is_whole


@dataclass(frozen=True)
class Prompt:
    """One prompt, and what it wants otherwise than the rest.

    Args:
        index: among the prompts of its source, from 0.
        text: what to draw.
        overrides: by the names of :data:`OVERRIDES`; images are paths.
    """

    index: int
    text: str
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """What tells it from another prompt at the same place: 16 hexadecimal digits."""
        plain = json.dumps([self.text, self.overrides], sort_keys=True)
        return hashlib.sha256(plain.encode()).hexdigest()[:16]


def _whole(value: Any, low: int) -> int:
    if isinstance(value, str):
        value = int(value)
    if not is_whole(value) or value < low:
        raise ValueError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, str):
        value = float(value)
    if not is_number(value):
        raise ValueError
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _paths(value: Any) -> list[str]:
    """One path, or a list of them; of a table's cell, several divided by ``|``."""
    paths = value.split("|") if isinstance(value, str) else value
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) and path for path in paths):
        raise ValueError
    return paths


@dataclass(frozen=True)
class _Override:
    """What a prompt may say of itself: how it is read, and what is expected."""

    read: Callable[[Any], Any]
    expected: str


_POSITIVE: Final = _Override(lambda value: _whole(value, 1), "a whole number >= 1")
#: What a line may set besides its prompt, by name: the settings it takes the place of.
OVERRIDES: Final[dict[str, _Override]] = {
    "negative": _Override(_text, "text"),
    "seed": _Override(lambda value: _whole(value, 0), "a whole number >= 0"),
    "width": _POSITIVE,
    "height": _POSITIVE,
    "frames": _POSITIVE,
    "steps": _POSITIVE,
    "guidance": _Override(_number, "a number"),
    "image": _Override(_paths, "the path of a picture, or a list of them"),
}


class PromptError(ValueError):
    """A prompt that cannot be read: names the file and the line."""


class PromptFile:
    """The prompts of a file, read anew every time they are gone through.

    By the name's end: ``.jsonl`` has an object a line, with ``"prompt"`` and any of :data:`OVERRIDES`;
    ``.csv`` and ``.tsv`` a row a prompt, with the same names at the top, or the prompt in the first column of
    a table without a column called so; anything else a prompt a line, blank lines left out. UTF-8, with or
    without a byte order mark. Pictures are found from the file's folder.

    Args:
        path: of the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __iter__(self) -> Iterator[Prompt]:
        """The prompts.

        Raises:
            PromptError: a line that cannot be read, a picture that is not there, or no prompt at all.
        """
        found = -1
        for found, (line, text, raw) in enumerate(self._rows()):
            yield Prompt(found, text, self._overrides(line, raw))
        if found < 0:
            raise PromptError(f"{self.path}: expected prompts, got none: write one a line")

    def unused(self) -> list[str]:
        """Columns of a table that nothing is taken from."""
        header = self._header() if self._separator else None
        return [name for name in header or () if name and name not in ("prompt", *OVERRIDES)]

    @property
    def _separator(self) -> str | None:
        return {".csv": ",", ".tsv": "\t"}.get(self.path.suffix.lower())

    def _rows(self) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
        """Line, prompt and raw overrides of each."""
        if self._separator:
            return self._table_rows(self._header())
        if self.path.suffix.lower() in (".jsonl", ".ndjson"):
            return self._json_rows()
        return ((line, text.strip(), {}) for line, text in self._lines() if text.strip())

    def _lines(self) -> Iterator[tuple[int, str]]:
        """Lines and their numbers from 1.

        Raises:
            PromptError: the file cannot be read, or is not UTF-8.
        """
        try:
            with self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline=None) as file:
                for number, line in enumerate(file, 1):
                    if not line.isascii() and any("\udc80" <= sign <= "\udcff" for sign in line):
                        raise self._error(number, "expected UTF-8, got other bytes")
                    yield number, line
        except OSError as error:
            raise PromptError(f"{self.path}: cannot read the prompts: {error.strerror}") from error

    def _json_rows(self) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
        for line, text in self._lines():
            if not text.strip():
                continue
            try:
                data = json.loads(text)
            except json.JSONDecodeError as error:
                raise self._error(line, f"expected a JSON object, got {error.msg}") from error
            if not isinstance(data, dict) or not isinstance(data.get("prompt"), (str, int)):
                raise self._error(line, f'expected an object with a "prompt", got {text.strip()[:60]}')
            raw = {name: value for name, value in data.items() if name != "prompt" and value is not None}
            unknown = sorted(raw.keys() - OVERRIDES.keys())
            if unknown:
                known = ", ".join(OVERRIDES)
                raise self._error(line, f"expected prompt and any of {known}, got {', '.join(unknown)}")
            yield line, str(data["prompt"]), raw

    def _header(self) -> list[str] | None:
        """The names at the top of a table; None where its first row is a prompt already."""
        for _, row in self._cells():
            names = [cell.strip().lower() for cell in row]
            return names if "prompt" in names else None
        return None

    def _table_rows(self, header: list[str] | None) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
        rows = self._cells()
        if header is not None:
            next(rows, None)
        for line, row in rows:
            if header is not None and len(row) > len(header):
                raise self._error(line, f"expected at most {len(header)} cells, got {len(row)}")
            named = dict(zip(header, row, strict=False)) if header is not None else {"prompt": row[0]}
            text = named.get("prompt", "").strip()
            if not text:
                raise self._error(line, "expected a prompt, got an empty cell")
            yield line, text, {name: cell for name, cell in named.items() if name in OVERRIDES and cell}

    def _cells(self) -> Iterator[tuple[int, list[str]]]:
        """Rows that are not blank, and the line each ends at."""
        reader = csv.reader(
            (text for _, text in self._lines()), delimiter=self._separator or ",", strict=True
        )
        try:
            for row in reader:
                if any(cell.strip() for cell in row):
                    yield reader.line_num, row
        except csv.Error as error:
            raise self._error(reader.line_num, f"expected a row of a table: {error}") from error

    def _overrides(self, line: int, raw: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in raw.items():
            wanted = OVERRIDES[name]
            try:
                found[name] = wanted.read(value)
            except ValueError:
                raise self._error(line, f"{name}: expected {wanted.expected}, got {value!r}") from None
        if "image" in found:
            found["image"] = [str(self.path.resolve().parent / path) for path in found["image"]]
            for path in found["image"]:
                if not Path(path).is_file():
                    raise self._error(line, f"image: expected a picture, got no file at {path}")
        return found

    def _error(self, line: int, what: str) -> PromptError:
        return PromptError(f"{self.path}: line {line}: {what}")


def given(texts: Sequence[str]) -> list[Prompt]:
    """Prompts of a command line."""
    return [Prompt(index, text) for index, text in enumerate(texts)]
