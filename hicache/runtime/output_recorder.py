"""Output granularity: the tensors that a denoiser returns are the features, with gates of one."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hicache.compat import pytree
from hicache.runtime.context import BegunCall
from hicache.runtime.recorders import Recorder
from hicache.step_plan import FullStep, OutputStep


@dataclass(frozen=True)
class Returned:
    """What a call returned, taken apart: tensors to forecast, and the rest.

    Args:
        layout: puts the leaves together.
        leaves: without those that are forecast.
        features: places of those among the leaves, with their dtypes.
    """

    layout: Any
    leaves: tuple[Any, ...]
    features: tuple[tuple[int, torch.dtype], ...]

    @classmethod
    def of(cls, output: Any) -> tuple[Returned, list[Tensor]]:
        """Take an output apart; returns its form and the tensors to forecast.

        Args:
            output: floating tensors, and whatever stays as it is from step to step, in tuples, lists,
                dictionaries and diffusers' or transformers' outputs.

        Raises:
            ValueError: nothing can be forecast, or it could not be put together again; the message says why.
        """
        leaves, layout = pytree.tree_flatten(output)
        features = [place for place, leaf in enumerate(leaves) if _varies(leaf)]
        tensors = [leaves[place] for place in features]
        refusal = _refusal(leaves, layout, tensors)
        if refusal is not None:
            raise ValueError(refusal)
        rest = [None if place in features else _kept(leaf) for place, leaf in enumerate(leaves)]
        form = tuple((place, leaves[place].dtype) for place in features)
        return cls(layout, tuple(rest), form), tensors

    def filled(self, tensors: Iterable[Tensor]) -> Any:
        """The same with other tensors in the places of those that are forecast, in their dtypes."""
        leaves = [_kept(leaf) for leaf in self.leaves]
        for (place, dtype), tensor in zip(self.features, tensors, strict=True):
            leaves[place] = tensor.to(dtype)
        return pytree.tree_unflatten(leaves, self.layout)


def _varies(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel() > 0


def _kept(leaf: Any) -> Any:
    """A leaf that is not forecast, which whoever gets it may write to."""
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _refusal(leaves: list[Any], layout: Any, tensors: list[Tensor]) -> str | None:
    """Why what a call returned cannot be forecast."""
    found = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    strange = [leaf for leaf in leaves if not isinstance(leaf, (Tensor, int, float, str, type(None)))]
    if strange:
        return f"returns {type(strange[0]).__name__}, which may have tensors inside"
    if not tensors:
        return "returns no floating tensors"
    if any(tensor.is_complex() or hasattr(tensor, "__tensor_flatten__") for tensor in found):
        return "returns tensors that are complex, or spread over processes"
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        return f"returns tensors on {' and '.join(sorted(devices))}"
    try:
        pytree.tree_unflatten(leaves, layout)
    except TypeError as error:
        return f"returns what cannot be put together from its parts ({error})"
    return None


class OutputRecorder(Recorder):
    """Features are the tensors that the denoiser returns: at a skipped step nothing of it runs."""

    name = "output"

    def plan_full(self, begun: BegunCall) -> FullStep:
        return FullStep(())  # it is recorded once it is there

    def plan_output(self, begun: BegunCall) -> OutputStep:
        """A skipped step begins: what it returns."""
        context = begun.context
        assert context.returned is not None
        return OutputStep(context.returned.filled(context.engine.forecast(begun.local_step)))

    def record(self, begun: BegunCall, returned: Returned, tensors: list[Tensor]) -> None:
        """A full step has ended: take in what it returned."""
        context = begun.context
        context.returned = returned
        dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
        slots = context.engine.open([tensor.shape for tensor in tensors], dtype, tensors[0].device)
        for slot, tensor in zip(slots, tensors, strict=True):
            slot.copy_(tensor.detach())
        context.finite.ask(begun.step, slots)
        context.engine.commit(begun.local_step)
