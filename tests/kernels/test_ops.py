"""Every op on every backend that runs here, against float64."""

from __future__ import annotations

import functools
import math
import tempfile
from pathlib import Path

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hicache_kernels import History, backend_status, forecast, gated_sum, update_, update_forecast_
from hicache_kernels.tiles import Tile
from tests.support.scripts import passed_interpreted

ROOT = Path(__file__).parents[2]
USABLE = [name for name, reason in backend_status("cpu").items() if reason is None]
backends = pytest.mark.parametrize("backend", USABLE)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


# Triton's interpreter is slow, and truncates bf16 on store where a GPU rounds: one more ulp there, and only
# there.
INTERPRETED = "triton" in USABLE
EXAMPLES = 15 if INTERPRETED else 60


def assert_no_worse(
    backend: str, ours: torch.Tensor, peer: torch.Tensor, exact: torch.Tensor, operands: float
) -> None:
    truncates = backend == "triton" and ours.dtype == torch.bfloat16
    oracle.assert_no_worse(ours, peer, exact, ulps=2 if truncates else 1, operands=operands)


def largest(differences: torch.Tensor, weights: list[float]) -> float:
    """A bound of what is added up on the way to a forecast."""
    if not differences.numel():
        return 0.0
    return float(differences.abs().max()) * (1 + sum(map(abs, weights)))


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def history(num_orders: int, numel: int, filled: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Orders with the inbox and ``filled`` differences set, and NaN in the rows that do not exist yet."""
    generator = torch.Generator().manual_seed(seed)
    orders = poisoned(num_orders, numel, dtype=dtype)
    for k in [*range(filled), num_orders - 1]:
        orders[k] = torch.randn(numel, generator=generator, dtype=torch.float64).to(dtype) * 2
    return orders


def skip_float64_in_triton(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("triton takes float32, bfloat16 and float16; that it refuses float64 is tested below")


cases = st.tuples(
    st.integers(1, 5).flatmap(lambda k: st.tuples(st.just(k), st.integers(0, k - 1))),
    st.sampled_from([0, 1, 2, 7, 15, 16, 17, 31, 33, 64, 127, 129, 1000]),
    st.sampled_from([1, 2, 3, 5, 7, 10]),
    st.lists(st.floats(-4, 4), min_size=5, max_size=5),
    st.integers(0, 2**16),
)


@backends
@dtypes
@settings(max_examples=EXAMPLES, deadline=None)
@given(case=cases)
def test_cascade_and_forecast(backend, dtype, case):
    skip_float64_in_triton(backend, dtype)
    (num_orders, filled), numel, gap, weights, seed = case
    coeffs = weights[: filled + 1]
    orders = history(num_orders, numel, filled, dtype, seed)
    beyond = orders[filled + 1 :].clone()
    exact = oracle.update(orders, gap, filled)
    exact_row = oracle.forecast(exact, coeffs)
    peer, peer_row = oracle.eager(orders, gap, coeffs, filled)
    inv_gap = torch.tensor(1 / gap, dtype=torch.float64)
    weights = torch.tensor(coeffs, dtype=torch.float64)

    fused = orders.clone()
    out = poisoned(numel, dtype=dtype)
    assert update_forecast_(fused, inv_gap, weights, filled, out=out, backend=backend) is out
    added = largest(exact, coeffs)
    assert_no_worse(backend, out, peer_row, exact_row, added)
    assert_no_worse(backend, fused[: filled + 1], peer, exact, added)

    update_(orders, inv_gap, filled, backend=backend)
    assert torch.equal(orders[: filled + 1], fused[: filled + 1])
    if filled + 1 < num_orders:  # rows past the new differences are left alone, poison and inbox alike
        torch.testing.assert_close(orders[filled + 1 :], beyond, rtol=0, atol=0, equal_nan=True)

    kept = orders[: filled + 1]
    exact_row = oracle.forecast(kept, coeffs)
    peer_row = sum(d * w for d, w in zip(kept, coeffs, strict=True))
    assert_no_worse(backend, forecast(orders, weights, backend=backend), peer_row, exact_row, added)


@pytest.mark.few(8)
@backends
@dtypes
@pytest.mark.parametrize("pending", [False, True], ids=["settled", "pending"])
@settings(max_examples=EXAMPLES, deadline=None)
@given(
    case=cases,
    shape=st.tuples(st.integers(1, 3), st.integers(0, 5), st.sampled_from([1, 3, 16, 31, 48, 130])),
    num_features=st.integers(1, 5),
    gated=st.booleans(),
    padding=st.sampled_from([0, 1, 37]),
)
def test_gated_sum(backend, dtype, pending, case, shape, num_features, gated, padding):
    skip_float64_in_triton(backend, dtype)
    (num_orders, filled), _, gap, weights, seed = case
    coeffs = weights[: filled + 1]
    batch, length, channels = shape
    numel = batch * length * channels
    orders = poisoned(num_orders, num_features, numel + padding, dtype=dtype)
    for feature in range(num_features):
        orders[:, feature, :numel] = history(
            num_orders, numel, filled if pending else filled + 1, dtype, seed + feature
        )
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(batch, length, channels, generator=generator).to(dtype)
    gates = torch.randn(num_features, batch, channels, generator=generator).to(dtype) if gated else None

    exact = base.double()
    peer = base
    expected_orders = []
    for feature in range(num_features):
        slot = orders[:, feature, :numel]
        if pending:
            differences, eager_row = (
                oracle.update(slot, gap, filled),
                oracle.eager(slot, gap, coeffs, filled)[1],
            )
        else:
            differences = slot[: filled + 1].double()
            eager_row = sum(d * w for d, w in zip(slot, coeffs, strict=False))
        expected_orders.append(differences)
        gate = torch.ones(batch, 1, channels) if gates is None else gates[feature][:, None]
        exact = exact + gate.double() * oracle.forecast(differences, coeffs).view(base.shape)
        peer = peer + gate.to(dtype) * eager_row.view(base.shape)

    before = orders.clone()
    out = poisoned(*base.shape, dtype=dtype)
    more = {"inv_gap": torch.tensor(1 / gap, dtype=torch.float64), "filled": filled} if pending else {}
    weights = torch.tensor(coeffs, dtype=torch.float64)
    assert gated_sum(base, orders, gates, weights, out=out, backend=backend, **more) is out
    added = 8 * sum(largest(differences, coeffs) for differences in expected_orders) + 8
    assert_no_worse(backend, out, peer, exact, added)
    if not pending:
        torch.testing.assert_close(orders, before, rtol=0, atol=0, equal_nan=True)
        return
    torch.testing.assert_close(orders[:, :, numel:], before[:, :, numel:], rtol=0, atol=0, equal_nan=True)
    for feature in range(num_features):
        slot = before[:, feature, :numel]
        peer = oracle.eager(slot, gap, coeffs, filled)[0]
        assert_no_worse(backend, orders[: filled + 1, feature, :numel], peer, expected_orders[feature], added)


SLOTS = [0, 1, 16, 31, 1000, 4096]


@pytest.mark.few(8)
@backends
@dtypes
@pytest.mark.parametrize("filled", [0, 1, 2])
def test_every_feature_may_have_a_row_of_coefficients(backend, dtype, filled):
    """The result is that of each feature alone, bit for bit; of equal rows that of one row for all."""
    skip_float64_in_triton(backend, dtype)
    inv_gap = torch.tensor(1 / 3)
    for features, slot in [(1, 17), *((3, slot) for slot in SLOTS)]:
        orders = history(3, features * slot, filled, dtype).view(3, features, slot)
        rows = torch.randn(filled + 1, features)
        updated, alone = orders.clone(), orders.clone()
        out = update_forecast_(updated, inv_gap, rows, filled, backend=backend)
        for feature in range(features):
            place, row = alone[:, feature], rows[:, feature]
            expected = update_forecast_(place, inv_gap, row, filled, backend=backend)
            assert torch.equal(out[feature], expected)
            of_feature = forecast(updated, rows, backend=backend)[feature]
            assert torch.equal(of_feature, forecast(place, row, backend=backend))
        torch.testing.assert_close(updated, alone, rtol=0, atol=0, equal_nan=True)
        alike = rows[:, :1].expand(-1, features)
        assert torch.equal(
            forecast(updated, alike, backend=backend), forecast(updated, rows[:, 0], backend=backend)
        )


@pytest.mark.few(10)
@backends
@dtypes
@pytest.mark.parametrize("gated", [False, True], ids=["ungated", "gated"])
@pytest.mark.parametrize("pending", [False, True], ids=["settled", "pending"])
def test_every_feature_of_a_sum_may_have_a_row_of_coefficients(backend, dtype, pending, gated):
    skip_float64_in_triton(backend, dtype)
    filled, features = 2, 3
    for shape in [(1, 1, 1), (2, 5, 48), (1, 9, 31), (2, 3, 264)]:
        base = torch.randn(shape).to(dtype)
        numel = base.numel()
        orders = history(3, features * numel, filled if pending else 3, dtype).view(3, features, numel)
        gates = torch.randn(features, shape[0], shape[2]).to(dtype) if gated else None
        rows = torch.randn(filled + 1, features)
        more = {"inv_gap": torch.tensor(0.2), "filled": filled} if pending else {}
        expected, ours = orders.clone(), orders.clone()
        total = gated_sum(base, expected, gates, rows, backend="reference", **more)
        assert_close = functools.partial(torch.testing.assert_close, equal_nan=True)
        exact = {"rtol": 0, "atol": 0} if backend != "triton" or dtype != torch.bfloat16 else {}
        assert_close(gated_sum(base, ours, gates, rows, backend=backend, **more), total, **exact)
        assert_close(ours, expected, **exact)
        # the reference itself: the sums of features one by one, each with its row
        high = base.double() if dtype == torch.float64 else base.float()
        for feature in range(features):
            value = [expected[k, feature].to(high.dtype) for k in range(filled + 1)]
            if pending:
                value = [orders[-1, feature].to(high.dtype)]
                for k in range(filled):
                    value.append((value[k] - orders[k, feature].to(high.dtype)) * more["inv_gap"])
            weighed = value[0] * rows[0, feature] + value[1] * rows[1, feature] + value[2] * rows[2, feature]
            gate = 1.0 if gates is None else gates[feature][:, None].to(high.dtype)
            high = high + weighed.view(shape) * gate
        torch.testing.assert_close(total, high.to(dtype))
        alike = rows[:, :1].expand(-1, features).contiguous()
        first, second = orders.clone(), orders.clone()
        assert torch.equal(
            gated_sum(base, first, gates, alike, backend=backend, **more),
            gated_sum(base, second, gates, rows[:, 0], backend=backend, **more),
        )


THREAD_SHARE = 1 << 17  # elements that a thread is woken for (csrc/cpu.cpp)


@dtypes
@pytest.mark.parametrize("num_orders", [1, 2, 3, 4, 5])
def test_native_gives_the_reference_s_bits(dtype, num_orders):
    """Also over several threads, and at lengths no thread's share divides."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        bits_of_native_and_reference(dtype, num_orders)
    finally:
        torch.set_num_threads(before)


def bits_of_native_and_reference(dtype: torch.dtype, num_orders: int) -> None:
    for numel in (3 * THREAD_SHARE + 17, 5):
        filled = num_orders - 1
        weights = torch.tensor([1.0, 0.5, -0.125, 0.3, 2.0][:num_orders])
        results = []
        for backend in ("reference", "native"):
            orders = history(num_orders, numel, filled, dtype)
            out = update_forecast_(orders, torch.tensor(1 / 3), weights, filled, backend=backend)
            results.append((orders, out))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(
    ("kept", "base"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_history_of_another_dtype_than_the_base(kept, base):
    hidden = torch.randn(2, 70, 33).to(base)
    gates = torch.randn(3, 2, 33).to(base)
    outputs = []
    for backend in ("reference", "native"):
        orders = torch.stack([history(3, hidden.numel(), 2, kept, seed) for seed in range(3)], dim=1)
        more = {"inv_gap": torch.tensor(0.2), "filled": 2}
        out = gated_sum(hidden, orders, gates, torch.tensor([1.0, 2.0, -0.5]), backend=backend, **more)
        outputs.append((out, orders))
    assert outputs[0][0].dtype == base
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])


@backends
@pytest.mark.parametrize("pending", [False, True], ids=["settled", "pending"])
def test_gated_sum_over_many_tiles(backend, pending):
    """Several samples, of more rows and of more channels than a tile of Triton's."""
    batch, rows, channels = 3, 9, 600
    assert rows > 2 * Tile().rows
    assert channels > 2 * Tile().columns
    base, gates = torch.randn(batch, rows, channels), torch.randn(2, batch, channels)
    orders = torch.randn(3, 2, base.numel() + 5)
    expected_orders = orders.clone()
    more = {"inv_gap": torch.tensor(0.2), "filled": 2} if pending else {}
    weights = torch.tensor([1.0, 0.5, -0.125])
    expected = gated_sum(base, expected_orders, gates, weights, backend="reference", **more)
    assert torch.equal(gated_sum(base, orders, gates, weights, backend=backend, **more), expected)
    assert torch.equal(orders, expected_orders)


@backends
def test_coefficients_may_be_a_view(backend):
    """Strided, or one number for all orders."""
    orders = torch.randn(3, 40)
    for weights in (torch.arange(6.0)[::2], torch.full((1,), 0.5).expand(3)):
        expected = forecast(orders, weights.clone(), backend=backend)
        assert torch.equal(forecast(orders, weights, backend=backend), expected)
        base = torch.zeros(1, 40)
        assert torch.equal(gated_sum(base, orders[:, None], None, weights, backend=backend)[0], expected)
        one = torch.tensor(0.5)
        updated = update_forecast_(orders.clone(), one, weights.clone(), 2, backend=backend)
        assert torch.equal(update_forecast_(orders.clone(), one, weights, 2, backend=backend), updated)


@backends
def test_special_values_survive(backend):
    """Infinities, NaN, subnormals and the largest numbers, through every dtype of low precision, and fp32."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        info = torch.finfo(dtype)
        values = [0.0, -0.0, info.tiny, info.tiny / 4, info.max, -info.max, float("inf"), float("nan"), 1 / 3]
        orders = torch.tensor([values * 3], dtype=dtype)
        if backend == "triton" and dtype == torch.bfloat16:
            continue  # the interpreter's casts of special bf16 values are not a GPU's
        row = forecast(orders, torch.ones(1), backend=backend)
        torch.testing.assert_close(row, orders[0], rtol=0, atol=0, equal_nan=True)
        halved = forecast(orders, torch.tensor([0.5]), backend=backend)
        torch.testing.assert_close(halved, orders[0] * 0.5, rtol=0, atol=0, equal_nan=True)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as whole numbers: zeros of either sign differ, and NaN equals itself."""
    return tensor.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.itemsize])


