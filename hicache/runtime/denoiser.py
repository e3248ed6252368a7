"""One hooked transformer: what becomes of every call of it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import torch
from torch import nn

from hicache import compat
from hicache.adapters.base import ModuleAdapter
from hicache.cuda_graphs.runner import GraphRunner
from hicache.hooks.transformer import HookedTransformer
from hicache.pipeline import check_one_cache
from hicache.runtime.budget import Policy, RecorderChoice
from hicache.runtime.context import BegunCall, Contexts
from hicache.runtime.planner import CallPlanner
from hicache.runtime.recorders import ModuleRecorder
from hicache.runtime.session import Session, StepCounter
from hicache.runtime.signature import requires_grad

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
    """One hooked transformer: counts its calls, and has them planned, run and taken in.

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
        self.contexts = Contexts(name)
        modules = None if adapter is None else ModuleRecorder(adapter, hooked.call)
        self.choice = RecorderChoice(hooked.name, policy, modules, self.contexts, self._warn)
        self._planner = CallPlanner(hooked, self.choice, session)
        self._names = tuple(inspect.signature(type(self.module).forward).parameters)[1:]
        self._counter = StepCounter(session)
        self._begun: BegunCall | None = None
        self._seen: list[Any] = []  # the model's fingerprint when it was learned from
        self._warned: set[str] = set()
        self._undo: list[Callable[[], None]] = []

    def install(self) -> None:
        """Hook the transformer."""
        # outside of what torch.compile makes of the model: it takes up at the model's own forward
        before, after = torch.compiler.disable(self._before), torch.compiler.disable(self._after)
        self._undo = [
            # nothing of a call that was broken off may reach the next one, or stay switched off
            compat.guard_calls(self.module, self._break_off),
            self.module.register_forward_pre_hook(before, with_kwargs=True).remove,
            self.module.register_forward_hook(after).remove,
        ]
        self.hooked.install(self._planner.forecast)
        if self.choice.modules is not None:
            self._undo += self.choice.modules.adapter.hooks()

    def remove(self) -> None:
        """Leave the transformer as it was."""
        self._end()
        if self.choice.modules is not None:
            self.choice.modules.forget()
        if self.graphs is not None:
            self.graphs.remove()  # its class was put over what is undone here
        while self._undo:
            self._undo.pop()()
        self.hooked.remove()

    def release(self) -> None:
        """Free its histories, and the graphs that are of use with them only."""
        self.contexts.release()
        if self.graphs is not None:
            self.graphs.drop()

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
        session, step = self.session, self._counter.step
        context = self.contexts.find(self._counter, model_kwargs, session)
        dropped = {name for name in BLOCK_ONLY_ARGUMENTS if model_kwargs.get(name) is not None}
        compiled = compat.inside_compiled_call()
        # what is known to be added between blocks, and dropped on skipped steps, is not looked for
        begun = BegunCall(context, step, args, kwargs, model_kwargs, compiled, checked=not dropped)
        full = self._planner.is_full(begun)
        if dropped and not full:
            args = tuple(None if n in dropped else v for n, v in zip(self._names, args, strict=False))
            kwargs = {name: None if name in dropped else value for name, value in kwargs.items()}
            begun = replace(begun, args=args, kwargs=kwargs)
        self._begun = begun
        if full:
            self._planner.begin_full(self._begun)
        else:
            graphs = self.graphs is not None and self.graphs.stats.eager is None
            self._planner.begin_skipped(self._begun, fixed=compiled or graphs)
        self._use_graphs(compiled)
        if full:
            return None
        if compiled:
            kwargs = {name: compat.of_any_size(value) for name, value in kwargs.items()}
        return (compat.of_any_size(args) if compiled else args), kwargs

    def _use_graphs(self, compiled: bool) -> None:
        """Have the call that begins replayed, if it may be."""
        call, graphs = self.hooked.call, self.graphs
        call.opaque = compiled
        if graphs is None:
            return
        if compiled:
            graphs.refuse("the transformer is compiled as a whole")
        if graphs.usable():
            call.opaque = graphs.due = True

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._begun is not None:
            self._planner.commit(self._begun, output)
        self._end()

    def _break_off(self) -> None:
        """A call raised, or was interrupted."""
        self._end()
        self.session.clock.abort()

    def _end(self) -> None:
        """A call has ended, or never came to its end."""
        self._begun = None
        if self.graphs is not None:
            self.graphs.due = False
        self._planner.end()

    def _start_run(self) -> None:
        seen = self.hooked.fingerprint()
        changed = seen != self._seen
        self.contexts.start_run()
        if self.graphs is not None:
            self.graphs.start_run(changed)
        if changed:
            check_one_cache(self.module, "hicache.fast")
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
