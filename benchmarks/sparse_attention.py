"""Times sparse attention beside torch's own: ``python -m benchmarks.sparse_attention``.

One attention of each of the shapes below, bf16 on a GPU and float32 at a small size on a CPU, in one run:
torch's ``scaled_dot_product_attention``; attention to few columns with the remainder added, as a sparse full
step does it; and what a step that takes columns anew does beside its dense attention. Before a row is timed,
some rows of the sparse result are compared with torch's in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import command, machine, tables
from benchmarks.common.timing import time_together
from hicache.companions.sparse import SparseAttention
from hicache_kernels import sparse_attention as kernels

SPARSE = SparseAttention()
KEEPS = (0.05, 0.15, 0.3)
CHECKED = 64  # rows that are compared


@dataclass(frozen=True)
class Shape:
    """Of one attention.

    Args:
        heads: of ``width`` channels each.
        tokens: of a picture or video, and its text.
        text: tokens of the text, which is kept.
        width: of a head.
    """

    heads: int
    tokens: int
    text: int = 0
    width: int = 128


SHAPES = {
    "cuda": {
        "FLUX.1, 1024²": Shape(24, 64**2 + 512, 512),
        "FLUX.1, 2048²": Shape(24, 128**2 + 512, 512),
        "Wan-1.3B, 480p × 81": Shape(12, 21 * 30 * 52),
        "Wan-14B, 720p × 81": Shape(40, 21 * 45 * 80),
    },
    "cpu": {"small": Shape(2, 768, 32, 32)},
}


@dataclass(frozen=True)
class Row:
    """Milliseconds of one attention, medians."""

    shape: str
    tokens: int
    keep: float
    columns: int
    dense_ms: float
    sparse_ms: float
    sparse_over_dense: float
    constants_ms: float  # of the rows that are asked which columns
    choosing_ms: float
    error: float  # of the sparse result without a remainder, relative to float64


def tensors(shape: Shape, device: str) -> list[Tensor]:
    """Query, key, value and a remainder, as projections leave them."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    draw = torch.Generator(device).manual_seed(0)
    size = 1, shape.tokens, shape.heads, shape.width
    return [torch.randn(size, generator=draw, device=device, dtype=dtype).transpose(1, 2) for _ in range(4)]


def error(shape: Shape, given: list[Tensor], columns: Tensor) -> float:
    """Of the last rows of the last head, relative: ‖found − exact‖ / ‖exact‖."""
    query, key, value, _ = given
    found = kernels.sparse_attention(query, key, value, columns, SPARSE.group)
    query, key, value = (tensor[:, -1:].double() for tensor in (query, key, value))
    first = (shape.tokens - 1) // SPARSE.group * SPARSE.group  # the last group's rows
    rows = slice(max(first, shape.tokens - CHECKED), shape.tokens)
    picked = columns[0, -1, -1].long()
    exact = F.scaled_dot_product_attention(query[:, :, rows], key[:, :, picked], value[:, :, picked])
    return float((found[:, -1:, rows].double() - exact).norm() / exact.norm())


def measure(name: str, shape: Shape, device: str, seconds: float) -> Iterator[Row]:
    """A row for every share of the columns."""
    given = tensors(shape, device)
    query, key, value, base = given
    asked = query[:, :, :: SPARSE.sample]
    group = SPARSE.group // SPARSE.sample
    constants = kernels.row_constants(asked, key)
    for keep in KEEPS:
        kept = kernels.kept_columns(shape.tokens, shape.text, keep)

        def choose(kept: int = kept) -> Tensor:
            return kernels.choose_columns(asked, key, constants, group, kept, shape.text)

        columns = choose()

        def sparse(columns: Tensor = columns) -> Tensor:
            return kernels.sparse_attention(query, key, value, columns, SPARSE.group, base=base)

        off = error(shape, given, columns)
        if not off < 2e-2:
            raise SystemExit(f"{name}: {off:.2g} off float64: nothing is timed")
        taken = time_together(
            {
                "dense": lambda: F.scaled_dot_product_attention(query, key, value),
                "sparse": sparse,
                "constants": lambda: kernels.row_constants(asked, key),
                "choosing": choose,
            },
            device=device,
            seconds=seconds,
        )
        dense, few, first, choosing = (taken[part].p50 * 1e3 for part in taken)
        yield Row(name, shape.tokens, keep, kept, dense, few, few / dense, first, choosing, off)


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--device", choices=tuple(SHAPES), default="cuda")
    parser.add_argument("--seconds", type=float, default=1.0, help="for every row")
    options = parser.parse_args()
    command.require(options.device, hint="; --device cpu times small ones")
    where = machine.place(options.device)
    print(where, flush=True)
    rows: list[Row] = []
    for name, shape in SHAPES[options.device].items():
        for row in measure(name, shape, options.device, options.seconds):
            rows.append(row)
            print(row, flush=True)
            if options.csv:
                tables.write_rows(options.csv, Row, rows, where)
    header = [field.name for field in fields(Row)]
    print(tables.markdown(header, [list(map(_cell, astuple(row))) for row in rows]))


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