@pytest.mark.few(8)
@dtypes
@pytest.mark.parametrize("channels", [1, 3, 5, 9, 17, 33])
def test_ragged_channels_keep_the_sign_of_zero(dtype, channels):
    """A row's last vector must not touch the sums of the next row, not even by adding zero to them."""
    base = torch.full((2, 7, channels), -0.0, dtype=dtype)
    orders = torch.full((2, 3, base.numel()), -0.0, dtype=dtype)
    gates = torch.ones(3, 2, channels, dtype=dtype)
    sums = [gated_sum(base, orders, gates, torch.ones(2), backend=name) for name in ("reference", "native")]
    assert torch.equal(bits(sums[0]), bits(base))
    assert torch.equal(bits(sums[1]), bits(base))


@dtypes
def test_flushing_of_denormals_is_the_caller_s_on_every_thread(dtype):
    """A result does not depend on which thread computed it."""
    before = torch.get_num_threads()
    tiny = torch.finfo(dtype).tiny
    values = torch.tensor([tiny / 4, tiny, -tiny / 2, 1.0, -0.0, 3 * tiny], dtype=torch.float64).to(dtype)
    orders = values.repeat(3, 8 * THREAD_SHARE)
    torch.set_num_threads(4)
    forecast(orders, torch.ones(3), backend="native")  # threads begin with the mode of whoever made them
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormal numbers")
    try:
        results = []
        for threads in (1, *[4] * 8):
            torch.set_num_threads(threads)
            results.append(forecast(orders, torch.tensor([1.0, 0.5, 0.25]), backend="native"))
        for result in results[1:]:
            assert torch.equal(bits(result), bits(results[0]))
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)


