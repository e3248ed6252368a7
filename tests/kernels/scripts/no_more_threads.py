"""An op for eight threads in a process that can have no more: no memory is left for the stack of one."""

import resource
import threading
from pathlib import Path

import torch

from hicache_kernels import forecast

orders, coeffs = torch.ones(2, 1 << 21), torch.tensor([1.0, 2.0])
out = torch.zeros(1 << 21)
forecast(orders[:, :64].contiguous(), coeffs, backend="native")
torch.set_num_threads(8)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), resource.RLIM_INFINITY))
try:
    threading.Thread(target=print).start()
except RuntimeError:
    forecast(orders, coeffs, out=out, backend="native")
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("computed" if bool((out == 3).all()) else "wrong")
