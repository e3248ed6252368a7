"""Every backend there is on a GPU, against the reference on the CPU, bit for bit.

A backend that cannot run there is skipped by itself, with its reason: without nvcc, Triton is tested still.
"""

from __future__ import annotations

import pytest
import torch

from hicache_kernels import (
    BACKENDS,
    History,
    backend_status,
    forecast,
    gated_sum,
    tiles,
    update_,
    update_forecast_,
)
from hicache_kernels.backends import native
from hicache_kernels.tiles import Tile, key

DEVICE = "cuda"
STATUS = (
    backend_status(DEVICE)
    if torch.cuda.is_available()
    else dict.fromkeys(BACKENDS, "needs a CUDA device, and torch sees none")
)
pytestmark = pytest.mark.gpu
backends = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}"))
        for name, reason in STATUS.items()
        if name != "reference"
    ],
)

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
FILLED = [(num_orders, filled) for num_orders in range(1, 6) for filled in range(num_orders)]
PADDING = 16  # of a row: its stride is a multiple of 16 where its length is, so that accesses are wide
# (numbers, numbers before the first): whole packs, a tail, a start no 16-byte access fits, many a thread
LAYOUTS = [(0, 0), (1, 0), (48, 0), (1001, 0), (1000, 3), (1 << 22, 0), ((1 << 20) + 5, 1)]


def same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def skip_unsupported(backend: str, num_orders: int, *dtypes: torch.dtype) -> None:
    """Skip what a backend says it does not take; that it refuses it is tested in test_ops.py."""
    reason = BACKENDS[backend].unsupported(dtypes, num_orders)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def rows(num_orders: int, numel: int, offset: int, dtype: torch.dtype) -> torch.Tensor:
    """Random ``[K, numel]`` on the CPU, ``offset`` numbers into each row of something longer."""
    whole = torch.randn(num_orders, numel + PADDING, dtype=torch.float32).to(dtype)
    return whole[:, offset : offset + numel]


