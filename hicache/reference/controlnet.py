"""A ControlNet before a cached transformer: its residuals are cached and forecast too, each by itself.

What it adds is linear in its residuals, so that forecasting each is forecasting all that they add up to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hicache.arguments import argument_names
from hicache.reference.context import Context, form, wants_gradients
from hicache.reference.run_settings import RunSettings
from hicache.reference.steps import Steps
from hicache.reference.timer import Timer


class ControlNet:
    """One ControlNet of a cached pipeline, which runs at full steps only.

    Its schedule counts as that of the transformer's first context does. Where its scale changes, the history
    is begun anew, here and in the transformer's contexts.

    Args:
        module: the ControlNet, or several in one; its ``forward`` is another while it is hooked.
        settings: of the pipeline's runs.
        steps: counts the steps of the pipeline.
        timer: of the pipeline.
    """

    def __init__(self, module: nn.Module, settings: RunSettings, steps: Steps, timer: Timer) -> None:
        self.module = module
        self.scale: Any = None  # of its last call
        self.calls = 0  # of this run
        self.runs = 0
        self._settings = settings
        self._steps = steps
        self._timer = timer
        self._names = argument_names(module)
        self._contexts: dict[Any, Context] = {}
        self._outputs: dict[Any, Any] = {}  # of the last full step of a context: how residuals are nested
        self._run = self._step = -1
        self._ordinal = 0
        self._undo: Callable[[], None] = lambda: None

    def install(self) -> None:
        """Put another ``forward`` in its place."""
        attributes, forward = self.module.__dict__, self.module.forward
        shadowed = "forward" in attributes

        def cached_forward(*args: Any, **kwargs: Any) -> Any:
            return self._call(forward, args, kwargs)

        def undo() -> None:
            if attributes.get("forward") is cached_forward:  # else wrapped since: it only passes calls on
                attributes["forward"] = forward
                if not shadowed:
                    del attributes["forward"]

        attributes["forward"] = cached_forward
        self._installed = True
        self._undo = undo

    def remove(self) -> None:
        """Leave it as it was."""
        self._installed = False
        self._undo()
        self.release()

    def release(self) -> None:
        """Free its histories."""
        self._contexts.clear()
        self._outputs.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of history held."""
        return sum(context.stats.history_bytes for context in self._contexts.values())

    def _call(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if not self._installed or (torch.is_grad_enabled() and wants_gradients(named)):
            return forward(*args, **kwargs)
        self._steps.count(self.module, named)
        self._count_calls()
        scale = named.get("conditioning_scale")
        self.scale = tuple(scale) if isinstance(scale, (list, tuple)) else scale
        key = self._ordinal, form(named)
        context = self._context(key)
        context.follow(self.scale, self._step, self._steps.num_steps)
        step = self._step - context.first_step
        device = next(self.module.parameters()).device
        if not context.is_full(step):
            with self._timer.measure(device), torch.no_grad():
                return _rebuilt(self._outputs[key], lambda index: context.forecast(step, (_PATH, index)))
        output = forward(*args, **kwargs)
        self.runs += 1
        with self._timer.measure(device), torch.no_grad():
            copies = {(_PATH, index): t.detach().clone() for index, t in enumerate(_tensors(output))}
            context.record(step, copies)
        self._outputs[key] = _rebuilt(output, lambda index: None)
        return output

    def _count_calls(self) -> None:
        steps = self._steps
        if self._run != steps.run:
            self._run, self._step = steps.run, -1
            self._settings.follow()
            self.calls = self.runs = 0
            self.release()
            self._timer.start_run(steps.run)
        if self._step != steps.step:
            self._step, self._ordinal = steps.step, 0
        else:
            self._ordinal += 1
        self.calls += 1

    def _context(self, key: Any) -> Context:
        if key not in self._contexts:
            num_steps, sigmas = self._steps.num_steps, self._settings.sigmas
            self._contexts[key] = Context(
                self._settings.config,
                _PATH,
                self._step,
                None if num_steps is None else num_steps - self._step,
                None if sigmas is None else sigmas[self._step :],
            )
        return self._contexts[key]


_PATH = "controlnet"


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (list, tuple, Mapping)):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)


def _rebuilt(output: Any, make: Callable[[int], Any]) -> Any:
    """The same nesting, with ``make(index)`` in the place of every tensor."""
    index = -1

    def of(part: Any) -> Any:
        nonlocal index
        if isinstance(part, (Tensor, _Place)):
            index += 1
            made = make(index)
            return _Place() if made is None else made
        if isinstance(part, (list, tuple)):
            return type(part)(map(of, part))
        if isinstance(part, Mapping):  # also what diffusers' models return: a dictionary of a class of theirs
            return type(part)(**{name: of(value) for name, value in part.items()})
        return part

    return of(output)


class _Place:
    """Where a tensor was."""
