"""``hicache.fast.apply(pipe)``: cache any diffusers pipeline, or a bare transformer, in one line.

>>> import hicache.fast                                        # doctest: +SKIP
>>> with hicache.fast.apply(pipe) as handle:                   # doctest: +SKIP
...     image = pipe("a red ring on blue").images[0]
>>> print(handle.stats)                                        # doctest: +SKIP
"""

from __future__ import annotations

import inspect
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final

import torch
from torch import Tensor, nn

from hicache.config import HiCacheConfig
from hicache.engine import Engine
from hicache.models.generic import BLOCK_ONLY_ARGUMENTS, StackAdapter
from hicache.schedule import bound, with_speedup
from hicache.tracker import SchedulerClock, TimestepClock
from hicache_kernels import BACKENDS, backend_status

GRANULARITIES: Final = ("auto", "stack")
_MAX_CONTEXTS: Final = 16  # calls of one denoiser in one step; more means that the step is not being counted
_ATTRIBUTE: Final = "_hicache_handle"


@dataclass
class ContextStats:
    """One context: one call of a denoiser in every step (conditional, unconditional, …)."""

    full_steps: int
    skipped_steps: int
    history_bytes: int


@dataclass
class Stats:
    """What the cache did in the current run, or in the last one if none is going on."""

    config: HiCacheConfig  # as used: with speedup=, the interval it chose
    granularity: str
    backend: str
    contexts: dict[str, ContextStats] = field(default_factory=dict)
    history_bytes: int = 0  # held, all contexts together, those the run no longer uses included
    cache_ms: float = 0.0  # time in recording and forecasting

    @property
    def full_steps(self) -> int:
        """Full steps of the run: of each denoiser's longest context."""
        return sum(context.full_steps for context in self._longest)

    @property
    def skipped_steps(self) -> int:
        """Skipped steps of the run: of each denoiser's longest context."""
        return sum(context.skipped_steps for context in self._longest)

    @property
    def bound(self) -> float:
        """Steps / full steps: the speed-up if skipped steps took no time."""
        return (self.full_steps + self.skipped_steps) / max(1, self.full_steps)

    @property
    def _longest(self) -> list[ContextStats]:
        """Of every denoiser the context that had most steps: denoisers take turns, contexts share steps."""
        longest: dict[str, ContextStats] = {}
        for label, context in self.contexts.items():
            denoiser = label.split("[")[0]
            held = longest.setdefault(denoiser, context)
            if context.full_steps + context.skipped_steps > held.full_steps + held.skipped_steps:
                longest[denoiser] = context
        return list(longest.values())

    def __str__(self) -> str:
        lines = [
            f"{self.granularity} granularity, {self.backend} backend, {self.config}",
            *(
                f"  {name}: {context.full_steps} full, {context.skipped_steps} skipped, "
                f"{context.history_bytes:,} bytes"
                for name, context in self.contexts.items()
            ),
            f"  bound {self.bound:.2f}x, cache {self.cache_ms:.2f} ms",
        ]
        return "\n".join(lines)


class _Stopwatch:
    """Milliseconds spent in the cache, without waiting for a GPU until they are asked for."""

    def __init__(self) -> None:
        self._ms = 0.0
        self._events: list[tuple[Any, Any]] = []

    def start(self, device: torch.device) -> Any:
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self, started: Any) -> None:
        if isinstance(started, float):
            self._ms += (time.perf_counter() - started) * 1e3
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append((started, event))

    def read(self) -> float:
        for started, stopped in self._events:
            stopped.synchronize()
            self._ms += started.elapsed_time(stopped)
        self._events.clear()
        return self._ms

    def reset(self) -> None:
        self._ms = 0.0
        self._events.clear()


class _Context:
    """One call of a denoiser in every step: its own history, its own count of steps."""

    def __init__(self, label: str, engine: Engine, first_step: int) -> None:
        self.label = label
        self.engine = engine
        self.restart(first_step)

    def restart(self, first_step: int) -> None:
        self.first_step = (
            first_step  # the schedule counts from here: a second denoiser warms up when it starts
        )
        self.full_steps = 0
        self.skipped_steps = 0


