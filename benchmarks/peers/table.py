"""All methods there are. A further package is a module beside this one, and its name here."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Final

from benchmarks.peers import of_cache_dit, of_diffusers, of_hicache, of_hicache_pp
from benchmarks.peers.method import Method

OURS: Final = of_hicache.PACKAGE
METHODS: Final = {
    method.name: method
    for entries in (of_hicache, of_diffusers, of_cache_dit, of_hicache_pp)
    for method in entries.METHODS
}


def chosen(names: Sequence[str]) -> list[Method]:
    """Return the methods that are named, or that are of a package that is; all of them without a name.

    Raises:
        ValueError: a name is neither of a method nor of a package.
    """
    known = {*METHODS, *(method.package for method in METHODS.values())}
    unknown = sorted(set(names) - known)
    if unknown:
        raise ValueError(f"--methods: unknown: {'; '.join(unknown)}; known: {'; '.join(sorted(known))}")
    return [
        method for method in METHODS.values() if not names or method.name in names or method.package in names
    ]


def installed(package: str) -> bool:
    """Whether a method's package can be imported here."""
    return importlib.util.find_spec(package.replace("-", "_")) is not None
