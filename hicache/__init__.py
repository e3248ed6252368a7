"""hicache: diffusion transformers that skip most of their steps and still draw the same picture.

>>> import hicache.fast                  # doctest: +SKIP
>>> handle = hicache.fast.apply(pipe)    # doctest: +SKIP
"""

from hicache._version import __version__
from hicache.basis import get_basis, known_bases, register_basis, unregister_basis
from hicache.config import HiCacheConfig
from hicache.engine import Engine
from hicache.schedule import bound, full_steps

__all__ = [
    "Engine",
    "HiCacheConfig",
    "__version__",
    "bound",
    "full_steps",
    "get_basis",
    "known_bases",
    "register_basis",
    "unregister_basis",
]
