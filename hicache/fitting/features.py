"""What rows are fitted to: what a full step gives, and what stands in for the model at a skipped one.

Features are ``[features, batch, tokens, channels]``, or ``[1, numbers]`` where what a model returns is one;
differentiable, and never written in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from hicache.adapters import registry
from hicache.adapters.base import ModuleAdapter, ModuleOutput
from hicache.adapters.layers import check_layers
from hicache.engine import Sum
from hicache.hooks.hooked import HookedModule
from hicache.hooks.output import HookedOutput
from hicache.hooks.transformer import HookedTransformer
from hicache.pipeline import check_choice
from hicache.runtime.module_recorder import as_blocks_do
from hicache.runtime.output_recorder import Returned
from hicache.runtime.sum_check import NotFinite, Unfit, check_sum
from hicache.step_plan import FullStep, OutputStep, SkippedStep


class Features(Protocol):
    """The features of one denoiser, a call at a time."""

    @property
    def hooked(self) -> HookedModule:
        """The denoiser, watched."""

    @property
    def count(self) -> int | None:
        """How many have rows of their own; None: one row serves all."""

    def install(self, forecast: Callable[[], Tensor]) -> list[Callable[[], None]]:
        """Hook what is needed inside the denoiser; returns what undoes it.

        Args:
            forecast: the features at a skipped step.
        """

    def begin_full(self, model_kwargs: Mapping[str, Any], take: Callable[[Tensor], None]) -> None:
        """A full step begins.

        Args:
            model_kwargs: the denoiser's arguments by name.
            take: is given the features, once they are there.

        Raises:
            ValueError: there or in the step: a call like this has no such features.
        """

    def begin_skipped(self) -> None:
        """A skipped step begins."""

    def end(self, output: Any) -> None:
        """A call has ended, and gave ``output``."""


def features_of(module: nn.Module, granularity: str) -> Features:
    """The features of a denoiser.

    Raises:
        ValueError: an unknown granularity, or a denoiser that has no such features.
    """
    check_choice("granularity", granularity, GRANULARITIES)
    return _KINDS[granularity](module)


class _OfBlocks:
    """Features of what is between the hidden state that enters the first block and the one after the last.

    Args:
        module: the denoiser, whose blocks are in their lists.
    """

    count: int | None = None

    def __init__(self, module: nn.Module) -> None:
        self.hooked = HookedTransformer(module)

    def install(self, forecast: Callable[[], Tensor]) -> list[Callable[[], None]]:
        def stand_in(plan: SkippedStep, base: Tensor, block_kwargs: Mapping[str, Any]) -> Tensor:
            return self.after_blocks(forecast(), base, block_kwargs)

        self.hooked.install(stand_in)
        return [self.hooked.remove]

    def begin_full(self, model_kwargs: Mapping[str, Any], take: Callable[[Tensor], None]) -> None:
        self.hooked.refresh()
        self.hooked.call.lesson = _Taking(self, model_kwargs, take)

    def begin_skipped(self) -> None:
        self.hooked.call.plan = SkippedStep(_NO_SUM)

    def end(self, output: Any) -> None:
        """There is nothing in it that blocks have not shown."""

    def begin(self, hidden: Tensor, block_kwargs: Mapping[str, Any], model_kwargs: Mapping[str, Any]) -> None:
        """A full step's hidden state enters the first block.

        Args:
            hidden: ``[batch, tokens, channels]``; blocks may work in place.
            block_kwargs: the first block's arguments by name.
            model_kwargs: the denoiser's.

        Raises:
            ValueError: a call like this has no such features.
        """
        raise NotImplementedError

    def taken(self, hidden: Tensor) -> Tensor:
        """The hidden state leaves the last block: the features of this step."""
        raise NotImplementedError

    def after_blocks(self, features: Tensor, base: Tensor, block_kwargs: Mapping[str, Any]) -> Tensor:
        """The hidden state after the blocks that features, which were forecast, make of the one before."""
        raise NotImplementedError


class _Taking:
    """Looks on at a full step (:class:`hicache.step_plan.Lesson`), and takes its features.

    Args:
        features: of the denoiser.
        model_kwargs: of the call, by name.
        take: is given them.
    """

    unfit: str | None = None

    def __init__(
        self, features: _OfBlocks, model_kwargs: Mapping[str, Any], take: Callable[[Tensor], None]
    ) -> None:
        self._features = features
        self._model_kwargs = model_kwargs
        self._take = take

    def first_block(self, hidden: Tensor, block_kwargs: Mapping[str, Any]) -> FullStep:
        self._features.begin(hidden, block_kwargs, self._model_kwargs)
        return FullStep(())

    def head(self, plan: FullStep, hidden: Tensor) -> FullStep | None:
        self._take(self._features.taken(hidden))
        return None


class OfStack(_OfBlocks):
    """What all blocks together add to the hidden state: one feature."""

    def begin(self, hidden: Tensor, block_kwargs: Mapping[str, Any], model_kwargs: Mapping[str, Any]) -> None:
        self._base = hidden.clone()

    def taken(self, hidden: Tensor) -> Tensor:
        return (hidden - self._base)[None]

    def after_blocks(self, features: Tensor, base: Tensor, block_kwargs: Mapping[str, Any]) -> Tensor:
        return base + features[0].to(base.dtype)


class OfModules(_OfBlocks):
    """What every module computes before its gate.

    Args:
        module: the denoiser, whose blocks are in their lists.

    Raises:
        ValueError: its modules are not known, or features of it are sums of several blocks'.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._name = type(module).__name__
        adapter = registry.find(module)
        if adapter is None:
            raise ValueError(
                f"hicache: granularity='module': the modules of {self._name} are not known; use 'stack'"
            )
        check_layers(adapter, by_feature=True)
        self._adapter: ModuleAdapter = adapter
        self.count = adapter.num_features({})
        self._outputs = list(adapter.outputs())
        self._held: dict[int, Tensor] = {}  # what there is of each feature, in a full step
        self._shape: torch.Size | None = None  # of the hidden state, in a full step
        self._check: tuple[Tensor, Tensor] | None = None  # hidden state and gates, where the sum is checked
        self._checked = False

    def install(self, forecast: Callable[[], Tensor]) -> list[Callable[[], None]]:
        outputs = self._outputs
        noted = [output.module.register_forward_hook(self._hook(output)).remove for output in outputs]
        return [*noted, *super().install(forecast)]

    def _hook(self, output: ModuleOutput) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], given: Any) -> None:
            value = None if self._shape is None else output.read(given, self._shape)
            if value is None:
                return
            for feature, factor in output.features:
                part = value if factor is None else value * factor()
                held = self._held.get(feature)
                self._held[feature] = part if held is None else held + part

        return note

    def begin(self, hidden: Tensor, block_kwargs: Mapping[str, Any], model_kwargs: Mapping[str, Any]) -> None:
        adapter = self._adapter
        refusal = adapter.refusal(block_kwargs, model_kwargs)
        if refusal is None and adapter.token_timesteps(model_kwargs) is not None:
            refusal = "tokens have timesteps of their own"
        if refusal is None and any(True for _ in adapter.between(model_kwargs)):
            refusal = "a ControlNet adds to the hidden state between its blocks"
        if refusal is None and adapter.num_features(block_kwargs) != self.count:
            refusal = "an adapter adds to the hidden state beside its modules"
        if refusal is not None:
            raise ValueError(
                f"hicache: granularity='module': rows for {self._name} cannot be fitted: {refusal}"
            )
        self._held, self._shape = {}, hidden.shape
        self._check = None if self._checked else (hidden.detach().clone(), self._gates(block_kwargs, hidden))

    def taken(self, hidden: Tensor) -> Tensor:
        held, self._held, self._shape = self._held, {}, None
        nothing = torch.zeros_like(hidden)  # what skip-layer guidance leaves out
        found = torch.stack([held.get(feature, nothing) for feature in range(self.count or 0)])
        if self._check is not None:
            base, gates = self._check
            self._check, self._checked = None, self._add_up(base, hidden, found, gates)
        return found

    def after_blocks(self, features: Tensor, base: Tensor, block_kwargs: Mapping[str, Any]) -> Tensor:
        gates = self._gates(block_kwargs, base)
        gated = torch.einsum("fbtc,fbc->btc", features.to(gates.dtype), gates)
        return base + gated.to(base.dtype)

    def _add_up(self, base: Tensor, hidden: Tensor, found: Tensor, gates: Tensor) -> bool:
        """Whether gated features are what the blocks made; not known where that is not finite.

        Raises:
            ValueError: they are not.
        """
        try:
            check_sum(base, hidden.detach(), list(found.detach()), gates, ())
        except NotFinite:
            return False
        except Unfit as error:
            raise ValueError(f"hicache: granularity='module': {self._name} {error}") from error
        return True

    @torch.no_grad()
    def _gates(self, block_kwargs: Mapping[str, Any], base: Tensor) -> Tensor:
        """Of this step, ``[features, batch, channels]``: the adapter uses its memory again."""
        return as_blocks_do(self._adapter.gates(block_kwargs, base), base).clone()


