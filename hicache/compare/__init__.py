"""``hicache compare``: modes × intervals on the same seeds, as one HTML page and the JSON of its numbers.

The pieces, in the order data flows: :mod:`~hicache.compare.variants` (what is compared),
:mod:`~hicache.compare.run` (draws it), :mod:`~hicache.compare.metrics` (judges it),
:mod:`~hicache.compare.plots` and :mod:`~hicache.compare.page` (show it), and
:mod:`~hicache.compare.command`, which a command line calls.
"""
