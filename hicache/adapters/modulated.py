"""Families whose blocks get their gates from modulation layers of one embedding, ``temb``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hicache.adapters.base import EMBEDDED, ModuleAdapter
from hicache.adapters.gates import Gates


class ModulatedAdapter(ModuleAdapter):
    """A subclass makes ``_gates`` of its modulation layers, and writes :meth:`embedding`.

    Args:
        module: the transformer.
    """

    _gates: Gates
    #: Children of the model that make ``temb``; one may be None.
    embedders: tuple[str, ...] = ("time_text_embed",)

    def embedding(
        self, model_kwargs: Mapping[str, Any], timesteps: Tensor, steps: int, like: Tensor
    ) -> Tensor:
        """``temb`` of several steps, ``[steps · batch, width]``; arguments as for :meth:`gate_inputs`."""
        raise NotImplementedError

    def gates(self, block_kwargs: Mapping[str, Any], base: Tensor) -> Tensor:
        return self._gates.of(nn.functional.silu(block_kwargs[EMBEDDED]), base.shape[-1])

    @property
    def embedder(self) -> nn.Module | None:
        named = self.embedders if self.foretell and len(self.embedders) == 1 else ()
        return next((getattr(self.module, name, None) for name in named), None)

    def embedding_modules(self) -> Sequence[nn.Module]:
        embedders = (getattr(self.module, name) for name in self.embedders)
        return [module for module in embedders if module is not None]

    def gate_modules(self) -> Sequence[nn.Module]:
        return [*self.embedding_modules(), *self._gates.layers]

    def gate_inputs(
        self,
        block_kwargs: Mapping[str, Any],
        model_kwargs: Mapping[str, Any],
        timesteps: Tensor,
        steps: int,
        like: Tensor,
    ) -> Mapping[str, Any]:
        return {**block_kwargs, EMBEDDED: self.embedding(model_kwargs, timesteps, steps, like)}
