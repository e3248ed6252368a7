"""Every op against eager torch, at the sizes of real models: ``python -m benchmarks.kernels --device cpu``.

Correctness comes first: every contestant's result is compared with float64 before anything is timed. Then
all are timed in turn, beside a plain copy, and reported as GB/s of the least bytes the op must move (each
input once, each output once; hicache_kernels/README.md) and as a share of that copy's bandwidth. One CSV.
"""

from __future__ import annotations

import argparse
import csv
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import device_name, versions
from benchmarks.timing import Timing, time_together
from hicache_kernels import History, backend_status, forecast, gated_sum, update_, update_forecast_

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Size:
    """Features of one history: ``terms`` tensors ``[batch, tokens, channels]``."""

    terms: int
    tokens: int
    channels: int
    batch: int = 1


# hidden states that enter the output head, at the resolutions the models are used with
SIZES = {
    "tiny": Size(1, 64, 192),
    "demo": Size(1, 64, 192, batch=16),
    "1Mi": Size(1, 1024, 1024),
    "FLUX 1024² stack": Size(1, 4096, 3072),
    "16Mi": Size(1, 4096, 4096),
    "Qwen-Image 1024² stack": Size(1, 4096, 3072, batch=2),
    "Wan-14B 720p stack": Size(1, 75600, 5120),
    "FLUX 1024² module": Size(76, 4096, 3072),
}


@dataclass
class Case:
    """One op on one history: contestants by name, each a call that writes its result in place."""

    op: str
    minimum_bytes: int
    calls: dict[str, Callable[[], object]]


def eager_update_forecast(orders: Tensor, gap: float, coeffs: list[float], out: Tensor) -> None:
    """What a reader of the paper writes in torch: in the history's dtype, an operator at a time."""
    fresh = orders[-1]
    new = [fresh.clone()]
    for k in range(len(orders) - 1):
        new.append((new[k] - orders[k]) / gap)
    total = new[0] * coeffs[0]
    for difference, weight in zip(new[1:], coeffs[1:], strict=True):
        total = total + difference * weight
    for k, difference in enumerate(new):
        orders[k].copy_(difference)
    out.copy_(total)


def foreach_update_forecast(
    orders: list[list[Tensor]], gap: float, coeffs: list[float], out: list[Tensor]
) -> None:
    """The same over lists of tensors, with the fused-over-tensors operators of torch."""
    new = [torch._foreach_clone(orders[-1])]
    for k in range(len(orders) - 1):
        difference = torch._foreach_sub(new[k], orders[k])
        torch._foreach_div_(difference, gap)
        new.append(difference)
    total = torch._foreach_mul(new[0], coeffs[0])
    for difference, weight in zip(new[1:], coeffs[1:], strict=True):
        torch._foreach_add_(total, difference, alpha=weight)
    for kept, difference in zip(orders, new, strict=True):
        torch._foreach_copy_(kept, difference)
    torch._foreach_copy_(out, total)


def cases(size: Size, order: int, dtype: torch.dtype, device: str, compiled: bool) -> list[Case]:
    """All ops on one history of this size."""
    shape = (size.batch, size.tokens, size.channels)
    history = History([shape] * size.terms, order, dtype, device)
    history.orders.normal_()
    orders, terms = history.orders, history.terms()
    row = torch.empty_like(orders[0])
    base = torch.randn(shape, device=device).to(dtype)
    gates = torch.randn(size.terms, size.batch, size.channels, device=device).to(dtype)
    out = torch.empty_like(base)
    gap = 7.0
    inv_gap = torch.tensor(1 / gap, device=device)
    weights = [1.0, 0.5, -0.125, 0.3, 0.1][: order + 1]
    coeffs = torch.tensor(weights, device=device)
    one = orders[0].nbytes
    k = order + 1
    backends = [name for name, why in backend_status(device).items() if why is None and name != "triton"]
    if device == "cuda" and backend_status(device)["triton"] is None:
        backends.append("triton")

    def each(call: Callable[[str], object]) -> dict[str, Callable[[], object]]:
        return {name: functools.partial(call, name) for name in backends}

    tensors = [history.split(orders[i]) for i in range(k)]
    peers: dict[str, Callable[[], object]] = {
        "eager": lambda: eager_update_forecast(orders, gap, weights, row),
        "foreach": lambda: foreach_update_forecast(tensors, gap, weights, history.split(row)),
    }
    if compiled:
        fused = torch.compile(eager_update_forecast, dynamic=False)
        peers["compiled"] = lambda: fused(orders, gap, weights, row)
    reads = [
        Case("forecast", (k + 1) * one, each(lambda b: forecast(orders, coeffs, out=row, backend=b))),
        Case(
            "gated_sum",
            k * one + 2 * base.nbytes + gates.nbytes,
            each(lambda b: gated_sum(base, terms, gates, coeffs, out=out, backend=b)),
        ),
    ]
    if order == 0:
        return reads  # a feature is its own history: there is nothing to update
    return [
        *reads,
        Case("update_", 2 * k * one, each(lambda b: update_(orders, inv_gap, order, backend=b))),
        Case(
            "update_forecast_",
            (2 * k + 1) * one,
            each(lambda b: update_forecast_(orders, inv_gap, coeffs, order, out=row, backend=b)) | peers,
        ),
        Case(
            "gated_sum, no gates, update",
            2 * k * one + 2 * base.nbytes,
            each(
                lambda b: gated_sum(
                    base, terms, None, coeffs, inv_gap=inv_gap, filled=order, out=out, backend=b
                )
            ),
        ),
    ]


