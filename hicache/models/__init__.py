"""How models are hooked. :mod:`hicache.models.generic` fits every transformer that iterates over lists of
blocks."""
