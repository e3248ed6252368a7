"""Whether the weights that gates and embeddings were computed with are still the model's."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import nn

from hicache import compat
from hicache.weights import only_in_their_blocks, weight_parts
from hicache_kernels.unchanged import TensorStates, Values


class GateWeights:
    """The state of modules that something was computed with, to be compared with what it is later.

    Noticed are modules and weights put in others' places, weights written to, and LoRA layers that are
    weighed, switched or merged; not writes through ``Tensor.data``, which torch does not count. Weights that
    are offloaded come and go, and are not compared.

    Args:
        model: the transformer.
        roots: the modules, parts of it; their own parts are compared, too.
        unhooked: one of them that hooks are not to be put on; None where that is as may be.
    """

    def __init__(
        self, model: nn.Module, roots: Sequence[nn.Module], unhooked: nn.Module | None = None
    ) -> None:
        self._roots, self._unhooked = list(roots), unhooked
        modules = [part for root in roots for part in root.modules()]
        offloaded = only_in_their_blocks(model) or any(map(compat.is_offloaded, modules))
        places: list[Any] = [
            compat.children_by_name(module) for module in (*_parents(model, roots), *modules)
        ]
        weights: list[Any] = [] if offloaded else [compat.weights_by_name(module) for module in modules]
        # one without children is taken to get none: what puts one into a layer (a parametrization) takes a
        # weight out of its place
        hooks = () if unhooked is None else compat.hooks_by_key(unhooked)
        self._places = Values([*(place for place in (*places, *weights) if place), *hooks])
        tensors = [weight for place in weights for weight in place.values() if weight is not None]
        self._states = TensorStates([part for weight in tensors for part in weight_parts(weight)])
        self._lora = [(module, compat.lora_settings(module)) for module in modules if compat.is_lora(module)]

    def of(self, roots: Sequence[nn.Module], unhooked: nn.Module | None) -> bool:
        """Whether it is the state of these modules."""
        same = len(roots) == len(self._roots) and all(map(operator.is_, roots, self._roots))
        return same and unhooked is self._unhooked

    def unchanged(self) -> bool:
        """Whether they are as they were; asked at every skipped step."""
        return (
            self._places.unchanged()
            and self._states.unchanged()
            and (not self._lora or all(compat.lora_settings(one) == settings for one, settings in self._lora))
        )


def _parents(model: nn.Module, modules: Sequence[nn.Module]) -> list[nn.Module]:
    """The parts of a model that have modules as children."""
    wanted = set(modules)
    return [part for part in model.modules() if not wanted.isdisjoint(part.children())]
