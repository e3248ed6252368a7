"""``hicache calibrate``: reads prompts, shows progress, prints what was found."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from hicache.calibration.rules import FittedSteps
from hicache.config import HiCacheConfig
from hicache.fitting.calibrate import Progress, calibrate
from hicache.fitting.trajectory import Search
from hicache.schedule import Steps, full_steps

#: Of the bundled model, where no prompts are given: to fit to, and to judge by.
PICTURES: Final = 48
FITTED_SEED, HELD_OUT_SEED = 7, 11


def run(options: SimpleNamespace, load: Callable[[str | None], Any]) -> None:
    """Carry the command out.

    Args:
        options: of the command line, by name.
        load: gives the pipeline of a folder or a name, None being the bundled one.

    Raises:
        ValueError: a file that is not there or empty, or a model without prompts.
    """
    try:
        from diffusers.utils.logging import disable_progress_bar
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar
        from rich.table import Table
    except ImportError as error:
        raise RuntimeError(f"needs the cli extra: pip install 'hicache[cli]' ({error})") from error

    if not options.out.parent.is_dir():
        raise ValueError(f"--out: expected a file in an existing folder, got {options.out}")
    prompts, held_out = _prompts(options)
    configs = _configs(options)
    disable_progress_bar()
    pipe = load(options.model)
    pipe.set_progress_bar_config(disable=True)
    call = {} if options.guidance is None else {"guidance_scale": options.guidance}
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        tasks: dict[HiCacheConfig, Any] = {}

        def show(progress: Progress) -> None:
            if progress.config not in tasks:
                name = f"{len(full_steps(progress.config, options.steps))} full steps"
                tasks[progress.config] = bar.add_task(name, total=progress.iterations)
            bar.update(tasks[progress.config], completed=progress.iteration + 1)

        found = calibrate(
            pipe,
            prompts,
            configs=configs,
            num_inference_steps=options.steps,
            call=call,
            method=options.method,
            places=options.places,
            granularity=options.granularity,
            held_out=held_out,
            held_out_pictures=options.held_out_pictures,
            search=Search(iterations=options.iterations, tail=options.tail),
            batch=options.batch,
            seed=options.seed,
            out=options.out,
            progress=show,
        )
    table = Table(title=f"{options.out}, PSNR against the full run on held-out pictures, dB")
    for column in ("full steps", "prior, mean", "worst", "fitted, mean", "worst"):
        table.add_column(column, justify="right")
    for entry in found.entries:
        names = ("prior mean dB", "prior worst dB", "fitted mean dB", "fitted worst dB")
        table.add_row(str(len(entry.full_steps)), *(f"{entry.scores[name]:.2f}" for name in names))
    Console().print(table)


def _configs(options: SimpleNamespace) -> list[HiCacheConfig]:
    """What gets rows: an interval each, or the places of a schedule; of a calibration's, all it has."""
    config = HiCacheConfig(order=options.order, sigma=options.sigma, basis=options.basis)
    if options.schedule is None:
        return [replace(config, interval=interval) for interval in options.interval]
    written = options.schedule.split(",")
    if all(map(str.isdecimal, written)):  # all there are, those of a warm-up included
        return [replace(config, warmup=1, schedule=Steps(*map(int, written)))]
    config = replace(config, interval=options.interval[0], schedule=options.schedule)
    places = config.schedule
    if not isinstance(places, FittedSteps):
        return [config]
    return [
        replace(config, warmup=entry.warmup, schedule=Steps(*entry.full_steps))
        for entry in places.calibration.entries
        if entry.num_steps == options.steps
    ]


def _prompts(options: SimpleNamespace) -> tuple[list[str], list[str] | None]:
    if options.prompts is None and options.model is None:
        from hicache.demo.prompts import random_prompts

        judging = random_prompts(options.held_out_pictures, HELD_OUT_SEED)
        return random_prompts(options.pictures, FITTED_SEED), judging
    if options.pictures != PICTURES:
        raise ValueError("--pictures: expected no other prompts than those of --prompts")
    if options.prompts is None:
        raise ValueError("--prompts: expected a text file of prompts, a prompt a line")
    held_out = None if options.held_out is None else lines("--held-out", options.held_out)
    return lines("--prompts", options.prompts), held_out


def lines(option: str, path: Path) -> list[str]:
    """Prompts of a text file, a line each.

    Args:
        option: that named the file, for messages.
        path: the file.

    Raises:
        ValueError: it cannot be read, or has no prompt.
    """
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option}: cannot read {path}: {error}") from error
    if not found:
        raise ValueError(f"{option}: expected a prompt a line in {path}, got none")
    return found
