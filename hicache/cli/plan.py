"""``hicache plan``: what caching a model takes, from its configuration alone."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from hicache.config import HiCacheConfig
from hicache.launch.backends import AUTO, BACKENDS
from hicache.pipeline import GRANULARITIES, MEMORY_BUDGET

_DEFAULTS: Final = HiCacheConfig()


def plan(
    model: Annotated[
        str | None,
        typer.Argument(help="Folder or name of a diffusers pipeline; the bundled one if left out."),
    ] = None,
    backend: Annotated[str, typer.Option(help=f"{', '.join((AUTO, *BACKENDS))}.")] = AUTO,
    width: Annotated[int | None, typer.Option(help="Pixels; the model's own if left out.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; the model's own if left out.")] = None,
    frames: Annotated[int | None, typer.Option(help="Of a video.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    batch: Annotated[int, typer.Option(help="Pictures drawn together.", min=1)] = 1,
    interval: Annotated[int, typer.Option(help="N: of N steps, one is full.")] = _DEFAULTS.interval,
    order: Annotated[int, typer.Option(help="O: the highest difference.")] = _DEFAULTS.order,
    warmup: Annotated[int, typer.Option(help="Full steps first.")] = _DEFAULTS.warmup,
    dtype: Annotated[str, typer.Option(help="auto (as stored), bf16, fp16, fp32.")] = "auto",
    granularity: Annotated[str, typer.Option(help=f"{', '.join(GRANULARITIES)}.")] = "auto",
    memory_budget: Annotated[int, typer.Option(help="Bytes that caching may take.")] = MEMORY_BUDGET,
) -> None:
    """Bytes and launches of caching a model, without loading its weights.

    [bold]Examples[/]

    hicache plan

    hicache plan black-forest-labs/FLUX.1-dev --width 1024 --height 1024 --order 2
    """
    from hicache.launch.forecast import memory_plan, steps_line
    from hicache.launch.loading import resolve
    from hicache.launch.settings import Settings

    settings, _ = resolve(
        Settings(
            model=model,
            backend=backend,
            width=width,
            height=height,
            frames=frames,
            steps=steps,
            interval=interval,
            order=order,
            warmup=warmup,
            dtype=dtype,
            granularity=granularity,
        )
    )
    print(steps_line(settings))
    print(memory_plan(settings, batch, memory_budget=memory_budget))