class _Denoiser:
    """One hooked transformer: decides about every call, and records or forecasts."""

    def __init__(self, name: str, module: nn.Module, adapter: StackAdapter, handle: Handle) -> None:
        self.name = name
        self.module = module
        self.adapter = adapter
        self.handle = handle
        self.contexts: dict[Any, _Context] = {}
        self._idle: dict[Any, _Context] = {}  # of the last run: their memory is kept for one run
        self._names = tuple(inspect.signature(type(module).forward).parameters)[1:]
        self._run = -1
        self._step = -1
        self._ordinal = 0
        self._current: _Context | None = None
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
        self.module.__dict__[_ATTRIBUTE] = self.handle

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.adapter.remove()
        self.module.__dict__.pop(_ATTRIBUTE, None)

    def release(self) -> None:
        self._idle.clear()
        for context in self.contexts.values():
            context.engine.release()

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
        clock = self.handle.clock
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

    def base(self, hidden: Tensor) -> None:
        context = self._current
        if context is None:
            return
        started = self.handle.watch.start(hidden.device)
        with torch.no_grad():
            [slot] = context.engine.open([hidden.shape], hidden.dtype, hidden.device)
            # A copy: blocks may work in place. The inbox has room for it unless it would round.
            exact = torch.promote_types(slot.dtype, hidden.dtype) == slot.dtype
            self._base = slot.copy_(hidden) if exact else hidden.detach().clone()
            self._slot = slot
        self.handle.watch.stop(started)

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
        started = self.handle.watch.start(hidden.device)
        with torch.no_grad():
            torch.sub(hidden.to(slot.device), base, out=slot)
        context.engine.commit(self._local_step)
        self.handle.watch.stop(started)
        self._recorded = True

    def forecast(self, base: Tensor) -> Tensor:
        assert self._current is not None
        started = self.handle.watch.start(base.device)
        with torch.no_grad():
            out = self._current.engine.gated_sum(self._local_step, base)
        self.handle.watch.stop(started)
        return out

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        context, skipping = self._current, self.skipping
        self._current = self._base = self._slot = None
        self.skipping = False
        iterated = self.adapter.iterated
        self.adapter.end()
        if output is None:  # the call raised
            self.handle.clock.abort()
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
                "skipped; call Handle.remove() to run it uncached"
            )
        if not self._recorded:
            raise RuntimeError(
                f"hicache: {type(module).__name__} ran without its blocks or its head being seen, so "
                "nothing could be recorded; call Handle.remove() to run it uncached"
            )

    # Contexts and runs.

    def _start_run(self) -> None:
        clock = self.handle.clock
        self._run = clock.run
        self._step = -1
        self._idle = {key: c for key, c in self.contexts.items() if c.full_steps}
        self.contexts = {}
        self.handle.start_run(clock.run, clock.num_steps)

    def _context(self, named: Mapping[str, Any]) -> _Context:
        key = (self._ordinal, *_signature(named))
        context = self.contexts.get(key)
        if context is None:
            handle = self.handle
            context = self._idle.pop(key, None)
            label = f"{self.name}[{self._ordinal}]"
            twins = sum(c.label.split(" ")[0] == label for c in self.contexts.values())
            label += f" #{twins + 1}" if twins else ""
            if context is None:
                # other shapes than in the last run: that memory will not be wanted
                self._idle = {k: c for k, c in self._idle.items() if k[0] != self._ordinal}
                context = _Context(label, Engine(handle.config_in_use, handle.backend), self._step)
            context.label = label
            context.restart(self._step)
            num_steps = handle.clock.num_steps
            left = None if num_steps is None else num_steps - self._step
            context.engine.reset(handle.config_in_use, left)
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


