"""Rows as a CSV file and as a Markdown table."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from benchmarks.common.machine import Place


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write rows below a header; floats get five digits and None an empty cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for row in rows:
            writer.writerow([f"{value:.5g}" if isinstance(value, float) else value for value in row])


def save_csv(path: Path | None, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """:func:`write_csv` for the option ``--csv``: nothing without a path, and a word on stderr with one."""
    if path is not None:
        write_csv(path, header, rows)
        print(f"saved {path}", file=sys.stderr)


def write_rows(path: Path, kind: type[Any], rows: Iterable[Any], place: Place) -> None:
    """Write dataclasses of one kind, a column a field, with the place of measurement on every row.

    Args:
        path: the CSV file.
        kind: the dataclass, which gives the header where there are no rows.
        rows: its instances.
        place: :func:`benchmarks.common.machine.place`.
    """
    header = [*(field.name for field in fields(kind)), *place._fields]
    write_csv(path, header, ([*astuple(row), *place] for row in rows))


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    first, *others = ["| " + " | ".join(map(str, line)) + " |" for line in (header, *rows)]
    return "\n".join([first, "|" + "---|" * len(header), *others])


def bullets(items: Iterable[str], none: str) -> str:
    """A Markdown list, or a sentence where there is nothing to list."""
    return "\n".join(f"- {item}" for item in items) or none


def shown(value: float | None, form: str, unit: str = "") -> str:
    """A number with its unit; an empty string for None."""
    return "" if value is None else f"{value:{form}}{unit}"
