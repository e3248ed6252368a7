"""One attention in one context: what it keeps between full steps, and what it gives at each.

At a dense step o is the attention's own; then columns I are chosen for every group of rows, and the remainder
o − S(I) is kept, S being the attention to those columns alone. At a sparse step the result is the remainder
plus the present's S(I): exact where nothing has changed since.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hicache_kernels.sparse_attention import choose_columns, kept_columns, row_constants, sparse_attention


class Phase(enum.Enum):
    """What attention does at a full step."""

    DENSE = "dense"
    CONSTANTS = "dense, softmax constants taken"
    RETAKE = "dense, columns and remainder taken"
    SPARSE = "sparse"


@dataclass(frozen=True)
class Turn:
    """What attention does at one full step of a context.

    Args:
        phase: what it does.
        taken: the ordinal of the full step whose columns and remainder it takes, or uses; −1 before any.
    """

    phase: Phase
    taken: int = -1

    @classmethod
    def at(cls, ordinal: int, warmup: int, refresh: int) -> Turn:
        """That of a full step.

        Args:
            ordinal: of the full step, counted from 0.
            warmup: full steps that are dense; two at least, the last of which take constants and remainder.
            refresh: every such full step after those is dense.
        """
        last = max(2, warmup) - 1
        if ordinal < last:
            return cls(Phase.CONSTANTS if ordinal == last - 1 else Phase.DENSE)
        age = (ordinal - last) % refresh
        return cls(Phase.SPARSE if age else Phase.RETAKE, ordinal - age)


@dataclass(frozen=True)
class Sparsity:
    """How sparse it is.

    Args:
        keep: share of the columns that are not text.
        group: rows that share their columns.
        sample: of the rows of a group, every such one tells which columns those are.
    """

    keep: float
    group: int
    sample: int


@dataclass
class Tokens:
    """How the tokens of a context lie.

    Args:
        text: of them, at the beginning of the sequence.
        order: ``[tokens]``, int64: where the rows of groups come from.
    """

    text: int
    order: Tensor

    def __post_init__(self) -> None:
        self.back = self.order.argsort()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.order.nbytes + self.back.nbytes


@dataclass
class Inputs:
    """What an attention is called with: query, key, value ``[batch, heads, tokens, width]``.

    ``dense`` gives the attention's own result.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None
    dense: Callable[[], Tensor]


class Layer:
    """One attention in one context. Nothing that it keeps is ever given away."""

    def __init__(self, sparsity: Sparsity) -> None:
        self._sparsity = sparsity
        self.constants: Tensor | None = None  # [B, H, N / sample], of the step before columns are chosen
        self.columns: Tensor | None = None  # [B, H, groups, kept]
        self.remainder: Tensor | None = None  # [B, H, N, D], its rows in the order of groups
        self.taken = -1  # the full step that columns and remainder are of

    def attend(self, turn: Turn, tokens: Tokens, inputs: Inputs) -> Tensor:
        """The attention's result at a full step: a new tensor, of query's shape and dtype."""
        kept = kept_columns(inputs.query.shape[2], tokens.text, self._sparsity.keep)
        if kept == inputs.query.shape[2]:
            return inputs.dense()
        return _STEPS[turn.phase](self, turn, tokens, inputs)

    def _dense(self, turn: Turn, tokens: Tokens, inputs: Inputs) -> Tensor:
        return inputs.dense()

    def _take_constants(self, turn: Turn, tokens: Tokens, inputs: Inputs) -> Tensor:
        with torch.no_grad():
            rows = self._sampled(_ordered(inputs.query, tokens.order))
            self.constants = row_constants(rows, inputs.key, scale=inputs.scale)
        return inputs.dense()

    def _retake(self, turn: Turn, tokens: Tokens, inputs: Inputs) -> Tensor:
        out = inputs.dense()
        with torch.no_grad():
            self._take(out, tokens, inputs)
        self.taken = turn.taken
        return out

    def _take(self, out: Tensor, tokens: Tokens, inputs: Inputs) -> None:
        """Choose columns, and keep what of a dense result is not theirs."""
        query, scale, group = _ordered(inputs.query, tokens.order), inputs.scale, self._sparsity.group
        rows = self._sampled(query)
        # after a sparse step there are none of the step before
        constants, self.constants = self.constants, None
        if constants is None:
            constants = row_constants(rows, inputs.key, scale=scale)
        kept = kept_columns(query.shape[2], tokens.text, self._sparsity.keep)
        self.columns = self.remainder = None  # their memory serves the new ones
        self.columns = choose_columns(
            rows, inputs.key, constants, group // self._sparsity.sample, kept, tokens.text, scale=scale
        )
        self.remainder = sparse_attention(
            query, inputs.key, inputs.value, self.columns, group,
            base=_ordered(out, tokens.order), subtract=True, scale=scale,
        )  # fmt: skip

    def _sparse(self, turn: Turn, tokens: Tokens, inputs: Inputs) -> Tensor:
        remainder, columns = self.remainder, self.columns
        # an attention that was left out when remainders were taken has an old one, or none
        if self.taken != turn.taken or remainder is None or columns is None:
            return inputs.dense()
        with torch.no_grad():
            query = _ordered(inputs.query, tokens.order)
            found = sparse_attention(
                query, inputs.key, inputs.value, columns, self._sparsity.group,
                base=remainder, scale=inputs.scale,
            )  # fmt: skip
            return _ordered(found, tokens.back)

    def _sampled(self, query: Tensor) -> Tensor:
        """The rows that are asked for columns, each token's heads still neighbours."""
        return query.transpose(1, 2)[:, :: self._sparsity.sample].contiguous().transpose(1, 2)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = (self.constants, self.columns, self.remainder)
        return sum(tensor.nbytes for tensor in held if tensor is not None)


_STEPS = {
    Phase.DENSE: Layer._dense,
    Phase.CONSTANTS: Layer._take_constants,
    Phase.RETAKE: Layer._retake,
    Phase.SPARSE: Layer._sparse,
}


def _ordered(tensor: Tensor, order: Tensor) -> Tensor:
    """The rows of ``[batch, heads, tokens, width]`` in another order, each token's heads still neighbours."""
    return tensor.transpose(1, 2).index_select(1, order).transpose(1, 2)
