"""Draws a small picture of FLUX on a GPU, cached by a granularity, into a file; says which backends ran."""

import sys

import torch

import hicache.fast
from tests.support import gpu
from tests.support.graphs import CONFIG

pipe, arguments = gpu.build("flux")
with hicache.fast.apply(pipe, CONFIG, granularity=sys.argv[1]) as handle:
    torch.save(gpu.draw(pipe, arguments), sys.argv[2])
    print(handle.stats.backends)
