"""Correctness on the device at hand, beyond parity: odd addresses, far rows, graphs, launches.

``python -m benchmarks.checks --device cuda`` runs them all; with ``--few`` a small subset, for running under
compute-sanitizer. Every check is one op on one backend; a failed one is reported and the others go on.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common import command
from benchmarks.common.timing import Call, capture
from benchmarks.kernels.parity import WrongResult, assert_no_worse, check_op, rounding
from benchmarks.kernels.problems import DTYPES, OPS, Op, Problem, Size, ops_at, usable_backends
from benchmarks.launches import count
from hicache_kernels import gated_sum, update_, update_forecast_

# aligned throughout; less than a vector; rows no power of two divides; more than a tile
CHECKED_SIZES = (Size(3, 16, 48, batch=2), Size(3, 1, 7), Size(2, 13, 130, batch=3), Size(1, 1, 4099))


@dataclass(frozen=True)
class Check:
    """One outcome. ``reason`` is None when it passed."""

    kind: str
    backend: str
    what: str
    reason: str | None = None


Body = Callable[[], object]
Plan = Iterator[tuple[str, str, str, Body]]


def numbers(device: str, dtypes: Sequence[torch.dtype], orders: Sequence[int], sizes: Sequence[Size]) -> Plan:
    """Compare every op, order and dtype with float64, on outputs full of NaN."""
    for order in orders:
        for size in sizes:
            for dtype in dtypes:
                problem = Problem(size, order, dtype, device)
                for op in ops_at(order):
                    for name in usable_backends(device, dtype, order + 1):
                        # over a few elements eager torch, the measure, may be lucky: a rounding an order more
                        ulps = rounding(name, dtype) * (1 + order)
                        body = functools.partial(check_op, problem, op, name, problem.call(op, name), ulps)
                        yield "float64", name, f"{op.name} {dtype} O={order} {size}", body


def _same(what: str, ours: Tensor, expected: Tensor) -> None:
    if not torch.equal(ours, expected):
        raise WrongResult(f"{what}: differs in {int((ours != expected).sum())} of {ours.numel()} numbers")


def partial(device: str, dtype: torch.dtype, backend: str) -> None:
    """Fill rows of differences that do not exist yet with NaN: nothing may read or write them."""
    orders = torch.full((5, 1003), float("nan"), dtype=dtype, device=device)
    orders[[0, 4]] = torch.randn(2, 1003, device=device).to(dtype)
    whole = orders[[0, 4]].clone()
    coeffs, inv_gap = torch.tensor([1.0, 0.5], device=device), torch.tensor(0.25, device=device)
    out = torch.full_like(orders[0], float("nan"))
    update_forecast_(orders, inv_gap, coeffs, 1, out=out, backend=backend)
    exact = torch.stack([whole[1].double(), (whole[1].double() - whole[0].double()) / 4])
    eager = torch.stack([whole[1], (whole[1] - whole[0]) / 4])
    assert_no_worse("orders", orders[:2], eager, exact, 2)
    assert_no_worse("forecast", out, eager[0] + eager[1] * 0.5, exact[0] + exact[1] / 2, 2)
    if not orders[2:4].isnan().all():
        raise WrongResult("a row that does not exist was written")
    _same("the inbox", orders[4], whole[1])


def unaligned(device: str, dtype: torch.dtype, backend: str) -> None:
    """Compare rows one element off any alignment with aligned ones: the bits are the same."""
    numel = 2 * 17 * 33
    memory = torch.randn(3 * (numel + 3) + 1, device=device).to(dtype)
    odd = memory[1:].as_strided((3, numel), (numel + 3, 1))
    aligned = odd.clone()
    coeffs = torch.tensor([1.0, 0.5, -0.125], device=device)
    inv_gap = torch.tensor(0.2, device=device)
    gates = torch.randn(2 * 33 + 1, device=device).to(dtype)[1:].view(1, 2, 33)
    base = torch.randn(numel + 1, device=device).to(dtype)[1:].view(2, 17, 33)
    for gate in (gates, None):
        results = []
        for orders in (odd[:, None], aligned[:, None]):
            results.append(gated_sum(base, orders, gate, coeffs, backend=backend))
        _same("gated_sum", *results)
    results = [update_forecast_(rows, inv_gap, coeffs, 2, backend=backend) for rows in (odd, aligned)]
    _same("forecast", *results)
    _same("history", odd, aligned)


def far(device: str, backend: str) -> None:
    """Use rows further apart than 2³¹ elements; on the CPU in a file with holes."""
    apart, numel = 2**31 + 64, 4099
    size = 2 * apart + numel
    with tempfile.NamedTemporaryFile() as file:
        if device == "cpu":
            memory = torch.from_file(file.name, shared=True, size=size, dtype=torch.bfloat16)
        else:
            memory = torch.empty(size, dtype=torch.bfloat16, device=device)
        orders = memory.as_strided((3, numel), (apart, 1))
        near = torch.randn(3, numel, device=device).bfloat16()
        orders.copy_(near)
        coeffs, inv_gap = torch.tensor([1.0, 0.5, 0.25], device=device), torch.tensor(0.5, device=device)
        base = torch.randn(1, numel, device=device).bfloat16()
        sums = [gated_sum(base, o[:, None], None, coeffs, backend=backend) for o in (orders, near)]
        _same("gated_sum", *sums)
        rows = [update_forecast_(o, inv_gap, coeffs, 2, backend=backend) for o in (orders, near)]
        _same("forecast", *rows)
        update_(orders, inv_gap, 2, backend=backend)
        update_(near, inv_gap, 2, backend=backend)
        _same("history", orders, near)


def graphed(op: Op, dtype: torch.dtype, backend: str) -> None:
    """Capture once and replay with other features, weights and gaps: the bits are those of a plain call."""
    problem = Problem(Size(4, 33, 96, batch=2), 2, dtype, "cuda")
    call = problem.call(op, backend)
    graph = capture(call)
    for replay in range(1, 4):
        problem.orders.normal_()
        problem.base.normal_()
        problem.coeffs.copy_(torch.tensor([1.0, 0.5 * replay, -0.3 / replay]))
        problem.inv_gap.fill_(1 / (replay + 2))
        start = problem.orders.clone()
        results = []
        for run in (call, graph.replay):
            problem.orders.copy_(start)
            problem.out.fill_(float("nan"))
            problem.row.fill_(float("nan"))
            run()
            torch.cuda.synchronize()
            written = problem.out if op.sums else problem.row
            results.append((problem.orders.clone(), written.clone() if op.forecasts else start))
        _same(f"history, replay {replay}", results[1][0], results[0][0])
        _same(f"result, replay {replay}", results[1][1], results[0][1])


def kernels_launched(call: Call) -> list[str]:
    """Name the kernels that one call runs on the GPU, as the profiler sees them; copies and fills count."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        call()
        torch.cuda.synchronize()
    events = profiler.events() or []
    return [event.name for event in events if event.device_type.name == "CUDA"]


