"""Rows tried in several processes."""

from __future__ import annotations

import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

import diffusers
import torch

from tests.compatibility.checks import Outcome
from tests.compatibility.registry import Row, try_out
from tests.compatibility.situations import rows

SHARE = 20  # rows that a process takes at a time: those of a model share what is drawn of it


def run(wanted: list[Row], jobs: int) -> dict[str, Outcome]:
    """Try rows in so many processes; outcomes by key, in the rows' order."""
    numbers = {row.key: number for number, row in enumerate(rows())}
    # those of a model together
    order = sorted(wanted, key=lambda row: (row.model, numbers[row.key]))
    shares = [[numbers[row.key] for row in order[at : at + SHARE]] for at in range(0, len(order), SHARE)]
    found: dict[str, Outcome] = {}
    began = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=prepare) as pool:
        for part in as_completed(pool.submit(try_share, share) for share in shares):
            found |= part.result()
            seconds = time.perf_counter() - began
            print(f"\r{len(found)} of {len(wanted)} rows, {seconds:.0f} s", end="", file=sys.stderr)
    print(file=sys.stderr)
    return {row.key: found[row.key] for row in wanted}


def prepare() -> None:
    """What tests do first, in a process of its own."""
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()


def try_share(share: list[int]) -> dict[str, Outcome]:
    """Try the rows of these numbers."""
    every = rows()
    return {every[number].key: try_out(every[number]) for number in share}
