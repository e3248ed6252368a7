"""What a module's arguments are called, and what their names say of them."""

from __future__ import annotations

import functools
import inspect
from typing import Final

from torch import nn

# how the names of arguments begin that say what is drawn
_CONDITIONS: Final = ("encoder_hidden_states", "pooled", "class_labels", "cap_feats")
# and how those end that a run gives in all its steps
_LASTING: Final = ("ids", "mask", "guidance")


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of a module's forward, in order."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def is_condition(name: str) -> bool:
    """Whether an argument of this name says what is drawn."""
    return name.startswith(_CONDITIONS)


@functools.cache
def lasts(name: str) -> bool:
    """Whether an argument of this name has the same numbers in all steps of a run, if nobody writes to it."""
    return is_condition(name) or name.endswith(_LASTING)
