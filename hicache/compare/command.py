"""What a command line calls: shows progress, writes the page and the numbers, prints a table."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from hicache.compare.files import appearing
from hicache.compare.request import Request
from hicache.launch.hiring import Team, placed
from hicache.launch.loading import pipeline

if TYPE_CHECKING:
    from hicache.compare.run import Comparison


def run(asked: Request, load: Callable[[str | None], Any] = pipeline) -> int:
    """Carry the command out; returns the exit status.

    Args:
        asked: what is compared.
        load: gives the pipeline of ``asked.model``, where this process compares.

    Raises:
        TypeError, ValueError: what was asked for cannot be.
        RuntimeError: the ``compare`` extra is not installed, a cluster cannot be had, or a variant failed.
    """
    try:
        from hicache.compare import cluster, page
        from hicache.compare.desk import Desk
    except ImportError as error:
        raise RuntimeError(f"needs the compare extra: pip install 'hicache[compare]' ({error})") from error

    where = None if asked.staff is None else placed(asked.staff)
    with appearing([asked.out, asked.numbers]) as drafts:
        if isinstance(where, Team):
            with _bar("batches") as show:
                found, made = cluster.compare(asked, where, show)
        else:
            desk = Desk(asked, load if where is None else partial(pipeline, place=where))
            total, done = desk.runs * asked.steps * len(list(asked.pictures.batches())), itertools.count(1)
            with _bar("steps") as show:
                found = desk.compare(asked.pictures, lambda: show(next(done), total))
            made = desk.origin()
        for draft, text in zip(drafts, (page.page(found, made), page.numbers(found, made)), strict=True):
            draft.write_text(text, encoding="utf-8")
    _print(found)
    print(f"saved {asked.out} and {asked.numbers}")
    return 0


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """How many are done, and how many there are, on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print(found: Comparison) -> None:
    """The table, shorter than the page's."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(found.asked)} pictures, {found.full.full_steps} steps")
    table.add_column("variant")
    for title in ("full steps", "seconds", "speed-up", *(f"{one.name}, mean" for one in found.metrics)):
        table.add_column(title, justify="right")
    for one in (found.full, *found.variants):
        scores = [
            metric.text(one.mean(metric.key)) if metric.key in one.scores else "" for metric in found.metrics
        ]
        numbers = f"{one.least_seconds:.3f}", f"{found.speedup(one):.2f}x"
        table.add_row(one.name, str(one.full_steps), *numbers, *scores)
    Console().print(table)
