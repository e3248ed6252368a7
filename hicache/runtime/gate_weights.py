"""Whether the weights that gates were computed with are still the model's."""

from __future__ import annotations

from torch import Tensor, nn

from hicache import compat
from hicache.adapters.base import ModuleAdapter
from hicache.weights import only_in_their_blocks, weight_parts


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
        self._offloaded = only_in_their_blocks(adapter.module) or any(map(compat.is_offloaded, modules))
        # holds on to the modules and weights, so that no others take their addresses
        self._parts = [(module, self._parts_of(module)) for module in modules]
        weights = [] if self._offloaded else [w for root in self._roots for w in root.parameters()]
        tensors = [part for weight in weights for part in weight_parts(weight)]
        self._tensors = [(tensor, *_place(tensor)) for tensor in tensors]
        self._lora = [(module, compat.lora_settings(module)) for module in modules if compat.is_lora(module)]

    def unchanged(self) -> bool:
        """Whether they are as they were."""
        roots = self._adapter.gate_modules()
        return (
            len(roots) == len(self._roots)
            and all(now is then for now, then in zip(roots, self._roots, strict=True))
            and all(_same(self._parts_of(module), parts) for module, parts in self._parts)
            and all(_place(tensor) == (address, writes) for tensor, address, writes in self._tensors)
            and all(compat.lora_settings(layer) == settings for layer, settings in self._lora)
        )

    def _parts_of(self, module: nn.Module) -> tuple[object, ...]:
        return compat.parts(module, weights=not self._offloaded)


def _same(now: tuple[object, ...], then: tuple[object, ...]) -> bool:
    return len(now) == len(then) and all(map(lambda a, b: a is b, now, then))


def _place(tensor: Tensor) -> tuple[int, int | None]:
    return tensor.data_ptr(), compat.write_count(tensor)
