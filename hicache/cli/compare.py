"""``hicache compare``: modes × intervals on the same seeds, as one page."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import typer


def compare(
    prompt: Annotated[list[str] | None, typer.Argument(help='Such as "a red ring on blue".')] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder of a diffusers pipeline, or its name; the bundled model where left out."),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file, a prompt a line.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The page; its numbers are written beside it. [compare.html]")
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="With commas: hicache, taylor, reuse, fitted, … or any basis.")
    ] = None,
    interval: Annotated[str | None, typer.Option(help="N, with commas. [5,7,10]")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. [50]")] = None,
    order: Annotated[int | None, typer.Option(help="O of all variants.")] = None,
    sigma: Annotated[float | None, typer.Option(help="Contraction.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Full steps first.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first picture; each has the next. [0]")] = None,
    batch: Annotated[int | None, typer.Option(help="Pictures drawn together. [8]")] = None,
    repeats: Annotated[int | None, typer.Option(help="Timed rounds; the fastest counts. [3]")] = None,
    granularity: Annotated[
        str | None, typer.Option(help="What is cached: auto, module, low-rank, stack or output.")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="Of hicache_kernels. [auto]")] = None,
    metrics: Annotated[
        str | None, typer.Option(help="With commas: psnr, ssim, lpips, clip, image-reward.")
    ] = None,
    gpus: Annotated[str | None, typer.Option(help="cpu, all, or numbers such as 0,1.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that compare. [one a GPU]")] = None,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster that runs.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of each on a CPU.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Of the pipeline; its own if left out.")] = None,
    width: Annotated[int | None, typer.Option(help="Of the pipeline; its own if left out.")] = None,
    height: Annotated[int | None, typer.Option(help="Of the pipeline; its own if left out.")] = None,
) -> None:
    """Draw the same pictures by modes and intervals, and write one page about them.

    [bold]Examples[/]

    hicache compare --out compare.html

    hicache compare "a red ring on blue" --mode hicache,taylor --interval 5,7
    """
    options = SimpleNamespace(**locals())
    from hicache.compare import command, request
    from hicache.demo.prompts import PROMPTS

    command.run(request.read(options, PROMPTS))
