"""Column-sparse attention in torch: the specification, and what a CPU runs.

Work is done by heads, and by as many groups at once as :data:`CHUNK` elements allow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK: Final = 1 << 25  # elements of one intermediate tensor


def row_constants(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """``log Σ_j exp(scale · q_i·k_j)`` of every row i, ``[batch, heads, rows]`` in float32."""
    rows = max(1, CHUNK // (key.shape[0] * key.shape[2]))
    found = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    for head in range(query.shape[1]):
        for begin in range(0, query.shape[2], rows):
            at = slice(begin, begin + rows)
            found[:, head, at] = _scores(query[:, head, at], key[:, head], scale).logsumexp(-1)
    return found


def column_sums(query: Tensor, key: Tensor, constants: Tensor, group: int, scale: float) -> Tensor:
    """``Σ_i exp(scale · q_i·k_j − constants_i)`` over the rows i of a group, in float32.

    ``[batch, heads, groups, tokens]``.
    """
    batch, heads, tokens, _ = key.shape
    groups = -(-query.shape[2] // group)
    sums = torch.empty(batch, heads, groups, tokens, dtype=torch.float32, device=query.device)
    for head in range(heads):
        for index in range(groups):
            at = slice(index * group, (index + 1) * group)
            scores = _scores(query[:, head, at], key[:, head], scale)  # [B, rows, N]
            sums[:, head, index] = (scores - constants[:, head, at, None]).exp().sum(1)
    return sums


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
    """Softmax attention of every group to its own columns, normalised over them: of query's form and dtype.

    With ``base``, ``base + sign · attention``, rounded once.
    """
    batch, heads, tokens, width = query.shape
    out = torch.empty_like(query)
    for head in range(heads):
        for groups, at in _chunks(columns.shape[2], tokens, group, batch * columns.shape[3] * width):
            picks = columns[:, head, groups].long()  # [B, G, C]
            keys, values = (_gathered(tensor[:, head], picks) for tensor in (key, value))  # [B, G, C, D]
            rows = query[:, head, at]
            rows = rows.reshape(batch, picks.shape[1], -1, width)
            found = F.scaled_dot_product_attention(rows, keys, values, scale=scale).flatten(1, 2)
            if base is not None:
                found = _precise(base[:, head, at]) + sign * _precise(found)
            out[:, head, at] = found
    return out


def _scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """``[batch, rows, tokens]``."""
    return (_precise(query) @ _precise(key).transpose(1, 2)) * scale


def _precise(tensor: Tensor) -> Tensor:
    """In float32, or as it is if that is more."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _gathered(tensor: Tensor, picks: Tensor) -> Tensor:
    """The rows of ``[batch, tokens, width]`` that ``picks`` [batch, groups, columns] name."""
    width = tensor.shape[-1]
    at = picks.flatten(1)[..., None].expand(-1, -1, width)
    return tensor.gather(1, at).view(*picks.shape, width)


def _chunks(groups: int, tokens: int, group: int, elements: int) -> Iterator[tuple[slice, slice]]:
    """Groups that are done at once, and their rows; a last group that is not whole is done alone."""
    whole, most = tokens // group, max(1, CHUNK // elements)
    for begin in range(0, whole, most):
        end = min(begin + most, whole)
        yield slice(begin, end), slice(begin * group, end * group)
    if whole < groups:
        yield slice(whole, groups), slice(whole * group, tokens)
