"""Searches for a tile of two ops in Triton's interpreter and prints the choices."""

import torch

from benchmarks.kernels.problems import OPS, Size
from benchmarks.kernels.tiles import choose
from hicache_kernels.tiles import Tile

sizes = {1: Size(1, 8, 64), 3: Size(3, 8, 64)}
tiles = [Tile(block=512, rows=8), Tile(block=256, rows=16)]
for name, features in (("gated_sum, update", 3), ("forecast", 1)):
    choice = choose(OPS[name], features, 2, torch.float32, "cpu", sizes, tiles)
    print(choice.key, choice.tried, choice.GBps >= choice.default_GBps)
