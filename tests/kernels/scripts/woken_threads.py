"""An op for two threads, after one for nine, wakes one thread of the pool: prints how many ran meanwhile."""

import os
import re
import time
from pathlib import Path

import torch

from hicache_kernels import forecast


def switches() -> dict[str, int]:
    """How often each thread of this process gave the processor away of its own."""
    found = {}
    for thread in os.listdir("/proc/self/task"):
        status = Path(f"/proc/self/task/{thread}/status").read_text()
        found[thread] = int(re.search(r"^voluntary_ctxt_switches:\s+(\d+)", status, re.M)[1])
    return found


orders, coeffs = torch.ones(1, 1 << 21), torch.ones(1)
torch.set_num_threads(9)
before = set(switches())  # with what torch itself has made
forecast(orders, coeffs, backend="native")
pool = set(switches()) - before
assert len(pool) == 8, pool
time.sleep(0.5)  # whoever woke has gone back to sleep
resting = switches()
torch.set_num_threads(2)
for _ in range(100):
    forecast(orders, coeffs, backend="native")
time.sleep(0.5)
now = switches()
print(sum(now[thread] > resting[thread] for thread in pool))
