"""Whether tensors and dictionaries are as they were, by the extension's loops and by Python's."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hicache_kernels import compat, unchanged
from hicache_kernels.backends import native
from hicache_kernels.unchanged import TensorStates, Values

COUNT = 50  # more than are fetched ahead


@pytest.fixture(params=["extension", "python"], autouse=True)
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "python":
        monkeypatch.setattr(unchanged, "_native", None)
    elif native.unavailable(torch.device("cpu")) is not None:
        pytest.skip("the extension is not built")
    return str(request.param)


def weights() -> list[Tensor]:
    with torch.inference_mode():
        uncounted = [torch.ones(3) for _ in range(2)]
    return [*(nn.Parameter(torch.ones(2, 3)) for _ in range(COUNT)), torch.ones(0), *uncounted]


@torch.no_grad()
def _write(tensor: Tensor) -> None:
    tensor.mul_(2)


def _set(tensor: Tensor) -> None:
    tensor.data = torch.ones(2, 3)


def _shrink(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.untyped_storage().resize_(0)


@pytest.mark.parametrize("index", [0, 20, COUNT - 1])
@pytest.mark.parametrize("change", [_write, _set, _shrink])
def test_every_tensor_is_looked_at(change: Callable[[Tensor], None], index: int):
    tensors = weights()
    states = TensorStates(tensors)
    assert states.unchanged()
    assert states.unchanged()
    change(tensors[index])
    assert not states.unchanged()
    assert TensorStates(tensors).unchanged()


def test_those_that_nobody_counts_are_looked_for_in_their_place():
    tensors = weights()
    states = TensorStates(tensors)
    with torch.inference_mode():
        tensors[-1].mul_(2)
    assert states.unchanged()
    with torch.inference_mode():
        tensors[-1].set_(torch.ones(3))
    assert not states.unchanged()


def test_none_are_unchanged():
    assert TensorStates([]).unchanged()
    assert Values([]).unchanged()


def test_who_looks(loops: str):
    if sys.platform == "linux":
        assert compat.state_functions() is not None, "torch's library has other names for what is asked"
    found = loops == "extension" and compat.state_functions() is not None
    assert TensorStates(weights()).compiled == found


def test_python_looks_where_the_librarys_functions_say_something_else(monkeypatch: pytest.MonkeyPatch):
    functions = compat.state_functions()
    if functions is None:
        pytest.skip("torch's library has not the functions that the loops call")
    _, writes = functions
    monkeypatch.setattr(compat, "state_functions", lambda: (writes, writes))
    tensors = weights()
    states = TensorStates(tensors)
    assert not states.compiled
    assert states.unchanged()
    _write(tensors[3])
    assert not states.unchanged()


def test_python_looks_where_torch_has_no_handles(monkeypatch: pytest.MonkeyPatch):
    def gone(tensors: Any) -> Any:
        raise AttributeError

    monkeypatch.setattr(compat, "tensor_handles", gone)
    assert not TensorStates(weights()).compiled


def test_no_handles_of_weights_that_torch_may_exchange(monkeypatch: pytest.MonkeyPatch):
    """It does not where anything but Python refers to one."""
    monkeypatch.setattr(torch.__future__, "get_swap_module_params_on_conversion", lambda: True)
    module = nn.Linear(2, 2)
    states = TensorStates(list(module.parameters()))
    assert not states.compiled
    assert states.unchanged()
    module.to(torch.float64)
    assert not states.unchanged()


def test_tensors_are_held_and_let_go():
    tensors = weights()
    refs = [weakref.ref(tensor) for tensor in tensors]
    states = TensorStates(tensors)
    del tensors
    gc.collect()
    assert all(ref() is not None for ref in refs)
    assert states.unchanged()
    del states
    gc.collect()
    assert not any(ref() is not None for ref in refs)


def test_a_module_that_holds_the_states_of_its_own_weights_is_let_go():
    module = nn.Linear(2, 2)
    states = TensorStates(list(module.parameters())), Values([module._parameters])
    module.__dict__["states"] = states
    refs = weakref.ref(module), weakref.ref(module.weight)
    del module, states
    gc.collect()
    assert [ref() for ref in refs] == [None, None]


def dicts() -> list[dict[str, Any]]:
    return [{"weight": nn.Parameter(torch.ones(1)), "bias": None} for _ in range(3)]


CHANGES: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "another object": lambda found: found[1].update(weight=nn.Parameter(torch.ones(1))),
    "one more": lambda found: found[2].update(more=None),
    "one less": lambda found: found[2].pop("bias"),
    "all gone": lambda found: [one.clear() for one in found],
    "moved to the next": lambda found: (found[0].pop("bias"), _first(found[1], None)),
    "exchanged": lambda found: (found[0].update(found[1]), found[1].update(found[2])),
}


def _first(into: dict[str, Any], value: Any) -> None:
    items = list(into.items())
    into.clear()
    into.update([("first", value), *items])


@pytest.mark.parametrize("change", CHANGES)
def test_dictionaries_have_the_values_they_had(change: str):
    found = dicts()
    values = Values(found)
    assert values.unchanged()
    CHANGES[change](found)
    assert not values.unchanged()


def test_the_same_object_put_there_again_is_no_change():
    found = dicts()
    values = Values(found)
    found[1]["weight"] = found[1]["weight"]
    assert values.unchanged()
