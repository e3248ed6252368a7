"""Every op on a history of many features, for counting its launches."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hicache_kernels import History, forecast, gated_sum, update_, update_forecast_

FEATURES = 76
MIXED = [(1, 3 + index % 5, 16 + 7 * (index % 3)) for index in range(FEATURES)]
ALIKE = [(2, 5, 48)] * FEATURES


def calls(backend: str) -> dict[str, Callable[[], object]]:
    """What to call, by name."""
    mixed, alike = (History(shapes, 2) for shapes in (MIXED, ALIKE))
    mixed.orders.normal_()
    alike.orders.normal_()
    by_feature = alike.orders_by_feature()
    inv_gap, coeffs = torch.tensor(0.2), torch.tensor([1.0, 0.5, -0.125])
    base, gates = torch.randn(2, 5, 48), torch.randn(FEATURES, 2, 48)
    pending = {"inv_gap": inv_gap, "filled": 2}
    return {
        "update_": lambda: update_(mixed.orders, inv_gap, 2, backend=backend),
        "forecast": lambda: forecast(mixed.orders, coeffs, backend=backend),
        "update_forecast_": lambda: update_forecast_(mixed.orders, inv_gap, coeffs, 2, backend=backend),
        "gated_sum": lambda: gated_sum(base, by_feature, gates, coeffs, backend=backend),
        "gated_sum, no gates": lambda: gated_sum(base, by_feature, None, coeffs, backend=backend),
        "gated_sum, update": lambda: gated_sum(base, by_feature, gates, coeffs, backend=backend, **pending),
    }
