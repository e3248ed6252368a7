"""Sparse full steps: column-sparse attention with a cached remainder, on FLUX and Wan.

>>> import hicache.fast
>>> from hicache.companions.sparse import SparseAttention
>>> with hicache.fast.apply(pipe, sparse=SparseAttention()) as handle:  # doctest: +SKIP
...     image = pipe("a red ring on blue").images[0]

docs/companions.md, "Sparse full steps", says what it is and when it pays. :func:`attach` has it without
HiCache.
"""

from hicache.companions.sparse.alone import Attached, attach
from hicache.companions.sparse.order import square_order
from hicache.companions.sparse.settings import SparseAttention

__all__ = ["Attached", "SparseAttention", "attach", "square_order"]
