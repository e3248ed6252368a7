"""The CUDA kernels and their launcher, run by the host: every index, table and address, on no GPU.

csrc/cuda_kernels.cu and csrc/cuda.cpp are compiled by the host compiler against ``cuda_on_host/``, where a
launch runs the threads of its grid one after the other. What Python calls is the extension's own bindings.
Not covered: what nvcc makes of the same source (tests/kernels/test_cuda_build.py reads that), and time.
"""

from __future__ import annotations

import pytest
import torch

from hicache_kernels import forecast, gated_sum, update_, update_forecast_
from hicache_kernels.backends import native

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PAIRS = [
    *((dtype, dtype) for dtype in DTYPES),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
pairs = pytest.mark.parametrize(
    ("kept", "base"), PAIRS, ids=["-".join(str(d).removeprefix("torch.") for d in pair) for pair in PAIRS]
)


@pytest.fixture
def machine(host_native, monkeypatch):
    """What ``native`` runs on: device n has n multiprocessors. Every access must be aligned."""
    module, machine, _ = host_native
    machine.reset()
    monkeypatch.setattr(native, "_native", module)
    monkeypatch.setattr(native, "_MISSING", None)
    yield machine
    assert machine.misaligned == 0


@pytest.fixture
def use(monkeypatch):
    """Choose the device, and the stream, of the ops to come."""

    def choose(device: int, stream: int = 0) -> None:
        monkeypatch.setattr(native, "_place", lambda orders: ("cuda_", (device, stream)))

    choose(1)
    return choose


def numbers(*shape: int, dtype: torch.dtype, offset: int = 0, stride: int | None = None) -> torch.Tensor:
    """Random ``[K, n]`` rows ``stride`` apart, ``offset`` numbers into memory aligned to 64 bytes."""
    rows, width = shape
    stride = width if stride is None else stride
    memory = torch.full((offset + rows * stride + 64,), float("nan"), dtype=dtype)
    offset += -(memory.data_ptr() // dtype.itemsize) % (64 // dtype.itemsize)
    tensor = memory.as_strided((rows, width), (stride, 1), offset)
    return tensor.copy_(torch.randn(rows, width, dtype=torch.float64) * 2)


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """All the memory under a tensor, so that a store anywhere else shows."""
    flat = torch.empty(0, dtype=tensor.dtype)
    return flat.set_(tensor.untyped_storage(), 0, (tensor.untyped_storage().nbytes() // tensor.itemsize,))


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor in a copy of all of its memory."""
    whole = memory_of(tensor).clone()
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


# (numel, offset, row stride): aligned and wide, a tail, a start or a stride that no 16-byte access fits
LAYOUTS = [
    (0, 0, 0), (1, 0, 1), (8, 0, 8), (8, 0, 9), (16, 1, 16), (48, 0, 64), (1000, 0, 1000), (1001, 0, 1008),
    (6152, 0, 6160), (6152, 8, 6152), (6152, 3, 6152),
]  # fmt: skip


@pytest.mark.few(40)
@dtypes
@pytest.mark.parametrize("backward", [0, 1], ids=["forward", "backward"])
@pytest.mark.parametrize(("num_orders", "filled"), [(k, f) for k in range(1, 6) for f in range(k)])
def test_cascades_give_the_reference_s_bits(machine, use, dtype, num_orders, filled, backward):
    machine.backward = backward
    inv_gap, weights = torch.tensor(1 / 3, dtype=torch.float64), torch.randn(filled + 1)
    for numel, offset, stride in LAYOUTS:
        for device in (1, 1000):  # each thread does many things, or one at most
            use(device)
            orders = numbers(num_orders, numel, dtype=dtype, offset=offset, stride=stride)
            orders[filled : num_orders - 1] = float("nan")  # they do not exist yet
            expected, updated, both = copied(orders), copied(orders), copied(orders)
            row = update_forecast_(expected, inv_gap, weights, filled, backend="reference")
            update_(updated, inv_gap, filled, backend="native")
            same(memory_of(updated), memory_of(expected))
            out = numbers(1, numel, dtype=dtype, offset=offset)[0]
            update_forecast_(both, inv_gap, weights, filled, out=out, backend="native")
            same(memory_of(both), memory_of(expected))
            same(out, row)
            assert memory_of(out).isnan().sum() == memory_of(out).numel() - numel
            row = forecast(expected, weights, backend="reference")
            same(forecast(both, weights, backend="native"), row)
            same(memory_of(both), memory_of(expected))


# (batch, rows, channels, slot padding, offset)
HIDDEN = [
    (1, 0, 16, 0, 0), (1, 1, 1, 0, 0), (1, 1, 8, 0, 0), (2, 3, 16, 16, 0), (3, 5, 24, 8, 0), (2, 4, 64, 3, 0),
    (1, 37, 31, 0, 0), (2, 7, 48, 0, 1), (1, 18, 264, 0, 0), (1, 1, 5000, 0, 0), (2, 9, 130, 6, 2),
]  # fmt: skip


@pytest.mark.few(60)
@pairs
@pytest.mark.parametrize("pending", [False, True], ids=["settled", "pending"])
@pytest.mark.parametrize("gated", [False, True], ids=["ungated", "gated"])
@pytest.mark.parametrize("used", [1, 2, 3, 4, 5])
def test_gated_sum_gives_the_reference_s_bits(machine, use, kept, base, used, gated, pending):
    num_orders = min(used + 1, 5)
    weights, inv_gap = torch.randn(used, dtype=torch.float64), torch.tensor(0.2)
    more = {"inv_gap": inv_gap, "filled": used - 1} if pending else {}
    for index, (batch, rows, channels, padding, offset) in enumerate(HIDDEN):
        num_features = 1 + index % 3
        slot = batch * rows * channels
        hidden = numbers(1, slot, dtype=base, offset=offset).view(batch, rows, channels)
        gates = None
        if gated:
            gates = numbers(1, num_features * batch * channels, dtype=base).view(
                num_features, batch, channels
            )
        flat = numbers(num_orders, num_features * (slot + padding), dtype=kept, offset=offset)
        orders = flat.view(num_orders, num_features, slot + padding)
        if pending:
            orders[used - 1 : num_orders - 1] = float("nan")
        expected = copied(orders)
        result = gated_sum(hidden, expected, gates, weights, backend="reference", **more)
        for device, machine.backward in ((1, 0), (1000, 1)):
            use(device)
            ours, in_place = copied(orders), copied(hidden)
            same(gated_sum(hidden, ours, gates, weights, backend="native", **more), result)
            same(memory_of(ours), memory_of(expected))
            gated_sum(in_place, copied(orders), gates, weights, out=in_place, backend="native", **more)
            same(in_place, result)
            assert (memory_of(in_place).isnan() == memory_of(hidden).isnan()).all()


@dtypes
def test_wide_where_it_can_be(machine, use, dtype):
    """How many threads have work tells how many numbers each takes at a time."""
    use(1000)
    pack = 16 // dtype.itemsize
    numel = 256 * 16 * pack

    def blocks(orders: torch.Tensor) -> int:
        update_(orders, torch.ones(()), 2, backend="native")
        return machine.blocks

    assert blocks(numbers(3, numel, dtype=dtype)) == 16
    assert blocks(numbers(3, numel, dtype=dtype, stride=numel + pack)) == 16
    assert blocks(numbers(3, numel, dtype=dtype, offset=1)) == 16 * pack
    assert blocks(numbers(3, numel, dtype=dtype, stride=numel + 1)) == 16 * pack
    assert blocks(numbers(3, numel + 1, dtype=dtype, stride=numel + pack)) == 16 * pack + 1


def test_one_launch_for_all_tensors_on_the_stream_and_device_asked_for(machine, use):
    use(3, stream=77)
    machine.device = 1
    orders, weights, gap = torch.randn(3, 4, 64), torch.ones(3), torch.ones(())
    hidden, gates = torch.randn(2, 2, 16), torch.randn(4, 2, 16)
    calls = [
        lambda: update_(orders, gap, 2, backend="native"),
        lambda: forecast(orders, weights, backend="native"),
        lambda: update_forecast_(orders, gap, weights, 2, backend="native"),
        lambda: gated_sum(hidden, orders, gates, weights, backend="native"),
        lambda: gated_sum(hidden, orders, None, weights, inv_gap=gap, filled=2, backend="native"),
    ]
    for count, call in enumerate(calls, start=1):
        before = native.launches()
        call()
        assert native.launches() - before == 1
        assert machine.launches == count
        assert (machine.launched_on, machine.stream, machine.device) == (3, 77, 1)
    update_(torch.empty(3, 0), gap, 2, backend="native")
    assert machine.launches == len(calls)


def test_the_grid_is_what_the_device_holds_and_asked_for_once(machine, use):
    use(7)
    machine.blocks_a_processor = 2
    orders = torch.randn(1, 256 * 4 * 100)
    for _ in range(3):
        update_(orders, torch.ones(()), 0, backend="native")
        assert machine.blocks == 14
    assert machine.occupancy_asked == 1
    assert machine.launches == 3


CALLS = (
    "cudaGetDevice",
    "cudaSetDevice",
    "cudaDeviceGetAttribute",
    "cudaOccupancyMaxActiveBlocksPerMultiprocessor",
    "cudaLaunchKernel",
)


@pytest.mark.parametrize("call", CALLS)
def test_an_error_names_op_call_and_reason_and_leaves_the_device(machine, use, call):
    use(100 + CALLS.index(call))  # a device nothing is known of yet
    machine.device = 1
    orders = torch.randn(3, 64)
    before, launches = orders.clone(), native.launches()
    machine.fails = call.encode()
    with pytest.raises(RuntimeError, match=rf"^update_: {call} failed: cudaErrorFake \(as asked\)$"):
        update_(orders, torch.ones(()), 2, backend="native")
    machine.fails = b""
    assert torch.equal(orders, before)
    assert native.launches() == launches
    assert machine.errors_cleared == 1
    assert machine.device == 1
    update_(orders, torch.ones(()), 2, backend="native")
    assert machine.launches == 1


@dtypes
def test_special_values(machine, use, dtype):
    info = torch.finfo(dtype)
    values = [0.0, -0.0, info.tiny, info.tiny / 4, info.max, -info.max, float("inf"), float("nan"), 1 / 3]
    orders = torch.tensor([values * 8], dtype=dtype)
    same(forecast(orders, torch.ones(1), backend="native"), orders[0])
    same(forecast(orders, torch.tensor([0.5]), backend="native"), orders[0] * 0.5)


@pytest.mark.parametrize("given", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_coefficients_of_any_dtype_and_stride(machine, use, given):
    orders = torch.randn(3, 64)
    weights = torch.randn(6).to(given)[::2]
    ours, expected = orders.clone(), orders.clone()
    gap = torch.tensor([0.3]).to(given)
    row = update_forecast_(ours, gap, weights, 2, backend="native")
    same(row, update_forecast_(expected, gap, weights, 2, backend="reference"))
    same(ours, expected)
    same(
        forecast(ours, weights[:1].expand(3), backend="native"),
        forecast(ours, weights[:1].expand(3), backend="reference"),
    )