class Handle:
    """A cached pipeline: leave the ``with`` block or call :meth:`remove` to get it back as it was."""

    def __init__(
        self,
        clock: SchedulerClock | TimestepClock,
        config: HiCacheConfig,
        speedup: float | None,
        backend: str,
    ) -> None:
        self.clock = clock
        self.config = config
        self.speedup = speedup
        self.backend = backend
        self.config_in_use = config
        self.watch = _Stopwatch()
        self._run = -1
        self._denoisers: list[_Denoiser] = []
        self._final: Stats | None = None

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
        self.config_in_use = with_speedup(self.config, self.speedup, num_steps)
        reached = bound(self.config_in_use, num_steps)
        if round(reached, 2) < round(self.speedup, 2):
            warnings.warn(
                f"hicache: speedup={self.speedup} is out of reach in {num_steps} steps with warmup="
                f"{self.config.warmup}: this run's bound is {reached:.2f}",
                RuntimeWarning,
                stacklevel=6,
            )

    def restart(self) -> None:
        """Start a new run at the next call.

        A pipeline does this by itself. In a loop of your own without a scheduler, a run that goes on in the
        direction the last one's timesteps ran (that one stopped early, this one starts later) looks like the
        same run: call this before it.
        """
        self.clock.restart()

    @property
    def active(self) -> bool:
        """Whether the pipeline is cached."""
        return bool(self._denoisers)

    @property
    def stats(self) -> Stats:
        """Full and skipped steps by context, bytes held and cache milliseconds of the current or last run.

        After :meth:`remove`, as they stood then.
        """
        if self._final is not None:
            return self._final
        contexts = {
            context.label: ContextStats(context.full_steps, context.skipped_steps, context.engine.nbytes)
            for denoiser in self._denoisers
            for context in denoiser.contexts.values()
        }
        held = sum(denoiser.nbytes for denoiser in self._denoisers)
        return Stats(self.config_in_use, "stack", self.backend, contexts, held, self.watch.read())

    def release(self) -> None:
        """Free the memory of all histories. The pipeline stays cached: its next run allocates anew."""
        for denoiser in self._denoisers:
            denoiser.release()

    def remove(self) -> None:
        """Leave the pipeline exactly as :func:`apply` found it. Calling it again does nothing."""
        if self._final is not None:
            return
        self._final = self.stats
        for denoiser in self._denoisers:
            denoiser.remove()
            denoiser.release()
        self._denoisers.clear()
        self.clock.detach()

    def __enter__(self) -> Handle:
        if not self.active:
            raise RuntimeError("hicache: this handle was removed; call apply() for a new one")
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        # its hooks reach into the pipeline, and a copy's would still reach into the original
        raise TypeError("hicache: a cached pipeline cannot be copied or pickled; call remove() first")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def apply(
    pipe: Any,
    config: HiCacheConfig | None = None,
    *,
    speedup: float | None = None,
    scheduler: Any = None,
    granularity: str = "auto",
    backend: str = "auto",
) -> Handle:
    """Cache a diffusers pipeline, or a bare transformer driven by a loop of your own.

    Every denoiser of the pipeline is hooked (``transformer``, ``transformer_2``, …), every call of it inside
    a step has its own history (classifier-free guidance), and every run starts fresh. Applying again replaces
    the settings.

    Args:
        pipe: a ``DiffusionPipeline``, any object with ``transformer`` and ``scheduler``, or a transformer
            module.
        config: the cache's settings; the defaults of :class:`HiCacheConfig` when None.
        speedup: bound to reach, steps / full steps, >= 1: picks the interval from each run's own step count,
            in place of the config's. A pipeline that changes denoisers in a run warms up with each of them,
            and stays below.
        scheduler: what counts the steps, where it is not ``pipe.scheduler``. A bare transformer without one
            counts by its ``timestep`` argument.
        granularity: what is cached: ``"stack"``, the residual of all blocks together; ``"auto"`` chooses.
        backend: of :mod:`hicache_kernels`: ``"auto"`` or a name; a name never falls back silently.

    Returns:
        Handle: its ``remove()`` restores everything.

    Raises:
        TypeError, ValueError: bad arguments, or a pipeline with nothing to hook. The pipeline is left as it
            was.
    """
    config = _check_config(config)
    _check_choice("granularity", granularity, GRANULARITIES)
    _check_choice("backend", backend, ("auto", *BACKENDS))
    modules = _denoisers(pipe)
    for module in modules.values():
        _check_backend(backend, module)
    clock_source = _scheduler_source(pipe, scheduler)
    _check_speedup(speedup, clock_source is not None)
    adapters = {name: StackAdapter(module) for name, module in modules.items()}

    for module in modules.values():
        previous = module.__dict__.get(_ATTRIBUTE)
        if previous is not None:
            previous.remove()
    # everything that can fail has been checked: from here on the pipeline is changed
    clock = TimestepClock() if clock_source is None else SchedulerClock(clock_source)
    handle = Handle(clock, config, speedup, backend)
    try:
        for name, module in modules.items():
            denoiser = _Denoiser(name, module, adapters[name], handle)
            handle._denoisers.append(denoiser)
            denoiser.install()
    except BaseException:
        handle.remove()
        raise
    return handle


