"""Attention of groups of rows to few columns each, and what tells which columns those should be.

Source: Chipmunk (arXiv 2506.03275), whose column-sparse attention with a cached remainder this serves.
Nothing imports this package but who uses it. Tensors are ``[batch, heads, tokens, width]``, query, key and
value of one dtype and device; a group is ``group`` consecutive rows of the query, the last one perhaps fewer.

CUDA tensors go to Triton where it can launch, all others to torch; ``backend="triton"`` or ``"torch"`` asks
for one of them.
"""

from __future__ import annotations

from types import ModuleType
from typing import Final

import torch
from torch import Tensor

from hicache_kernels.backends import triton as ops_in_triton
from hicache_kernels.sparse_attention import reference
from hicache_kernels.sparse_attention import triton as in_triton
from hicache_kernels.sparse_attention.columns import kept_columns, top_columns

__all__ = [
    "choose_columns",
    "column_sums",
    "kept_columns",
    "row_constants",
    "sparse_attention",
    "top_columns",
]

_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)  # of Triton's kernels
#: Bytes of column sums that are held at once: those of a long video's layer would be gigabytes.
SUMS_NBYTES: Final = 1 << 28


def row_constants(query: Tensor, key: Tensor, *, scale: float | None = None, backend: str = "auto") -> Tensor:
    """The softmax constants of every row: ``log Σ_j exp(scale · q_i·k_j)``.

    Args:
        query: ``[batch, heads, rows, width]``: of all tokens, or of some.
        key: ``[batch, heads, tokens, width]``.
        scale: of the products; None: ``1 / √width``.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``[batch, heads, rows]``, float32.

    Raises:
        ValueError: tensors that do not fit, or an unknown backend.
        RuntimeError: Triton was asked for and cannot run.
    """
    _check_pair(query, key)
    run = _pick(backend, query)
    return run.row_constants(*_laid_out(query, key), _scale(scale, query))  # type: ignore[no-any-return]


