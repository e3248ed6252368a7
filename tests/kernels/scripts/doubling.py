"""A backend that a test adds: it doubles what the reference forecasts."""

name = "doubling"


def unavailable(device):
    return None


def unsupported(dtypes, num_orders):
    return None


def forecast(orders, coeffs, out):
    out.copy_(2 * (orders[: len(coeffs)] * coeffs[:, None]).sum(0))


update_ = update_forecast_ = gated_sum = forecast