def gate(device: str) -> None:
    """Stop unless every backend and peer agrees with float64 on a small history."""
    for dtype in DTYPES.values():
        for order in range(5):
            torch.manual_seed(order)
            history = History([(2, 32, 48)] * 3, order, dtype, device)  # a slot has no padding
            history.orders.normal_()
            start = history.orders.clone()
            row = torch.empty_like(start[0])
            weights = [1.0, 0.5, -0.125, 0.3, 0.1][: order + 1]
            exact = start.double()
            exact_row = torch.empty_like(exact[0])
            eager_update_forecast(exact, 7.0, weights, exact_row)
            coeffs, inv_gap = torch.tensor(weights, device=device), torch.tensor(1 / 7, device=device)
            runs: dict[str, Callable[[], object]] = {
                name: functools.partial(
                    update_forecast_, history.orders, inv_gap, coeffs, order, out=row, backend=name
                )
                for name, why in backend_status(device).items()
                if why is None
            }
            runs["eager"] = functools.partial(eager_update_forecast, history.orders, 7.0, weights, row)
            tensors = [history.split(history.orders[k]) for k in range(order + 1)]
            runs["foreach"] = functools.partial(
                foreach_update_forecast, tensors, 7.0, weights, history.split(row)
            )
            tolerance = 8 * torch.finfo(dtype).eps
            for name, run in runs.items():
                history.orders.copy_(start)
                run()
                for ours, theirs in ((row, exact_row), (history.orders, exact)):
                    error = (ours.double() - theirs).abs().max() / theirs.abs().max()
                    if not error <= tolerance:
                        raise SystemExit(
                            f"gate: {name}, order {order}, {dtype}: error {error:.2e} > {tolerance:.2e}"
                        )


def copy_call(numbers: int, dtype: torch.dtype, device: str) -> tuple[Callable[[], object], int]:
    """A plain copy that moves about as many bytes as an op, and how many that is."""
    source = torch.randn(numbers, device=device).to(dtype)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--sizes", nargs="+", choices=list(SIZES), help="default: all that fit in --gigabytes"
    )
    parser.add_argument("--orders", nargs="+", type=int, default=[0, 1, 2, 3, 4], choices=range(5))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--gigabytes", type=float, default=4.0, help="leave out larger histories")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compiled", action="store_true", help="also time torch.compile of the eager form")
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: no CUDA device")
    gate(options.device)
    print(f"gate passed on {device_name(options.device)}; {versions()}")
    rows = []
    for name in options.sizes or SIZES:
        size = SIZES[name]
        for key in options.dtypes:
            dtype = DTYPES[key]
            for order in options.orders:
                numbers = size.terms * size.batch * size.tokens * size.channels
                # the history, and as much again for the eager form's temporaries and the copy
                if 3 * (order + 1) * numbers * dtype.itemsize > options.gigabytes * 1e9:
                    print(f"{name}, order {order}, {key}: left out, over --gigabytes", file=sys.stderr)
                    continue
                copy, copied = copy_call((order + 1) * numbers, dtype, options.device)
                for case in cases(size, order, dtype, options.device, options.compiled):
                    timings = time_together({"copy": copy, **case.calls}, options.rounds, options.device)
                    bandwidth = copied / timings["copy"].p50 / 1e9
                    for contestant in case.calls:
                        rows.append(row_of(name, key, order, case, contestant, timings, bandwidth))
                        print(
                            " ".join(
                                f"{value:>24}" if i == 0 else f"{value:>12}"
                                for i, value in enumerate(rows[-1])
                            )
                        )
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*HEADER, "device", "versions"])
            where = device_name(options.device), versions()
            writer.writerows([*row, *where] for row in rows)


HEADER = ("size", "dtype", "order", "op", "backend", "p20 ms", "p50 ms", "p80 ms", "GB/s", "share of copy")


def row_of(
    name: str,
    dtype: str,
    order: int,
    case: Case,
    contestant: str,
    timings: dict[str, Timing],
    bandwidth: float,
) -> tuple[str, ...]:
    timing = timings[contestant]
    speed = case.minimum_bytes / timing.p50 / 1e9
    milliseconds = (f"{1e3 * value:.4f}" for value in (timing.p20, timing.p50, timing.p80))
    return (
        name,
        dtype,
        str(order),
        case.op,
        contestant,
        *milliseconds,
        f"{speed:.2f}",
        f"{speed / bandwidth:.2f}",
    )


if __name__ == "__main__":
    main()
