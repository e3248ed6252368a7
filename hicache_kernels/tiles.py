"""How much one program of a Triton kernel works on: a default, or a table measured on the card at hand.

The default is not a guess: with it the compiled kernels keep more bytes in flight on every multiprocessor
than Little's law asks for (bandwidth × latency; tests/kernels/test_triton_ptx.py reads it off the binaries).
A table, written by ``python -m benchmarks.gpu``, takes its place where ``HICACHE_TILES`` names one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True)
class Tile:
    """The work of one program, and how it is compiled."""

    # elements, where rows have no meaning; 8 a thread: one 16-byte access of a 2-byte dtype
    block: int = 1024
    rows: int = 4  # gated_sum with gates: rows of one sample …
    columns: int = 256  # … by channels; the gates of a tile are loaded once
    num_warps: int = 4
    # gated_sum: features whose loads are in flight at once; over 1, through shared memory
    num_stages: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            power_of_two = isinstance(value, int) and value > 0 and value & (value - 1) == 0
            if not power_of_two and not (name == "num_stages" and isinstance(value, int) and value > 0):
                raise ValueError(f"Tile: expected {name} to be a positive power of two, got {value!r}")


_override: Mapping[str, Tile] | None = None


def key(op: str, num_coeffs: int, itemsize: int, num_features: int) -> str:
    """Problems that share a tile, as a table names them: op, orders read, bytes an element, features.

    A tile measured on one model serves every model with the same key: any tile runs at any shape.
    """
    return f"{op} K={num_coeffs} bytes={itemsize} features={'1' if num_features == 1 else 'many'}"


@lru_cache
def default(num_coeffs: int, itemsize: int) -> Tile:
    """The tile without a table: more elements where a program would load one row of them only."""
    if num_coeffs > 1:
        return Tile()
    return Tile(block=2048, rows=8) if itemsize >= 4 else Tile(block=4096, rows=16)


def tile(op: str, num_coeffs: int, itemsize: int, num_features: int) -> Tile:
    """The tile for an op. A table is read once a process and never inside a capture."""
    table = _table() if _override is None else _override
    measured = table.get(key(op, num_coeffs, itemsize, num_features)) if table else None
    return measured or default(num_coeffs, itemsize)


@contextmanager
def override(table: Mapping[str, Tile]) -> Iterator[None]:
    """Use this table, by :func:`key`, inside the ``with`` block: for measuring one."""
    global _override
    before, _override = _override, table
    try:
        yield
    finally:
        _override = before


def read_table(path: Path) -> dict[str, Tile]:
    """A measured table: JSON, :func:`key` → the fields of :class:`Tile`.

    Raises:
        ValueError: the file is not such a table.
    """
    try:
        entries = json.loads(path.read_text())
        return {name: Tile(**entry) for name, entry in entries.items()}
    except (OSError, AttributeError, TypeError, ValueError) as error:
        known = ", ".join(field.name for field in fields(Tile))
        raise ValueError(f"{path}: expected a JSON table of tiles with {known}: {error}") from error


def write_table(path: Path, table: Mapping[str, Tile]) -> None:
    """Write a table that :func:`read_table` reads."""
    path.write_text(json.dumps({name: asdict(tile) for name, tile in table.items()}, indent=1) + "\n")


@lru_cache(maxsize=1)
def _table() -> dict[str, Tile]:
    path = os.environ.get("HICACHE_TILES")
    return read_table(Path(path)) if path else {}