def on_device(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy at the same offset into rows of the same length."""
    shape = tensor.shape[0], tensor.shape[1] + PADDING
    whole = torch.full(shape, float("nan"), dtype=tensor.dtype, device=DEVICE)
    return whole[:, offset : offset + tensor.shape[1]].copy_(tensor)


@backends
@dtypes
@pytest.mark.parametrize(("num_orders", "filled"), FILLED)
def test_cascades(backend, dtype, num_orders, filled):
    skip_unsupported(backend, num_orders, dtype)
    inv_gap, weights = torch.tensor(1 / 3, dtype=torch.float64), torch.randn(filled + 1)
    there = inv_gap.to(DEVICE), weights.to(DEVICE)
    for numel, offset in LAYOUTS:
        expected = rows(num_orders, numel, offset, dtype)
        expected[filled : num_orders - 1] = float("nan")  # they do not exist yet
        updated, both = on_device(expected, offset), on_device(expected, offset)
        row = update_forecast_(expected, inv_gap, weights, filled, backend="reference")
        update_(updated, there[0], filled, backend=backend)
        same(updated, expected)
        same(update_forecast_(both, *there, filled, backend=backend), row)
        same(both, expected)
        row = forecast(expected, weights, backend="reference")
        same(forecast(both, there[1], backend=backend), row)


# Tiles of one row: the test below has more of them than any grid axis but the first may be long.
ONE_ROW = Tile(rows=1, columns=16, num_warps=1)
ONE_ROW_TABLE = {key(op, 2, 4, 2): ONE_ROW for op in ("gated_sum", "gated_sum_update_")}
SHAPES = [(1, 1, 1, 1), (2, 37, 31, 3), (2, 37, 48, 2), (1, 1030, 512, 4)]  # batch, rows, channels, features


@backends
@pairs
@pytest.mark.parametrize("pending", [False, True], ids=["settled", "pending"])
@pytest.mark.parametrize("gated", [False, True], ids=["ungated", "gated"])
@pytest.mark.parametrize("used", [1, 2, 3, 4, 5])
def test_gated_sum(backend, kept, base, used, gated, pending):
    num_orders = min(used + 1, 5)
    skip_unsupported(backend, num_orders, kept, base)
    weights = torch.randn(used)
    for batch, length, channels, features in SHAPES:
        hidden = torch.randn(batch, length, channels).to(base)
        gates = torch.randn(features, batch, channels).to(base) if gated else None
        orders = torch.randn(num_orders, features, hidden.numel() + PADDING).to(kept)
        there = [None if x is None else x.to(DEVICE, copy=True) for x in (hidden, orders, gates, weights)]
        more = {"inv_gap": torch.tensor(0.2), "filled": used - 1} if pending else {}
        expected = gated_sum(hidden, orders, gates, weights, backend="reference", **more)
        if pending:
            more["inv_gap"] = more["inv_gap"].to(DEVICE)
        same(gated_sum(*there, backend=backend, **more), expected)
        same(there[1], orders)


@backends
@pairs
@pytest.mark.parametrize("used", [1, 3, 5])
def test_rows_of_coefficients_by_feature(backend, kept, base, used):
    num_orders = min(used + 1, 5)
    skip_unsupported(backend, num_orders, kept, base)
    for batch, length, channels, features in SHAPES:
        hidden = torch.randn(batch, length, channels).to(base)
        gates = torch.randn(features, batch, channels).to(base)
        orders = torch.randn(num_orders, features, hidden.numel()).to(kept)
        weights, inv_gap = torch.randn(used, features), torch.tensor(0.2)
        there = [x.to(DEVICE, copy=True) for x in (hidden, orders, gates, weights)]
        expected = gated_sum(hidden, orders, gates, weights, backend="reference")
        same(gated_sum(*there, backend=backend), expected)
        same(forecast(there[1], there[3], backend=backend), forecast(orders, weights, backend="reference"))
        row = update_forecast_(orders, inv_gap, weights, used - 1, backend="reference")
        same(update_forecast_(there[1], inv_gap.to(DEVICE), there[3], used - 1, backend=backend), row)
        same(there[1], orders)


@backends
@pytest.mark.parametrize("pending", [False, True], ids=["settled", "pending"])
def test_more_rows_than_a_grid_has_blocks_on_its_other_axes(backend, pending):
    """65,535 there; a video has more tiles of rows."""
    batch, length, channels = 2, 2 * 65_536 + 3, 16
    hidden, gates = torch.randn(batch, length, channels), torch.randn(2, batch, channels)
    orders, weights = torch.randn(2, 2, hidden.numel()), torch.randn(2)
    there = [x.to(DEVICE, copy=True) for x in (hidden, orders, gates, weights)]
    more = {"inv_gap": torch.tensor(0.2), "filled": 1} if pending else {}
    expected = gated_sum(hidden, orders, gates, weights, backend="reference", **more)
    if pending:
        more["inv_gap"] = more["inv_gap"].to(DEVICE)
    with tiles.override(ONE_ROW_TABLE):
        same(gated_sum(*there, backend=backend, **more), expected)
    same(there[1], orders)


@backends
@dtypes
def test_special_values(backend, dtype):
    skip_unsupported(backend, 1, dtype)
    info = torch.finfo(dtype)
    values = [0.0, -0.0, info.tiny, info.tiny / 4, info.max, -info.max, float("inf"), float("nan"), 1 / 3]
    orders = torch.tensor([values * 8], dtype=dtype)
    there = orders.to(DEVICE)
    same(forecast(there, torch.ones(1, device=DEVICE), backend=backend), orders[0])
    same(forecast(there, torch.tensor([0.5], device=DEVICE), backend=backend), orders[0] * 0.5)


@pytest.fixture
def launches(backend, monkeypatch):
    """A function that tells how many kernels the backend has launched so far."""
    if backend == "native":
        return native.launches
    if backend != "triton":
        pytest.fail(f"{backend}: say here how its launches are counted")
    from triton.runtime import JITFunction

    count, run = [0], JITFunction.run

    def counted(*args, **kwargs):
        count[0] += 1
        return run(*args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", counted)
    return lambda: count[0]


@backends
def test_one_launch_for_all_tensors(backend, launches):
    history = History([(64, 48), (7,), (33, 5)], order=2, device=DEVICE, dtype=torch.bfloat16)
    history.orders.normal_()
    gap, weights = torch.ones((), device=DEVICE), torch.ones(3, device=DEVICE)
    before = launches()
    update_forecast_(history.orders, gap, weights, 2, backend=backend)
    assert launches() - before == 1


@backends
def test_a_captured_step_replays_with_new_coefficients(backend):
    hidden, gates = torch.randn(1, 64, 48), torch.randn(3, 1, 48)
    orders, weights = torch.randn(3, 3, hidden.numel()), torch.randn(3)
    there = [x.to(DEVICE) for x in (hidden, orders, gates, weights)]
    out = torch.empty_like(there[0])
    gated_sum(*there, out=out, backend=backend)  # the first launch compiles or loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gated_sum(*there, out=out, backend=backend)
    for _ in range(3):
        weights = torch.randn(3)
        there[3].copy_(weights)
        graph.replay()
        same(out, gated_sum(hidden, orders, gates, weights, backend="reference"))


@backends
def test_runs_on_the_current_stream(backend):
    """The op waits for what its own stream does before it, which takes far longer than a launch."""
    orders, weights = torch.zeros(1, 1 << 20, device=DEVICE), torch.ones(1, device=DEVICE)
    forecast(orders, weights, backend=backend)  # the first launch compiles or loads the kernel
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        orders.fill_(2.0)
        row = forecast(orders, weights, backend=backend)
    stream.synchronize()
    assert (row == 2).all()


@backends
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_a_device_that_is_not_current(backend):
    orders, weights = torch.randn(3, 1024), torch.randn(3)
    with torch.cuda.device(0):
        same(
            forecast(orders.to("cuda:1"), weights.to("cuda:1"), backend=backend),
            forecast(orders, weights, backend="reference"),
        )
        assert torch.cuda.current_device() == 0
