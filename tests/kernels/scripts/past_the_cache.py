"""Every op as if no cache held anything (HICACHE_CPU_LAST_LEVEL=0): streamed results, and every tactic tried.

All give the reference's bits; then one is taken, among those that were measured.
"""

import math

import torch

from hicache_kernels import forecast, gated_sum, update_forecast_
from hicache_kernels.backends import native

COEFFS, GAP = torch.tensor([1.0, 0.5, -0.125]), torch.tensor(0.25)
CALLS = 3 * 6 + 2  # every tactic three times, then the one that is taken

for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for rows, channels in ((70, 64), (13, 59), (1, 40000)):  # aligned rows, ragged ones, several blocks
        base = torch.randn(2, rows, channels).to(dtype)
        orders = torch.randn(3, 2, base.numel()).to(dtype)
        gates = torch.randn(2, 2, channels).to(dtype)
        plain = forecast(orders, COEFFS, backend="reference")
        assert torch.equal(forecast(orders, COEFFS, backend="native"), plain)
        ours, theirs = orders.clone(), orders.clone()
        fused = update_forecast_(theirs, GAP, COEFFS, 2, backend="reference")
        assert torch.equal(update_forecast_(ours, GAP, COEFFS, 2, backend="native"), fused)
        assert torch.equal(ours, theirs)
        for weighed in (gates, None):
            for more in ({}, {"inv_gap": GAP, "filled": 2}):
                ours, theirs = orders.clone(), orders.clone()
                for _ in range(CALLS):
                    out = gated_sum(base, ours, weighed, COEFFS, backend="native", **more)
                    expected = gated_sum(base, theirs, weighed, COEFFS, backend="reference", **more)
                    assert torch.equal(out, expected), (dtype, rows, channels, more)
                    assert torch.equal(ours, theirs)
tried = native.tactics()
assert len(tried) == 4 * 3 * 4, tried  # dtypes, shapes, with and without gates and an update
assert len({kind[:-2] for kind in tried}) == len(tried)
for *_, chosen, costs in tried:
    assert len(costs) == 6
    assert all(map(math.isfinite, costs)), costs
    best = min(costs)
    # the first one stays where no other is clearly faster
    assert costs[chosen] == best or (chosen == 0 and best > 0.94 * costs[0]), (chosen, costs)
print(native.isa())
