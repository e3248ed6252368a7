"""A call like one before it asks little: no dispatcher, no checks of its form, no binding of arguments.

Whatever else wants to hear of a call still does.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from op_calls import calls
from op_cases import Call, Case, assert_reference_bits
from torch.overrides import TorchFunctionMode

from hicache_kernels import backend_status, forecast, library, update_
from tests.support.operations import Operations

COEFFS, GAP = torch.tensor([1.0, 0.5, -0.125]), torch.tensor(0.5)


@pytest.fixture
def dispatched(monkeypatch):
    """The names of ops whose checks were run: all of those that the dispatcher was given."""
    names: list[str] = []
    for op in [value for value in vars(library).values() if isinstance(value, library.Op)]:
        own = op._check
        monkeypatch.setattr(op, "_check", lambda *given, own=own, op=op: (names.append(op.name), own(*given)))
    return names


@pytest.mark.parametrize("name", calls("auto"))
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_second_call_of_a_form_is_not_dispatched(dispatched, name, backend):
    if reason := backend_status("cpu")[backend]:
        pytest.skip(reason)
    call = calls(backend)[name]
    call()
    dispatched.clear()
    call()
    calls(backend)[name]()  # other addresses
    assert dispatched == []


class Listener(TorchFunctionMode):
    """Hears of every function of torch's, and calls it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "listening",
    [
        Operations,
        Listener,
        lambda: torch.device("cpu"),
        torch.autograd.profiler.profile,
    ],
    ids=["dispatch mode", "function mode", "default device", "profiler"],
)
def test_whoever_listens_hears_of_it(dispatched, listening):
    orders = torch.randn(3, 2, 48)
    forecast(orders, COEFFS)
    dispatched.clear()
    with listening():
        forecast(orders, COEFFS)
    assert dispatched == ["forecast"]


def test_inside_a_transform_it_is_dispatched(dispatched):
    orders, out = torch.randn(3, 2, 48), torch.empty(2, 48)
    forecast(orders, COEFFS, out=out)
    dispatched.clear()
    torch.func.vmap(lambda x: (forecast(orders, COEFFS, out=out), x)[1])(torch.ones(2))
    assert dispatched == ["forecast"]


class Named(torch.Tensor):
    """A subclass sees what is done with it."""


WRONG: dict[str, tuple[Callable[[torch.Tensor], object], type[Exception], str]] = {
    "out in the history": (
        lambda orders: forecast(orders, COEFFS, out=orders[1]), ValueError, "not to overlap orders",
    ),
    "the gap in the history": (
        lambda orders: update_(orders, orders[0, 0, 0], 2), ValueError, "inv_gap not to overlap orders",
    ),
    "between two numbers": (
        lambda orders: forecast(orders, COEFFS, out=misaligned()), ValueError, "at an address divisible by",
    ),
    "a gradient": (
        lambda orders: forecast(orders.clone().requires_grad_(), COEFFS), RuntimeError, "got orders that",
    ),
    "no whole number": (lambda orders: update_(orders, GAP, True), TypeError, "filled to be an int"),
    "another shape": (
        lambda orders: forecast(orders, COEFFS, out=torch.empty(48, 2)), ValueError, r"shape \(2, 48\)",
    ),
}  # fmt: skip


def misaligned() -> torch.Tensor:
    """A tensor of the right form, a byte behind where one may be."""
    return torch.frombuffer(bytearray(2 * 48 * 4 + 1), dtype=torch.float32, offset=1).view(2, 48)


@pytest.mark.parametrize("name", WRONG)
def test_a_known_form_does_not_excuse_a_wrong_call(name):
    call, error, message = WRONG[name]
    orders = torch.randn(3, 2, 48)
    for _ in range(2):
        forecast(orders, COEFFS, out=torch.empty(2, 48))
        update_(orders, GAP, 1)
        update_(orders, GAP, 2)
    before = orders.clone()
    with pytest.raises(error, match=message):
        call(orders)
    assert torch.equal(orders, before)


def test_numbers_that_the_dispatcher_makes_are_made():
    """A tensor of a lazy minus is not what its memory holds; one of a class of its own is its class's."""
    orders = torch.randn(3, 2, 48)
    expected = forecast(-orders, COEFFS)
    minus = torch._neg_view(orders)
    assert minus.data_ptr() == orders.data_ptr()
    assert torch.equal(forecast(minus, COEFFS), expected)
    assert torch.equal(forecast((-orders).as_subclass(Named), COEFFS), expected)


def test_versions_go_up_all_the_same():
    orders, out = torch.randn(3, 2, 48), torch.empty(2, 48)
    update_(orders, GAP, 2)
    forecast(orders, COEFFS, out=out)
    versions = orders._version, out._version
    update_(orders, GAP, 2)
    forecast(orders, COEFFS, out=out)
    assert (orders._version, out._version) > versions
    assert out._version > versions[1]


@pytest.mark.parametrize(
    "case",
    [
        Case("update_", torch.bfloat16, (2504,)),
        Case("forecast", torch.float32, (1001,), offset=3),
        Case("update_forecast_", torch.bfloat16, (2504,)),
        Case("gated_sum", torch.bfloat16, (2, 6, 320), pending=True),
        Case("gated_sum", torch.float32, (2, 6, 320), gated=False),
    ],
    ids=str,
)
def test_the_second_launch_binds_no_arguments(triton_card, case):
    """It has other addresses, and gives the reference's bits all the same."""
    from triton.runtime import JITFunction

    from hicache_kernels.backends import triton as backend

    first, second = Call(case), Call(case)
    with (
        triton_card(90, first.memory) as driver,
        mock.patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run) as run,
    ):
        first.run(backend)
        assert run.call_count == 1
        driver.memory = second.memory
        second.run(backend)
    assert run.call_count == 1
    assert len(driver.launches) == 2
    assert driver.launches[0] == driver.launches[1]
    assert_reference_bits(second)


def test_a_profiler_of_launches_gets_them_the_whole_way(triton_card):
    from triton import knobs
    from triton.runtime import JITFunction

    from hicache_kernels.backends import triton as backend

    call = Call(Case("forecast", torch.float32, (1001,)))
    with (
        triton_card(90, call.memory),
        mock.patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run) as run,
    ):
        call.run(backend)
        hook = mock.Mock()
        knobs.runtime.launch_enter_hook.add(hook)
        try:
            call.run(backend)
        finally:
            knobs.runtime.launch_enter_hook.remove(hook)
    assert run.call_count == 2
