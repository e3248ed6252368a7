"""The ops at the sizes of real models: tensors, contestants, and the least an op must move and compute."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common.timing import Call
from benchmarks.kernels import eager
from hicache_kernels import BACKENDS, History, forecast, gated_sum, update_, update_forecast_

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16, "fp64": torch.float64}
GAP = 7.0
WEIGHTS = (1.0, 0.5, -0.125, 0.3, 0.1)


@dataclass(frozen=True)
class Size:
    """The features of one history: so many tensors ``[batch, tokens, channels]``."""

    features: int
    tokens: int
    channels: int
    batch: int = 1

    @property
    def numel(self) -> int:
        """Elements of one feature."""
        return self.batch * self.tokens * self.channels


# Image tokens only: the text's are never read (docs/algorithm.md). Small ones first, down to where the cost
# of a launch is all there is.
SIZES = {
    "1Ki": Size(1, 16, 64),
    "demo": Size(1, 64, 192, batch=16),
    "1Mi": Size(1, 1024, 1024),
    "FLUX 1024² stack": Size(1, 4096, 3072),
    "16Mi": Size(1, 4096, 4096),
    "Qwen-Image 1328² stack": Size(1, 6889, 3072),
    "76 small": Size(76, 256, 512),
    "32 of 4Mi": Size(32, 4096, 1024),
    "Wan-14B 720p stack": Size(1, 75600, 5120),
    "FLUX 1024² module": Size(76, 4096, 3072),
    "Qwen-Image 1328² module": Size(120, 6889, 3072),
}


@dataclass(frozen=True)
class Op:
    """A public op, or a way of using one. Everything is at steady state: all differences exist."""

    name: str
    updates: bool  # takes a new feature into the history
    forecasts: bool = True
    sums: bool = False  # ends in a hidden state, not in a row of forecasts
    gated: bool = False
    by_feature: bool = False  # coefficients are a row for each feature; the rows are equal here

    @property
    def form(self) -> str:
        """The public op's name, without the way it is used."""
        return self.name.split(",")[0]


OPS = {
    op.name: op
    for op in (
        Op("update_", updates=True, forecasts=False),
        Op("forecast", updates=False),
        Op("update_forecast_", updates=True),
        Op("gated_sum", updates=False, sums=True, gated=True),
        Op("gated_sum, no gates", updates=False, sums=True),
        Op("gated_sum, update", updates=True, sums=True, gated=True),
        Op("gated_sum, no gates, update", updates=True, sums=True),
        Op("forecast, by feature", updates=False, by_feature=True),
        Op("gated_sum, by feature", updates=False, sums=True, gated=True, by_feature=True),
    )
}


def ops_at(order: int) -> list[Op]:
    """Return the ops that make sense: at order 0 a feature is its own history and nothing is updated."""
    return [op for op in OPS.values() if order > 0 or not op.updates]


def minimum_bytes(op: Op, size: Size, order: int, itemsize: int) -> int:
    """Count bytes if each input is read once and each output written once (hicache_kernels/README.md).

    Coefficients and the gap, a few numbers, are not counted.
    """
    rows = (order + 1) * size.features * size.numel * itemsize
    moved = 2 * rows if op.updates else rows
    if op.sums:
        moved += 2 * size.numel * itemsize  # base, hidden state
        moved += size.features * size.batch * size.channels * itemsize if op.gated else 0
    elif op.forecasts:
        moved += size.features * size.numel * itemsize
    return moved


def flop(op: Op, size: Size, order: int) -> int:
    """Count the additions, subtractions and multiplications of one call."""
    each = 2 * order if op.updates else 0
    each += 2 * order + 1 if op.forecasts else 0
    each += 1 + op.gated if op.sums else 0
    return each * size.features * size.numel


