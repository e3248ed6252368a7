"""Forks many times while other threads compute; every child computes too and says so by its exit status.

Takes the number of forks and the seconds a child has; one that has not ended by then is killed and counted as
hung. Prints how many were.
"""

import os
import signal
import sys
import threading

import torch

from hicache_kernels import forecast

SECONDS = int(sys.argv[2])
torch.set_num_threads(3)
orders, coeffs = torch.ones(2, 1 << 19), torch.tensor([1.0, 2.0])
out = torch.empty(1 << 19)
stop = threading.Event()


def compute() -> None:
    mine = torch.empty_like(out)
    while not stop.is_set():
        forecast(orders, coeffs, out=mine, backend="native")


others = [threading.Thread(target=compute) for _ in range(2)]
for other in others:
    other.start()
hung = 0
for _ in range(int(sys.argv[1])):
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        torch.set_num_threads(3)
        forecast(orders, coeffs, out=out, backend="native")
        # no operator of torch's that wants threads: its OpenMP does not survive a fork
        os._exit(0 if bool((out.numpy() == 3).all()) else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGALRM), status
    hung += status != 0
stop.set()
for other in others:
    other.join()
print(hung)
