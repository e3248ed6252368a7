"""Calls of a module that others watch: whether, when and how often they are made is theirs to say."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn

from hicache.mixin import mix_in

# given what makes the call, and its arguments; gives what the caller gets
Watcher = Callable[..., Any]

_KEY: Final = "_hicache_watchers"


class _Watchers(list[Watcher]):
    """Of one module, with what takes the class off that makes them heard."""

    undo: Callable[[], None]


class _Watched(nn.Module):
    """Mixed into a module's class: before its hooks, and before offloading brings its weights."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = super().__call__
        if not torch.compiler.is_compiling():  # else a part of what is compiled: made as it stands there
            for watcher in tuple(self.__dict__.get(_KEY, ())):
                call = functools.partial(watcher, call)
        return call(*args, **kwargs)


def watch_calls(module: nn.Module, watcher: Watcher) -> Callable[[], None]:
    """Have the calls of a module made by ``watcher(call, *args, **kwargs)``; returns what undoes it.

    Several may watch one module, the last of them first. Once the last has gone the module is as it was.
    """
    watchers = module.__dict__.get(_KEY)
    if watchers is None:
        watchers = _Watchers()
        watchers.undo = mix_in(module, _Watched, _KEY, watchers)
    watchers.append(watcher)

    def undo() -> None:
        watchers.remove(watcher)
        if not watchers:
            watchers.undo()

    return undo
