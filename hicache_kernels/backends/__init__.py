"""Implementations of the ops. They never import one another; :mod:`hicache_kernels.ops` picks one."""
