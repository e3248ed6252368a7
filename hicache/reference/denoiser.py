"""One transformer cached module by module: what becomes of every call of it, and of its submodules."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from hicache.arguments import argument_names
from hicache.companion import Companions, FullCall
from hicache.reference.blocks import Part, cached_parts
from hicache.reference.context import Context, form, wants_gradients
from hicache.reference.controlnet import ControlNet
from hicache.reference.rows import Key
from hicache.reference.run_settings import RunSettings
from hicache.reference.steps import Steps
from hicache.reference.timer import Timer

if TYPE_CHECKING:  # nobody who does not use them imports them
    from hicache.reference.clusters import ClusteredModel, Clusters

# Calls of one transformer in one step; more means that the steps are not being counted.
_MOST_CALLS: Final = 16


class _Call:
    """A call of the transformer that goes on: its submodules report to it."""

    def __init__(self, context: Context, step: int, timer: Timer, parts: Sequence[Part]) -> None:
        self.context = context
        self.step = step  # of the context
        self.full = context.is_full(step)
        self.clusters = context.clusters
        self.outputs: dict[Key, Any] = {}
        self.parts = {part.path: part for part in parts}
        self._runs: Counter[str] = Counter()
        self._timer = timer

    def feature(self, path: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A submodule whose output is cached is called."""
        key = path, self._runs[path]
        self._runs[path] += 1
        if not self.full:
            with self._timer.measure(_device(args, kwargs)), torch.no_grad():
                if self.clusters is not None and self.clusters.compute(path):
                    return self._clustered(self.clusters, key, forward, args, kwargs)
                return self.context.forecast(self.step, key)
        output = forward(*args, **kwargs)
        self.outputs[key] = _copy(path, output)
        return output

    def _clustered(
        self, clusters: Clusters, key: Key, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Tensor:
        """An MLP that is computed for a few tokens is called at a skipped step."""
        hidden, *others = args
        return clusters.forecast(
            self.step,
            key[0],
            lambda rows: forward(rows, *others, **kwargs),
            hidden,
            self.context.history(key),
            lambda: self.context.forecast(self.step, key),
        )

    def idle(self, path: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A submodule that only feeds a cached one is called."""
        if self.full:
            output = forward(*args, **kwargs)
            if not isinstance(output, Tensor):
                self.context.pairs.add(path)
            return output
        # nobody reads it, so what came in will do
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, kwargs["encoder_hidden_states"]) if path in self.context.pairs else hidden


class Denoiser:
    """One hooked transformer.

    Between its calls, two hooks on it are all that is changed; while it runs, the submodules of the table
    have another ``forward``.

    Args:
        name: of the pipeline's component.
        module: the transformer.
        settings: of the pipeline's runs.
        steps: counts the steps of all denoisers of the pipeline.
        timer: of all of them, too.
        controlnets: that the pipeline calls before it.
        companions: take part in its full steps, not installed yet; None for none.
        clustered: its MLPs that are computed for a few tokens at skipped steps; None: none are.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        settings: RunSettings,
        steps: Steps,
        timer: Timer,
        controlnets: Sequence[ControlNet] = (),
        companions: Companions | None = None,
        clustered: ClusteredModel | None = None,
    ) -> None:
        self.name = name
        self.module = module
        self.contexts: dict[Any, Context] = {}
        self._settings = settings
        self._steps = steps
        self._timer = timer
        self._controlnets = controlnets
        self.companions = companions or Companions()
        self._clustered = clustered
        self._names = argument_names(module)
        self._run = -1
        self._step = -1
        self._ordinal = 0
        self._call: _Call | None = None
        self._undo: list[Callable[[], None]] = []  # of the call that goes on
        self._warned: set[str] = set()
        self._hooks: list[Any] = []

    def install(self) -> None:
        self.companions.install()
        self._hooks = [
            self.module.register_forward_pre_hook(self._before, with_kwargs=True),
            self.module.register_forward_hook(self._after, always_call=True),
        ]

    def remove(self) -> None:
        self._end()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.companions.remove()

    def release(self) -> None:
        for context in self.contexts.values():
            context.release()
        self.companions.release()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._call is not None:
            # an interrupt, unlike an exception, ends a call without the hook after it
            self._end()
            self._abort()
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if torch.is_grad_enabled() and (module.training or wants_gradients(named)):
            self._warn("is called for its gradients: it runs uncached")
            return
        self._steps.count(module, named)
        self._count_calls()
        if self._ordinal >= _MOST_CALLS:
            self._warn(
                f"was called more than {_MOST_CALLS} times without a step of the scheduler: these calls "
                "run uncached; is this the scheduler of the run? (see apply(..., scheduler=...))"
            )
            return
        context = self._context((self._ordinal, form(named)))
        scales = tuple(controlnet.scale for controlnet in self._controlnets)
        context.follow(scales, self._step, self._steps.num_steps)
        self._settings.see(self._step, named.get(self._names[0]))
        parts = cached_parts(module)  # looked up anew: adapters may have replaced some since
        self._call = _Call(context, self._step - context.first_step, self._timer, parts)
        if self._call.full:
            self._settings.note(self._step)
            self.companions.begin(FullCall(context, context.recorded, context.config.warmup, named))
        for part in parts:
            self._undo.append(_replace_forward(part, self._call))
        if context.clusters is not None:
            self._undo.append(context.clusters.watch(self._call.full))

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = self._call
        self._end()
        if output is None:  # the call raised
            self._abort()
            return
        if call is None:
            return
        self._settings.end(self._step)
        if not call.full:
            call.context.skipped_steps += 1
            return
        with self._timer.measure(next(module.parameters()).device), torch.no_grad():
            call.context.record(call.step, call.outputs, call.parts)
        call.context.full_steps += 1

    def _end(self) -> None:
        self._call = None
        self.companions.end()
        while self._undo:
            self._undo.pop()()

    def _abort(self) -> None:
        self.contexts.clear()
        self._steps.abort()

    def _count_calls(self) -> None:
        """Which call of the step this is; a new run forgets the last one."""
        steps = self._steps
        if self._run != steps.run:
            self._run, self._step = steps.run, -1
            self.contexts.clear()
            self._settings.follow()
            self._timer.start_run(steps.run)
        if self._step != steps.step:
            self._step, self._ordinal = steps.step, 0
        else:
            self._ordinal += 1

    def _context(self, key: tuple[Any, ...]) -> Context:
        if key not in self.contexts:
            label = f"{self.name}[{self._ordinal}]"
            twins = sum(context.label.split(" ")[0] == label for context in self.contexts.values())
            num_steps, sigmas = self._steps.num_steps, self._settings.sigmas
            context = self.contexts[key] = Context(
                self._settings.config,
                f"{label} #{twins + 1}" if twins else label,
                self._step,
                None if num_steps is None else num_steps - self._step,
                None if sigmas is None else sigmas[self._step :],
            )
            if self._clustered is not None:
                context.clusters = self._clustered.begin()
        return self.contexts[key]

    def _warn(self, what: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f"hicache: {type(self.module).__name__} {what}", RuntimeWarning, stacklevel=4)


def _replace_forward(part: Part, call: _Call) -> Callable[[], None]:
    """Let a submodule's calls go to ``call``; returns what undoes it exactly."""
    attributes = part.module.__dict__
    forward = part.module.forward  # the class's, or what offloading has put in its place

    def cached_forward(*args: Any, **kwargs: Any) -> Any:
        if part.is_feature:
            return call.feature(part.path, forward, args, kwargs)
        return call.idle(part.path, forward, args, kwargs)

    def undo() -> None:
        if shadowed:
            attributes["forward"] = forward
        else:
            del attributes["forward"]

    shadowed = "forward" in attributes
    attributes["forward"] = cached_forward
    return undo


def _copy(path: str, output: Any) -> Any:
    """A copy of what a submodule gave: blocks may go on with it in place."""
    if isinstance(output, Tensor):
        return output.detach().clone()
    elements = output if isinstance(output, (tuple, list)) else (output,)
    if not all(element is None or isinstance(element, Tensor) for element in elements):
        raise RuntimeError(
            f"hicache.reference: expected {path} to give a tensor or a tuple of tensors, got "
            f"{[type(element).__name__ for element in elements]}"
        )
    return tuple(None if element is None else element.detach().clone() for element in elements)


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    return next(value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
