"""Column-sparse attention in Triton: CUDA tensors, or CPU ones under ``TRITON_INTERPRET=1``.

What is computed is said in :mod:`hicache_kernels.sparse_attention.reference`. Sums and softmax are in
float32, products of lower precision are the tensor cores' own. Addresses are 64-bit. A program works on ROWS
rows of one group, so that all of them gather the same columns.

Tensors are ``[batch, heads, tokens, width]`` in a layout where one token's heads are neighbours, as
projections leave them; strides are counted in elements, and the shape tags say what a program holds.
"""

from __future__ import annotations

import functools
import importlib
import math
from contextlib import nullcontext
from typing import Any, Final

import torch
from torch import Tensor

from hicache_kernels.triton_runtime import MISSING, Launcher

ROWS: Final = 64
COLUMNS: Final = 64
# two stages: a tile is gathered while the last is multiplied; with four warps registers spill
_OPTIONS: Final = (("num_warps", 8), ("num_stages", 2))
# Where four warps multiply as one, straight from shared memory, nothing spills. The third stage is for the
# numbers of the columns that are gathered next. On an H200 an attention takes a third of the time so.
_WARPGROUP_OPTIONS: Final = (("num_warps", 4), ("num_stages", 3))
_WARPGROUPS: Final = (9, 10)  # generations that have such instructions
_LOG2E: Final = 1 / math.log(2)

