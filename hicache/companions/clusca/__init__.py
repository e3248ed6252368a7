"""ClusCa and Hi-ClusCa: at skipped steps, the MLPs of double blocks run on a few tokens of every picture.

Tokens are grouped by k-means; of each cluster one token is drawn, and the MLP computed for it. What that
gives takes the place of the drawn token's forecast, and counts a little in the forecasts of its cluster. The
basis decides the name: with ``"taylor"`` it is ClusCa (arXiv 2509.10312), with ``"hermite"`` Hi-ClusCa.
docs/companions.md has the rules and what they are worth.

>>> from hicache import HiCacheConfig
>>> from hicache.companions.clusca import ClusCa
>>> import hicache.fast                                                       # doctest: +SKIP
>>> hicache.fast.apply(pipe, HiCacheConfig(), clusters=ClusCa(clusters=16))   # doctest: +SKIP
"""

from hicache.companions.clusca.settings import ClusCa

__all__ = ["ClusCa"]
