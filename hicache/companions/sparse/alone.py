"""Sparse full steps without HiCache: every step is full."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hicache.arguments import argument_names
from hicache.companion import Companions, FullCall, companions
from hicache.companions.sparse.settings import SparseAttention
from hicache.hooks.step_clock import SchedulerClock, TimestepClock
from hicache.pipeline import HANDLE_ATTRIBUTES, find_denoisers, find_scheduler

if TYPE_CHECKING:
    from typing_extensions import Self


class _Context:
    """One call of a denoiser in every step of a run."""

    full_steps = 0


class _Counted:
    """One denoiser whose calls are counted.

    Args:
        module: the denoiser.
        companions: take part in its steps.
        clock: counts the pipeline's steps.
        warmup: see :func:`attach`.
    """

    def __init__(
        self, module: nn.Module, companions: Companions, clock: SchedulerClock | TimestepClock, warmup: int
    ) -> None:
        self._module = module
        self.companions = companions
        self._clock = clock
        self._warmup = warmup
        self._names = argument_names(module)
        self._at = (-1, -1)  # run and step
        self._ordinal = 0
        self._contexts: dict[int, _Context] = {}  # by the order of calls in a step
        self._undo: list[Callable[[], None]] = []

    def install(self) -> None:
        self.companions.install()
        self._undo = [
            self.companions.remove,
            self._module.register_forward_pre_hook(self._before, with_kwargs=True).remove,
            self._module.register_forward_hook(self._after, always_call=True).remove,
        ]

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.companions.end()
        if torch.is_grad_enabled() and module.training:
            return
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        self._clock.tick(module, named)
        at = self._clock.run, self._clock.step
        if at[0] != self._at[0]:
            self._contexts.clear()
        self._ordinal = 0 if at != self._at else self._ordinal + 1
        self._at = at
        context = self._contexts.setdefault(self._ordinal, _Context())
        self.companions.begin(FullCall(context, context.full_steps, self._warmup, named))
        context.full_steps += 1

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.companions.end()
        if output is None:  # it raised
            self._clock.abort()


class Attached:
    """A pipeline with sparse steps: leave the ``with`` block or call :meth:`remove` to get it back."""

    def __init__(self, denoisers: list[_Counted], clock: SchedulerClock | TimestepClock) -> None:
        self._denoisers = denoisers
        self._clock = clock

    def install(self) -> None:
        """Hook all denoisers, or none where one fails."""
        try:
            for denoiser in self._denoisers:
                denoiser.install()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Leave the pipeline as it was. Calling it again does nothing."""
        for denoiser in self._denoisers:
            denoiser.remove()
        self._denoisers.clear()
        self._clock.detach()

    @property
    def nbytes(self) -> int:
        """Bytes that columns and remainders hold."""
        return sum(denoiser.companions.nbytes for denoiser in self._denoisers)

    def __str__(self) -> str:
        return "; ".join(denoiser.companions.describe() for denoiser in self._denoisers) or "removed"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def attach(
    pipe: Any, settings: SparseAttention | None = None, *, warmup: int = 3, scheduler: Any = None
) -> Attached:
    """Make the attention of a pipeline's steps sparse, and cache nothing else.

    The calls of a step are told apart by their order. With HiCache, pass ``sparse=`` to its ``apply()``.

    Args:
        pipe: as for :func:`hicache.fast.apply`, of a model of FLUX or Wan.
        settings: None for the defaults.
        warmup: steps that a run begins with, all dense.
        scheduler: as for :func:`hicache.fast.apply`.

    Returns:
        Attached: its ``remove()`` restores everything.

    Raises:
        TypeError, ValueError: bad arguments, or a pipeline that HiCache caches at the moment. The pipeline is
            left as it was.
    """
    modules = find_denoisers(pipe)
    for module in modules.values():
        _check_uncached(module)
    source = find_scheduler(pipe, scheduler)
    found = companions(modules, settings=SparseAttention() if settings is None else settings)
    clock = TimestepClock() if source is None else SchedulerClock(source())
    attached = Attached([_Counted(modules[name], found[name], clock, warmup) for name in modules], clock)
    attached.install()
    return attached


def _check_uncached(module: nn.Module) -> None:
    for owner, attribute in HANDLE_ATTRIBUTES.items():
        if attribute in module.__dict__:
            raise ValueError(
                f"hicache: {owner} caches this {type(module).__name__}: pass sparse= to its apply() instead"
            )
