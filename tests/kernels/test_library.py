"""The ops as torch sees them: schemas, fakes, torch.compile and inference mode."""

from __future__ import annotations

import pytest
import torch

import hicache_kernels
from hicache_kernels import History, forecast, gated_sum, update_, update_forecast_
from tests.support.scripts import run_script

GAP = torch.tensor(0.25)
COEFFS = torch.tensor([1.0, 0.5, -0.125])
backends = pytest.mark.parametrize("backend", ["reference", "native"])


def past(num_features: int = 2, shape: tuple[int, ...] = (2, 5, 16)) -> History:
    history = History([shape] * num_features, order=2)
    history.orders.normal_()
    return history


def calls(backend: str) -> dict[str, tuple]:
    """Op → arguments."""
    history, base, gates = past(), torch.randn(2, 5, 16), torch.randn(2, 2, 16)
    row, out = torch.empty_like(history.orders[0]), torch.empty_like(base)
    orders, by_feature = history.orders, history.orders_by_feature()
    return {
        "update_": (orders, GAP, 2, backend),
        "forecast": (orders, COEFFS, row, backend),
        "update_forecast_": (orders, GAP, COEFFS, 2, row, backend),
        "gated_sum": (base, by_feature, gates, COEFFS, out, backend),
        "gated_sum_update_": (base, by_feature, gates, COEFFS, GAP, 2, out, backend),
    }


@backends
@pytest.mark.parametrize("name", calls("auto"))
def test_opcheck(name, backend):
    op = getattr(torch.ops.hicache, name).default
    torch.library.opcheck(op, calls(backend)[name])


def test_schemas_mutate_what_they_say():
    for name, arguments in calls("auto").items():
        op = getattr(torch.ops.hicache, name).default
        written = [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        expected = {
            "update_": ["orders"],
            "forecast": ["out"],
            "update_forecast_": ["orders", "out"],
            "gated_sum": ["out"],
            "gated_sum_update_": ["orders", "out"],
        }[name]
        assert written == expected
        before = {
            a.name: v.clone()
            for a, v in zip(op._schema.arguments, arguments, strict=True)
            if torch.is_tensor(v)
        }
        op(*arguments)
        for argument, value in zip(op._schema.arguments, arguments, strict=True):
            if torch.is_tensor(value):
                same = torch.equal(value, before[argument.name])
                assert same == (argument.name not in expected), (name, argument.name)


def step(
    orders: torch.Tensor, by_feature: torch.Tensor, base: torch.Tensor, gates: torch.Tensor, pending: bool
):
    """Every public op once, in a function to compile."""
    update_(orders, GAP, 2)
    row = forecast(orders, COEFFS)
    fused = update_forecast_(orders, GAP, COEFFS, 2)
    more = {"inv_gap": GAP, "filled": 2} if pending else {}
    return row + fused, gated_sum(base, by_feature, gates, COEFFS, **more) * 2


@pytest.mark.parametrize("pending", [False, True], ids=["settled", "pending"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_compiles_whole_and_gives_the_same(mode, pending):
    torch._dynamo.reset()
    base, gates = torch.randn(2, 5, 16), torch.randn(2, 2, 16)
    eager, compiled = past(), past()
    compiled.orders.copy_(eager.orders)
    with mode():
        expected = step(eager.orders, eager.orders_by_feature(), base, gates, pending)
        run = torch.compile(step, backend="aot_eager", fullgraph=True)
        results = run(compiled.orders, compiled.orders_by_feature(), base, gates, pending)
    for ours, theirs in zip(results, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(compiled.orders, eager.orders)


def test_one_call_of_the_dispatcher_for_all_tensors():
    """However many features a history has, an op is one op."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.ops = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.ops.append(func)
            return func(*args, **(kwargs or {}))

    for num_features in (1, 76):
        history = past(num_features)
        out = torch.empty_like(history.orders[0])
        with Counter() as counter:
            update_forecast_(history.orders, GAP, COEFFS, 2, out=out)
        kernels = [op for op in counter.ops if op.namespace == "hicache"]
        assert kernels == [torch.ops.hicache.update_forecast_.default]
        assert all(op.is_view or op in kernels for op in counter.ops)


def test_base_in_the_history_is_refused_while_it_is_updated():
    history = past(1)
    by_feature = history.orders_by_feature()
    base = history.slot(0, 1)
    with pytest.raises(ValueError, match="gated_sum: expected base not to overlap orders"):
        gated_sum(base, by_feature, None, COEFFS, inv_gap=GAP, filled=2)


def test_public_names():
    for name in hicache_kernels.__all__:
        assert getattr(hicache_kernels, name) is not None


def test_imported_twice():
    """It says so in words of its own, and the first copy works on."""
    done = run_script("import_twice.py")
    assert done.returncode == 0, done.stderr
    reload, copy, result = done.stdout.splitlines()
    for message in (reload, copy):
        assert message.startswith("hicache_kernels: expected to be imported once in a process")
        assert message.endswith("start a new process")
    assert result == "[3.0, 3.0, 3.0]"