def column_sums(
    query: Tensor,
    key: Tensor,
    constants: Tensor,
    group: int,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """How much the rows of each group look at every column: ``Σ_i exp(scale · q_i·k_j − constants_i)``.

    With the constants of an earlier step this takes one pass, and is not exactly a sum of probabilities.

    Args:
        query: ``[batch, heads, rows, width]``.
        key: ``[batch, heads, tokens, width]``.
        constants: ``[batch, heads, rows]``, float32, of :func:`row_constants`.
        group: rows that are summed together.
        scale: see :func:`row_constants`.
        backend: see :func:`row_constants`.

    Returns:
        ``[batch, heads, groups, tokens]``, float32.

    Raises:
        ValueError, RuntimeError: as :func:`row_constants`; or a shape that does not fit.
    """
    _check_pair(query, key)
    _check_form("constants", constants, query.shape[:3], torch.float32)
    _check_group(group)
    run = _pick(backend, query)
    return run.column_sums(  # type: ignore[no-any-return]
        *_laid_out(query, key), constants, group, _scale(scale, query)
    )


def choose_columns(
    query: Tensor,
    key: Tensor,
    constants: Tensor,
    group: int,
    kept: int,
    text: int = 0,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """The ``kept`` columns that each group of rows looks at most, those of the text among them.

    Heads are done a few at a time, so that sums never hold more than :data:`SUMS_NBYTES` or one head's.

    Args:
        query: ``[batch, heads, rows, width]``.
        key: ``[batch, heads, tokens, width]``.
        constants: ``[batch, heads, rows]``, float32.
        group: rows that share their columns.
        kept: columns of a group, at most ``tokens``.
        text: columns at the beginning that every group keeps.
        scale: see :func:`row_constants`.
        backend: see :func:`row_constants`.

    Returns:
        ``[batch, heads, groups, kept]``, int32, ascending.

    Raises:
        ValueError, RuntimeError: as :func:`column_sums`; or a number of columns that cannot be had.
    """
    _check_pair(query, key)
    batch, heads, tokens = key.shape[:3]
    if not text <= kept <= tokens or kept < 1:
        raise ValueError(
            f"hicache_kernels: expected {max(1, text)} (the text's) to {tokens} (all) columns, got {kept}"
        )
    _check_group(group)
    query, key = _laid_out(query, key)
    most = max(1, SUMS_NBYTES // (4 * batch * -(-query.shape[2] // group) * tokens))
    return torch.cat(
        [
            top_columns(
                column_sums(query[:, at], key[:, at], constants[:, at], group, scale=scale, backend=backend),
                kept,
                text,
            )
            for at in (slice(first, first + most) for first in range(0, heads, most))
        ],
        dim=1,
    )


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    columns: Tensor,
    group: int,
    *,
    base: Tensor | None = None,
    subtract: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention of every group of rows to its own columns alone, normalised over them.

    Args:
        query: ``[batch, heads, tokens, width]``.
        key: alike.
        value: alike.
        columns: ``[batch, heads, groups, kept]``, int32, of :func:`choose_columns`: numbers below ``tokens``,
            which nobody looks at again.
        group: rows that share their columns.
        base: of query's shape and dtype, which the attention is added to.
        subtract: subtract it from ``base`` instead.
        scale: see :func:`row_constants`.
        backend: see :func:`row_constants`.

    Returns:
        A new tensor of query's shape and dtype.

    Raises:
        ValueError, RuntimeError: as :func:`row_constants`; or a shape that does not fit.
    """
    _check_alike(query, key, value, *(() if base is None else (base,)))
    _check_group(group)
    if subtract and base is None:
        raise ValueError("hicache_kernels: expected base with subtract=True, got None")
    groups = -(-query.shape[2] // group)
    _check_form("columns", columns, (*query.shape[:2], groups, columns.shape[-1]), torch.int32)
    given = [_token_major(tensor) for tensor in (query, key, value)]
    run = _pick(backend, query)
    return run.sparse_attention(  # type: ignore[no-any-return]
        *given,
        columns.contiguous(),
        group,
        _scale(scale, query),
        None if base is None else _token_major(base),
        -1 if subtract else 1,
    )


def _pick(backend: str, tensor: Tensor) -> ModuleType:
    """What computes.

    Raises:
        ValueError: no such backend.
        RuntimeError: Triton was asked for and cannot run.
    """
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"hicache_kernels: unknown backend {backend!r}; expected one of auto, triton, torch")
    if backend == "torch" or (backend == "auto" and not tensor.is_cuda):
        return reference
    why = ops_in_triton.unavailable(tensor.device)
    if why is None and tensor.dtype not in _DTYPES:
        why = f"it takes {', '.join(map(str, _DTYPES))}, not {tensor.dtype}"
    if why is not None and backend == "triton":
        raise RuntimeError(f"hicache_kernels: backend 'triton' cannot run: {why}")
    return in_triton if why is None else reference


def _scale(scale: float | None, query: Tensor) -> float:
    return float(query.shape[-1] ** -0.5) if scale is None else scale


def _token_major(tensor: Tensor) -> Tensor:
    """In memory ``[batch, tokens, heads, width]``, as projections leave it; a copy where it is not."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _laid_out(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the same strides but for their batches, channels next to each other; else copies that are."""
    if query.stride()[1:] == key.stride()[1:] and query.stride(-1) == 1:
        return query, key
    return _token_major(query), _token_major(key)


def _check_alike(*tensors: Tensor) -> None:
    forms = {(tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in tensors}
    if len(forms) > 1 or tensors[0].ndim != 4:
        found = [f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in tensors]
        raise ValueError(
            "hicache_kernels: expected tensors [batch, heads, tokens, width] of one shape, dtype and device, "
            f"got {', '.join(found)}"
        )


def _check_pair(query: Tensor, key: Tensor) -> None:
    """Check rows of a query against a key."""
    if query.ndim == 4 and key.ndim == 4:
        query = query[:, :, :1].expand(-1, -1, key.shape[2], -1)  # as many rows as there are tokens
    _check_alike(query, key)


def _check_form(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
        raise ValueError(
            f"hicache_kernels: expected {name} to be {tuple(shape)} {dtype}, got {tuple(tensor.shape)} "
            f"{tensor.dtype}"
        )


def _check_group(group: int) -> None:
    if group < 1:
        raise ValueError(f"hicache_kernels: expected group >= 1 rows, got {group}")