if MISSING is None:
    triton: Any = importlib.import_module("triton")
    tl: Any = importlib.import_module("triton.language")

    @triton.jit
    def _rows(tile, tokens, heads, GROUP: tl.constexpr, ROWS: tl.constexpr):
        """Where a tile of rows is: its sample, head and group, its rows [R] and which of them there are."""
        tiles = (GROUP + ROWS - 1) // ROWS
        groups = tl.cdiv(tokens, GROUP)
        inside = tile % tiles * ROWS + tl.arange(0, ROWS)
        group = tile // tiles % groups
        row = group * GROUP + inside
        head = tile // tiles // groups % heads
        return tile // tiles // groups // heads, head, group, row, (inside < GROUP) & (row < tokens)

    @triton.jit
    def _scores(rows, columns, scale):
        """``scale · rows [R, W] · columns [C, W]ᵀ``: [R, C] in float32."""
        return tl.dot(rows, tl.trans(columns), input_precision="ieee") * scale

    @triton.jit
    def _sparse_attention_kernel(
        query,
        key,
        value,
        columns,
        base,
        out,
        tokens,
        heads,
        kept,
        batch_stride,
        head_stride,
        token_stride,
        scale,
        BASED: tl.constexpr,
        SIGN: tl.constexpr,
        GROUP: tl.constexpr,
        WIDTH: tl.constexpr,
        BLOCK_WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        """``out = base + SIGN · softmax attention`` to ``columns[batch, heads, groups, kept]``.

        ``scale`` has log₂ e in it. Without BASED the attention alone, whatever SIGN is.
        """
        tile = tl.program_id(0).to(tl.int64)
        sample, head, group, row, real = _rows(tile, tokens, heads, GROUP, ROWS)
        channel = tl.arange(0, BLOCK_WIDTH)
        begin = sample * batch_stride + head * head_stride
        at = begin + row[:, None] * token_stride + channel[None, :]  # [R, W]
        mask = real[:, None] & (channel < WIDTH)[None, :]
        rows = tl.load(query + at, mask=mask, other=0.0)
        picks = columns + ((sample * heads + head) * tl.cdiv(tokens, GROUP) + group) * kept
        best = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        mean = tl.zeros([ROWS, BLOCK_WIDTH], tl.float32)
        for first in range(0, kept, COLUMNS):
            pick = first + tl.arange(0, COLUMNS)
            column = tl.load(picks + pick, mask=pick < kept, other=0).to(tl.int64)
            of = begin + column[:, None] * token_stride + channel[None, :]  # [C, W]
            there = (pick < kept)[:, None] & (channel < WIDTH)[None, :]
            scores = _scores(rows, tl.load(key + of, mask=there, other=0.0), scale)
            scores = tl.where((pick < kept)[None, :], scores, float("-inf"))
            higher = tl.maximum(best, tl.max(scores, 1))
            weights = tl.exp2(scores - higher[:, None])  # [R, C]
            shrunk = tl.exp2(best - higher)
            total = total * shrunk + tl.sum(weights, 1)
            values = tl.load(value + of, mask=there, other=0.0)
            mean = tl.dot(weights.to(values.dtype), values, mean * shrunk[:, None], input_precision="ieee")
            best = higher
        result = mean / total[:, None]
        if BASED:
            result = tl.load(base + at, mask=mask, other=0.0).to(tl.float32) + SIGN * result
        tl.store(out + at, result.to(out.dtype.element_ty), mask=mask)

    @triton.jit
    def _row_constants_kernel(
        query,
        key,
        out,
        queries,
        tokens,
        heads,
        query_batch_stride,
        batch_stride,
        head_stride,
        token_stride,
        scale,
        WIDTH: tl.constexpr,
        BLOCK_WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        """``out[batch, heads, queries] = log Σ_j exp(…)`` of every row; ``scale`` has log₂ e in it."""
        tile = tl.program_id(0).to(tl.int64)
        sample, head, _, row, real = _rows(tile, queries, heads, ROWS, ROWS)
        channel = tl.arange(0, BLOCK_WIDTH)
        begin = sample * batch_stride + head * head_stride
        at = (
            sample * query_batch_stride + head * head_stride + row[:, None] * token_stride + channel[None, :]
        )  # [R, W]
        rows = tl.load(query + at, mask=real[:, None] & (channel < WIDTH)[None, :], other=0.0)
        best = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for first in range(0, tokens, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            of = begin + column.to(tl.int64)[:, None] * token_stride + channel[None, :]  # [C, W]
            there = (column < tokens)[:, None] & (channel < WIDTH)[None, :]
            scores = _scores(rows, tl.load(key + of, mask=there, other=0.0), scale)
            scores = tl.where((column < tokens)[None, :], scores, float("-inf"))
            higher = tl.maximum(best, tl.max(scores, 1))
            total = total * tl.exp2(best - higher) + tl.sum(tl.exp2(scores - higher[:, None]), 1)
            best = higher
        # from log₂ to log
        natural = (best + tl.log2(total)) * 0.6931471805599453
        tl.store(out + (sample * heads + head) * queries + row, natural, mask=real)

    @triton.jit
    def _column_sums_kernel(
        query,
        key,
        constants,
        out,
        queries,
        tokens,
        heads,
        query_batch_stride,
        batch_stride,
        head_stride,
        token_stride,
        scale,
        GROUP: tl.constexpr,
        WIDTH: tl.constexpr,
        BLOCK_WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        """``out[batch, heads, groups, tokens]``: a tile of columns of one group a program, with no atomics.

        ``scale`` has log₂ e in it; ``constants[batch, heads, queries]`` have not.
        """
        program = tl.program_id(0).to(tl.int64)
        groups, column_tiles = tl.cdiv(queries, GROUP), tl.cdiv(tokens, COLUMNS)
        column = program % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
        group = program // column_tiles % groups
        head = program // column_tiles // groups % heads
        sample = program // column_tiles // groups // heads
        channel = tl.arange(0, BLOCK_WIDTH)
        begin = sample * batch_stride + head * head_stride
        there = (column < tokens)[:, None] & (channel < WIDTH)[None, :]
        columns = tl.load(
            key + begin + column[:, None] * token_stride + channel[None, :], mask=there, other=0.0
        )
        total = tl.zeros([COLUMNS], tl.float32)
        for first in range(0, GROUP, ROWS):
            inside = first + tl.arange(0, ROWS)
            row = group * GROUP + inside
            real = (inside < GROUP) & (row < queries)
            at = (
                sample * query_batch_stride
                + head * head_stride
                + row[:, None] * token_stride
                + channel[None, :]
            )
            rows = tl.load(query + at, mask=real[:, None] & (channel < WIDTH)[None, :], other=0.0)
            # rows that are not there weigh nothing
            constant = tl.load(
                constants + (sample * heads + head) * queries + row, mask=real, other=float("inf")
            )
            scores = _scores(rows, columns, scale) - (constant * 1.4426950408889634)[:, None]
            total += tl.sum(tl.exp2(scores), 0)
        tl.store(
            out + ((sample * heads + head) * groups + group) * tokens + column, total, mask=column < tokens
        )

    _SPARSE: Final = Launcher(_sparse_attention_kernel)
    _CONSTANTS: Final = Launcher(_row_constants_kernel)
    _SUMS: Final = Launcher(_column_sums_kernel)


def options(dtype: torch.dtype, generation: int) -> tuple[tuple[str, int], ...]:
    """What kernels are compiled with.

    Args:
        dtype: of what is multiplied.
        generation: the first number of a GPU's compute capability.
    """
    grouped = generation in _WARPGROUPS and dtype.itemsize == 2
    return _WARPGROUP_OPTIONS if grouped else _OPTIONS


@functools.cache
def _generation(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def _launch(
    launcher: Launcher,
    programs: int,
    pointers: tuple[Tensor | None, ...],
    sizes: tuple[int, ...],
    key: Tensor,
    scale: float,
    constants: tuple[int, ...],
) -> None:
    """Launch a kernel; ``sizes`` are what comes before the strides of ``key``."""
    width = key.shape[-1]
    block = max(16, triton.next_power_of_2(width))  # the least that tensor cores multiply
    # Triton launches on the current device, whatever device its arguments are on
    with torch.cuda.device(key.device) if key.is_cuda else nullcontext():
        launcher(
            programs,
            pointers,
            (*sizes, *key.stride()[:3], scale * _LOG2E),
            (*constants, width, block, ROWS, COLUMNS),
            options(key.dtype, _generation(key.device)),
        )


def _sizes(query: Tensor, key: Tensor) -> tuple[int, ...]:
    """Of a kernel whose rows are some of the tokens."""
    return query.shape[2], key.shape[2], key.shape[1], query.stride(0)


def row_constants(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """See the reference."""
    out = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    programs = out[..., ::ROWS].numel()
    _launch(_CONSTANTS, programs, (query, key, out), _sizes(query, key), key, scale, ())
    return out


def column_sums(query: Tensor, key: Tensor, constants: Tensor, group: int, scale: float) -> Tensor:
    """See the reference."""
    batch, heads, tokens, _ = key.shape
    groups = -(-query.shape[2] // group)
    out = torch.empty(batch, heads, groups, tokens, dtype=torch.float32, device=query.device)
    programs = batch * heads * groups * -(-tokens // COLUMNS)
    pointers = query, key, constants.contiguous(), out
    _launch(_SUMS, programs, pointers, _sizes(query, key), key, scale, (group,))
    return out


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    columns: Tensor,
    group: int,
    scale: float,
    base: Tensor | None = None,
    sign: int = 1,
) -> Tensor:
    """See the reference; with ``base`` added in the same launch."""
    out = torch.empty_like(query)
    programs = columns[..., 0].numel() * -(-group // ROWS)
    sizes, constants = (key.shape[2], key.shape[1], columns.shape[3]), (base is not None, sign, group)
    _launch(_SPARSE, programs, (query, key, value, columns, base, out), sizes, key, scale, constants)
    return out