class OfOutput:
    """What the denoiser returns, all its floating tensors one after the other: nothing inside is looked at.

    Args:
        module: the denoiser, of any kind.

    Raises:
        ValueError: its calls do more than to return something.
    """

    count: int | None = None

    def __init__(self, module: nn.Module) -> None:
        self.hooked = HookedOutput(module)

    def install(self, forecast: Callable[[], Tensor]) -> list[Callable[[], None]]:
        self._forecast = forecast
        return [self.hooked.remove]

    def begin_full(self, model_kwargs: Mapping[str, Any], take: Callable[[Tensor], None]) -> None:
        self._take = take

    def begin_skipped(self) -> None:
        numbers = self._forecast().flatten().split([shape.numel() for shape in self._shapes])
        tensors = [part.view(shape) for part, shape in zip(numbers, self._shapes, strict=True)]
        self.hooked.call.left_out = OutputStep(self._returned.filled(tensors))

    def end(self, output: Any) -> None:
        if self.hooked.call.left_out is None:
            try:
                self._returned, tensors = Returned.of(output)
            except ValueError as error:
                name = self.hooked.name
                raise ValueError(f"hicache: granularity='output': {name} {error}") from error
            self._shapes = [tensor.shape for tensor in tensors]
            self._take(torch.cat([tensor.flatten() for tensor in tensors])[None])


_KINDS: Final[Mapping[str, Callable[[nn.Module], Features]]] = {
    "stack": OfStack,
    "module": OfModules,
    "output": OfOutput,
}
#: What rows can be fitted to: the residual of the whole stack; every module's output, with a row of its own;
#: what the denoiser returns.
GRANULARITIES: Final = tuple(_KINDS)

_NO_SUM: Any = Sum(torch.empty(0), torch.empty(0), None, 0, "reference")  # whoever fits forecasts
