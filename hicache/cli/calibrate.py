"""``hicache calibrate``: rows of coefficients, fitted to a model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Final

import typer

from hicache.config import HiCacheConfig

_DEFAULTS: Final = HiCacheConfig()


def calibrate(
    model: Annotated[
        str | None,
        typer.Option(help="Folder of a diffusers pipeline, or its name; the bundled model where left out."),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file, a prompt a line, to fit to.")] = None,
    pictures: Annotated[
        int, typer.Option(help="Of the bundled model: how many random prompts of its own to fit to.")
    ] = 48,
    held_out: Annotated[
        Path | None, typer.Option(help="Prompts that judge; those of --prompts, with other noise.")
    ] = None,
    held_out_pictures: Annotated[int, typer.Option(help="How many judge.")] = 16,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("hicache.json"),
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    interval: Annotated[str, typer.Option(help="N; several divided by commas.")] = str(_DEFAULTS.interval),
    order: Annotated[int, typer.Option(help="O.")] = _DEFAULTS.order,
    sigma: Annotated[float, typer.Option(help="Contraction.")] = _DEFAULTS.sigma,
    basis: Annotated[str, typer.Option(help="Where rows begin.")] = str(_DEFAULTS.basis),
    schedule: Annotated[
        str | None,
        typer.Option(
            help="Places of the full steps, not of --interval: 0,1,2,4,…, a name, or all of a calibration."
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="trajectory, heads or closed-form.")] = "trajectory",
    places: Annotated[
        str, typer.Option(help="Of the full steps: given by the interval, or as many that are searched.")
    ] = "given",
    granularity: Annotated[
        str,
        typer.Option(
            help="What rows are for: stack, its residual; module, each has its own; output, what is returned."
        ),
    ] = "stack",
    iterations: Annotated[int, typer.Option(help="Of the fit.")] = 150,
    tail: Annotated[
        float, typer.Option(help="0 to 1: how much more pictures that are far off weigh in the fit.")
    ] = 0.0,
    batch: Annotated[int, typer.Option(help="Pictures drawn together.")] = 8,
    guidance: Annotated[
        float | None, typer.Option(help="guidance_scale of the pipeline; its own if left out.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first picture.")] = 0,
) -> None:
    """Fit rows of coefficients to a model; other pictures judge them. Writes one JSON file.

    [bold]Examples[/]

    hicache calibrate --out rows.json

    hicache calibrate --model FOLDER --prompts prompts.txt --interval 5,7 --places searched --out rows.json
    """
    from hicache.fitting.command import run
    from hicache.launch.loading import pipeline

    options = {**locals(), "interval": _numbers(interval)}
    run(SimpleNamespace(**options), pipeline)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--interval: expected whole numbers divided by commas, got {text!r}") from None