def _check_config(config: HiCacheConfig | None) -> HiCacheConfig:
    if config is None:
        return HiCacheConfig()
    if not isinstance(config, HiCacheConfig):
        raise TypeError(f"hicache: expected config to be a HiCacheConfig or None, got {config!r}")
    return config


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"hicache: unknown {name} {value!r}; expected one of {', '.join(known)}")


def _check_backend(backend: str, module: nn.Module) -> None:
    if backend == "auto":
        return
    # where the weights are, or where offloading will take them
    devices = {parameter.device.type for parameter in module.parameters()} | {"cpu"}
    if torch.cuda.is_available():
        devices.add("cuda")
    reasons = {device: backend_status(device)[backend] for device in sorted(devices - {"meta"})}
    if None not in reasons.values():
        why = "; ".join(str(reason) for reason in reasons.values())
        raise ValueError(f"hicache: backend {backend!r} cannot run: {why}")


def _check_speedup(speedup: float | None, counted: bool) -> None:
    if speedup is None:
        return
    if isinstance(speedup, bool) or not isinstance(speedup, (int, float)):
        raise TypeError(f"hicache: expected speedup to be a number >= 1 or None, got {speedup!r}")
    if not (math.isfinite(speedup) and speedup >= 1):
        raise ValueError(f"hicache: expected a finite speedup >= 1, got {speedup!r}")
    if not counted:
        raise ValueError(
            "hicache: speedup= needs the number of steps: pass scheduler=, or config= with an interval"
        )


def _denoisers(pipe: Any) -> dict[str, nn.Module]:
    if isinstance(pipe, nn.Module):
        return {"transformer": _unwrap(pipe)}
    components = getattr(pipe, "components", None)
    if not isinstance(components, Mapping):
        components = {name: getattr(pipe, name, None) for name in ("transformer", "transformer_2", "unet")}
    modules = {name: part for name, part in components.items() if isinstance(part, nn.Module)}
    found: dict[str, nn.Module] = {}
    for name, part in modules.items():
        if "transformer" in name and _unwrap(part) not in found.values():
            found[name] = _unwrap(part)
    if not found:
        present = ", ".join(f"{name} ({type(part).__name__})" for name, part in modules.items())
        raise ValueError(
            f"hicache: nothing to hook in {type(pipe).__name__}: expected a component named 'transformer', "
            f"got {present or 'no modules'}"
        )
    return found


def _unwrap(module: nn.Module) -> nn.Module:
    """A compiled module's original: hooks belong on it."""
    original = getattr(module, "_orig_mod", module)
    assert isinstance(original, nn.Module)
    return original


def _scheduler_source(pipe: Any, scheduler: Any) -> Any:
    """A function that gives the scheduler in use, or None when there is none."""
    if scheduler is not None:
        SchedulerClock.check(scheduler)
        return lambda: scheduler
    if isinstance(pipe, nn.Module):
        return None
    SchedulerClock.check(getattr(pipe, "scheduler", None))
    return lambda: pipe.scheduler
