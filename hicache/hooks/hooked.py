"""A denoiser, watched: what the runtime uses of it, whatever of its inside is looked at."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from hicache import compat
from hicache.step_plan import RunningCall, SkippedStep

# the hidden state that would leave the last block on a skipped step, of the first block's arguments by name
Forecast = Callable[[SkippedStep, Tensor, Mapping[str, Any]], Tensor]


class Before(Protocol):
    """A call of a module begins; returns its arguments, or None for those that it has."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], /) -> Any: ...


class After(Protocol):
    """A call of a module has ended, and gives ``output``."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any, /) -> None: ...


class HookedModule:
    """A denoiser and its running call; subclasses say how the plan of that is carried out.

    Args:
        module: the denoiser. It is only looked at until :meth:`watch` and :meth:`install`.
        may_leave_out: whether a plan may leave out a call of it as a whole.
    """

    #: Lists of its blocks, which may be captured one by one.
    lists: Sequence[nn.ModuleList] = ()
    #: Lists whose modules make what is added between blocks.
    side_lists: Any = ()
    #: Whether nothing of it has to be checked at a first skipped step.
    verified = True

    def __init__(self, module: nn.Module, may_leave_out: bool = False) -> None:
        self.module = module
        self.may_leave_out = may_leave_out
        self.name = type(module).__name__
        self.call = RunningCall()
        self._inside: set[int] = set()  # threads that are in a call
        self._before: Before | None = None
        self._after: After | None = None

    def watch(self, before: Before, after: After, failed: Callable[[], None]) -> list[Callable[[], None]]:
        """Watch its calls; returns what undoes it.

        Calls that may be left out are watched from outside of all hooks of the denoiser: none of them runs
        where the plan is to leave a call out, so that offloaded or sharded weights stay where they are, and
        what ``torch.compile`` made of it is not entered. Others are watched by hooks, after those that were
        there before: what they make of a call's arguments is seen.

        Args:
            before: a call begins.
            after: it has ended, having returned something.
            failed: it has ended in any ``BaseException``: nothing of it may reach the next one.
        """
        if self.may_leave_out:
            self._before, self._after = before, after
            return [compat.guard_calls(self.module, failed, self._make)]
        return [
            compat.guard_calls(self.module, failed),
            self.module.register_forward_pre_hook(before, with_kwargs=True).remove,
            self.module.register_forward_hook(after).remove,
        ]

    @compat.passed_by
    def _make(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the denoiser, by whomever; ``call`` makes it."""
        thread = threading.get_ident()
        if thread in self._inside:  # there are two ways into a module, and one goes by the other
            return call(*args, **kwargs)
        assert self._before is not None
        assert self._after is not None
        self._inside.add(thread)
        try:
            args, kwargs = self._before(self.module, args, kwargs) or (args, kwargs)
            plan = self.call.left_out
            output = call(*args, **kwargs) if plan is None else plan.output
            self._after(self.module, args, output)
            return output
        finally:
            self._inside.discard(thread)

    def install(self, forecast: Forecast, embedder: nn.Module | None = None) -> None:
        """Hook what is inside. :meth:`remove` undoes it exactly.

        Args:
            forecast: makes the sum of a skipped step.
            embedder: the child whose output skipped steps may have at hand.
        """

    def remove(self) -> None:
        """Leave the inside as it was before :meth:`install`."""
        self.end()

    def refresh(self) -> None:
        """A full step begins: parts of it may have been put in others' places since."""

    def end(self) -> None:
        """A call has ended, or never came to its end: let go of its tensors."""
        self.call.clear()

    def fingerprint(self) -> list[Any]:
        """What of it is not weights: equal as long as nobody puts parts of it in others' places."""
        return [
            part
            for module in self.module.modules()
            for part in (
                id(module),
                id(module.__dict__.get("forward")),
                id(module.__dict__.get("processor")),
                type(module.__dict__.get("processor")),  # an id may be that of one long gone
                compat.processor_attention_backend(module.__dict__.get("processor")),
                *compat.hook_keys(module),
            )
        ]