@backends
def test_rows_may_be_a_slice_of_a_larger_history(backend):
    whole = torch.randn(3, 300)
    part, expected = whole[:, 40:140], whole[:, 40:140].clone()
    others = whole.clone()
    row = update_forecast_(part, torch.tensor(0.5), torch.ones(3), 2, backend=backend)
    expected_row = update_forecast_(expected, torch.tensor(0.5), torch.ones(3), 2, backend="reference")
    assert torch.equal(row, expected_row)
    assert torch.equal(whole[:, 40:140], expected)
    assert torch.equal(whole[:, :40], others[:, :40])
    assert torch.equal(whole[:, 140:], others[:, 140:])


def test_history_layout():
    shapes = [(2, 3, 5), (7,), (0, 4), (1, 33)]
    for dtype in DTYPES:
        past = History(shapes, order=2, dtype=dtype)
        assert past.orders.shape[0] == 3
        assert past.nbytes == past.orders.nbytes
        for index, shape in enumerate(shapes):
            for order in range(3):
                slot = past.slot(index, order)
                assert slot.shape == shape
                assert (slot.data_ptr() - past.orders[order].data_ptr()) % 128 == 0 or slot.numel() == 0
                slot.fill_(index * 10 + order)
        for index in range(len(shapes)):
            assert (past.inbox(index) == index * 10 + 2).all()
            assert (past.split(past.orders[1])[index] == index * 10 + 1).all()
    with pytest.raises(ValueError, match="features of one shape"):
        past.orders_by_feature()
    assert History([(3, 5)] * 4, 1).orders_by_feature().shape == (2, 4, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 1), "at least one feature shape, got none"),
        (([(2,)], -1), "order >= 0, got -1"),
        (([(2,)], 1, torch.int32), "floating-point dtype, got torch.int32"),
    ],
)
def test_bad_history(arguments, message):
    with pytest.raises(ValueError, match=message):
        History(*arguments)


