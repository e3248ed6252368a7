"""One hooked transformer: what becomes of every call of it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from hicache.ahead import Ahead
from hicache.compiling import Compiling
from hicache.config import HiCacheConfig
from hicache.engine import Engine
from hicache.granularity import Granularity, Kind, Module, Stack, Unfit
from hicache.graphs import Graphs
from hicache.models.call import Mode
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
        self.kind: Kind | None = None  # learned from its first call
        self.remembered: list[Any] = []  # rotary embeddings of the last full step

    def restart(self, label: str, first_step: int) -> None:
        self.label = label
        # the schedule counts from here: a second denoiser warms up when it starts
        self.first_step = first_step
        self.full_steps = 0
        self.skipped_steps = 0
        self.ahead.restart()

    def release(self) -> None:
        """Free its memory, and forget what was learned."""
        self.engine.release()
        self.ahead.forget()
        self.remembered.clear()
        self.kind = None

    @property
    def planned(self) -> int:
        """Bytes of history it wants, module by module."""
        kind = self.kind
        if kind is None:
            return 0
        return self.engine.planned_nbytes([kind.shape] * kind.terms, kind.dtype)


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
        graphs: captures and replays its calls; None for none.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        adapter: StackAdapter,
        modules: ModuleAdapter | None,
        policy: Policy,
        session: Session,
        graphs: Graphs | None = None,
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
        self._call = adapter.call
        self._current: Context | None = None
        self._local_step = 0
        self._named: Mapping[str, Any] = {}
        self._policy = policy
        self._stack = Stack()
        by_module = modules is not None and policy.granularity != "stack"
        self._modules = Module(modules, adapter.call) if by_module and modules is not None else None
        self._why_stack = (
            "asked for"
            if policy.granularity == "stack"
            else f"no adapter knows the modules of {adapter.name}"
        )
        self.granularity: Granularity = self._modules or self._stack
        self._checked = False
        self._unfit: str | None = None  # why the stack of the current call could not be recorded
        self._compiling = Compiling()
        self.graphs = graphs
        self._inside = False  # whether the current call is compiled as a whole
        self._seen: list[Any] = []  # the model's fingerprint when it was learned from
        self._warned: set[str] = set()
        self._undo: list[Callable[[], None]] = []

    def install(self) -> None:
        # outside of what torch.compile makes of the model: it takes up at the model's own forward
        before, after = torch.compiler.disable(self._before), torch.compiler.disable(self._after)
        self._undo = [
            self.module.register_forward_pre_hook(before, with_kwargs=True).remove,
            # also after an exception: nothing of a call may reach the next one
            self.module.register_forward_hook(after, always_call=True).remove,
        ]
        self.adapter.install(self)
        if self._modules is not None:
            self._undo += self._modules.adapter.hooks()

    def remove(self) -> None:
        if self._modules is not None:
            self._modules.unwatch()
        while self._undo:
            self._undo.pop()()
        self.adapter.remove()
        self._compiling.resume()
        if self.graphs is not None:
            self.graphs.remove()

    def release(self) -> None:
        self._idle.clear()
        for context in self.contexts.values():
            context.release()

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

    # What a call of the transformer goes through, in order. From _before() to _after() it may be compiled.

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        self._end()
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
        self._inside = self._compiling.inside()
        context = self._context(named)
        self._current = context
        self._named = named
        self._local_step = clock.step - context.first_step
        self._call.remembered = context.remembered
        dropped = {name for name in BLOCK_ONLY_ARGUMENTS if named.get(name) is not None}
        if context.engine.is_full(self._local_step):
            # Not with arguments that are known to be added between blocks, and dropped on skipped steps.
            self._checked = not dropped
            self._begin_full(context, args, kwargs)
            self._use_graphs()
            return None
        if dropped:
            args = tuple(None if n in dropped else v for n, v in zip(self._names, args, strict=False))
            kwargs = {name: None if name in dropped else value for name, value in kwargs.items()}
        self._begin_skipped(context, args, kwargs)
        self._use_graphs()
        return args, kwargs

    def _use_graphs(self) -> None:
        """Have the call that begins replayed, if it may be."""
        self._call.quiet = self._inside
        graphs = self.graphs
        if graphs is None:
            return
        if self._inside:
            graphs.refuse("the transformer is compiled as a whole")
        if graphs.usable():
            self._call.quiet = True
            graphs.begin()

    def _begin_full(self, context: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.adapter.checked = self._checked
        if context.kind is None:
            self._call.mode = Mode.LEARN
            self.adapter.learn()
            self._compiling.pause()
            if not self._inside:
                return
            # Too late to keep this call from being compiled: learn from one of our own.
            self.module.forward(*args, **kwargs)
            self._learned(context)
            context.engine.reset(num_steps=context.engine.num_steps)
            self._between_calls()
            self.adapter.checked = self._checked
            self._call.remembered = context.remembered
            if context.kind is None:
                return
        with self.session.watch.measure(context.kind.device), torch.no_grad():
            self._decide(context, context.kind)
            self.granularity.open(context.engine, context.kind, self._call)
        self.adapter.refresh()
        self._call.mode = Mode.FULL

    def _begin_skipped(self, context: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self._call
        assert context.kind is not None
        # one graph for all skipped steps: where they are compiled or captured, they must not differ
        fixed = self._inside or (self.graphs is not None and self.graphs.stats.eager is None)
        with self.session.watch.measure(context.kind.device), torch.no_grad():
            call.sum = context.engine.prepare(self._local_step, fixed=fixed)
            if isinstance(self.granularity, Module):
                adapter = self.granularity.adapter
                call.gates = context.ahead.gates(adapter, self._step, self._named)
                call.between = list(adapter.between(self._named))
        if not self.adapter.verified:
            call.mode = Mode.VERIFY
            self._compiling.pause()
            if not self._inside:
                return
            self.module.forward(*args, **kwargs)
            call.recalled = 0
            self._compiling.resume()
        call.mode = Mode.SKIP

    # Called back in a call to learn from …

    def base(self, hidden: Tensor, call: Mapping[str, Any]) -> None:
        context = self._current
        assert context is not None
        iterated = self.adapter.iterated
        with self.session.watch.measure(hidden.device), torch.no_grad():
            kind = Kind(hidden.shape, hidden.dtype, hidden.device)
            # nothing that holds on to the hidden states themselves
            kind.arguments = {n: value for n, value in call.items() if not n.endswith("hidden_states")}
            if self._modules is not None:
                adapter = self._modules.adapter
                kind.terms, kind.refusal = adapter.terms(call), adapter.refusal(call)
            context.kind = kind
            self._decide(context, kind)
            self.granularity.open(context.engine, kind, self._call)
            if self._call.base is not None:
                self._call.base.copy_(hidden)
            if isinstance(self.granularity, Module):
                between = list(self.granularity.adapter.between(self._named))
                self.granularity.prove(hidden, call, between, self._named)
        self.adapter.iterated = iterated  # by the model, not by what lists its features

    def result(self, hidden: Tensor) -> None:
        context, call = self._current, self._call
        if context is None or context.kind is None or call.left:
            return
        call.left = True
        with self.session.watch.measure(hidden.device), torch.no_grad():
            if isinstance(self.granularity, Module):
                base = self.granularity.base
                try:
                    self.granularity.verify(hidden, context.kind)
                except Unfit as error:
                    self._warn(f"{error}; its stack is cached instead")
                    self._fall_back(f"{self.adapter.name} {error}")
                    assert self._modules is not None
                    self._modules.unwatch()
                    self._modules = None
                    # this step's stack can still be recorded: as if it had been from the start
                    self._stack.open(context.engine, context.kind, call)
                    if base is None:
                        self._unfit = str(error)
                        return
                    assert call.base is not None
                    call.base.copy_(base)
            if call.base is not None and call.slot is not None:
                if hidden.shape != call.base.shape:
                    self._unfit = (
                        f"gives its head a hidden state {tuple(hidden.shape)} that is not of the shape of "
                        f"its first block's, {tuple(call.base.shape)}"
                    )
                    self._warn(f"{self._unfit}: this call runs uncached")
                    return
                torch.sub(hidden.to(call.slot.device), call.base, out=call.slot)

    # … and in a skipped step.

    def forecast(self, base: Tensor, call: Mapping[str, Any]) -> Tensor:
        """Maybe compiled: the sum, with gates foreseen or computed now."""
        current = self._call
        assert current.sum is not None
        started = None if current.quiet else self.session.watch.start(base.device)
        with torch.no_grad():
            gates = current.gates
            if gates is None and isinstance(self.granularity, Module):
                gates = self.granularity.gates(call, base)
            for residual in current.between:
                base = base + residual
            out = current.sum(base, gates)
        if started is not None:
            self.session.watch.stop(started)
        return out

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        context, mode = self._current, self._call.mode
        if output is None:  # the call raised
            self._end()
            self.session.clock.abort()
            return
        if context is None:
            self._end()
            return
        if mode >= Mode.VERIFY:
            context.engine.settle()
            context.skipped_steps += 1
            self._end()
            return
        context.full_steps += 1
        try:
            self._learned(context)
            if context.kind is not None:
                with self.session.watch.measure(context.kind.device), torch.no_grad():
                    context.engine.commit(self._local_step)
                    self._look_ahead(context, context.kind)
        finally:
            self._end()

    def _learned(self, context: Context) -> None:
        """A full call has come to its end: take in what it recorded, if it did.

        Raises:
            RuntimeError: it did not go through its blocks or its head as it should.
        """
        call, name = self._call, type(self.module).__name__
        if call.mode == Mode.LEARN and not self.adapter.iterated:
            raise RuntimeError(
                f"hicache: {name} runs without iterating over its blocks, so they cannot be "
                f"skipped; {UNCACHED}"
            )
        if not call.left:
            raise RuntimeError(
                f"hicache: {name} ran without its blocks or its head being seen, so nothing could be "
                f"recorded; {UNCACHED}"
            )
        if self._unfit is not None:
            context.kind = None
            context.engine.reset(num_steps=context.engine.num_steps)
            return
        assert context.kind is not None
        with self.session.watch.measure(context.kind.device), torch.no_grad():
            self.granularity.close(context.kind, call)

    def _end(self) -> None:
        """A call has ended, or never came to its end."""
        self._current = None
        self._named = {}
        self._between_calls()

    def _between_calls(self) -> None:
        self._unfit = None
        if self.graphs is not None:
            self.graphs.end()
        if self._modules is not None:
            self._modules.end()
        self.adapter.end()
        self._compiling.resume()

    def _look_ahead(self, context: Context, kind: Kind) -> None:
        """Compute the gates of the skipped steps before the context's next full one."""
        if not isinstance(self.granularity, Module) or not self.granularity.foreseeable:
            return
        limit = self.session.clock.num_steps
        last = self._step + 1
        while (limit is None or last < limit) and not context.engine.is_full(last - context.first_step):
            last += 1
        context.ahead.look(
            self.granularity.adapter,
            range(self._step + 1, last),
            self.session.clock.timesteps,
            kind.arguments,
            self._named,
            kind.like(),
        )

    # What is cached.

    def _decide(self, context: Context, kind: Kind) -> None:
        """At every full step: whether this run's contexts can be cached module by module."""
        if self.granularity is self._stack:
            return
        refusal = None if kind.refusal is None else f"{self.adapter.name}: {kind.refusal}"
        if refusal is None and self._policy.granularity == "auto":
            refusal = self._over_budget(context, kind.device)
        if refusal is not None:
            self._fall_back(refusal)

    def _over_budget(self, context: Context, device: torch.device) -> str | None:
        """Why the histories of this run's contexts must not be held; None when they may."""
        planned = sum(other.planned for other in self.contexts.values())
        budget = self._policy.memory_budget
        # Where the second context is too much, the first has been recorded in vain; in every such run anew,
        # as nothing of an earlier run may change the picture.
        if planned > budget:
            return f"its modules' history, {planned:,} bytes or more, is over memory_budget={budget:,}"
        wanted = context.planned - context.engine.nbytes
        free = _free_bytes(device) if wanted > 0 else None
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
        self.granularity, self._why_stack = self._stack, reason
        if self._modules is not None:
            self._modules.end()
        for context in self.contexts.values():
            context.engine.release()

    # Contexts and runs.

    def _start_run(self) -> None:
        clock = self.session.clock
        self._run = clock.run
        self._step = -1
        self._idle = {key: c for key, c in self.contexts.items() if c.full_steps}
        seen = self.adapter.fingerprint()
        if self.graphs is not None:
            self.graphs.start_run(changed=seen != self._seen)
        if seen != self._seen:
            # blocks, processors or hooks have been put in place since: what was learned may not hold
            self._seen, self.adapter.verified = seen, False
            for context in self._idle.values():
                context.kind = None
            if self._modules is not None:
                self._modules.forget()
        self.contexts = {}
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
    """What a context's history fits, and no other: the form of a call.

    Shapes, dtypes and devices of its tensors, those in lists and dictionaries too (IP-Adapters'), whole
    numbers in lists (which layers to skip), and what autocast makes of them.
    """
    seen = _forms(named, in_list=False)
    kinds = sorted({device.type for *_, device in seen if isinstance(device, torch.device)})
    known = [kind for kind in kinds if torch.amp.is_autocast_available(kind)]
    casts = [torch.get_autocast_dtype(kind) for kind in known if torch.is_autocast_enabled(kind)]
    return (*seen, *casts)


def _forms(values: Any, in_list: bool) -> list[tuple[Any, ...]]:
    seen: list[tuple[Any, ...]] = []
    for name, value in values.items() if isinstance(values, Mapping) else enumerate(values):
        if isinstance(value, Tensor):
            seen.append((name, value.shape, value.dtype, value.device))
        elif isinstance(value, (list, tuple, Mapping)):
            seen += [(name, *form) for form in _forms(value, not isinstance(value, Mapping))]
        elif in_list and isinstance(value, int):
            seen.append((name, value))
    return seen
