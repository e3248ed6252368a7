"""``torch.ops.hicache.*`` called as they are: wrong arguments are errors, and gradients are never lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hicache_kernels import backend_status, forecast, gated_sum, update_, update_forecast_

OPS = torch.ops.hicache
USABLE = [name for name, reason in backend_status("cpu").items() if reason is None]
backends = pytest.mark.parametrize("backend", USABLE)


class Tensors:
    """Arguments of every op that fit each other, made anew for every test."""

    def __init__(self) -> None:
        self.orders = torch.randn(3, 2, 48)
        self.inv_gap = torch.tensor(0.5)
        self.coeffs = torch.tensor([1.0, 0.5, -0.125])
        self.row = torch.empty(2, 48)
        self.base = torch.randn(2, 3, 8)
        self.gates = torch.randn(2, 2, 8)
        self.out = torch.empty(2, 3, 8)


Call = Callable[[Tensors, str], object]

WRONG: dict[str, tuple[Call, str]] = {
    "out too long": (
        lambda t, b: OPS.forecast(t.orders, t.coeffs, torch.empty(9999), b),
        r"out of shape \(2, 48\)",
    ),
    "out too short": (
        lambda t, b: OPS.update_forecast_(t.orders, t.inv_gap, t.coeffs, 2, torch.empty(5), b),
        r"out of shape \(2, 48\)",
    ),
    "out of another dtype": (
        lambda t, b: OPS.forecast(t.orders, t.coeffs, t.row.double(), b),
        r"torch.float32 on cpu, got \(2, 48\), torch.float64",
    ),
    "out not contiguous": (
        lambda t, b: OPS.forecast(t.orders, t.coeffs, torch.empty(48, 2).t(), b),
        "contiguous out",
    ),
    "out elsewhere": (lambda t, b: OPS.forecast(t.orders, t.coeffs, t.row.to("meta"), b), "on cpu, got"),
    "base longer than its slot": (
        lambda t, b: OPS.gated_sum(torch.ones(2, 3, 9), t.orders, None, t.coeffs, torch.empty(2, 3, 9), b),
        "slots of at least 54 elements, got 48",
    ),
    "base without a sample": (
        lambda t, b: OPS.gated_sum(torch.ones(8), t.orders, None, t.coeffs, torch.empty(8), b),
        "contiguous base",
    ),
    "too few gates": (
        lambda t, b: OPS.gated_sum(t.base, t.orders, t.gates[:1], t.coeffs, t.out, b),
        r"contiguous gates \(2, 2, 8\)",
    ),
    "gates of another dtype": (
        lambda t, b: OPS.gated_sum(t.base, t.orders, t.gates.bfloat16(), t.coeffs, t.out, b),
        "gates .* of torch.float32, got",
    ),
    "orders without features": (
        lambda t, b: OPS.gated_sum(t.base, t.orders.flatten(1), None, t.coeffs, t.out, b),
        r"orders \[K, num_features, slot\]",
    ),
    "no terms": (
        lambda t, b: OPS.forecast(t.orders, torch.empty(0), t.row, b),
        "1 to 3 coeffs, one an order, got 0",
    ),
    "more terms than orders": (lambda t, b: OPS.forecast(t.orders, torch.ones(4), t.row, b), "1 to 3 coeffs"),
    "terms of the update": (
        lambda t, b: OPS.update_forecast_(t.orders, t.inv_gap, t.coeffs, 1, t.row, b),
        r"2 coeffs \(filled \+ 1\), got 3",
    ),
    "whole numbers": (lambda t, b: OPS.forecast(t.orders, t.coeffs.int(), t.row, b), "floating-point"),
    "more differences than orders": (
        lambda t, b: OPS.update_(t.orders, t.inv_gap, 3, b),
        "0 <= filled <= 2, got 3",
    ),
    "fewer than none": (lambda t, b: OPS.update_(t.orders, t.inv_gap, -1, b), "0 <= filled <= 2, got -1"),
    "no gap": (lambda t, b: OPS.update_(t.orders, torch.empty(0), 1, b), "one number"),
    "a row of numbers": (lambda t, b: OPS.update_(t.orders[0, 0], t.inv_gap, 0, b), r"orders \[K, ...\]"),
    "no orders": (lambda t, b: OPS.update_(t.orders[:0], t.inv_gap, 0, b), "K >= 1"),
    "rows that overlap": (
        lambda t, b: OPS.update_(t.orders.as_strided((3, 96), (5, 1)), t.inv_gap, 2, b),
        "rows that do not overlap",
    ),
    "rows with holes": (lambda t, b: OPS.update_(t.orders[..., ::2], t.inv_gap, 2, b), "contiguous rows"),
    "the gap in the history": (
        lambda t, b: OPS.update_(t.orders, t.orders[0, 0, 0], 2, b),
        "inv_gap not to overlap orders",
    ),
    "out in the history": (
        lambda t, b: OPS.forecast(t.orders, t.coeffs, t.orders[1], b),
        "out not to overlap orders",
    ),
    "out on the coefficients": (
        lambda t, b: OPS.forecast(t.orders, t.row.flatten()[:3], t.row, b),
        "out not to overlap coeffs",
    ),
    "gates in the history, pending": (
        lambda t, b: OPS.gated_sum_update_(
            t.base, t.orders, t.orders[0].flatten()[:32].view(2, 2, 8), t.coeffs, t.inv_gap, 2, t.out, b
        ),
        "gates not to overlap orders",
    ),
    "base and out in the history": (
        lambda t, b: OPS.gated_sum(
            t.orders[0, 0].view(2, 3, 8), t.orders, None, t.coeffs, t.orders[0, 0].view(2, 3, 8), b
        ),
        "out not to overlap orders",
    ),
    "base and out on the gates": (
        lambda t, b: OPS.gated_sum(
            t.gates.view(2, 2, 8), t.orders, t.gates, t.coeffs, t.gates.view(2, 2, 8), b
        ),
        "out not to overlap gates",
    ),
    "base in the history, pending": (
        lambda t, b: OPS.gated_sum_update_(
            t.orders[0, 0].view(2, 3, 8), t.orders, None, t.coeffs, t.inv_gap, 2, t.out, b
        ),
        "base not to overlap orders",
    ),
    "an unknown backend": (lambda t, b: OPS.update_(t.orders, t.inv_gap, 2, b + "?"), "unknown backend"),
}


@backends
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_an_error(name, backend):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call(Tensors(), backend)


@pytest.mark.parametrize(
    "name", ["out too long", "too few gates", "no terms", "more differences than orders"]
)
def test_a_wrong_argument_is_an_error_when_it_is_traced(name):
    call, message = WRONG[name]
    torch._dynamo.reset()
    with pytest.raises(Exception, match=message):
        torch.compile(lambda: call(Tensors(), "native"), backend="aot_eager", fullgraph=True)()


@backends
def test_base_may_be_in_the_history_while_nothing_is_written_there(backend):
    t = Tensors()
    base = t.orders[0, 0].view(2, 3, 8)
    expected = gated_sum(base.clone(), t.orders, None, t.coeffs, backend=backend)
    assert torch.equal(gated_sum(base, t.orders, None, t.coeffs, backend=backend), expected)


def leaves(name: str) -> tuple[Tensors, torch.Tensor]:
    """Tensors of which one requires a gradient, and that one."""
    t = Tensors()
    leaf = getattr(t, name).requires_grad_()
    return t, leaf


PUBLIC: dict[str, Callable[[Tensors], object]] = {
    "update_": lambda t: update_(t.orders, t.inv_gap, 2),
    "forecast": lambda t: forecast(t.orders, t.coeffs),
    "update_forecast_": lambda t: update_forecast_(t.orders, t.inv_gap, t.coeffs, 2),
    "gated_sum": lambda t: gated_sum(t.base, t.orders, t.gates, t.coeffs),
    "gated_sum_update_": lambda t: gated_sum(
        t.base, t.orders, t.gates, t.coeffs, inv_gap=t.inv_gap, filled=2
    ),
}
READ = {
    "update_": ("orders", "inv_gap"),
    "forecast": ("orders", "coeffs"),
    "update_forecast_": ("orders", "inv_gap", "coeffs"),
    "gated_sum": ("base", "orders", "gates", "coeffs"),
    "gated_sum_update_": ("base", "orders", "gates", "coeffs", "inv_gap"),
}


@pytest.mark.parametrize(("op", "argument"), [(op, name) for op, names in READ.items() for name in names])
def test_a_gradient_is_refused_and_never_lost(op, argument):
    t, leaf = leaves(argument)
    before = leaf.detach().clone()
    with pytest.raises(
        RuntimeError, match=f"{op}: expected tensors that require no gradient, got {argument} "
    ):
        PUBLIC[op](t)
    assert torch.equal(leaf.detach(), before)
    with torch.no_grad():
        PUBLIC[op](t)


def test_a_transform_for_gradients_is_refused():
    t = Tensors()
    with pytest.raises(RuntimeError, match="got base that does"):
        torch.func.grad(lambda base: gated_sum(base, t.orders, t.gates, t.coeffs).sum())(t.base)

    def direct(base: torch.Tensor) -> torch.Tensor:
        OPS.gated_sum(base, t.orders, None, t.coeffs, t.out, "auto")
        return t.out.sum()

    with pytest.raises(RuntimeError, match="got base that does"):
        torch.func.grad(direct)(t.base)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_what_is_written_has_a_new_version(backend):
    """Autograd must find that a tensor it kept was changed."""
    t = Tensors()
    kept = torch.ones(3, 2, 48, requires_grad=True)
    product = (kept * t.orders).sum()
    versions = [x._version for x in (t.orders, t.row, t.out)]
    OPS.update_(t.orders, t.inv_gap, 2, backend)
    OPS.forecast(t.orders, t.coeffs, t.row, backend)
    OPS.gated_sum(t.base, t.orders, t.gates, t.coeffs, t.out, backend)
    assert all(
        now > then for now, then in zip((x._version for x in (t.orders, t.row, t.out)), versions, strict=True)
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_inference_mode_has_no_versions():
    with torch.inference_mode():
        t = Tensors()
        OPS.update_(t.orders, t.inv_gap, 2, "auto")
        gated_sum(t.base, t.orders, t.gates, t.coeffs)
