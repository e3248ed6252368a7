"""One hooked transformer: what becomes of every call of it."""

from __future__ import annotations

import functools
import inspect
import operator
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from hicache.ahead import Ahead
from hicache.config import HiCacheConfig
from hicache.engine import Engine
from hicache.granularity import Granularity, Module, Stack, Unfit
from hicache.models.features import ModuleAdapter
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
        self.ahead = Ahead()

    def restart(self, label: str, first_step: int) -> None:
        self.label = label
        # the schedule counts from here: a second denoiser warms up when it starts
        self.first_step = first_step
        self.full_steps = 0
        self.skipped_steps = 0
        self.planned = 0  # bytes of history it wants in module granularity, from its first full step on
        self.remembered: list[Any] = []  # rotary embeddings of the last full step
        self.ahead.restart()


@dataclass(frozen=True)
class Policy:
    """What a user wants cached: ``"module"``, ``"stack"``, or ``"auto"``: module if it fits the budget."""

    granularity: str
    memory_budget: int  # bytes


class Denoiser:
    """One hooked transformer: decides about every call, and records or forecasts.

    Args:
        name: the pipeline's for it.
        module: the transformer.
        adapter: hooks its blocks and its head.
        modules: knows what its modules compute; None where nobody does.
        policy: what to cache.
        session: what all denoisers of the pipeline share.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        adapter: StackAdapter,
        modules: ModuleAdapter | None,
        policy: Policy,
        session: Session,
    ) -> None:
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
        self._named: Mapping[str, Any] = {}
        self._recorded = False
        self._policy = policy
        self._stack = Stack()
        self._modules = None if modules is None or policy.granularity == "stack" else Module(modules)
        self._why_stack = (
            "asked for"
            if policy.granularity == "stack"
            else f"no adapter knows the modules of {adapter.name}"
        )
        self.granularity: Granularity = self._modules or self._stack
        self._watched: list[nn.Module] = []  # modules whose outputs are recorded
        self._unwatch: list[Callable[[], None]] = []
        self._device = torch.device("cpu")  # of the hidden state of the current call
        self._warned: set[str] = set()
        self.skipping = False
        self._undo: list[Callable[[], None]] = []

    def install(self) -> None:
        self._undo = [
            self.module.register_forward_pre_hook(self._before, with_kwargs=True).remove,
            # also after an exception: nothing of a call may reach the next one
            self.module.register_forward_hook(self._after, always_call=True).remove,
        ]
        self.adapter.install(self)
        if self._modules is not None:
            self._undo += self._modules.adapter.hooks()
            self._watch(self._modules)

    def remove(self) -> None:
        self._watch(None)
        while self._undo:
            self._undo.pop()()
        self.adapter.remove()

    def release(self) -> None:
        self._idle.clear()
        for context in self.contexts.values():
            context.engine.release()
            context.remembered.clear()
            context.ahead.forget()

    @property
    def choice(self) -> str:
        """What is cached of the current run's calls, and why."""
        if self.granularity is self._stack:
            return f"stack: {self._why_stack}"
        planned = sum(context.planned for context in self.contexts.values())
        if self._policy.granularity == "module":
            return f"module: asked for; {planned:,} bytes"
        return f"module: {planned:,} bytes fit memory_budget={self._policy.memory_budget:,}"

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
        self._named = named
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

    def base(self, hidden: Tensor, call: Mapping[str, Any]) -> None:
        context = self._current
        if context is None:
            return
        started = self.session.watch.start(hidden.device)
        with torch.no_grad():
            self._device = hidden.device
            self._choose(context, hidden, call)
            self.granularity.open(context.engine, hidden, call, self._named)
        self.session.watch.stop(started)

    def result(self, hidden: Tensor) -> None:
        context, granularity = self._current, self.granularity
        if context is None or not granularity.opened:
            return
        self._recorded = True
        started = self.session.watch.start(hidden.device)
        try:
            with torch.no_grad():
                granularity.close(hidden)
        except Unfit as error:
            context.engine.reset(num_steps=context.engine.num_steps)
            if isinstance(granularity, Stack):
                self._warn(f"{error}: this call runs uncached")
                return
            base = granularity.base
            self._warn(f"{error}; its stack is cached instead")
            self._fall_back(f"{self.adapter.name} {error}")
            self._modules = None
            self._watch(None)
            if base is not None:  # this step's stack can still be recorded: as if it had been from the start
                with torch.no_grad():
                    self._stack.open(context.engine, base, {}, {})
                self.result(hidden)
            return
        context.engine.commit(self._local_step)
        if isinstance(granularity, Module):
            with torch.no_grad():
                timesteps = self.session.clock.timesteps
                granularity.look_ahead(context.ahead, self._coming(context), timesteps, hidden)
        self.session.watch.stop(started)

    def forecast(self, base: Tensor, call: Mapping[str, Any]) -> Tensor:
        context = self._current
        assert context is not None
        started = self.session.watch.start(base.device)
        with torch.no_grad():
            out = self._forecast(context, base, call)
        self.session.watch.stop(started)
        return out

    def _forecast(self, context: Context, base: Tensor, call: Mapping[str, Any]) -> Tensor:
        if isinstance(self.granularity, Stack):
            return self.granularity.forecast(context.engine, self._local_step, base)
        adapter = self.granularity.adapter
        foreseen = context.ahead.gates(adapter, self._step, call, self._named)
        return self.granularity.forecast(context.engine, self._local_step, base, call, self._named, foreseen)

    def _coming(self, context: Context) -> range:
        """The skipped steps before this context's next full one."""
        limit = self.session.clock.num_steps
        last = self._step + 1
        while (limit is None or last < limit) and not context.engine.is_full(last - context.first_step):
            last += 1
        return range(self._step + 1, last)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        context, skipping = self._current, self.skipping
        self._current = None
        self._named = {}
        self.skipping = False
        self.granularity.end()
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

    # What is cached.

    def _choose(self, context: Context, hidden: Tensor, call: Mapping[str, Any]) -> None:
        """Decide at a context's first full step whether its modules can be cached, and watch those of now."""
        if self._modules is None or self.granularity is self._stack:
            return
        if not context.planned:
            adapter = self._modules.adapter
            shapes = [hidden.shape] * adapter.terms(call)
            context.planned = context.engine.planned_nbytes(shapes, hidden.dtype)
            refusal = adapter.refusal(call)
            if refusal is not None:
                refusal = f"{self.adapter.name}: {refusal}"
            elif self._policy.granularity == "auto":
                refusal = self._over_budget(context, hidden.device)
            if refusal is not None:
                self._fall_back(refusal)
                return
        self._watch(self._modules)

    def _over_budget(self, context: Context, device: torch.device) -> str | None:
        """Why the histories of this run's contexts must not be held; None when they may."""
        planned = sum(other.planned for other in self.contexts.values())
        budget = self._policy.memory_budget
        # Where the second context is too much, the first has been recorded in vain; in every such run anew,
        # as nothing of an earlier run may change the picture.
        if planned > budget:
            return f"its modules' history, {planned:,} bytes or more, is over memory_budget={budget:,}"
        free = _free_bytes(device)
        wanted = context.planned - context.engine.nbytes
        if free is not None and wanted > free:
            why = f"its modules' history wants {wanted:,} bytes and {free:,} are free on {device}"
            self._warn(f"is cached as a stack: {why}")
            return why
        return None

    def _fall_back(self, reason: str) -> None:
        """Cache the stack for the rest of the run, in every context."""
        if self._policy.granularity == "module":
            raise RuntimeError(
                f"hicache: granularity='module' cannot be had: {reason}; use granularity='stack' or 'auto'"
            )
        self.granularity.end()
        self.granularity, self._why_stack = self._stack, reason
        for context in self.contexts.values():
            context.engine.release()

    def _watch(self, modules: Module | None) -> None:
        """Record the outputs of a family's modules; LoRA may have put others in their places since."""
        watched = [] if modules is None else [feature.module for feature in modules.adapter.features()]
        if len(watched) == len(self._watched) and all(map(operator.is_, watched, self._watched)):
            return
        for undo in self._unwatch:
            undo()
        self._watched = watched
        self._unwatch = [
            module.register_forward_hook(functools.partial(self._feature, index)).remove
            for index, module in enumerate(watched)
        ]

    def _feature(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        if self._current is None or self.skipping or not isinstance(self.granularity, Module):
            return
        started = self.session.watch.start(self._device)
        with torch.no_grad():
            self.granularity.add(index, output)
        self.session.watch.stop(started)

    # Contexts and runs.

    def _start_run(self) -> None:
        clock = self.session.clock
        self._run = clock.run
        self._step = -1
        self._idle = {key: c for key, c in self.contexts.items() if c.full_steps}
        self.contexts = {}
        if self._modules is not None:
            self._modules.restart()
        self.granularity = self._modules or self._stack
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


def _free_bytes(device: torch.device) -> int | None:
    """Bytes that can be allocated on a GPU; None for other devices, which do not tell."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def _requires_grad(named: Mapping[str, Any]) -> bool:
    return any(isinstance(value, Tensor) and value.requires_grad for value in named.values())


def _signature(named: Mapping[str, Any]) -> tuple[Any, ...]:
    """Shapes, dtypes and devices of the tensors in a call; a context's history fits no others."""
    seen: list[Any] = []
    for name, value in named.items():
        tensors = value if isinstance(value, (list, tuple)) else (value,)
        seen.extend((name, t.shape, t.dtype, t.device) for t in tensors if isinstance(t, Tensor))
    return tuple(seen)
