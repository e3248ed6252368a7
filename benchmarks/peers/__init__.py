"""This cache beside others: diffusers' own, cache-dit's, hicache-pp's."""
