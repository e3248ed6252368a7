"""Fused kernels for feature caching by finite differences.

>>> import torch
>>> from hicache_kernels import History, update_forecast_
>>> history = History([(2, 3)], order=1)
>>> one = torch.ones(())
>>> _ = history.inbox(0).fill_(1.0); row = update_forecast_(history.orders, one, torch.tensor([1.0]), 0)
>>> _ = history.inbox(0).fill_(3.0); row = update_forecast_(history.orders, one, torch.tensor([1.0, 0.5]), 1)
>>> history.split(row)[0]
tensor([[4., 4., 4.],
        [4., 4., 4.]])
"""

from hicache_kernels.history import History, history_nbytes
from hicache_kernels.ops import (
    BACKENDS,
    auto_backend,
    backend_status,
    forecast,
    gated_sum,
    update_,
    update_forecast_,
)

__all__ = [
    "BACKENDS",
    "History",
    "auto_backend",
    "backend_status",
    "forecast",
    "gated_sum",
    "history_nbytes",
    "update_",
    "update_forecast_",
]
