"""Calls of modules: watched, left out, and found on the stack (torch 2.11 – 2.13)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any, Final

import torch
from torch import nn

from hicache.mixin import mix_in

# what the compiler passes by, while what it calls is compiled as if it were not there
passed_by: Final = partial(torch.compiler.disable, recursive=False)

_GUARD: Final = "_hicache_guard"


@passed_by
def _guarded(call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
    try:
        _, make = module.__dict__.get(_GUARD, (None, None))
        return call(*args, **kwargs) if make is None else make(call, args, kwargs)
    except BaseException:
        failed, _ = module.__dict__.get(_GUARD, (None, None))
        if failed is not None:
            failed()
        raise


def _own(module: nn.Module, name: str) -> Callable[..., Any]:
    """A method as the module's class has it, without what is mixed in below."""
    owner = super(_GuardedCalls, module) if isinstance(module, _GuardedCalls) else module
    found: Callable[..., Any] = getattr(owner, name)
    return found


class _GuardedCalls(nn.Module):
    """Mixed into a module's class by :func:`guard_calls`.

    Both ways into a module: by itself, and by what ``torch.compile`` made of it. What has been compiled holds
    on to these functions after they are gone from the class.
    """

    @passed_by
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = _own(self, "__call__")
        if self._compiled_call_impl is None:  # goes by _call_impl, below
            return call(*args, **kwargs)
        return _guarded(call, self, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # its hooks reach into the pipeline, and a copy's would still reach into the original
        raise TypeError("hicache: a cached transformer cannot be copied or pickled; call remove() first")

    @passed_by
    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        return _guarded(_own(self, "_call_impl"), self, args, kwargs)


def guard_calls(
    module: nn.Module, failed: Callable[[], None], make: Callable[..., Any] | None = None
) -> Callable[[], None]:
    """Call ``failed()`` when a call of a module ends in any ``BaseException``; returns what undoes it.

    Forward hooks with ``always_call`` are called for an ``Exception`` only (``Module._call_impl``). With
    ``make``, ``make(call, args, kwargs)`` makes the calls or does not, outside of all hooks; it is
    :data:`passed_by`. A call by one of both ways goes by the other one, too.
    """
    return mix_in(module, _GuardedCalls, _GUARD, (torch.compiler.disable(failed), make))


def original_module(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile(module)`` wraps (``OptimizedModule._orig_mod``); else the module."""
    original = getattr(module, "_orig_mod", module)
    assert isinstance(original, nn.Module)
    return original


def is_compiled(module: nn.Module) -> bool:
    """Whether it or one of its parts was compiled: ``part.compile()`` (``_compiled_call_impl``) or
    ``torch.compile(part)`` in its place (``_orig_mod``)."""
    return any(
        part._compiled_call_impl is not None or "_orig_mod" in part._modules for part in module.modules()
    )


def inside_compiled_call(module: nn.Module) -> bool:
    """Whether a module that is called is compiled as a whole: what it calls is, whatever the stance.

    By itself (``_compiled_call_impl``), or by a callable on the stack, whose frame is ``compile_wrapper`` of
    ``torch/_dynamo/eval_frame.py``.
    """
    if module._compiled_call_impl is not None:
        return True
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "compile_wrapper" and code.co_filename.endswith("eval_frame.py"):
            return True
        frame = frame.f_back
    return False


def is_calling(thread: int, module: nn.Module) -> bool:
    """Whether a thread is in a call of a module (``_call_impl``, ``__call__``), or in a compiled one of any.

    Compiled calls go on in functions called ``torch_dynamo_resume_in_...``. A thread that goes on while its
    frames are looked at may show one that is none (Python 3.11): it is in a call, then, and asked again.
    """
    frame: Any = sys._current_frames().get(thread)
    while frame is not None:
        if not isinstance(frame, FrameType):
            return True
        name = frame.f_code.co_name
        if name.startswith("torch_dynamo_resume") or name == "compile_wrapper":
            return True
        if name in ("_call_impl", "__call__") and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False


def running_calls() -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """The first two arguments of every ``__call__`` of Python that goes on, and its variables, inside out.

    None for one that is gone from its variables.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__call__" and code.co_filename != __file__:  # not the guards above
            variables = frame.f_locals
            names = code.co_varnames[: min(2, code.co_argcount)]
            yield list(map(variables.get, names)), variables
        frame = frame.f_back
