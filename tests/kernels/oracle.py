"""The ops again, number by number in Python floats: independent of every backend."""

from __future__ import annotations

import torch


def cascade(feature: list[float], old: list[list[float]], gap: float) -> list[list[float]]:
    """New differences of every number, from the feature and the old differences that take part."""
    new = [feature]
    for previous in old:
        new.append([(a - b) / gap for a, b in zip(new[-1], previous, strict=True)])
    return new


def weigh(differences: list[list[float]], coeffs: list[float]) -> list[float]:
    return [
        sum(c * d for c, d in zip(coeffs, column, strict=True)) for column in zip(*differences, strict=True)
    ]


def rows(orders: torch.Tensor, count: int) -> list[list[float]]:
    return [orders[k].flatten().double().tolist() for k in range(count)]


def update(orders: torch.Tensor, gap: float, filled: int) -> torch.Tensor:
    """Float64 ``[filled + 1, numel]``."""
    feature = orders[-1].flatten().double().tolist()
    return torch.tensor(cascade(feature, rows(orders, filled), gap), dtype=torch.float64)


def forecast(differences: torch.Tensor, coeffs: list[float]) -> torch.Tensor:
    return torch.tensor(weigh(differences.double().tolist(), coeffs), dtype=torch.float64)


def eager(
    orders: torch.Tensor, gap: float, coeffs: list[float], filled: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What plain torch does at the history's own precision, rounding after every operation."""
    new = [orders[-1].clone()]
    for k in range(filled):
        new.append((new[k] - orders[k]) / gap)
    total = new[0] * coeffs[0]
    for difference, weight in zip(new[1:], coeffs[1:], strict=True):
        total = total + difference * weight
    return torch.stack(new), total


def assert_no_worse(
    ours: torch.Tensor, peer: torch.Tensor, exact: torch.Tensor, ulps: int = 1, operands: float = 0.0
) -> None:
    """At most twice plain torch's error against float64, in maximum and relative RMS, plus some roundings.

    At float64 there is nothing more exact to compare with: 1e-12 of the largest number. ``operands`` is the
    largest number that was added up: where sums cancel, roundings of fp32 are of its size, not of theirs, and
    plain torch may be lucky.
    """
    exact = exact.reshape(ours.shape)
    if not exact.numel():
        return
    step = 1e-12 if ours.dtype == torch.float64 else ulps * torch.finfo(ours.dtype).eps
    error, allowed = (ours.double() - exact).abs(), (peer.double() - exact).abs()
    inner = 1e-12 if ours.dtype == torch.float64 else 2 * torch.finfo(torch.float32).eps
    tiny = inner * operands + torch.finfo(ours.dtype).tiny
    assert error.max() <= 2 * allowed.max() + step * exact.abs().max() + tiny
    assert error.norm() <= 2 * allowed.norm() + step * exact.norm() + tiny * exact.numel() ** 0.5
