"""Native against the reference, bit for bit, at the instruction set that HICACHE_CPU_ISA allows.

Prints which it was, and a digest of what comes of the smallest numbers while the processor flushes denormal
ones to zero. The choice is made once a process.
"""

import hashlib

import torch

from hicache_kernels import forecast, gated_sum, update_forecast_
from hicache_kernels.backends import native

for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    results = []
    for backend in ("reference", "native"):
        torch.manual_seed(1)
        orders = torch.randn(3, 1003).to(dtype)
        row = update_forecast_(orders, torch.tensor(0.3), torch.randn(3), 2, backend=backend)
        base, gates = torch.randn(1, 17, 59).to(dtype), torch.randn(1, 1, 59).to(dtype)
        out = gated_sum(base, orders[:, None], gates, torch.randn(3), backend=backend)
        results.append((orders, row, out))
    assert all(map(torch.equal, *results)), dtype

digest = hashlib.sha256()
torch.set_flush_denormal(True)
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    orders = torch.arange(3000).to(whole).view(dtype).view(3, 1000)
    row = forecast(orders, torch.tensor([1.0, 0.5, -0.25]), backend="native")
    digest.update(row.view(whole).numpy().tobytes())
print(native.isa(), digest.hexdigest())
