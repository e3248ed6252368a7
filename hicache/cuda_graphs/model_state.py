"""What of a transformer is part of its graphs: where its weights are, how LoRA and processors are set."""

from __future__ import annotations

import os
from typing import Any, Final

import torch
from torch import Tensor, nn

from hicache import compat
from hicache.cuda_graphs.capture import CaptureBackend
from hicache.weights import is_sharded, weight_parts

ENVIRONMENT: Final = "HICACHE_CUDA_GRAPHS"  # "0" switches graphs off, whatever the code asks for


class ModelState:
    """The weights, LoRA layers and attention processors of a transformer.

    Args:
        module: the transformer.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._parameters: list[Tensor] = []
        self._scaled: list[Any] = []  # LoRA layers
        self._processors: list[Any] = []  # of attentions

    def start_run(self) -> None:
        """Look the transformer over: parts of it may have been put in others' places."""
        self._parameters = [part for w in self._module.parameters() for part in weight_parts(w)]
        modules = list(self._module.modules())
        self._scaled = [module for module in modules if compat.is_lora(module)]
        processors = [getattr(m, "processor", None) for m in modules]
        self._processors = [processor for processor in processors if hasattr(processor, "__dict__")]

    def why_eager(self, backend: CaptureBackend) -> str | None:
        """Why no call of it can be captured; None when one can."""
        if os.environ.get(ENVIRONMENT) == "0":
            return f"{ENVIRONMENT}=0"
        if not self._parameters:
            return "the transformer has no weights"
        if is_sharded(self._module):
            return "its weights are sharded: they are gathered to other memory in every call"
        devices: set[torch.device] = {parameter.device for parameter in self._parameters}
        if len(devices) > 1:
            return f"its weights are on {', '.join(sorted(map(str, devices)))}"
        for module in self._module.modules():
            if compat.is_offloaded(module):
                return f"{type(module).__name__} is offloaded or hooked"
        return backend.unavailable(devices.pop())

    def read(self) -> tuple[Any, ...]:
        """Where the weights are, how LoRA weighs its own, and the settings of attention processors.

        Numbers of Python are part of a graph: an IP-Adapter's scale may change between any two calls.
        """
        return (
            *(parameter.data_ptr() for parameter in self._parameters),
            *(compat.lora_settings(layer) for layer in self._scaled),
            *(_settings(processor) for processor in self._processors),
        )


def _settings(processor: Any) -> tuple[Any, ...]:
    """The plain values among an object's attributes, and lists of them."""
    found: list[Any] = []
    for name, value in vars(processor).items():
        values = value if isinstance(value, (list, tuple)) else (value,)
        if all(isinstance(one, (bool, int, float, str)) for one in values):
            found.append((name, *values))
    return tuple(found)
