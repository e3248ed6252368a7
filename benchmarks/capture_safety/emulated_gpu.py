"""An emulated GPU: tensors that say they are on ``cuda:0``, while the host has their numbers.

Fake tensors have no numbers, so code that reads one from the device stops there. These go on, and every copy
between the two memories is an operation that can be seen. What Python asks of a tensor is answered for CUDA;
torch's own C++ takes it to be on the meta device, as a build without CUDA refuses to index others.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from hicache.stats import Stopwatch

DEVICE: Final = torch.device("cuda", 0)
_META: Final = torch.device("meta")


class EmulatedTensor(Tensor):
    """A tensor on the emulated GPU.

    Args:
        host: has its numbers.
    """

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> EmulatedTensor:
        made: EmulatedTensor = Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=_META,
        )
        made.host = host
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(f"{func}: expected EmulatedGpu to be entered")

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    # Where torch's C++ would make tensors of lists on the meta device, past everything that looks on.

    def new_tensor(  # type: ignore[override]
        self, data: Any, *, dtype: torch.dtype | None = None, **more: Any
    ) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, **{"device": DEVICE, **more})

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(self._index(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(self._index(index), value)

    def _index(self, index: Any) -> Any:
        if isinstance(index, tuple):
            return tuple(self._index(part) for part in index)
        return torch.tensor(index, device=DEVICE) if isinstance(index, list) else index


class Event:
    """``torch.cuda.Event``. Waiting for it is counted where waits are.

    Args:
        done: whether the device has come to it.
    """

    def __init__(self, done: Callable[[], bool]) -> None:
        self.query = done

    def record(self, stream: Any = None) -> None:
        """Nothing is in the background."""

    def synchronize(self) -> None:
        """Done at once, but told to whoever has put something in the place of torch's."""
        torch.cuda.Event.synchronize(self)  # type: ignore[arg-type]


class EmulatedGpu(TorchDispatchMode):
    """While it is entered, the device "cuda" is the host.

    Args:
        done: whether the device has come to what it is asked whether it has.
    """

    def __init__(self, done: Callable[[], bool] = lambda: True) -> None:
        super().__init__()
        self._done = done

    def __enter__(self) -> EmulatedGpu:
        with ExitStack() as stack:
            if not torch.cuda.is_available():
                stack.enter_context(mock.patch("torch.cuda._lazy_init"))
            # no events to record, no graphs to capture
            stack.enter_context(mock.patch.object(Stopwatch, "start", return_value=0.0))
            # nothing is copied in the background
            stack.enter_context(mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor))
            stack.enter_context(mock.patch("torch.cuda.Event", functools.partial(Event, self._done)))
            stack.enter_context(mock.patch("torch.cuda.current_stream", return_value=None))
            stack.enter_context(mock.patch("torch.cuda.is_current_stream_capturing", return_value=False))
            stack.enter_context(mock.patch.dict(os.environ, {"HICACHE_CUDA_GRAPHS": "0"}))
            # torch.tensor(…, device=…) is to show its copy
            stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
            torch._C._set_only_lift_cpu_tensors(True)
            # the same operations in every build of torch
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            super().__enter__()
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._undo.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known: dict[int, EmulatedTensor] = {}  # by the id of their host's: what works in place returns itself

        def unwrap(leaf: Any) -> Any:
            if not isinstance(leaf, EmulatedTensor):
                if isinstance(leaf, Tensor) and leaf.is_meta:
                    raise NotImplementedError(f"{func}: a tensor was made without its numbers")
                return leaf
            known[id(leaf.host)] = leaf
            return leaf.host

        args, kwargs = _mapped(unwrap, (args, kwargs or {}))
        there = bool(known)
        kwargs.pop("pin_memory", None)
        if kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]).type != "cpu"
            kwargs["device"] = torch.device("cpu")
            if func is torch.ops.aten.scalar_tensor.default:
                # a number assigned by an index: on the host if the tensor is on a GPU
                there = False
        output = func(*args, **kwargs)

        def wrap(leaf: Any) -> Any:
            if id(leaf) in known:
                return known[id(leaf)]
            return EmulatedTensor(leaf) if there and isinstance(leaf, Tensor) else leaf

        return _mapped(wrap, output)


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to the leaves of what an operator takes or returns, faster than pytree does."""
    if type(value) in (tuple, list):
        return type(value)([_mapped(function, part) for part in value])
    if type(value) is dict:
        return {key: _mapped(function, part) for key, part in value.items()}
    return pytree.tree_map(function, value) if isinstance(value, (tuple, list, dict)) else function(value)


def to_gpu(value: Any) -> Any:
    """Turn tensors on the host, however nested, into ones on the GPU."""
    return pytree.tree_map(lambda leaf: EmulatedTensor(leaf) if isinstance(leaf, Tensor) else leaf, value)


def move(model: nn.Module) -> None:
    """Take the parameters and buffers of a model to the GPU, as its ``to()`` would; nothing else."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(EmulatedTensor(parameter.data), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = EmulatedTensor(buffer)
