"""A denoiser of which only what it returns is looked at: a skipped step calls nothing of it.

It is the call that is left out, not what is inside: no hook of the denoiser runs either, so that offloaded or
sharded weights stay where they are, and what ``torch.compile`` made of it is not entered.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from hicache import compat
from hicache.hooks.hooked import After, Before, HookedModule
from hicache.hooks.structures import structure_of


class HookedOutput(HookedModule):
    """Any denoiser, with blocks or without.

    Args:
        module: the denoiser. It is only looked at until :meth:`watch`.

    Raises:
        ValueError: its calls do more than to return something; the message names the class.
    """

    skips_whole = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        structure = structure_of(module)
        if structure.keeps:
            raise ValueError(f"hicache: {self.name} cannot be cached: {structure.refusal}")
        self._inside: set[int] = set()  # threads that are in a call
        self._before: Before | None = None
        self._after: After | None = None

    def watch(self, before: Before, after: After, failed: Callable[[], None]) -> list[Callable[[], None]]:
        self._before, self._after = before, after
        return [compat.guard_calls(self.module, failed, self._make)]

    def wanted(self, model_kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        # return_dict, and whatever else chooses what is returned
        return tuple((name, value) for name, value in model_kwargs.items() if isinstance(value, bool))

    @compat.passed_by
    def _make(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the denoiser, by whomever; ``call`` makes it."""
        thread = threading.get_ident()
        if thread in self._inside:  # there are two ways into a module, and one goes by the other
            return call(*args, **kwargs)
        assert self._before is not None
        assert self._after is not None
        self._inside.add(thread)
        try:
            args, kwargs = self._before(self.module, args, kwargs) or (args, kwargs)
            plan = self.call.left_out
            output = call(*args, **kwargs) if plan is None else plan.output
            self._after(self.module, args, output)
            return output
        finally:
            self._inside.discard(thread)