class Problem:
    """Tensors of one size, order and dtype, and the calls of every contestant on them, by op.

    Memory the ops must write is NaN at first, and so is nothing they read.
    """

    def __init__(self, size: Size, order: int, dtype: torch.dtype, device: str) -> None:
        self.size, self.order, self.dtype, self.device = size, order, dtype, device
        shape = (size.batch, size.tokens, size.channels)
        self.history = History([shape] * size.features, order, dtype, device)
        self.orders = self.history.orders
        _fill(self.orders)
        self.base = torch.randn(shape, device=device, dtype=torch.float32).to(dtype)
        self.gates = torch.randn(size.features, size.batch, size.channels, device=device).to(dtype)
        self.out = torch.full_like(self.base, float("nan"))
        self.row = torch.full_like(self.orders[0], float("nan"))
        self.weights = WEIGHTS[: order + 1]
        high = torch.float64 if dtype == torch.float64 else torch.float32
        self.coeffs = torch.tensor(self.weights, dtype=high, device=device)
        self.inv_gap = torch.tensor(1 / GAP, dtype=high, device=device)

    def record(self) -> None:
        """Write a new feature into the inbox, as a full step does: the last one with its sign turned.

        Without one between them, updates divide the highest difference by the gap again and again until it is
        subnormal, which a processor is many times slower at.
        """
        torch.neg(self.orders[0], out=self.orders[-1])

    def call(self, op: Op, backend: str) -> Call:
        """Return the call of an op on one of our backends."""
        coeffs = self.coeffs
        if op.by_feature:
            coeffs = coeffs[:, None].expand(-1, self.size.features).contiguous()
        if op.sums:
            return functools.partial(
                gated_sum,
                self.base,
                self.history.orders_by_feature(),
                self.gates if op.gated else None,
                coeffs,
                inv_gap=self.inv_gap if op.updates else None,
                filled=self.order if op.updates else 0,
                out=self.out,
                backend=backend,
            )
        if not op.updates:
            orders = self.history.orders_by_feature() if op.by_feature else self.orders
            row = self.row.view(orders.shape[1:])
            return functools.partial(forecast, orders, coeffs, out=row, backend=backend)
        if not op.forecasts:
            return functools.partial(update_, self.orders, self.inv_gap, self.order, backend=backend)
        return functools.partial(
            update_forecast_,
            self.orders,
            self.inv_gap,
            self.coeffs,
            self.order,
            out=self.row,
            backend=backend,
        )

    def _arguments(
        self, op: Op, orders: Tensor, base: Tensor, gates: Tensor, row: Tensor
    ) -> tuple[object, ...]:
        """What an eager form of the op takes."""
        rows = [self.history.split(one) for one in orders]
        if op.sums:
            listed = list(gates[:, :, None]) if op.gated else None  # [batch, 1, channels] each
            return base, rows, listed, self.weights, GAP if op.updates else None
        gap = (GAP,) if op.updates else ()
        return rows, *gap, *((self.weights, self.history.split(row)) if op.forecasts else ())

    def eager_calls(self, op: Op) -> dict[str, Call]:
        """Return the calls in eager torch and in torch's operators over lists; sums return their result."""
        arguments = self._arguments(op, self.orders, self.base, self.gates, self.row)
        return {name: functools.partial(forms[op.form], *arguments) for name, forms in eager.FORMS.items()}

    def product(self, op: Op) -> dict[str, Call]:
        """Return the op as one matrix product, where it is one; low precision would round coefficients."""
        if op.updates or op.gated or op.by_feature or self.dtype.itemsize < 4:
            return {}
        if not op.sums:
            return {"mm": functools.partial(eager.product_forecast, self.orders, self.coeffs[None], self.row)}
        rows = self.history.orders_by_feature().flatten(0, 1)[:, : self.size.numel]
        coeffs = self.coeffs.repeat_interleave(self.size.features)[None]
        return {"mm": functools.partial(eager.product_gated_sum, self.base, rows, coeffs)}

    def compiled(self, op: Op) -> dict[str, Call]:
        """Return ``torch.compile`` of the eager form over all features at once, for the two fused ops."""
        torch._dynamo.reset()  # one problem's graphs must not count against the next one's recompilations
        if op.sums:
            summed: Callable[..., object] = torch.compile(eager.whole_gated_sum, dynamic=False)
            size = self.size
            features = self.history.orders_by_feature()[:, :, : size.numel]
            features = features.unflatten(-1, (size.batch, size.tokens, size.channels))
            gates = self.gates[:, :, None] if op.gated else None
            gap = GAP if op.updates else None
            return {"compiled": functools.partial(summed, self.base, features, gates, self.weights, gap)}
        if op.updates and op.forecasts:
            fused: Callable[..., object] = torch.compile(eager.whole_update_forecast, dynamic=False)
            return {"compiled": functools.partial(fused, self.orders, GAP, self.weights, self.row)}
        return {}

    def eagerly(self, op: Op, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Return ``(orders, result)`` after the op in a dtype; the problem is not changed."""
        orders = self.orders.to(dtype, copy=True)
        row = torch.empty_like(orders[0])
        arguments = self._arguments(op, orders, self.base.to(dtype), self.gates.to(dtype), row)
        summed = eager.FORMS["eager"][op.form](*arguments)
        if op.sums:
            return orders, summed
        return orders, self.unpadded(row) if op.forecasts else None

    def unpadded(self, rows: Tensor) -> Tensor:
        """Return rows ``[..., numel]`` without the padding between slots, ``[..., features * numel]``."""
        slots: Tensor = rows.view(*rows.shape[:-1], self.size.features, -1)
        return slots[..., : self.size.numel].flatten(-2)


def _fill(tensor: Tensor) -> None:
    """Fill with normal numbers: a block, repeated, as drawing thousands of millions takes too long."""
    block = torch.randn(min(tensor.numel(), 1_000_003), device=tensor.device)  # a prime: rows differ
    for chunk in tensor.view(-1).split(block.numel()):
        chunk.copy_(block[: chunk.numel()])


def copy_call(num_bytes: int, dtype: torch.dtype, device: str) -> Call:
    """Return a plain copy that moves ``num_bytes``: half are read, half are written."""
    count = max(1, num_bytes // 2 // dtype.itemsize)
    source = torch.ones(count, dtype=dtype, device=device)
    target = torch.zeros_like(source)  # touched: the first write of fresh memory is not what is measured
    return functools.partial(target.copy_, source)


def peak_bytes(op: Op, size: Size, order: int, itemsize: int, contestant: str) -> int:
    """Estimate the bytes that timing a contestant takes: its tensors, its temporaries and the copy's."""
    row = size.features * size.numel * itemsize
    kept = (order + 2) * row + 4 * size.numel * itemsize + minimum_bytes(op, size, order, itemsize)
    temporary = {"eager": row // size.features, "foreach": row, "compiled": row}.get(contestant, 0)
    return kept + (order + 3) * temporary


def usable_backends(device: str, dtype: torch.dtype, num_orders: int) -> Sequence[str]:
    """Name our backends that can take such a history here."""
    where = torch.device(device)
    return [
        name
        for name, module in BACKENDS.items()
        if (module.unavailable(where) or module.unsupported((dtype,), num_orders)) is None
    ]
