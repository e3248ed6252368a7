"""Whether the weights that gates were computed with are still the model's."""

from __future__ import annotations

import operator

from hicache import compat
from hicache.adapters.base import ModuleAdapter
from hicache.weights import Places, addresses, only_in_their_blocks, weight_parts


class GateWeights:
    """The state of the modules that make a family's gates, to be compared with what it is later.

    Noticed are modules and weights put in others' places, weights written to, and LoRA layers that are
    weighed, switched or merged; not writes through ``Tensor.data``, which torch does not count. Weights that
    are offloaded come and go, and are not compared.

    Args:
        adapter: the family's.
    """

    def __init__(self, adapter: ModuleAdapter) -> None:
        self._adapter = adapter
        self._roots = list(adapter.gate_modules())
        modules = [part for root in self._roots for part in root.modules()]
        offloaded = only_in_their_blocks(adapter.module) or any(map(compat.is_offloaded, modules))
        self._places = Places(modules, weights=not offloaded)
        weights = [] if offloaded else [weight for root in self._roots for weight in root.parameters()]
        self._tensors = [part for weight in weights for part in weight_parts(weight)]
        self._addresses = addresses(self._tensors)
        # of those made in inference mode nobody counts the writes
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._writes = compat.write_counts(self._counted)
        self._lora = [(module, compat.lora_settings(module)) for module in modules if compat.is_lora(module)]

    def unchanged(self) -> bool:
        """Whether they are as they were."""
        roots = self._adapter.gate_modules()
        return (
            len(roots) == len(self._roots)
            and all(map(operator.is_, roots, self._roots))
            and self._places.unchanged()
            and addresses(self._tensors) == self._addresses
            and compat.write_counts(self._counted) == self._writes
            and all(compat.lora_settings(layer) == settings for layer, settings in self._lora)
        )