ORDERS = torch.zeros(3, 8)
ONE, THREE = torch.ones(()), torch.ones(3)
WHOLE, GATES = torch.ones(16), torch.ones(1, 2, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: update_([1.0], ONE, 0), TypeError, "update_: expected orders to be a tensor, got list"),
        (
            lambda: update_(torch.zeros(3), ONE, 0),
            ValueError,
            r"update_: expected floating-point orders \[K, ...\]",
        ),
        (lambda: update_(ORDERS.int(), ONE, 0), ValueError, "got torch.int32"),
        (
            lambda: update_(torch.zeros(8, 3).t(), ONE, 0),
            ValueError,
            "update_: expected orders with contiguous rows",
        ),
        (lambda: update_(torch.zeros(20).as_strided((3, 8), (4, 1)), ONE, 0), ValueError, "do not overlap"),
        (
            lambda: update_(ORDERS, 0.5, 0),
            TypeError,
            "update_: expected inv_gap to be a tensor, got float",
        ),
        (lambda: update_(ORDERS, THREE, 0), ValueError, "tensor of one number"),
        (lambda: update_(ORDERS, ONE, 3), ValueError, "update_: expected 0 <= filled <= 2, got 3"),
        (lambda: update_(ORDERS, ONE, True), TypeError, "filled to be an int, got True"),
        (
            lambda: update_(ORDERS, ONE.to("meta"), 0),
            ValueError,
            "expected inv_gap on cpu, as orders, got meta",
        ),
        (
            lambda: forecast(ORDERS, torch.ones(4)),
            ValueError,
            "forecast: expected 1 to 3 coeffs, one an order, got 4",
        ),
        (lambda: forecast(ORDERS, torch.ones(0)), ValueError, "got 0"),
        (
            lambda: forecast(ORDERS, torch.ones(2, 3)),
            ValueError,
            r"expected coeffs \[orders, 8\], a row for each feature of orders \(3, 8\), got shape \(2, 3\)",
        ),
        (
            lambda: gated_sum(torch.ones(1, 2), torch.ones(3, 4, 2), None, torch.ones(3, 1)),
            ValueError,
            r"gated_sum: expected coeffs \[orders, 4\]",
        ),
        (
            lambda: forecast(ORDERS, torch.ones(4, 8)),
            ValueError,
            "expected 1 to 3 coeffs, one an order, got 4",
        ),
        (
            lambda: forecast(ORDERS, torch.ones(1, 2, 3)),
            ValueError,
            r"tensor \[orders\] or \[orders, features\]",
        ),
        (lambda: forecast(ORDERS, THREE.int()), ValueError, "coeffs to be a floating-point tensor"),
        (lambda: forecast(ORDERS, THREE, out=torch.ones(7)), ValueError, r"contiguous out of shape \(8,\)"),
        (lambda: forecast(ORDERS, THREE, out=ORDERS[1]), ValueError, "forecast: expected out not to overlap"),
        (
            lambda: forecast(ORDERS, THREE, backend="cuda"),
            ValueError,
            "unknown backend 'cuda'; expected auto, ref",
        ),
        (
            lambda: update_forecast_(ORDERS, ONE, THREE, 1),
            ValueError,
            r"expected 2 coeffs \(filled \+ 1\), got 3",
        ),
        (
            lambda: gated_sum(THREE, ORDERS, None, THREE),
            ValueError,
            r"gated_sum: expected orders \[K, num_features, slot\]",
        ),
        (
            lambda: gated_sum(torch.ones(1, 3, 4).mT, ORDERS[:, None], None, THREE),
            ValueError,
            "expected a contiguous base",
        ),
        (
            lambda: gated_sum(torch.ones(3, 3), ORDERS[:, None], None, THREE),
            ValueError,
            "slots of at least 9 elements",
        ),
        (
            lambda: gated_sum(torch.ones(2, 4), ORDERS[:, None], torch.ones(1, 4), THREE),
            ValueError,
            r"contiguous gates \(1, 2, 4\) of torch.float32, got shape \(1, 4\)",
        ),
        (
            lambda: gated_sum(torch.ones(1, 8), torch.zeros(3, 0, 8), None, THREE),
            ValueError,
            "num_features >= 1",
        ),
        (
            lambda: gated_sum(WHOLE[:8].view(2, 4), ORDERS[:, None], None, THREE, out=WHOLE[2:10].view(2, 4)),
            ValueError,
            "gated_sum: expected out not to overlap base",
        ),
        (
            lambda: gated_sum(torch.ones(2, 4), ORDERS[:, None], GATES, THREE, out=GATES[0]),
            ValueError,
            "gated_sum: expected out not to overlap gates",
        ),
        (
            lambda: gated_sum(torch.ones(2, 4), ORDERS[:, None], None, THREE, filled=2),
            ValueError,
            "expected filled=0 when inv_gap is None",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def misaligned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor that starts one byte into a buffer, as one read from a file may."""
    count = math.prod(shape)
    memory = bytearray(count * dtype.itemsize + dtype.itemsize)
    odd = torch.frombuffer(memory, dtype=dtype, count=count, offset=1).view(shape)
    assert odd.data_ptr() % dtype.itemsize
    return odd


ODD_GATES = misaligned(1, 2, 4)


@backends
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("orders", lambda b: update_(misaligned(3, 8), ONE, 2, backend=b)),
        ("inv_gap", lambda b: update_(ORDERS.clone(), misaligned(), 2, backend=b)),
        ("out", lambda b: forecast(ORDERS, THREE, out=misaligned(8), backend=b)),
        ("coeffs", lambda b: update_forecast_(ORDERS.clone(), ONE, misaligned(3), 2, backend=b)),
        ("base", lambda b: gated_sum(misaligned(2, 4), ORDERS[:, None], None, THREE, backend=b)),
        ("gates", lambda b: gated_sum(torch.ones(2, 4), ORDERS[:, None], ODD_GATES, THREE, backend=b)),
    ],
)  # fmt: skip
def test_misaligned_memory_is_refused(name, call, backend):
    with pytest.raises(ValueError, match=rf"expected {name} at an address divisible by its 4 bytes a number"):
        call(backend)


def test_a_named_backend_never_falls_back():
    with pytest.raises(
        RuntimeError, match="forecast: backend 'native' cannot run: it is compiled for at most 5"
    ):
        forecast(torch.zeros(6, 8), torch.ones(6), backend="native")
    assert (forecast(torch.ones(6, 8), torch.ones(6)) == 6).all()  # auto finds one that can


@backends
def test_gated_sum_in_place(backend):
    orders = torch.randn(3, 1, 48)
    base = torch.randn(2, 24)
    expected = gated_sum(base, orders, None, THREE, backend=backend)
    assert torch.equal(gated_sum(base, orders, None, THREE, out=base, backend=backend), expected)


@backends
def test_addresses_past_32_bits(backend):
    """Rows further apart than 2³¹ numbers, in a file with holes: only the rows themselves take memory."""
    apart, numel = 2**31 + 64, 33
    with tempfile.NamedTemporaryFile() as file:
        whole = torch.from_file(file.name, shared=True, size=2 * apart + numel, dtype=torch.bfloat16)
        orders = whole.as_strided((3, numel), (apart, 1))
        small = torch.randn(3, numel).bfloat16()
        orders.copy_(small)
        weights = torch.tensor([1.0, 0.5, 0.25])
        out = update_forecast_(orders, torch.tensor(0.5), weights, 2, backend=backend)
        expected = update_forecast_(small, torch.tensor(0.5), weights, 2, backend=backend)
        assert torch.equal(out, expected)
        assert torch.equal(orders, small)
        by_feature = whole.as_strided((3, 1, numel), (apart, numel, 1))
        base = torch.ones(1, numel).bfloat16()
        summed = gated_sum(base, by_feature, None, weights, backend=backend)
        assert torch.equal(summed, gated_sum(base, small[:, None], None, weights, backend=backend))


def test_triton_without_a_gpu_says_why():
    if INTERPRETED:
        with pytest.raises(RuntimeError, match=r"it takes torch\.float32, .*, not torch\.float64"):
            forecast(ORDERS.double(), THREE, backend="triton")
        return
    with pytest.raises(
        RuntimeError, match=r"forecast: backend 'triton' cannot run: (it runs on CUDA|triton is not)"
    ):
        forecast(ORDERS, THREE, backend="triton")


def test_triton_in_its_interpreter():
    """These tests again, in a process where Triton's kernels run on the CPU."""
    if INTERPRETED:
        pytest.skip("this is that process")
    pytest.importorskip("triton", reason="triton is not installed")
    assert passed_interpreted(__file__) >= 10


def test_native_is_built_where_there_is_a_compiler():
    """A build that fails quietly must not pass for a machine without a compiler."""
    import shutil

    if not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler here")
    assert "native" in USABLE, backend_status("cpu")["native"]
