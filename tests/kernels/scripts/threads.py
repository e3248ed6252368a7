"""The native backend wakes as many threads as torch uses, and a child process makes its own."""

import os

import torch

from hicache_kernels import forecast


def threads() -> int:
    """Threads of this process."""
    return len(os.listdir("/proc/self/task"))


torch.set_num_threads(3)
orders = torch.ones(1, 1 << 20)
before = threads()
forecast(orders, torch.ones(1), backend="native")
assert threads() == before + 2, (before, threads())
torch.set_num_threads(1)
forecast(orders, torch.ones(1), backend="native")
assert threads() == before + 2, (before, threads())
torch.set_num_threads(2)
child = os.fork()
row = forecast(orders, torch.full((1,), 2.0), backend="native")
# no operator of torch's that wants threads: its OpenMP does not survive a fork
assert set(row.numpy().tolist()) == {2.0}
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
