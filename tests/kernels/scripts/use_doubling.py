"""The added backend is there by name, and "auto" does not take it unasked."""

import torch

from hicache_kernels import backend_status, forecast

assert backend_status("cpu")["doubling"] is None
assert (forecast(torch.ones(3, 4), torch.ones(2), backend="doubling") == 4).all()
assert (forecast(torch.ones(3, 4), torch.ones(2)) == 2).all()
