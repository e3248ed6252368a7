"""One of the processes that tokens of a transformer spread over; rank 0 prints how far off cached runs are.

Usage: context_parallel.py RANK PROCESSES PORT MODEL…
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import diffusers
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

import hicache.fast
from hicache import HiCacheConfig
from tests.support import models, pipelines
from tests.support.runs import blocks_of

CONFIG = HiCacheConfig(interval=3)
QWEN: dict[str, Any] = {
    "prompt_embeds": models.noise(1, 6, 16),
    "prompt_embeds_mask": torch.ones(1, 6, dtype=torch.long),
}
# what makes tokens and heads divide by the number of processes
EVEN: dict[str, dict[str, Any]] = {
    "wan": {"height": 32},
    "qwen": QWEN,
    "qwen_edit": QWEN,
}


def main(rank: int, processes: int, port: int, names: list[str]) -> None:
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    alone = {(name, kind): draw(name, kind) for name in names for kind in ("stack", "module")}
    torch.accelerator.device_count = lambda: processes
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=processes)
    for (name, kind), (wanted, expected) in alone.items():
        picture, blocks = draw(name, kind, ContextParallelConfig(ulysses_degree=processes))
        off = float((picture - wanted).norm() / wanted.norm())
        if rank == 0:
            print(name, kind, off, blocks, expected, flush=True)
    dist.destroy_process_group()


def draw(name: str, granularity: str, parallel: Any = None) -> tuple[torch.Tensor, int]:
    """A cached picture, and how many blocks ran."""
    pipe, arguments = pipelines.build(name)
    pipe.register_modules(transformer=models.reconfigured(pipe.transformer, num_attention_heads=4))
    if parallel is not None:
        pipe.transformer.set_attention_backend("native")
        pipe.transformer.enable_parallelism(config=parallel)
    runs: list[int] = []
    for block in blocks_of(pipe.transformer):
        block.register_forward_hook(lambda *_: runs.append(1))
    with hicache.fast.apply(pipe, CONFIG, granularity=granularity):
        return pipelines.draw(pipe, {**arguments, **EVEN.get(name, {})}), len(runs)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), sys.argv[4:])
