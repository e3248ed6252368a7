"""Reading a calibration file, with the line of what is wrong in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from hicache.basis import Basis
from hicache.calibration.file import FORMAT, VERSION, Calibration, Entry, Row, Rows
from hicache.json_lines import line_of
from hicache.model_key import ModelKey
from hicache.plain_data import from_plain

_KINDS: Final = {dict: "an object", list: "a list", str: "a string", int: "an int"}


class CalibrationError(ValueError):
    """A file that is no calibration, or a damaged one; the message names the line."""


def load(path: str | Path) -> Calibration:
    """Read a file.

    Raises:
        CalibrationError: it cannot be read, is no calibration, or is damaged.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: cannot be read: {error}") from error
    return parse(path.name, text)


def parse(name: str, text: str) -> Calibration:
    """Read a file's contents.

    Args:
        name: of the file, for messages.
        text: the contents.

    Raises:
        CalibrationError: it is no calibration, or damaged.
    """
    return _Reader(name, text).calibration()


class _Reader:
    """Takes a file's contents apart, and names the line of what is wrong."""

    def __init__(self, name: str, text: str) -> None:
        self._name = name
        self._text = text

    def calibration(self) -> Calibration:
        try:
            data = json.loads(self._text)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{self._name}: line {error.lineno}: not JSON: {error.msg}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise CalibrationError(f"{self._name}: line 1: expected a file of format {FORMAT!r}")
        if data.get("version") != VERSION:
            self._fail(["version"], f"version {VERSION}", data.get("version"))
        models = {
            name: self._model(["models", name], key)
            for name, key in self._take(data, [], "models", dict).items()
        }
        entries = self._take(data, [], "entries", list)
        if not entries:
            self._fail(["entries"], "at least one entry", entries)
        for name in ("guidance", "granularity"):
            if not isinstance(data.get(name), (str, type(None))):
                self._fail([name], "a string or null", data[name])
        try:
            prior = from_plain(self._take(data, [], "prior", dict), Basis, "prior")
        except (TypeError, ValueError) as error:
            line = line_of(self._text, ["prior"])
            raise CalibrationError(f"{self._name}: line {line}: {error}") from error
        read = tuple(self._entry(["entries", index], entry) for index, entry in enumerate(entries))
        guidance, granularity = data.get("guidance"), data.get("granularity")
        settings = self._take(data, [], "settings", dict)
        found = Calibration(models, guidance, prior, read, settings, granularity, self._name)
        if found.by_feature and granularity != "module":
            self._fail(["granularity"], "'module', as features have rows of their own", granularity)
        return found

    def _model(self, path: list[str | int], data: Any) -> ModelKey:
        weights = self._numbers([*path, "weights"], self._take(data, path, "weights", list))
        return ModelKey(self._take(data, path, "class", str), self._take(data, path, "config", str), weights)

    def _entry(self, path: list[str | int], data: Any) -> Entry:
        num_steps, order, warmup = (
            self._whole([*path, name], self._take(data, path, name, int))
            for name in ("num_steps", "order", "warmup")
        )
        places = self._take(data, path, "full_steps", list)
        full = [self._whole([*path, "full_steps"], step) for step in places]
        if not full or full != sorted(set(full)) or full[0] != 0 or full[-1] >= num_steps:
            self._fail([*path, "full_steps"], f"rising steps from 0 to {num_steps - 1}", full)
        rows = self._rows(path, data, num_steps, order, full)
        sigmas = data.get("sigmas")
        return Entry(
            num_steps,
            order,
            warmup,
            tuple(full),
            rows,
            None if sigmas is None else self._numbers([*path, "sigmas"], sigmas),
            self._take(data, path, "scores", dict),
        )

    def _rows(self, path: list[str | int], data: Any, num_steps: int, order: int, full: list[int]) -> Rows:
        rows: dict[str, dict[int, Row]] = {}
        features: int | None = None  # that have rows of their own; 0: none has
        for context in self._take(data, path, "rows", dict):
            own = rows[context] = {}
            for step, row in self._take(data["rows"], [*path, "rows"], context, dict).items():
                place = [*path, "rows", context, step]
                if not step.isdecimal() or int(step) in full or int(step) >= num_steps:
                    self._fail(place, f"a skipped step below {num_steps} for a key", step)
                if not isinstance(row, list) or not 1 <= len(row) <= order + 1:
                    self._fail(place, f"1 to {order + 1} coefficients", row)
                own[int(step)] = read = self._row(place, row)
                counts = [len(numbers) if isinstance(numbers, tuple) else 0 for numbers in read]
                features = counts[0] if features is None else features
                if set(counts) != {features}:
                    self._fail(place, f"rows of {features or 'no'} features as those before", row)
        return rows

    def _row(self, path: list[str | int], row: list[Any]) -> Row:
        if not any(isinstance(numbers, list) and numbers for numbers in row):
            return self._numbers(path, row)
        return tuple(self._numbers(path, numbers) for numbers in row)

    def _take(self, data: Any, path: list[str | int], name: str, kind: type) -> Any:
        value = data.get(name) if isinstance(data, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            self._fail([*path, name], f"{name} to be {_KINDS[kind]}", value)
        return value

    def _whole(self, path: list[str | int], value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            self._fail(path, "an int >= 0", value)
        return int(value)

    def _numbers(self, path: list[str | int], values: Any) -> tuple[float, ...]:
        finite = isinstance(values, list) and all(
            isinstance(value, (int, float)) and abs(value) < float("inf") for value in values
        )
        if not finite:
            self._fail(path, "a list of finite numbers", values)
        return tuple(map(float, values))

    def _fail(self, path: list[str | int], expected: str, got: Any) -> None:
        shown = repr(got) if len(repr(got)) < 60 else f"{repr(got)[:60]}…"
        line = line_of(self._text, path)
        raise CalibrationError(f"{self._name}: line {line}: expected {expected}, got {shown}")
