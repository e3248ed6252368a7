"""Times what the host does in a skipped step, beside an earlier commit.

``python -m benchmarks.host_time --against 3d7e2b6``

FLUX.1 of its true depth (19 + 38 blocks) and of the least width runs on the CPU, in its pipeline, module by
module and as a stack, eagerly and with graphs. Time is that of the thread:

- ``step``: a skipped call of the cached transformer, from the call to its return.
- ``own``: that less a call of the bare model, the same transformer without its blocks and with its rotary
  embeddings at hand: what the cache adds to what the model itself does before and after its blocks. A replay
  runs none of that, so with graphs there is no such number.

Left out: the sum's kernel (a small copy is in its place) and a graph's launch (a replay does nothing). Tensor
operations are as small as can be; on a GPU a launch is in the place of each.

A call of the bare model is timed after every step, and times are told in such calls, too: on a machine that
does other things as well both take longer. Ratios are of those.

With ``--against`` the same probe runs on a commit's tree, from a worktree made for it, in turns with this
one, each time in a process of its own; a ratio is of one turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import command, machine, tables

ROOT = Path(__file__).parents[2]
PROBE = Path(__file__).with_name("probe.py")


@dataclass(frozen=True)
class Time:
    """Of one case and part: medians of one process."""

    microseconds: float
    models: float  # the same in calls of the bare model


# case -> part -> time
Times = dict[str, dict[str, Time]]


@dataclass(frozen=True)
class Row:
    """One case, and one part of its time: medians over the turns."""

    case: str  # granularity, and how it runs
    part: str  # "step" or "own"
    microseconds: float
    models: float
    against: str  # a commit; empty without
    against_microseconds: float | None = None
    against_models: float | None = None
    ratio: float | None = None  # of the models, and the least and the most of a turn
    least: float | None = None
    most: float | None = None


def time_tree(tree: Path) -> Times:
    """Run the probe on a tree.

    Raises:
        SystemExit: it failed; what it said is printed.
    """
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(PROBE), str(tree)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"the probe failed on {tree}:\n{done.stderr}")
    found: Times = {}
    for case, pairs in json.loads(done.stdout.splitlines()[-1]).items():
        found[case] = {"step": _time(pairs, 0)}
        if case.endswith("eager"):
            found[case]["own"] = _time(pairs, 1)
    return found


def _time(pairs: list[tuple[int, int]], less: int) -> Time:
    """Of nanoseconds of steps and of the bare model's calls after them; ``less`` so many of those."""
    microseconds = statistics.median(step - less * model for step, model in pairs) / 1e3
    return Time(microseconds, statistics.median(step / model for step, model in pairs) - less)


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """The tree of a commit, for as long as it is wanted.

    Raises:
        SystemExit: there is no such commit.
    """
    with tempfile.TemporaryDirectory(prefix="hicache-") as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        made = subprocess.run(
            [*git, "add", "--detach", str(tree), commit], capture_output=True, text=True, check=False
        )
        if made.returncode:
            raise SystemExit(f"--against {commit}: {made.stderr.strip()}")
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True, capture_output=True)


def rows(ours: list[Times], theirs: list[Times], commit: str) -> list[Row]:
    """Medians, and ratios of each turn's two.

    Args:
        ours: of this tree, a process each.
        theirs: of the commit's, in the same order; empty without one.
        commit: its name.
    """
    found = []
    for case, part in [(case, part) for case, parts in ours[0].items() for part in parts]:
        mine, other = ([times[case][part] for times in tree] for tree in (ours, theirs))
        row = Row(case, part, *_medians(mine), commit)
        if other:
            ratios = [a.models / b.models for a, b in zip(mine, other, strict=True)]
            spread = statistics.median(ratios), min(ratios), max(ratios)
            row = Row(case, part, *_medians(mine), commit, *_medians(other), *spread)
        found.append(row)
    return found


def _medians(times: list[Time]) -> tuple[float, float]:
    return (
        statistics.median(time.microseconds for time in times),
        statistics.median(time.models for time in times),
    )


def show(found: list[Row]) -> str:
    """A table."""
    header = ["case", "part", "µs", "models", "µs before", "models before", "ratio", "least – most"]
    lines = [
        [
            row.case,
            row.part,
            f"{row.microseconds:.0f}",
            f"{row.models:.2f}",
            tables.shown(row.against_microseconds, ".0f"),
            tables.shown(row.against_models, ".2f"),
            tables.shown(row.ratio, ".2f"),
            "" if row.ratio is None else f"{row.least:.2f} – {row.most:.2f}",
        ]
        for row in found
    ]
    return tables.markdown(header, lines)


def main() -> None:
    """Time this tree, or the two in turns."""
    parser: argparse.ArgumentParser = command.parser(__doc__)
    parser.add_argument("--against", metavar="COMMIT", default="", help="time this commit's tree, too")
    parser.add_argument("--rounds", type=int, default=5, help="processes for each tree")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"expected --rounds of at least 1, got {options.rounds}")
    torch.set_num_threads(1)
    ours: list[Times] = []
    theirs: list[Times] = []
    if not options.against:
        ours = [time_tree(ROOT) for _ in range(options.rounds)]
    else:
        with worktree(options.against) as tree:
            for turn in range(options.rounds):
                # there and back: what warms or slows the machine is as often before one as before the other
                for own in (True, False) if turn % 2 else (False, True):
                    (ours if own else theirs).append(time_tree(ROOT if own else tree))
    found = rows(ours, theirs, options.against)
    print(show(found))
    if options.csv is not None:
        tables.write_rows(options.csv, Row, found, machine.place("cpu", "diffusers"))


if __name__ == "__main__":
    main()
