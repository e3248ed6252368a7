"""A denoiser of which only what it returns is looked at: a skipped step calls nothing of it."""

from __future__ import annotations

from torch import nn

from hicache.hooks.hooked import HookedModule
from hicache.hooks.structures import structure_of


class HookedOutput(HookedModule):
    """Any denoiser, with blocks or without.

    Args:
        module: the denoiser. It is only looked at until :meth:`watch`.

    Raises:
        ValueError: its calls do more than to return something; the message names the class.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, may_leave_out=True)
        structure = structure_of(module)
        if structure.keeps:
            raise ValueError(f"hicache: {self.name} cannot be cached: {structure.refusal}")
