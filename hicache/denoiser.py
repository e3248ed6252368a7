"""One hooked transformer: what becomes of every call of it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from hicache.config import HiCacheConfig
from hicache.engine import Engine
from hicache.models.generic import BLOCK_ONLY_ARGUMENTS, UNCACHED, StackAdapter
from hicache.schedule import bound, with_speedup
from hicache.stats import Stopwatch
from hicache.tracker import SchedulerClock, TimestepClock

_MAX_CONTEXTS: Final = 16  # calls of one denoiser in one step; more means that the step is not being counted


class Session:
    """What all denoisers of a pipeline share: the clock, the settings of the current run, the stopwatch.

    Args:
        clock: counts runs and steps.
        config: the settings; with ``speedup``, all but the interval.
        speedup: bound to reach; None takes the config's interval.
        backend: of :mod:`hicache_kernels`.
    """

    def __init__(
        self,
        clock: SchedulerClock | TimestepClock,
        config: HiCacheConfig,
        speedup: float | None,
        backend: str,
    ) -> None:
        self.clock = clock
        self.config = config  # of the current run
        self.speedup = speedup
        self.backend = backend
        self.watch = Stopwatch()
        self._run = -1

    def start_run(self, run: int, num_steps: int | None) -> None:
        """Called by every denoiser at its first call in a run."""
        if run == self._run:
            return
        self._run = run
        self.watch.reset()
        if self.speedup is None:
            return
        if num_steps is None:
            raise ValueError(
                "hicache: speedup= needs a scheduler that has its `timesteps` after set_timesteps()"
            )
        self.config = with_speedup(self.config, self.speedup, num_steps)
        reached = bound(self.config, num_steps)
        if round(reached, 2) < round(self.speedup, 2):
            warnings.warn(
                f"hicache: speedup={self.speedup} is out of reach in {num_steps} steps with warmup="
                f"{self.config.warmup}: this run's bound is {reached:.2f}",
                RuntimeWarning,
                stacklevel=6,
            )


class Context:
    """One call of a denoiser in every step: its own history, its own count of steps."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def restart(self, label: str, first_step: int) -> None:
        self.label = label
        # the schedule counts from here: a second denoiser warms up when it starts
        self.first_step = first_step
        self.full_steps = 0
        self.skipped_steps = 0
        self.remembered: list[Any] = []  # rotary embeddings of the last full step


