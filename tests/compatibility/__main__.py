"""What works with what: ``python -m tests.compatibility [--write docs/compatibility.md] [--jobs 2]``.

Tries every situation with each of its models, and prints what came of them, or writes the page. With
``--only`` the rows whose name has a text in it are tried, and printed or put into the page.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")


from tests.compatibility.checks import Outcome
from tests.compatibility.page import page, read
from tests.compatibility.processes import run
from tests.compatibility.registry import WRONG
from tests.compatibility.situations import rows
from tests.compatibility.subjects import MODELS, STEPS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--write", type=Path, help="write the page here")
    parser.add_argument("--only", help="try rows that have this text in their name, and print them")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args()
    wanted = [row for row in rows() if (options.only or "").lower() in row.key.lower()]
    outcomes = run(wanted, options.jobs)
    if options.only and not options.write:
        print(*(f"{key}: {found.text} [{found.cached_by}]" for key, found in outcomes.items()), sep="\n")
    wrong = {key: found for key, found in outcomes.items() if found.text.startswith(WRONG)}
    print(*(f"{key}: {found.text}" for key, found in wrong.items()), sep="\n", file=sys.stderr)
    if wrong:
        return 1
    if options.write:
        options.write.write_text(page({**kept(options), **outcomes}, STEPS))
    elif not options.only:
        print(page(outcomes, STEPS))
    return 0


def kept(options: argparse.Namespace) -> dict[str, Outcome]:
    """The rows of the page as it is, where some only are tried anew."""
    if not options.only:
        return {}
    written = read(options.write.read_text())
    cells = {row.key: (row.situation.name, MODELS[row.model].title) for row in rows()}
    return {key: written[cell] for key, cell in cells.items() if cell in written}


if __name__ == "__main__":
    sys.exit(main())
