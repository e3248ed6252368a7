"""This cache beside those of other packages: ``python -m benchmarks.peers``.

Every method draws the same pictures from the same noise (benchmarks/common/judging.py: nothing was fitted
to them), in a process of its own; they are compared with those of the uncached loop, and loops of one picture
are timed beside it. Rows go to the CSV as they are measured, and those that are there are not measured again.
The packages are those of the extra ``peers``; what is not installed is left out.

``--model flux`` measures what a skipped step costs where there are 19 + 38 blocks, of a tiny width.
"""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import command
from benchmarks.peers import rows
from benchmarks.peers.method import Method
from benchmarks.peers.models import MODELS
from benchmarks.peers.table import chosen, installed

RESULTS = Path("benchmarks/results")
FILES = {"bundled": RESULTS / "peers.csv", "flux": RESULTS / "peers-flux.csv"}
PICTURES = 48


def options() -> Namespace:
    parser = command.parser(__doc__, csv=False)
    parser.add_argument("--model", choices=list(MODELS), default="bundled")
    parser.add_argument(
        "--methods", nargs="+", default=[], help="names, of methods or of packages; default: all"
    )
    parser.add_argument("--intervals", type=float, nargs="+", help="of methods that have one; default: all")
    parser.add_argument("--pictures", type=int, help=f"default: {PICTURES}; of flux, as many as --rounds")
    parser.add_argument("--rounds", type=int, default=5, help="of timing, each of another picture")
    parser.add_argument("--threads", type=int, help="of torch; default: its own")
    parser.add_argument("--again", action="store_true", help="measure rows that are there again")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--timing-only", action="store_true", help="time again, and leave the rest of the rows")
    only.add_argument("--operators-only", action="store_true", help="count operators again, and nothing else")
    only.add_argument("--untimed", action="store_true", help="all but times, which want a quiet machine")
    parser.add_argument("--csv", type=Path, help="default: benchmarks/results/peers.csv, or peers-flux.csv")
    return parser.parse_args()


def wanted(method: Method, given: Namespace, table: dict[tuple[str, float], rows.Row]) -> Iterator[float]:
    """Yield the settings of a method that are to be measured."""
    for setting in MODELS[given.model].settings(method):
        if given.intervals and method.knob == "interval" and setting not in given.intervals:
            continue
        row = table.get((method.name, setting))
        if given.timing_only or given.operators_only:
            if row is not None and not row.note:
                yield setting
        elif given.again or row is None or not row.done(given.pictures, timed=not given.untimed):
            yield setting


def main() -> None:
    given = options()
    given.csv = given.csv or FILES[given.model]
    given.pictures = given.pictures or (PICTURES if MODELS[given.model].judged else given.rounds)
    try:
        methods = chosen(given.methods)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    failed = []
    for method in methods:
        settings = list(wanted(method, given, rows.read(given.csv)))
        if settings and not installed(method.package):
            print(f"{method.name}: left out: {method.package} is not installed", file=sys.stderr)
        elif settings and subprocess.run(worker(method, settings, given), check=False).returncode:
            failed.append(method.name)
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}")


def worker(method: Method, settings: list[float], given: Namespace) -> list[str]:
    """Return the command that measures a method."""
    pictures = 1 if given.operators_only else given.rounds if given.timing_only else given.pictures
    switches = ["--operators"] if given.operators_only else [] if given.timing_only else ["--judge"]
    untimed = given.untimed or given.operators_only
    if given.threads:
        switches += ["--threads", str(given.threads)]
    return [
        *(sys.executable, "-m", "benchmarks.peers.worker", "--model", given.model, "--method", method.name),
        *("--settings", *map(str, settings), "--pictures", str(pictures)),
        *("--rounds", str(0 if untimed else min(given.rounds, pictures))),
        *("--csv", str(given.csv), "--kept", "build/peers", *switches),
    ]


if __name__ == "__main__":
    main()
