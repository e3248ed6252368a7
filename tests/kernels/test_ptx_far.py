"""Kernels where addresses, rows and blocks are more than 32 or 16 bits count, with little memory.

Address space is reserved, of which only pages that are touched take memory; of a grid of a million blocks the
first and the last run.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import pytest
import torch
from ptx.memory import Allocation, Global
from ptx.on_native import Card
from ptx.tensors import allocation
from torch import Tensor

from hicache_kernels.backends import native, reference

NORESERVE = 0x4000  # Linux's MAP_NORESERVE; mmap names it since Python 3.13
BF16 = torch.bfloat16


def reserved(numel: int) -> Tensor:
    """So many bf16 numbers of address space, all zero."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    try:
        memory = mmap.mmap(-1, 2 * numel, flags=flags)
    except OSError as error:
        pytest.skip(f"no {2 * numel} bytes of address space: {error}")
    return torch.frombuffer(memory, dtype=BF16)


def first_and_last(blocks: int) -> Sequence[int]:
    return sorted({0, *range(max(blocks - 8, 0), blocks)})


@pytest.fixture(params=["triton", "native"])
def execute(request):
    """Call an op of a backend on memory: how many blocks it launched, of which the first and last ran."""

    def by_triton(op: str, memory: list[Allocation], *arguments: object) -> int:
        from hicache_kernels.backends import triton as backend

        with request.getfixturevalue("triton_card")(90, Global(memory), only=first_and_last) as driver:
            getattr(backend, op)(*arguments)
        [grid] = driver.launches
        return math.prod(grid)

    def by_native(op: str, memory: list[Allocation], *arguments: object) -> int:
        _, machine, library = request.getfixturevalue("host_native")
        request.getfixturevalue("native_place")(10**8)  # a card that holds all blocks at a time
        card = Card(library, request.getfixturevalue("extension"), only=first_and_last)
        with card.holding(machine, Global(memory)):
            getattr(native, op)(*arguments)
        [(_, blocks)] = card.launches
        return blocks

    return {"triton": by_triton, "native": by_native}[request.param]


# In elements: an order times a stride that fits 32 bits does not; a stride that does not fit.
STRIDES = [2**30 + 64, 2**32 + 64]


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("op", ["update_", "forecast", "update_forecast_"])
def test_orders_far_apart(execute, op, stride):
    orders = reserved(2 * stride + 1000).as_strided((3, 1000), (stride, 1))
    orders.copy_(torch.randn(3, 1000))
    expected, out, row = orders.contiguous(), torch.zeros(1000, dtype=BF16), torch.zeros(1000, dtype=BF16)
    gap, coeffs = torch.tensor(0.3), torch.randn(3)
    arguments = {"update_": (gap, 2), "forecast": (coeffs,), "update_forecast_": (gap, coeffs, 2)}[op]
    results = {"update_": ((), ())}.get(op, ((out,), (row,)))
    memory = [allocation(f"orders[{k}]", orders[k], writable="update" in op) for k in range(3)]
    memory += [allocation("gap", gap), allocation("coeffs", coeffs), allocation("out", out, False, True)]
    execute(op, memory, orders, *arguments, *results[0])
    getattr(reference, op)(expected, *arguments, *results[1])
    assert torch.equal(orders, expected)
    assert torch.equal(out, row)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("pending", [False, True], ids=["settled", "pending"])
def test_features_far_apart(execute, pending, stride):
    base, gates = torch.randn(1, 5, 48).to(BF16), torch.randn(3, 1, 48).to(BF16)
    orders = reserved(6 * stride).as_strided((2, 3, 240), (3 * stride, stride, 1))
    orders.copy_(torch.randn(2, 3, 240))
    expected, out, row = orders.contiguous(), torch.zeros_like(base), torch.zeros_like(base)
    gap, coeffs = torch.tensor(0.3), torch.randn(2)
    memory = [
        allocation(f"orders[{k}, {i}]", orders[k, i], writable=pending) for k in range(2) for i in range(3)
    ]
    memory += [allocation("base", base), allocation("gates", gates), allocation("coeffs", coeffs)]
    memory += [allocation("gap", gap), allocation("out", out, False, True)]
    due = gap if pending else None
    execute("gated_sum", memory, base, orders, gates, coeffs, due, 1, out)
    reference.gated_sum(base, expected, gates, coeffs, due, 1, row)
    assert torch.equal(orders, expected)
    assert torch.equal(out, row)


@pytest.mark.parametrize("gated", [False, True], ids=["ungated", "gated"])
def test_more_numbers_than_32_bits_count(execute, gated):
    """The last rows of a base of 2³¹ numbers and more, in more blocks than a grid's second axis has."""
    rows, channels = 2**20 + 5, 2048
    ends = (slice(0, 40), slice(rows - 40, rows))  # all that the blocks that run may touch
    base, history, out = (reserved(rows * channels).view(1, rows, channels) for _ in range(3))
    gates, coeffs = torch.randn(1, 1, channels).to(BF16), torch.randn(1)
    memory = [allocation("gates", gates), allocation("coeffs", coeffs)]
    gates = gates if gated else None
    for end in ends:
        for name, tensor in (("base", base), ("history", history), ("out", out)):
            if name != "out":
                tensor[:, end] = torch.randn(1, 40, channels).to(BF16)
            memory.append(allocation(f"{name}[{end}]", tensor[:, end], writable=name == "out"))
    orders = history.view(1, 1, rows * channels)
    blocks = execute("gated_sum", memory, base, orders, gates, coeffs, None, 0, out)
    assert blocks > 65_535
    last, row = ends[1], torch.zeros(1, 1, channels, dtype=BF16)
    reference.gated_sum(base[:, -1:], history[:, -1:].reshape(1, 1, -1), gates, coeffs, None, 0, row)
    assert torch.equal(out[:, -1:], row)
    assert not out[:, last.start : last.start + 2].any()  # blocks that did not run
