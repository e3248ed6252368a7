"""Host time of a call of an op, beside a launch of its kernel alone. No GPU: the launch goes to a driver that
does nothing (``common/stub_driver.c``), through Triton's own launcher.

``python -m benchmarks.op_cost --against 3d7e2b6 --csv benchmarks/results/op-cost.csv``

``launches`` is host time in launches of Triton: one ``kernel[grid](...)`` with the same arguments, timed in
the same rounds. On a CPU, ``native`` and ``reference`` compute besides, on few numbers. The best round of a
process counts, and the median of processes.
``--against COMMIT`` runs that commit too, in a git worktree, in turn with this one.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BACKENDS = ("triton", "native", "reference")
NOW = "this tree"
HEADER = ["tree", "op", "backend", "us", "launch_us", "launches", "machine", "versions"]
FEATURES, SHAPE = 76, (2, 5, 48)  # those of FLUX by number, few by size


def calls() -> dict[str, Callable[[str], object]]:
    """Every public op in its forms, as a skipped step calls them: name → a call that takes a backend."""
    import torch

    from hicache_kernels import History, forecast, gated_sum, update_, update_forecast_

    history = History([SHAPE] * FEATURES, 2, torch.bfloat16)
    history.orders.normal_()
    # terms() is what it was called
    orders, terms = history.orders, (getattr(history, "orders_by_feature", None) or history.terms)()
    base, gates = torch.randn(SHAPE).bfloat16(), torch.randn(FEATURES, SHAPE[0], SHAPE[-1]).bfloat16()
    gap, coeffs = torch.tensor(0.2), torch.tensor([1.0, 0.5, -0.125])
    return {
        "update_": lambda b: update_(orders, gap, 2, backend=b),
        "forecast": lambda b: forecast(orders, coeffs, backend=b),
        "update_forecast_": lambda b: update_forecast_(orders, gap, coeffs, 2, backend=b),
        "gated_sum": lambda b: gated_sum(base, terms, gates, coeffs, backend=b),
        "gated_sum, update": lambda b: gated_sum(
            base, terms, gates, coeffs, inv_gap=gap, filled=2, backend=b
        ),
    }


@contextmanager
def recorded_launches() -> Iterator[list[Callable[[], object]]]:
    """What Triton is asked to launch inside, each to be launched again."""
    from triton.runtime import JITFunction

    launches: list[Callable[[], object]] = []
    run = JITFunction.run

    def recording(self: Any, *args: Any, **kwargs: Any) -> Any:
        launches.append(lambda: run(self, *args, **kwargs))
        return run(self, *args, **kwargs)

    JITFunction.run = recording
    try:
        yield launches
    finally:
        JITFunction.run = run


def measure(rounds: int, number: int) -> dict[str, dict[str, float]]:
    """Microseconds a call: op → backend → the best of rounds, and ``launch`` for its kernel's alone."""
    import torch

    from hicache_kernels import backend_status
    from hicache_kernels.backends import triton as backend

    # tensors are on the CPU, and the stub's launches touch none
    backend.unavailable = lambda device: None
    usable = [name for name in BACKENDS if backend_status("cpu")[name] is None]
    timed: dict[tuple[str, str], Callable[[], object]] = {}
    for op, call in calls().items():
        with recorded_launches() as launches:
            call("triton")
        timed[op, "launch"] = launches[-1]
        for name in usable:
            timed[op, name] = lambda call=call, name=name: call(name)  # type: ignore[misc]
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in timed}
    gc.disable()
    with torch.no_grad():
        for index in range(rounds + 1):
            for key, function in timed.items():
                times = number if key[1] != "reference" else max(1, number // 50)  # it is slow
                began = time.perf_counter()
                for _ in range(times):
                    function()
                if index:
                    taken[key].append((time.perf_counter() - began) / times * 1e6)
    found: dict[str, dict[str, float]] = {}
    for (op, name), values in taken.items():
        found.setdefault(op, {})[name] = min(values)
    return found


def _measure_here(library: Path, rounds: int, number: int) -> None:
    """In a process of its own: print what :func:`measure` finds of the hicache_kernels on the path."""
    import torch

    sys.path.insert(0, str(ROOT))
    from benchmarks.common import stub_driver

    sys.path.remove(str(ROOT))
    torch.set_num_threads(1)
    stub_driver.load(library)
    stub_driver.activate()
    print(json.dumps(measure(rounds, number)))


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """A checkout of a commit, with the native extension where its sources are the same."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT)]
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            if subprocess.run([*git, "diff", "--quiet", commit, "--", "csrc"], check=False).returncode == 0:
                for built in (ROOT / "hicache_kernels").glob("_native*.so"):
                    shutil.copy(built, tree / "hicache_kernels")
            yield tree
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True)


def compare(
    trees: dict[str, Path], library: Path, repeats: int, rounds: int, number: int
) -> dict[tuple[str, str], dict[str, float]]:
    """(tree, op) → backend → microseconds: of a tree's processes, in turn with the others', the median."""
    samples: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(repeats):
        for name, tree in trees.items():
            command = [sys.executable, __file__, "--measure", str(library), str(rounds), str(number)]
            path = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=path, cwd=tree, check=True, stdout=subprocess.PIPE, text=True)
            for op, found in json.loads(done.stdout).items():
                samples.setdefault((name, op), []).append(found)
    return {
        key: {name: statistics.median(one[name] for one in found) for name in found[0]}
        for key, found in samples.items()
    }


def main() -> None:
    from benchmarks.common import command, machine, stub_driver, tables

    parser = command.parser(__doc__)
    parser.add_argument("--against", metavar="COMMIT", help="also measure this commit")
    parser.add_argument("--repeats", type=int, default=5, help="processes of every tree (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="in every process (%(default)s)")
    parser.add_argument("--calls", type=int, default=500, help="in every round (%(default)s)")
    options: argparse.Namespace = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        library = stub_driver.build(Path(folder))
        with worktree(options.against) if options.against else tempfile.TemporaryDirectory() as other:
            trees = {NOW: ROOT} | ({options.against: Path(other)} if options.against else {})
            found = compare(trees, library, options.repeats, options.rounds, options.calls)
    rows = [
        [tree, op, name, us, times["launch"], us / times["launch"]]
        for (tree, op), times in found.items()
        for name, us in times.items()
        if name != "launch"
    ]
    for tree, op, name, us, launch, ratio in rows:
        print(f"{tree:<10} {op:<18} {name:<10} {us:7.1f} us; {ratio:5.2f} launches of {launch:.1f} us")
    place = machine.place("cpu")
    tables.save_csv(options.csv, HEADER, [[*row, place.device, place.versions] for row in rows])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        _measure_here(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
