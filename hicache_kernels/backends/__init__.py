"""Implementations of the ops: a module each, as :mod:`hicache_kernels.backend` says; none imports another.

A new one is a module here and its name in ``NAMES``; "auto" takes it once a measurement says so
(:mod:`hicache_kernels.library`).
"""

from __future__ import annotations

from importlib import import_module
from typing import Final

from hicache_kernels.backend import Backend

NAMES: Final = ("reference", "native", "triton")


def load() -> dict[str, Backend]:
    """Every backend, by name; one that cannot run here is there, and says why.

    Raises:
        TypeError: a module lacks something of a backend, or calls itself by another name.
    """
    backends: dict[str, Backend] = {}
    for name in NAMES:
        module = import_module(f"{__name__}.{name}")
        if not isinstance(module, Backend) or module.name != name:
            raise TypeError(f"{module.__name__}: expected a backend called {name!r}, as Backend says")
        backends[name] = module
    return backends
