"""How the features of a full step get into a history: forward hooks on the modules that compute them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hicache import compat
from hicache.adapters.base import ModuleOutput
from hicache.step_plan import FullStep, RunningCall
from hicache.token_view import TokenView


class _Part:
    """One feature that a module's output is recorded in."""

    def __init__(
        self, output: ModuleOutput, feature: int, factor: Callable[[], Tensor] | None, sole: bool
    ) -> None:
        self.output = output
        self.feature = feature
        self.factor = factor
        self.sole = sole  # it alone makes up the feature: copied into the slot, not added up
        # Bound before the call, not looked up in the plan by index: with an index each block is another block
        # to torch.compile. None: the call has no such feature.
        self.slot: Tensor | None = None
        # by how much the output counts in each of several slots, which are then one tensor
        self.weights: Tensor | None = None
        self.seen = False  # whether the call that is learned from had it


class _OutputHook:
    """Records the output of one module."""

    def __init__(self, call: RunningCall) -> None:
        self.call = call
        self.parts: list[_Part] = []
        self.shape: torch.Size | None = None  # of the hidden state
        self.view: TokenView | None = None  # of it that is recorded; None: all
        self.problem: str | None = None  # why what the module gave in the call learned from is no feature

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(self.call.plan, FullStep):
            return
        if self.call.lesson is None:
            for part in self.parts:
                if part.slot is not None:
                    self._write(part, part.slot, output)
        elif self.problem is None:
            self._learn(module, output)

    def _learn(self, module: nn.Module, output: Any) -> None:
        """Record, and note which features there are and what does not fit."""
        try:
            for part in self.parts:
                if part.slot is not None:
                    part.seen = self._write(part, part.slot, output) or part.seen
                elif self.shape is not None and part.output.read(output, self.shape) is not None:
                    self.problem = f"{type(module).__name__} gives part of a feature this call does not have"
        except ValueError as error:
            self.problem = str(error)

    def _write(self, part: _Part, slot: Tensor, output: Any) -> bool:
        view = self.view
        value = part.output.read(output, slot.shape[-3:] if view is None else view.whole.shape)
        if value is None:
            return False
        value = value.detach() if view is None else view.drawn(value.detach())
        if part.weights is not None:
            slot.addcmul_(value.to(slot.device), part.weights)
            return True
        if part.sole:
            slot.copy_(value)
            return True
        sums = self.call.result.partial_sums
        total = sums.get(part.feature)
        factor = None if part.factor is None else part.factor().to(value.device)
        # one pass an output and a sum: torch promotes within it
        if total is not None:
            sums[part.feature] = total.add_(value) if factor is None else total.addcmul_(value, factor)
            return True
        accumulated = torch.promote_types(value.dtype, torch.float32)
        if factor is None:
            sums[part.feature] = value.to(accumulated, copy=True)
        else:
            sums[part.feature] = value * factor.to(accumulated)
        return True


class ModuleOutputs:
    """The output hooks of a whole model.

    A feature that one output makes up is copied into its slot. One that several add up to is summed in fp32
    (float64 for float64) beside it, and rounded once.

    Args:
        call: the model's running call.
        outputs: all outputs of the model that are recorded.
    """

    def __init__(self, call: RunningCall, outputs: Sequence[ModuleOutput]) -> None:
        self._call = call
        self.modules = [output.module for output in outputs]
        counts = Counter(feature for output in outputs for feature, _ in output.features)
        self._hooks: dict[nn.Module, _OutputHook] = {}
        self._parts: list[_Part] = []
        for output in outputs:
            hook = self._hooks.setdefault(output.module, _OutputHook(call))
            for feature, factor in output.features:
                part = _Part(output, feature, factor, sole=counts[feature] == 1 and factor is None)
                hook.parts.append(part)
                self._parts.append(part)
        self._bound = False
        for module, hook in self._hooks.items():
            compat.add_output_hook(module, hook)

    def remove(self) -> None:
        """Take the hooks off."""
        for module in self._hooks:
            compat.remove_output_hook(module)

    def bind(self, slots: Sequence[Tensor], view: TokenView | None) -> None:
        """Record the features of the call that begins in these slots: what the view has of each."""
        for part in self._parts:
            part.slot, part.weights = slots[part.feature] if part.feature < len(slots) else None, None
        for hook in self._hooks.values():
            hook.shape = slots[0].shape if view is None else view.whole.shape
            hook.view = view
        self._bound = True

    def bind_sums(self, sums: Tensor, weights: Tensor, view: TokenView | None) -> None:
        """Add the features of the call that begins up in these sums, with weights in place of factors.

        Args:
            sums: ``[sums, batch, drawn tokens, channels]``, in fp32 or float64, zeros.
            weights: ``[num_features, sums, batch, 1, channels]``.
            view: of the hidden state that the sums have; None: all of it.
        """
        for part in self._parts:
            has = part.feature < len(weights)
            part.slot, part.weights = (sums, weights[part.feature]) if has else (None, None)
        for hook in self._hooks.values():
            hook.shape = sums.shape[1:] if view is None else view.whole.shape
            hook.view = view
        self._bound = True

    def missing(self, num_features: int) -> tuple[int, ...]:
        """Features that the call learned from had no output for: skip-layer guidance leaves blocks out.

        Raises:
            ValueError: a module gave something that is no feature.
        """
        problems = [hook.problem for hook in self._hooks.values() if hook.problem is not None]
        seen = {part.feature for part in self._parts if part.seen}
        for hook in self._hooks.values():
            hook.problem = None
        for part in self._parts:
            part.seen = False
        if problems:
            raise ValueError(problems[0])
        return tuple(feature for feature in range(num_features) if feature not in seen)

    def finish(self, slots: Sequence[Tensor], missing: Sequence[int]) -> None:
        """The call has ended: round partial sums into their slots, and zero the features it does not have."""
        for feature, total in self._call.result.partial_sums.items():
            slots[feature].copy_(total)
        for feature in missing:
            slots[feature].zero_()

    def unbind(self) -> None:
        """Record nothing until the next :meth:`bind`."""
        if not self._bound:
            return
        self._bound = False
        for part in self._parts:
            part.slot = part.weights = None
        for hook in self._hooks.values():
            hook.shape = hook.view = hook.problem = None


def watched(held: ModuleOutputs | None, call: RunningCall, outputs: Sequence[ModuleOutput]) -> ModuleOutputs:
    """The hooks held, where they are on the modules that give these outputs; else others.

    Args:
        held: hooks from before; LoRA may have put other modules in places of theirs since.
        call: the model's running call.
        outputs: all outputs of the model that are recorded.
    """
    modules = [output.module for output in outputs]
    if held is not None:
        if len(held.modules) == len(modules) and all(map(lambda a, b: a is b, held.modules, modules)):
            return held
        held.remove()
    return ModuleOutputs(call, outputs)
