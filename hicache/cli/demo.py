"""``hicache demo``: prompts in full and with HiCache, side by side."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Any, Final

import typer

import hicache.demo
from hicache.basis import known_bases
from hicache.calibration.shipped import shipped
from hicache.config import HiCacheConfig
from hicache.demo.prompts import PROMPTS
from hicache.pipeline import GRANULARITIES, check_backend, check_choice, check_speedup
from hicache_kernels import BACKENDS

_DEFAULTS: Final = HiCacheConfig()
_PAPERS: Final = "The paper's settings, in place of what was fitted to the model for as many full steps"


def demo(
    prompts: Annotated[
        list[str] | None, typer.Argument(help='Such as "a red ring on blue"; eight of them if left out.')
    ] = None,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("hicache.png"),
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    interval: Annotated[int, typer.Option(help="N: of N steps, one is full.")] = _DEFAULTS.interval,
    order: Annotated[
        int | None, typer.Option(help=f"O ({_DEFAULTS.order}).", rich_help_panel=_PAPERS)
    ] = None,
    sigma: Annotated[
        float | None, typer.Option(help=f"Contraction ({_DEFAULTS.sigma}).", rich_help_panel=_PAPERS)
    ] = None,
    warmup: Annotated[
        int | None, typer.Option(help=f"Full steps first ({_DEFAULTS.warmup}).", rich_help_panel=_PAPERS)
    ] = None,
    basis: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(known_bases())} ({_DEFAULTS.basis}).", rich_help_panel=_PAPERS),
    ] = None,
    last_step_full: Annotated[
        bool | None,
        typer.Option("--last-step-full", help="Run the last step in full.", rich_help_panel=_PAPERS),
    ] = None,
    speedup: Annotated[float | None, typer.Option(help="Bound to reach, in place of --interval.")] = None,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance.")] = 4.0,
    seed: Annotated[int, typer.Option(help="Of the starting noise.")] = 0,
    repeats: Annotated[int, typer.Option(help="Timed runs of each kind; medians count.")] = 5,
    granularity: Annotated[str, typer.Option(help=f"What is cached: {', '.join(GRANULARITIES)}.")] = "auto",
    backend: Annotated[str, typer.Option(help=f"Of hicache_kernels: auto, {', '.join(BACKENDS)}.")] = "auto",
) -> None:
    """Draw with the bundled model in full and with HiCache: one PNG with both, and a table.

    [bold]Examples[/]

    hicache demo --out demo.png

    hicache demo "a large blue ring on yellow" --interval 5 --basis taylor
    """
    from PIL import Image

    _check_numbers(steps=steps, repeats=repeats)
    if out.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--out: expected the name of a picture such as hicache.png, got {out}")
    if not out.parent.is_dir():
        raise ValueError(f"--out: expected a file in an existing folder, got {out}")
    if not math.isfinite(guidance):
        raise ValueError(f"--guidance: expected a finite number, got {guidance}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"--seed: expected a number of 64 bits, got {seed}")
    check_choice("granularity", granularity, GRANULARITIES)
    check_choice("backend", backend, ("auto", *BACKENDS))
    check_speedup(speedup, counted=True)
    _check_writable(out)
    papers = {
        "order": order,
        "sigma": sigma,
        "warmup": warmup,
        "basis": basis,
        "last_step_full": last_step_full,
    }
    own: dict[str, Any] = {name: value for name, value in papers.items() if value is not None}
    config = HiCacheConfig(interval=interval, **own)
    pipe = _load(backend)
    if not own and speedup is None:
        config = config.fitted_in(shipped(pipe, granularity), steps) or config
    _draw(
        pipe,
        prompts or list(PROMPTS),
        None if speedup is not None and not own else config,  # None: what is fitted, at that speed-up
        out,
        speedup=speedup,
        steps=steps,
        guidance_scale=guidance,
        seed=seed,
        granularity=granularity,
        backend=backend,
        repeats=repeats,
    )


def _check_numbers(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"--{name}: expected at least 1, got {number}")


def _load(backend: str) -> Any:
    """The bundled pipeline, without progress bars where there is no terminal."""
    from diffusers.utils.logging import disable_progress_bar

    no_bars = not sys.stderr.isatty()
    if no_bars:
        disable_progress_bar()
    pipe = hicache.demo.load()
    check_backend(backend, pipe.transformer)
    pipe.set_progress_bar_config(desc="denoising", leave=False, disable=no_bars)
    return pipe


def _draw(pipe: Any, prompts: list[str], config: HiCacheConfig | None, out: Path, **settings: Any) -> None:
    """Draw, save the picture and print the table."""
    from rich.console import Console
    from rich.table import Table

    from hicache.demo.compare import compare
    from hicache.demo.sheet import side_by_side

    result, steps = compare(pipe, prompts, config, **settings), settings["steps"]
    side_by_side(prompts, result).save(out)
    stats = result.stats
    rows: dict[str, tuple[str, str]] = {
        "full steps": (str(steps), str(stats.full_steps)),
        "skipped steps": ("0", str(stats.skipped_steps)),
        "seconds": (f"{result.full.seconds:.3f}", f"{result.cached.seconds:.3f}"),
        "speed-up, wall clock": ("1.00x", f"{result.speedup:.2f}x"),
        "bound, steps / full steps": ("1.00x", f"{stats.bound:.2f}x"),
        "PSNR against full, mean": ("", f"{_mean(result.psnr):.2f} dB"),
        "PSNR against full, worst": ("", f"{min(result.psnr):.2f} dB"),
        "SSIM against full, mean": ("", f"{_mean(result.ssim):.4f}"),
        "history": ("0 bytes", f"{stats.history_bytes:,} bytes"),
    }
    table = Table(title=f"{len(prompts)} pictures, {steps} steps, {stats.config.basis}")
    table.add_column("")
    table.add_column("full run", justify="right")
    table.add_column(f"HiCache N={stats.config.interval} O={stats.config.order}", justify="right")
    for name, (full, cached) in rows.items():
        table.add_row(name, full, cached)
    Console().print(table)
    print(f"saved {out}")


def _check_writable(path: Path) -> None:
    """Find out before the run, which may be long.

    Raises:
        ValueError: no file can be written there.
    """
    existed = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise ValueError(f"--out: cannot write {path}: {error.strerror}") from error
    if not existed:
        path.unlink()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
