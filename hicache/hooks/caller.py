"""Which pipeline a transformer is called by: several may share one, with schedulers of their own.

A server makes a pipeline for every request, ``from_pipe(shared, scheduler=...)``. Of those made after
``apply()`` nothing is known but what stands on the stack when they call the transformer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from hicache import compat


def calling_scheduler(module: nn.Module) -> Any:
    """The scheduler of the pipeline that is calling a transformer now; None if none is.

    A pipeline is what runs in a ``__call__``, or is given to one first (modular pipelines' blocks), and has
    the transformer and a scheduler among its attributes.
    """
    for argument in compat.arguments_of_calls():
        attributes = getattr(argument, "__dict__", None)
        if not isinstance(attributes, Mapping):
            continue
        scheduler = attributes.get("scheduler")
        if scheduler is not None and any(_is(value, module) for value in attributes.values()):
            return scheduler
    return None


def _is(value: Any, module: nn.Module) -> bool:
    return isinstance(value, nn.Module) and compat.original_module(value) is module
