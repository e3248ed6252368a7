"""What a run shows on a terminal: a bar with pictures a second and what is left, and a table at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from hicache.launch.run import Summary
from hicache.launch.tasks import Picture


class Screen:
    """A bar on standard error where that is a terminal, and a table on standard output.

    Args:
        title: of both.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._console = Console(stderr=True)

    @contextmanager
    def bar(self) -> Iterator[Any]:
        """Gives what :func:`hicache.launch.run.run` calls after each picture."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, disable=not self._console.is_terminal) as progress:
            task = progress.add_task(self._title, total=None, rate="loading")

            def show(summary: Summary, picture: Picture) -> None:
                done = summary.made + summary.failed
                rate = f"{done / summary.took:.3g} pictures/s, {summary.failed} failed"
                progress.update(task, total=summary.wanted, completed=summary.there + done, rate=rate)

            yield show

    def end(self, summary: Summary, folder: str) -> None:
        """The table, and what failed."""
        table = Table(title=self._title)
        table.add_column("")
        table.add_column(folder, justify="right")
        for name, value in summary.rows().items():
            table.add_row(name, value)
        Console().print(table)
        for index, why in sorted(summary.reasons.items()):
            self._console.print(f"picture {index}: {why}", markup=False, highlight=False, soft_wrap=True)
        if summary.failed > len(summary.reasons):
            self._console.print(
                f"… and {summary.failed - len(summary.reasons)} more: done.jsonl has them all"
            )