class Denoiser:
    """One hooked transformer: decides about every call, and records or forecasts."""

    def __init__(self, name: str, module: nn.Module, adapter: StackAdapter, session: Session) -> None:
        self.name = name
        self.module = module
        self.adapter = adapter
        self.session = session
        self.contexts: dict[Any, Context] = {}
        self._idle: dict[Any, Context] = {}  # of the last run: their memory is kept for one run
        self._names = tuple(inspect.signature(type(module).forward).parameters)[1:]
        self._run = -1
        self._step = -1
        self._ordinal = 0
        self._current: Context | None = None
        self._local_step = 0
        self._base: Tensor | None = None
        self._slot: Tensor | None = None
        self._recorded = False
        self._warned: set[str] = set()
        self.skipping = False
        self._hooks: list[Any] = []

    def install(self) -> None:
        self._hooks = [
            self.module.register_forward_pre_hook(self._before, with_kwargs=True),
            # also after an exception: nothing of a call may reach the next one
            self.module.register_forward_hook(self._after, always_call=True),
        ]
        self.adapter.install(self)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.adapter.remove()

    def release(self) -> None:
        self._idle.clear()
        for context in self.contexts.values():
            context.engine.release()
            context.remembered.clear()

    @property
    def nbytes(self) -> int:
        return sum(context.engine.nbytes for context in (*self.contexts.values(), *self._idle.values()))

    # What a call of the transformer goes through, in order.

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        self.skipping = False
        self._current = None
        self.adapter.end()
        if torch.is_grad_enabled() and (module.training or _requires_grad(named)):
            self._warn("is called for its gradients: it runs uncached")
            return None
        clock = self.session.clock
        clock.tick(module, named)
        if self._run != clock.run:
            self._start_run()
        if self._step != clock.step:
            self._step, self._ordinal = clock.step, 0
        else:
            self._ordinal += 1
        if self._ordinal >= _MAX_CONTEXTS:
            self._warn(
                f"was called more than {_MAX_CONTEXTS} times without a step of the scheduler: these calls "
                "run uncached; is this the scheduler of the run? (see apply(..., scheduler=...))"
            )
            return None
        dropped = {name for name in BLOCK_ONLY_ARGUMENTS if named.get(name) is not None}
        self.adapter.begin(checked=not dropped)
        context = self._context(named)
        self._current = context
        self._local_step = clock.step - context.first_step
        self._recorded = False
        if context.engine.is_full(self._local_step):
            return None
        self.skipping = True
        if not dropped:
            return None
        return (
            tuple(None if name in dropped else value for name, value in zip(self._names, args, strict=False)),
            {name: None if name in dropped else value for name, value in kwargs.items()},
        )

    @property
    def remembered(self) -> list[Any]:
        return [] if self._current is None else self._current.remembered

    def base(self, hidden: Tensor) -> None:
        context = self._current
        if context is None:
            return
        started = self.session.watch.start(hidden.device)
        with torch.no_grad():
            [slot] = context.engine.open([hidden.shape], hidden.dtype, hidden.device)
            # A copy: blocks may work in place. The inbox has room for it unless it would round.
            exact = torch.promote_types(slot.dtype, hidden.dtype) == slot.dtype
            self._base = slot.copy_(hidden) if exact else hidden.detach().clone()
            self._slot = slot
        self.session.watch.stop(started)

    def result(self, hidden: Tensor) -> None:
        context, base, slot = self._current, self._base, self._slot
        self._base = self._slot = None
        if context is None or base is None or slot is None:
            return
        if hidden.shape != base.shape:
            self._warn(
                f"gives its head a hidden state {tuple(hidden.shape)} that is not of the shape of its first "
                f"block's, {tuple(base.shape)}: this call runs uncached"
            )
            context.engine.reset(num_steps=context.engine.num_steps)
            self._recorded = True
            return
        started = self.session.watch.start(hidden.device)
        with torch.no_grad():
            torch.sub(hidden.to(slot.device), base, out=slot)
        context.engine.commit(self._local_step)
        self.session.watch.stop(started)
        self._recorded = True

    def forecast(self, base: Tensor) -> Tensor:
        assert self._current is not None
        started = self.session.watch.start(base.device)
        with torch.no_grad():
            out = self._current.engine.gated_sum(self._local_step, base)
        self.session.watch.stop(started)
        return out

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        context, skipping = self._current, self.skipping
        self._current = self._base = self._slot = None
        self.skipping = False
        iterated = self.adapter.iterated
        self.adapter.end()
        if output is None:  # the call raised
            self.session.clock.abort()
            return
        if context is None:
            return
        if skipping:
            context.skipped_steps += 1
            return
        context.full_steps += 1
        if not iterated:
            raise RuntimeError(
                f"hicache: {type(module).__name__} runs without iterating over its blocks, so they cannot be "
                f"skipped; {UNCACHED}"
            )
        if not self._recorded:
            raise RuntimeError(
                f"hicache: {type(module).__name__} ran without its blocks or its head being seen, so "
                f"nothing could be recorded; {UNCACHED}"
            )

    # Contexts and runs.

    def _start_run(self) -> None:
        clock = self.session.clock
        self._run = clock.run
        self._step = -1
        self._idle = {key: c for key, c in self.contexts.items() if c.full_steps}
        self.contexts = {}
        self.session.start_run(clock.run, clock.num_steps)

    def _context(self, named: Mapping[str, Any]) -> Context:
        key = (self._ordinal, *_signature(named))
        context = self.contexts.get(key)
        if context is None:
            session = self.session
            context = self._idle.pop(key, None)
            label = f"{self.name}[{self._ordinal}]"
            twins = sum(c.label.split(" ")[0] == label for c in self.contexts.values())
            label += f" #{twins + 1}" if twins else ""
            if context is None:
                # other shapes than in the last run: that memory will not be wanted
                self._idle = {k: c for k, c in self._idle.items() if k[0] != self._ordinal}
                context = Context(Engine(session.config, session.backend))
            context.restart(label, self._step)
            num_steps = session.clock.num_steps
            left = None if num_steps is None else num_steps - self._step
            context.engine.reset(session.config, left)
            self.contexts[key] = context
        return context

    def _warn(self, what: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f"hicache: {type(self.module).__name__} {what}", RuntimeWarning, stacklevel=4)


def _requires_grad(named: Mapping[str, Any]) -> bool:
    return any(isinstance(value, Tensor) and value.requires_grad for value in named.values())


def _signature(named: Mapping[str, Any]) -> tuple[Any, ...]:
    """Shapes, dtypes and devices of the tensors in a call; a context's history fits no others."""
    seen: list[Any] = []
    for name, value in named.items():
        tensors = value if isinstance(value, (list, tuple)) else (value,)
        seen.extend((name, t.shape, t.dtype, t.device) for t in tensors if isinstance(t, Tensor))
    return tuple(seen)
