"""One hooked transformer: what becomes of every call of it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from hicache import compat
from hicache.adapters.base import ModuleAdapter
from hicache.arguments import argument_names
from hicache.companion import Companions
from hicache.cuda_graphs.runner import GraphRunner
from hicache.handle import NotCopied
from hicache.hooks.caller import CallerFinder, CallName
from hicache.hooks.hooked import HookedModule
from hicache.pipeline import check_one_cache
from hicache.runtime.budget import Policy
from hicache.runtime.context import BegunCall
from hicache.runtime.corrector import Correctors
from hicache.runtime.module_recorder import ModuleRecorder
from hicache.runtime.planner import forecast
from hicache.runtime.residuals import given_to_blocks, scale_of
from hicache.runtime.sessions import Sessions
from hicache.runtime.signature import requires_grad
from hicache.runtime.stream_order import StreamOrder
from hicache.runtime.track import Track, Tracks
from hicache.runtime.turns import Turns
from hicache.step_plan import SkippedStep

_UNCOUNTED: Final = (
    "without a step of the scheduler: these calls run uncached; is this the scheduler of the run? (see "
    "apply(..., scheduler=...))"
)
_TILES: Final = "; tiles need apply(..., max_contexts=...)"
_MANY: Final = f"in one run: further ones run uncached{_TILES}"


class Denoiser(NotCopied):
    """One hooked transformer: counts its calls, and has them planned, run and taken in.

    Args:
        name: the pipeline's for it.
        hooked: the transformer, watched.
        adapter: knows what its modules compute; None where nobody does.
        policy: what to cache.
        sessions: what all denoisers of the pipeline share.
        graphs: captures and replays its calls; None for none.
        companions: take part in its full steps, not installed yet; None for none.
        correctors: make what its skipped steps do beside their sums; None: they do nothing.
    """

    def __init__(
        self,
        name: str,
        hooked: HookedModule,
        adapter: ModuleAdapter | None,
        policy: Policy,
        sessions: Sessions,
        graphs: GraphRunner | None = None,
        companions: Companions | None = None,
        correctors: Correctors | None = None,
    ) -> None:
        self.name = name
        self.module = hooked.module
        self.hooked = hooked
        self.sessions = sessions
        self.graphs = graphs
        self._max_contexts = policy.max_contexts
        self.companions = companions or Companions()
        self._modules: ModuleRecorder | None = None
        self._embedder = None if adapter is None else adapter.embedder
        if adapter is not None and policy.by_module:
            self._modules = ModuleRecorder(adapter, hooked.call, correctors)
        track = functools.partial(Track, name, hooked, policy, self._modules, self._warn, adapter, graphs)
        self.tracks = Tracks(track, policy.memory_budget, adapter, self.companions)
        self._names = argument_names(self.module)
        self._name = CallName(self.module)
        self._caller = CallerFinder(self.module)
        self._turns = Turns(self.module)
        self._order = StreamOrder()
        self._track: Track | None = None  # of the call whose turn it is
        self._begun: BegunCall | None = None
        self._seen: list[Any] = []  # the model's fingerprint when it was learned from
        self._version = 0  # how often that was another
        self._warned: set[str] = set()
        self._undo: list[Callable[[], None]] = []
        if graphs is not None:
            graphs.memory.room = lambda: None if self._track is None else self.tracks.left_by(self._track)

    def install(self) -> None:
        """Hook the transformer."""
        self.companions.install()
        # outside of what torch.compile makes of the model: it takes up at the model's own forward
        before, after = torch.compiler.disable(self._before), torch.compiler.disable(self._after)
        self._undo = [*self.hooked.watch(before, after, self._break_off), self._name.install()]
        self.hooked.install(self._forecast, self._embedder)
        if self._modules is not None:
            self._undo += self._modules.adapter.hooks()

    def remove(self) -> None:
        """Leave the transformer as it was."""
        with self._turns.none():
            self._end()
            if self._modules is not None:
                self._modules.forget()
            if self.graphs is not None:
                self.graphs.remove()  # its class was put over what is undone here
            while self._undo:
                self._undo.pop()()
            self.hooked.remove()
            self.companions.remove()

    def release(self) -> None:
        """Free its histories, and the graphs that are of use with them only."""
        with self._turns.none():
            self.tracks.release()
            self.companions.release()
            if self.graphs is not None:
                self.graphs.drop()

    # What a call of the transformer goes through, in order. From _before() to _after() it may be compiled.

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        model_kwargs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if self._turns.take():
            self._clear()
        if not self._undo:  # removed while it waited
            self._turns.give_back()
            return None
        latents = model_kwargs.get(self._names[0])
        if isinstance(latents, Tensor):
            self._order.follow(latents.device)
        if torch.is_grad_enabled() and (module.training or requires_grad(model_kwargs)):
            self._warn("is called for its gradients: it runs uncached")
            return None
        caller = self._caller.find()
        track = self._track = self.tracks.of(self.sessions.of_call(caller.scheduler, model_kwargs))
        counter = track.counter
        if counter.tick(module, model_kwargs):
            self._start_run(track)
        if counter.stands_still(model_kwargs):
            self._warn(f"was called with another timestep {_UNCOUNTED}")
        if counter.ordinal >= self._max_contexts:
            self._warn(f"was called more than {self._max_contexts} times {_UNCOUNTED}{_TILES}")
            return None
        name = self._name.current or caller.name
        scale = scale_of(model_kwargs)
        key = name, scale is None, *track.planner.wanted(model_kwargs)
        context = track.contexts.find(counter, key, model_kwargs, track.session)
        if context is None:
            self._warn(f"was called in more than {self._max_contexts} forms or with as many prompts {_MANY}")
            return None
        context.follow(scale, counter.step, track.session)
        compiled = compat.inside_compiled_call(module)
        checked = not self.hooked.side_lists
        replayed = self.graphs is not None and self.graphs.replays_skipped
        begun = BegunCall(context, counter.step, args, kwargs, model_kwargs, compiled, replayed, checked)
        self._begun = begun
        if track.session.latents is not None:
            track.session.latents.see(counter.step, latents)
        full = track.planner.is_full(begun)
        if full:
            track.session.begin_full(counter.step)
        self._begun = begun = given_to_blocks(begun, self._names, full)
        args, kwargs = begun.args, begun.kwargs
        if full:
            track.planner.begin_full(begun)
            self.companions.begin(begun.as_full(track.session.config.warmup))
        else:
            track.planner.begin_skipped(begun)
        self.hooked.call.opaque = (self.graphs is not None and self.graphs.begin_call(compiled)) or compiled
        if compiled and not full:
            kwargs = {name: compat.of_any_size(value) for name, value in kwargs.items()}
            args = compat.of_any_size(args)
        return args, kwargs

    def _forecast(self, plan: SkippedStep, base: Tensor, block_kwargs: Mapping[str, Any]) -> Tensor:
        """See :func:`~hicache.runtime.planner.forecast`; maybe compiled, and then nothing is timed."""
        if self.hooked.call.opaque or self._track is None:
            return forecast(plan, self._modules, base, block_kwargs)
        watch = self._track.session.watch
        started = watch.start(base.device)
        hidden = forecast(plan, self._modules, base, block_kwargs)
        watch.stop(started)
        return hidden

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        begun, track = self._begun, self._track
        if begun is not None and track is not None:
            track.planner.commit(begun, output)
            if track.session.latents is not None:
                track.session.latents.end(begun.step)
        self._end()

    def _break_off(self) -> None:
        """A call raised, or was interrupted, perhaps while it waited for its turn."""
        if not self._turns.mine():
            return
        begun, track = self._begun, self._track
        self._end()
        if begun is not None and track is not None:
            # half of it may be in the history; the same call may be made again
            begun.context.distrust()
            begun.context.last_step = begun.step - 1
            track.counter.ordinal -= 1
        if track is not None:
            track.session.clock.abort()

    def _end(self) -> None:
        """A call has ended: the next one's turn."""
        self._clear()
        self._turns.give_back()

    def _clear(self) -> None:
        """A call has ended, or never came to its end: let go of its tensors."""
        track, self._begun, self._track = self._track, None, None
        if self.graphs is not None:
            self.graphs.due = False
        if self.companions.members:
            self.companions.end()
        if track is not None:
            track.planner.end()

    def _start_run(self, track: Track) -> None:
        track.session.start_run()
        seen = self.hooked.fingerprint()
        changed = seen != self._seen
        track.contexts.start_run()
        if self.graphs is not None:
            self.graphs.start_run(changed, track.session.whole)
        if changed:
            check_one_cache(self.module, "hicache.fast")
            # blocks, processors or hooks have been put in place since: what was learned may not hold
            self._seen, self.hooked.verified = seen, False
            self._version += 1
            if self._modules is not None:
                self._modules.forget()
        if track.learned_from != self._version:
            track.learned_from = self._version
            track.contexts.forget_forms()
        track.start_run()

    def _warn(self, what: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f"hicache: {type(self.module).__name__} {what}", RuntimeWarning, stacklevel=4)
