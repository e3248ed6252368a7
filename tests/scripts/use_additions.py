"""Use what tests/test_adding_one_of_each.py added to the tree that this runs in; print what came of it."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch

import hicache.fast
from hicache import HiCacheConfig, full_steps
from hicache.basis import Named, evaluate
from hicache.run import Position
from hicache.schedule import EveryOther  # type: ignore[attr-defined]


def main() -> None:
    assert Path(hicache.__file__).is_relative_to(Path.cwd()), hicache.__file__
    # a basis
    assert evaluate(Named("halved"), Position(2, 0, (1.0,), 2)) == [1.0, 0.5]
    # a schedule
    assert full_steps(HiCacheConfig(schedule=EveryOther()), 7) == [0, 2, 4, 6]
    # a model, whose class is in a file of its own
    torch.manual_seed(0)
    model = runpy.run_path(sys.argv[1])["Pebble"]().eval()
    latents = torch.randn(1, 9, 4)
    config = HiCacheConfig(interval=3, basis="halved")
    with torch.no_grad(), hicache.fast.apply(model, config, granularity="module") as handle:
        for t in torch.linspace(1, 0.05, 12):
            latents = latents - 0.05 * model(latents, timestep=t[None])
    assert latents.isfinite().all()
    print(handle.stats.granularity, handle.stats.full_steps, handle.stats.skipped_steps)


if __name__ == "__main__":
    main()
