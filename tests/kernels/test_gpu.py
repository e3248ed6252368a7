"""The native CUDA kernels on a GPU, against the reference on the CPU, bit for bit."""

from __future__ import annotations

import pytest
import torch

from hicache_kernels import History, backend_status, forecast, gated_sum, update_, update_forecast_
from hicache_kernels.backends import native

WHY_NOT = (
    backend_status("cuda")["native"]
    if torch.cuda.is_available()
    else "needs a CUDA device, and torch sees none"
)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]

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
# (numbers, numbers before the first): whole packs, a tail, a start no 16-byte access fits, many a thread
LAYOUTS = [(0, 0), (1, 0), (48, 0), (1001, 0), (1000, 3), (1 << 22, 0), ((1 << 20) + 5, 1)]


def same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def rows(num_orders: int, numel: int, offset: int, dtype: torch.dtype) -> torch.Tensor:
    """Random ``[K, numel]`` on the CPU, ``offset`` numbers into each row of something longer."""
    return torch.randn(num_orders, numel + 8, dtype=torch.float32).to(dtype)[:, offset : offset + numel]


def on_gpu(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy at the same offset into rows of the same length."""
    whole = torch.full(
        (tensor.shape[0], tensor.shape[1] + 8), float("nan"), dtype=tensor.dtype, device="cuda"
    )
    part = whole[:, offset : offset + tensor.shape[1]]
    return part.copy_(tensor)


@dtypes
@pytest.mark.parametrize(("num_orders", "filled"), FILLED)
def test_cascades(dtype, num_orders, filled):
    inv_gap, weights = torch.tensor(1 / 3, dtype=torch.float64), torch.randn(filled + 1)
    for numel, offset in LAYOUTS:
        expected = rows(num_orders, numel, offset, dtype)
        expected[filled : num_orders - 1] = float("nan")  # they do not exist yet
        updated, both = on_gpu(expected, offset), on_gpu(expected, offset)
        row = update_forecast_(expected, inv_gap, weights, filled, backend="reference")
        update_(updated, inv_gap.cuda(), filled, backend="native")
        same(updated, expected)
        same(update_forecast_(both, inv_gap.cuda(), weights.cuda(), filled, backend="native"), row)
        same(both, expected)
        row = forecast(expected, weights, backend="reference")
        same(forecast(both, weights.cuda(), backend="native"), row)


@pairs
@pytest.mark.parametrize("pending", [False, True], ids=["settled", "pending"])
@pytest.mark.parametrize("gated", [False, True], ids=["ungated", "gated"])
@pytest.mark.parametrize("used", [1, 2, 3, 4, 5])
def test_gated_sum(kept, base, used, gated, pending):
    num_orders = min(used + 1, 5)
    weights = torch.randn(used)
    for batch, length, channels, terms in ((1, 1, 1, 1), (2, 37, 31, 3), (2, 37, 48, 2), (1, 1030, 512, 4)):
        hidden = torch.randn(batch, length, channels).to(base)
        gates = torch.randn(terms, batch, channels).to(base) if gated else None
        orders = torch.randn(num_orders, terms, hidden.numel() + 8).to(kept)
        ours = orders.cuda()
        more = {"inv_gap": torch.tensor(0.2), "filled": used - 1} if pending else {}
        expected = gated_sum(hidden, orders, gates, weights, backend="reference", **more)
        if pending:
            more["inv_gap"] = more["inv_gap"].cuda()
        there = None if gates is None else gates.cuda()
        same(gated_sum(hidden.cuda(), ours, there, weights.cuda(), backend="native", **more), expected)
        same(ours, orders)


@dtypes
def test_special_values(dtype):
    info = torch.finfo(dtype)
    values = [0.0, -0.0, info.tiny, info.tiny / 4, info.max, -info.max, float("inf"), float("nan"), 1 / 3]
    orders = torch.tensor([values * 8], dtype=dtype)
    same(forecast(orders.cuda(), torch.ones(1).cuda(), backend="native"), orders[0])
    same(forecast(orders.cuda(), torch.tensor([0.5]).cuda(), backend="native"), orders[0] * 0.5)


def test_one_launch_for_all_tensors():
    history = History([(64, 48), (7,), (33, 5)], order=2, device="cuda", dtype=torch.bfloat16)
    history.orders.normal_()
    before = native.launches()
    update_forecast_(
        history.orders, torch.ones((), device="cuda"), torch.ones(3, device="cuda"), 2, backend="native"
    )
    assert native.launches() - before == 1


def test_a_captured_step_replays_with_new_coefficients():
    hidden, gates = torch.randn(1, 64, 48), torch.randn(3, 1, 48)
    orders, weights = torch.randn(3, 3, hidden.numel()), torch.randn(3)
    there = [x.cuda() for x in (hidden, orders, gates, weights)]
    out = torch.empty_like(there[0])
    gated_sum(*there, out=out, backend="native")  # the first launch loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gated_sum(*there, out=out, backend="native")
    for _ in range(3):
        weights = torch.randn(3)
        there[3].copy_(weights)
        graph.replay()
        same(out, gated_sum(hidden, orders, gates, weights, backend="reference"))


def test_runs_on_the_current_stream():
    """The op waits for what its own stream does before it, which takes far longer than a launch."""
    orders = torch.zeros(1, 1 << 20, device="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        orders.fill_(2.0)
        row = forecast(orders, torch.ones(1, device="cuda"), backend="native")
    stream.synchronize()
    assert (row == 2).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_a_device_that_is_not_current():
    orders, weights = torch.randn(3, 1024), torch.randn(3)
    with torch.cuda.device(0):
        same(
            forecast(orders.to("cuda:1"), weights.to("cuda:1"), backend="native"),
            forecast(orders, weights, backend="reference"),
        )
        assert torch.cuda.current_device() == 0
