"""What a command line calls: shows progress, writes the page and the numbers, prints a table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hicache.compare.files import appearing
from hicache.compare.request import Request
from hicache.compare.variants import variants
from hicache.launch.loading import pipeline
from hicache.pipeline import check_backend, find_denoisers

if TYPE_CHECKING:
    from hicache.compare.run import Comparison


def run(asked: Request, load: Callable[[str | None], Any] = pipeline) -> int:
    """Carry the command out; returns the exit status.

    Args:
        asked: what is compared.
        load: gives the pipeline of ``asked.model``.

    Raises:
        TypeError, ValueError: what was asked for cannot be.
        RuntimeError: the ``compare`` extra is not installed, or a variant failed.
    """
    try:
        from diffusers.utils.logging import disable_progress_bar

        from hicache.compare import metrics, page
        from hicache.compare.origin import origin
        from hicache.compare.run import compare
    except ImportError as error:
        raise RuntimeError(f"needs the compare extra: pip install 'hicache[compare]' ({error})") from error

    with appearing([asked.out, asked.numbers]) as drafts:
        measuring, missing = metrics.load(asked.metrics)
        disable_progress_bar()
        pipe = load(asked.model)
        pipe.set_progress_bar_config(disable=True)
        for module in find_denoisers(pipe, unets=asked.cached == "output").values():
            check_backend(asked.backend, module)
        chosen = variants(pipe, asked.mode, asked.interval, asked.steps, asked.base)
        calls = 2 * asked.repeats * (1 + len(chosen)) * len(list(asked.pictures.batches()))
        with _bar(calls * asked.steps) as on_step:
            found = compare(
                pipe,
                asked.pictures,
                chosen,
                measuring,
                rounds=asked.repeats,
                granularity=asked.cached,
                backend=asked.backend,
                on_step=on_step,
            )
        made = origin(asked, pipe, missing)
        for draft, text in zip(drafts, (page.page(found, made), page.numbers(found, made)), strict=True):
            draft.write_text(text, encoding="utf-8")
    _print(found)
    print(f"saved {asked.out} and {asked.numbers}")
    return 0


@contextmanager
def _bar(total: int) -> Iterator[Callable[[], None]]:
    """Steps done, on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("steps", total=total)
        yield lambda: bar.advance(task)


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
