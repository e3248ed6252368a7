"""One of the processes that weights are sharded over; rank 0 prints how far off cached runs are.

Usage: sharded.py RANK PROCESSES PORT MODEL…
"""

from __future__ import annotations

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import diffusers
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import hicache.fast
from hicache import HiCacheConfig
from tests.support import pipelines
from tests.support.runs import blocks_of

CONFIG = HiCacheConfig(interval=3)


def main(rank: int, processes: int, port: int, names: list[str]) -> None:
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    alone = {(name, kind): draw(name, kind) for name in names for kind in ("stack", "module")}
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=processes)
    for (name, kind), (wanted, expected) in alone.items():
        picture, blocks = draw(name, kind, sharded=True)
        off = float((picture - wanted).norm() / wanted.norm())
        if rank == 0:
            print(name, kind, off, blocks, expected, flush=True)
    dist.destroy_process_group()


def draw(name: str, granularity: str, sharded: bool = False) -> tuple[torch.Tensor, int]:
    """A cached picture, and how many blocks ran."""
    pipe, arguments = pipelines.build_randomized(name)
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in blocks_of(pipe.transformer):
            fully_shard(block, mesh=mesh)
        fully_shard(pipe.transformer, mesh=mesh)
    runs: list[int] = []
    for block in blocks_of(pipe.transformer):
        block.register_forward_hook(lambda *_: runs.append(1))
    with hicache.fast.apply(pipe, CONFIG, granularity=granularity) as handle:
        picture = pipelines.draw(pipe, arguments)
        why = handle.stats.graphs["transformer"].eager or ""
        assert ("sharded" in why) == sharded, why
    return picture, len(runs)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), sys.argv[4:])
