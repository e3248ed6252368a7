"""Calls of the ops on memory of which every byte has a meaning, for launches executed without a card."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from ptx.memory import Allocation, Global
from ptx.tensors import allocation
from torch import Tensor

from hicache_kernels.backends import reference
from hicache_kernels.history import ALIGNMENT

SPECIAL = (
    0.0,
    -0.0,
    1e-45,
    -1e-40,
    6e-8,
    65504.0,
    -65520.0,
    3.3e38,
    float("inf"),
    float("-inf"),
    float("nan"),
)


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Args:
        kept: dtype of the history; ``base`` that of what a gated sum is added to.
        used: orders that take part; of a history of ``num_orders``.
        shape: of a feature: ``[numel]``, or ``[batch, rows, channels]`` for a gated sum.
        pending: of a gated sum: an update is due.
        offset: where tensors begin, in elements behind an address that is aligned.
        padding: elements between a row or slot and the next, beyond those that keep it aligned.
        scalars: dtype of coefficients and gap.
        by_feature: every feature has coefficients of its own.
    """

    op: str
    kept: torch.dtype
    shape: tuple[int, ...]
    base: torch.dtype | None = None
    num_orders: int = 3
    used: int = 3
    num_features: int = 3
    gated: bool = True
    pending: bool = False
    in_place: bool = False
    offset: int = 0
    padding: int = 0
    scalars: torch.dtype = torch.float32
    special: bool = False
    by_feature: bool = False

    def __str__(self) -> str:
        """For a test's id."""
        dtypes = [str(d).removeprefix("torch.") for d in (self.kept, self.base) if d is not None]
        flags = [name for name in ("gated", "pending", "in_place", "special") if getattr(self, name)]
        flags = flags if self.op == "gated_sum" else []
        flags += ["by_feature"] * self.by_feature
        orders = f"{self.used}of{self.num_orders}"
        return "-".join(
            [self.op, *dtypes, "x".join(map(str, self.shape)), orders, *flags, f"at{self.offset}"]
        )


class Call:
    """The tensors of a case, the same numbers each time, and what of them a kernel may touch: ``memory``."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(1)
        self.case = case
        self.everything: list[Tensor] = []  # and what lies around, which nobody may touch
        self._allowed: list[Allocation] = []
        self.updating = case.pending or case.op in ("update_", "update_forecast_")
        self.orders = self._history()
        self.coeffs = self._tensor((case.used, case.num_features)[: 1 + case.by_feature], case.scalars)
        self.gap = torch.tensor(1 / 3, dtype=case.scalars)
        self.base = self.gates = self.out = None
        if self.updating:
            self._allowed.append(allocation("inv_gap", self.gap))
        if case.op != "update_":
            self._allowed.append(allocation("coeffs", self.coeffs))
            self._results()

    def run(self, backend: object) -> None:
        """Call the op of a backend."""
        op: Callable[..., None] = getattr(backend, self.case.op)
        differences = self.case.used - 1
        arguments = {
            "update_": (self.orders, self.gap, differences),
            "forecast": (self.orders, self.coeffs, self.out),
            "update_forecast_": (self.orders, self.gap, self.coeffs, differences, self.out),
            "gated_sum": (
                self.base, self.orders, self.gates, self.coeffs, self.gap if self.updating else None,
                differences, self.out,
            ),
        }  # fmt: skip
        op(*arguments[self.case.op])

    @property
    def memory(self) -> Global:
        """What a kernel may read and write, and no byte more."""
        return Global(self._allowed)

    def _history(self) -> Tensor:
        """``[K, numel]``, or ``[K, num_features, slot]``.

        Rows that are read hold something, those an update writes are writable, and others are not there.
        """
        case = self.case
        numel, features = math.prod(case.shape), case.num_features if case.op == "gated_sum" else 1
        line = ALIGNMENT // case.kept.itemsize
        slot = -(-numel // line) * line + case.padding
        top, differences = case.num_orders - 1, case.used - 1
        slots = self._tensor((case.num_orders, features, slot), case.kept, case.offset)
        for k in range(case.num_orders):
            holds = k <= differences if not self.updating else k < differences or k == top
            writable = self.updating and k <= differences
            for feature, place in enumerate(slots[k]):
                if holds or writable:
                    row = place[:numel]
                    self._allowed.append(allocation(f"orders[{k}, {feature}]", row, holds, writable))
                if not holds:
                    place.fill_(float("nan"))
        if case.op == "gated_sum":
            return slots
        row = slots[:, 0, :numel]
        return row.unflatten(1, (case.num_features, -1)) if case.by_feature else row

    def _results(self) -> None:
        case = self.case
        dtype = case.base or case.kept
        self.out = self._tensor(case.shape, dtype, case.offset)
        if case.by_feature and case.op != "gated_sum":
            self.out = self.out.unflatten(0, (case.num_features, -1))
        if case.op == "gated_sum":
            self.base = self.out
            if not case.in_place:
                self.base = self._tensor(case.shape, dtype, case.offset)
                self._allowed.append(allocation("base", self.base))
            if case.gated:
                batch, _, channels = case.shape
                self.gates = self._tensor((case.num_features, batch, channels), dtype, case.offset)
                self._allowed.append(allocation("gates", self.gates))
        if not case.in_place:
            self.out.fill_(float("nan"))
        self._allowed.append(allocation("out", self.out, holds=case.in_place, writable=True))

    def _tensor(self, shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> Tensor:
        """Random numbers ``offset`` elements behind a multiple of 128 bytes, amid nan."""
        numel, line = math.prod(shape), ALIGNMENT // dtype.itemsize
        memory = torch.full((numel + offset + 2 * line,), float("nan"), dtype=dtype)
        aligned = memory[-(memory.data_ptr() // dtype.itemsize) % line :][: numel + offset + line]
        self.everything.append(aligned)
        tensor = aligned[offset : offset + numel].copy_(torch.randn(numel, dtype=torch.float64))
        if self.case.special:
            tensor[:: len(SPECIAL) - 1] = torch.tensor(SPECIAL).repeat(numel)[
                : len(tensor[:: len(SPECIAL) - 1])
            ]
        return tensor.view(shape)


def assert_reference_bits(ours: Call) -> None:
    """What a call did to all memory is what the reference does, bit for bit; every nan is alike."""
    expected = Call(ours.case)
    expected.run(reference)
    for a, b in zip(ours.everything, expected.everything, strict=True):
        whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
        same = (a.view(whole) == b.view(whole)) | (a.isnan() & b.isnan())
        assert same.all(), f"{ours.case}: {int((~same).sum())} of {same.numel()} numbers differ"