def one_launch(op: Op, device: str, backend: str) -> None:
    """Count the launches for many features: one; on the CPU, one operator."""
    problem = Problem(Size(76, 3, 64), 2, torch.float32, device)
    call = problem.call(op, backend)
    launched = kernels_launched(call) if device == "cuda" else list(count(call).elements())
    if len(launched) != 1:
        raise WrongResult(f"expected one launch, got {launched}")


def core(device: str, few: bool = False) -> Plan:
    """Plan what must be right before anything is timed: bf16 and fp32 at order 2; ``few``: at fewer sizes."""
    dtypes = [DTYPES[key] for key in ("bf16", "fp32")]
    yield from numbers(device, dtypes, (2,), CHECKED_SIZES[1:3] if few else CHECKED_SIZES)
    yield from layouts(device, dtypes)


def others(device: str) -> Plan:
    """Plan all other dtypes and orders, rows far apart, and how many kernels an op is."""
    dtypes = [DTYPES[key] for key in ("fp16", "fp64")]
    for name in usable_backends(device, torch.bfloat16, 3):
        yield "rows 2³¹ apart", name, "bf16", functools.partial(far, device, name)
        for op in OPS.values():
            if name != "reference":  # which is many operators
                yield "one launch", name, op.name, functools.partial(one_launch, op, device, name)
    yield from numbers(device, dtypes, (2,), CHECKED_SIZES)
    yield from layouts(device, dtypes)
    yield from numbers(device, list(DTYPES.values()), (1, 3, 0, 4), CHECKED_SIZES)


def layouts(device: str, dtypes: Sequence[torch.dtype]) -> Plan:
    """Plan rows that do not exist yet, addresses off any alignment, and replays of a graph."""
    for dtype in dtypes:
        for name in usable_backends(device, dtype, 5):
            for kind, check in (("NaN in rows to come", partial), ("unaligned", unaligned)):
                yield kind, name, str(dtype), functools.partial(check, device, dtype, name)
            if device == "cuda" and name != "reference":
                for op in ops_at(2):
                    yield "graph", name, f"{op.name} {dtype}", functools.partial(graphed, op, dtype, name)


def run(plan: Plan, deadline: float = float("inf")) -> Iterator[Check]:
    """Run the checks of a plan, one by one. What is not begun by the deadline stays in the plan."""
    torch.manual_seed(0)
    while time.monotonic() <= deadline and (planned := next(plan, None)) is not None:
        kind, backend, what, body = planned
        try:
            body()
        except (WrongResult, RuntimeError, ValueError) as error:
            yield Check(kind, backend, what, f"{type(error).__name__}: {error}")
        else:
            yield Check(kind, backend, what)


def main() -> None:
    parser = command.parser(__doc__, csv=False)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--few", action="store_true", help="a small subset")
    options = parser.parse_args()
    plan = core(options.device, options.few)
    checks = list(run(plan if options.few else itertools.chain(plan, others(options.device))))
    failed = [check for check in checks if check.reason is not None]
    for check in failed:
        print(f"FAILED {check.kind}, {check.backend}, {check.what}: {check.reason}")
    print(f"{len(checks) - len(failed)} of {len(checks)} checks passed")
    if failed or not checks:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
