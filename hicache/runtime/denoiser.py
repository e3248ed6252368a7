"""One hooked transformer: what becomes of every call of it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from hicache import compat
from hicache.adapters.base import ModuleAdapter
from hicache.cuda_graphs.runner import GraphRunner
from hicache.hooks.block_interface import UNCACHED
from hicache.hooks.dynamo import CompilePause
from hicache.hooks.transformer import HookedTransformer
from hicache.runtime.budget import Policy, RecorderChoice
from hicache.runtime.context import Context, Contexts
from hicache.runtime.lesson import FirstCall
from hicache.runtime.recorders import ModuleRecorder
from hicache.runtime.session import Session, StepCounter
from hicache.runtime.signature import requires_grad
from hicache.step_plan import SkippedStep

_MAX_CONTEXTS: Final = 16  # calls of one denoiser in one step; more means that the step is not being counted
# Arguments that only feed the blocks: their effect is in the cached residual already. A list of ControlNet
# residuals would be added a second time, and skip-layer guidance would leave out the stand-in.
BLOCK_ONLY_ARGUMENTS: Final = (
    "controlnet_block_samples",
    "controlnet_single_block_samples",
    "block_controlnet_hidden_states",
    "skip_layers",
)


class Denoiser:
    """One hooked transformer: plans every call of it, and takes in what came of it.

    Args:
        name: the pipeline's for it.
        hooked: the transformer, watched.
        adapter: knows what its modules compute; None where nobody does.
        policy: what to cache.
        session: what all denoisers of the pipeline share.
        graphs: captures and replays its calls; None for none.
    """

    def __init__(
        self,
        name: str,
        hooked: HookedTransformer,
        adapter: ModuleAdapter | None,
        policy: Policy,
        session: Session,
        graphs: GraphRunner | None = None,
    ) -> None:
        self.name = name
        self.module = hooked.module
        self.hooked = hooked
        self.session = session
        self.graphs = graphs
        self.contexts = Contexts(name, session.backend)
        modules = None if adapter is None else ModuleRecorder(adapter, hooked.call)
        self.choice = RecorderChoice(hooked.name, policy, modules, self.contexts, self._warn)
        self._names = tuple(inspect.signature(type(self.module).forward).parameters)[1:]
        self._counter = StepCounter(session)
        self._pause = CompilePause()
        self._seen: list[Any] = []  # the model's fingerprint when it was learned from
        self._warned: set[str] = set()
        self._undo: list[Callable[[], None]] = []
        # of the running call
        self._current: Context | None = None
        self._local_step = 0  # counted from the context's first
        self._model_kwargs: Mapping[str, Any] = {}
        self._compiled = False  # whether it is compiled as a whole

    def install(self) -> None:
        """Hook the transformer."""
        # outside of what torch.compile makes of the model: it takes up at the model's own forward
        before, after = torch.compiler.disable(self._before), torch.compiler.disable(self._after)
        self._undo = [
            self.module.register_forward_pre_hook(before, with_kwargs=True).remove,
            # also after an exception: nothing of a call may reach the next one
            self.module.register_forward_hook(after, always_call=True).remove,
        ]
        self.hooked.install(self)
        if self.choice.modules is not None:
            self._undo += self.choice.modules.adapter.hooks()

    def remove(self) -> None:
        """Leave the transformer as it was."""
        if self.choice.modules is not None:
            self.choice.modules.remove()
        while self._undo:
            self._undo.pop()()
        self.hooked.remove()
        self._pause.resume()
        if self.graphs is not None:
            self.graphs.remove()

    def release(self) -> None:
        """Free its histories."""
        self.contexts.release()

    # What a call of the transformer goes through, in order. From _before() to _after() it may be compiled.

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        model_kwargs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        self._end()
        if torch.is_grad_enabled() and (module.training or requires_grad(model_kwargs)):
            self._warn("is called for its gradients: it runs uncached")
            return None
        if self._counter.tick(module, model_kwargs):
            self._start_run()
        if self._counter.ordinal >= _MAX_CONTEXTS:
            self._warn(
                f"was called more than {_MAX_CONTEXTS} times without a step of the scheduler: these calls "
                "run uncached; is this the scheduler of the run? (see apply(..., scheduler=...))"
            )
            return None
        self._compiled = compat.inside_compiled_call()
        session, step = self.session, self._counter.step
        context = self.contexts.find(
            self._counter.ordinal, model_kwargs, session.config, step, session.clock.num_steps
        )
        self._current, self._model_kwargs = context, model_kwargs
        self._local_step = step - context.first_step
        self.hooked.call.rotary = context.rotary
        dropped = {name for name in BLOCK_ONLY_ARGUMENTS if model_kwargs.get(name) is not None}
        if context.engine.is_full(self._local_step):
            # Not with arguments that are known to be added between blocks, and dropped on skipped steps.
            self._begin_full(context, args, kwargs, checked=not dropped)
            self._use_graphs()
            return None
        if dropped:
            args = tuple(None if n in dropped else v for n, v in zip(self._names, args, strict=False))
            kwargs = {name: None if name in dropped else value for name, value in kwargs.items()}
        self._begin_skipped(context, args, kwargs)
        self._use_graphs()
        return args, kwargs

    def _begin_full(
        self, context: Context, args: tuple[Any, ...], kwargs: dict[str, Any], checked: bool
    ) -> None:
        call, choice = self.hooked.call, self.choice
        self.hooked.refresh()
        call.checked = checked
        if context.form is None:
            call.lesson = FirstCall(context, choice, self._model_kwargs, self.session.watch, self._warn)
            self._pause.pause()
            if not self._compiled:
                return
            # Too late to keep this call from being compiled: learn from one of our own.
            self.module.forward(*args, **kwargs)
            self._take_in(context)
            context.engine.reset(num_steps=context.engine.num_steps)
            self._between_calls()
            call.checked, call.rotary = checked, context.rotary
            if context.form is None:
                return
        with self.session.watch.measure(context.form.device), torch.no_grad():
            choice.decide(context)
            call.plan = choice.recorder.plan_full(context.engine, context.form)

    def _begin_skipped(self, context: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self.hooked.call
        assert context.form is not None
        # one graph for all skipped steps: where they are compiled or captured, they must not differ
        fixed = self._compiled or (self.graphs is not None and self.graphs.stats.eager is None)
        with self.session.watch.measure(context.form.device), torch.no_grad():
            total = context.engine.prepare(self._local_step, fixed=fixed)
            call.plan = self.choice.recorder.plan_skipped(
                context, self._counter.step, total, self._model_kwargs
            )
        if self.hooked.verified:
            return
        call.verifying = True
        self._pause.pause()
        if self._compiled:
            self.module.forward(*args, **kwargs)
            call.rotary_index, call.verifying = 0, False
            self._pause.resume()

    def _use_graphs(self) -> None:
        """Have the call that begins replayed, if it may be."""
        call, graphs = self.hooked.call, self.graphs
        call.opaque = self._compiled
        if graphs is None:
            return
        if self._compiled:
            graphs.refuse("the transformer is compiled as a whole")
        if graphs.usable():
            call.opaque = True
            graphs.begin()

    def forecast(self, plan: SkippedStep, base: Tensor, block_kwargs: Mapping[str, Any]) -> Tensor:
        """The hidden state after the blocks, with gates prefetched or computed now; maybe compiled.

        Args:
            plan: of this skipped step.
            base: ``[batch, tokens, channels]``, the hidden state that enters the first block.
            block_kwargs: the first block's arguments by name.
        """
        started = None if self.hooked.call.opaque else self.session.watch.start(base.device)
        with torch.no_grad():
            gates = plan.gates
            if gates is None:
                gates = self.choice.recorder.gates(block_kwargs, base)
            for residual in plan.between:
                base = base + residual
            out = plan.sum(base, gates)
        if started is not None:
            self.session.watch.stop(started)
        return out

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        context = self._current
        if context is None or output is None:
            self._end()
            if output is None:  # the call raised
                self.session.clock.abort()
            return
        if self.hooked.call.skipping:
            context.engine.settle()
            context.skipped_steps += 1
            self._end()
            return
        context.full_steps += 1
        try:
            self._take_in(context)
            if context.form is not None:
                with self.session.watch.measure(context.form.device), torch.no_grad():
                    context.engine.commit(self._local_step)
                    self.choice.recorder.prefetch(
                        context, self._skipped_next(context), self.session.clock.timesteps, self._model_kwargs
                    )
        finally:
            self._end()

    def _take_in(self, context: Context) -> None:
        """A full call has come to its end: take in what it recorded, if it did.

        Raises:
            RuntimeError: it did not go through its blocks or its head as it should.
        """
        call, name = self.hooked.call, type(self.module).__name__
        lesson = call.lesson
        if lesson is not None and not call.result.entered:
            raise RuntimeError(
                f"hicache: {name} runs without iterating over its blocks, so they cannot be skipped; "
                f"{UNCACHED}"
            )
        if not (call.result.entered and call.result.head_reached):
            raise RuntimeError(
                f"hicache: {name} ran without its blocks or its head being seen, so nothing could be "
                f"recorded; {UNCACHED}"
            )
        if isinstance(lesson, FirstCall) and lesson.unfit is not None:
            context.form = None
            context.engine.reset(num_steps=context.engine.num_steps)
            return
        assert context.form is not None
        with self.session.watch.measure(context.form.device), torch.no_grad():
            self.choice.recorder.finish(context.form)

    def _end(self) -> None:
        """A call has ended, or never came to its end."""
        self._current = None
        self._model_kwargs = {}
        self._between_calls()

    def _between_calls(self) -> None:
        if self.graphs is not None:
            self.graphs.end()
        if self.choice.modules is not None:
            self.choice.modules.end()
        self.hooked.end()
        self._pause.resume()

    def _skipped_next(self, context: Context) -> range:
        """The skipped steps before the context's next full one."""
        limit = self.session.clock.num_steps
        first = last = self._counter.step + 1
        while (limit is None or last < limit) and not context.engine.is_full(last - context.first_step):
            last += 1
        return range(first, last)

    def _start_run(self) -> None:
        seen = self.hooked.fingerprint()
        changed = seen != self._seen
        self.contexts.start_run()
        if self.graphs is not None:
            self.graphs.start_run(changed)
        if changed:
            # blocks, processors or hooks have been put in place since: what was learned may not hold
            self._seen, self.hooked.verified = seen, False
            self.contexts.forget_forms()
            if self.choice.modules is not None:
                self.choice.modules.forget()
        self.choice.start_run()
        self.session.start_run(self.session.clock.run, self.session.clock.num_steps)

    def _warn(self, what: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f"hicache: {type(self.module).__name__} {what}", RuntimeWarning, stacklevel=4)
