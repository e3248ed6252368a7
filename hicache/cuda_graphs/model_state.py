"""What of a transformer is part of its graphs: where its weights are, how LoRA and processors are set."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, Final

import torch
from torch import nn

from hicache import compat
from hicache.cuda_graphs.capture import CaptureBackend
from hicache.weights import addresses, is_sharded, weight_parts

ENVIRONMENT: Final = "HICACHE_CUDA_GRAPHS"  # "0" switches graphs off, whatever the code asks for


class _Part:
    """Some of a transformer's modules: weights, LoRA layers and attention processors of their own.

    Args:
        modules: the modules.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        weights = [weight for module in modules for weight in module.parameters(recurse=False)]
        self.weights = [part for weight in weights for part in weight_parts(weight)]
        self._scaled = [module for module in modules if compat.is_lora(module)]
        processors = [getattr(module, "processor", None) for module in modules]
        self._processors = [processor for processor in processors if hasattr(processor, "__dict__")]

    def read(self) -> tuple[Any, ...]:
        """Where the weights are, how LoRA weighs its own, and the settings of attention processors.

        Numbers of Python are part of a graph: an IP-Adapter's scale may change between any two calls.
        """
        return (
            addresses(self.weights),
            [compat.lora_settings(layer) for layer in self._scaled],
            [_settings(processor) for processor in self._processors],
        )


class ModelState:
    """What of a transformer is part of its graphs, and whether it still is as it was.

    A skipped step whose gates are at hand runs nothing of the blocks: their hundreds of weights are looked at
    where a graph has them.

    Args:
        module: the transformer.
        block_lists: of it.
    """

    def __init__(self, module: nn.Module, block_lists: Sequence[nn.ModuleList]) -> None:
        self._module = module
        self._block_lists = block_lists
        self._seen_outside: tuple[Any, ...] = ()
        self._seen_inside: tuple[Any, ...] = ()
        self.start_run()

    def start_run(self) -> None:
        """Look the transformer over: parts of it may have been put in others' places."""
        blocks = [block for blocks in self._block_lists for block in compat.children_of_list(blocks)]
        inside = dict.fromkeys(part for block in blocks for part in block.modules())
        self._outside = _Part(module for module in self._module.modules() if module not in inside)
        self._inside = _Part(inside)

    def changed(self, blocks: bool) -> bool:
        """Whether it is not as it was when it was last looked at.

        Args:
            blocks: whether blocks are to be looked at, too.
        """
        outside = self._outside.read()
        moved = outside != self._seen_outside
        self._seen_outside = outside
        if blocks or moved:
            inside = self._inside.read()
            moved |= inside != self._seen_inside
            self._seen_inside = inside
        return moved

    def why_eager(self, backend: CaptureBackend) -> str | None:
        """Why no call of it can be captured; None when one can."""
        if os.environ.get(ENVIRONMENT) == "0":
            return f"{ENVIRONMENT}=0"
        weights = self._outside.weights + self._inside.weights
        if not weights:
            return "the transformer has no weights"
        if is_sharded(self._module):
            return "its weights are sharded: they are gathered to other memory in every call"
        devices: set[torch.device] = {weight.device for weight in weights}
        if len(devices) > 1:
            return f"its weights are on {', '.join(sorted(map(str, devices)))}"
        for module in self._module.modules():
            if compat.is_offloaded(module):
                return f"{type(module).__name__} is offloaded or hooked"
        return backend.unavailable(devices.pop())


def _settings(processor: Any) -> tuple[Any, ...]:
    """The plain values among an object's attributes, and lists of them."""
    found: list[Any] = []
    for name, value in vars(processor).items():
        values = value if isinstance(value, (list, tuple)) else (value,)
        if all(isinstance(one, (bool, int, float, str)) for one in values):
            found.append((name, *values))
    return tuple(found)
