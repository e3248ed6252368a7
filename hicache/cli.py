"""The ``hicache`` command: ``hicache generate`` and ``hicache info``."""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import platform
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import hicache
from hicache.basis import known_bases
from hicache.calibration.shipped import shipped
from hicache.compare import command as comparing
from hicache.compare import request
from hicache.config import HiCacheConfig
from hicache.schedule import full_steps

PROMPTS: Final = (
    "a red ring on blue",
    "a green square on yellow",
    "a white triangle on purple",
    "an orange cross on black",
    "a blue diamond on white",
    "a yellow circle on green",
    "a small black square at the top left on red",
    "a large purple ring at the right on white",
)

#: Settings that are the paper's: one of them given, nothing fitted is taken.
PAPERS: Final = ("order", "sigma", "warmup", "basis", "last_step_full")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="hicache", description=hicache.__doc__.split("\n")[0])
    parser.add_argument("--version", action="version", version=f"hicache {hicache.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    _generate_arguments(
        commands.add_parser(
            "generate",
            help="draw prompts in full and with HiCache, side by side",
            description="Draw prompts in full and with HiCache: one PNG and one table.",
        )
    )
    _calibrate_arguments(
        commands.add_parser(
            "calibrate",
            help="fit rows of coefficients to a model: one JSON file",
            description="Fit rows of coefficients to a model; other pictures judge them.",
        )
    )
    request.arguments(
        commands.add_parser(
            "compare",
            help="modes × intervals on the same seeds: one page, with its numbers as JSON",
            description="Draw prompts in full and by modes × intervals; one HTML page shows what came of it.",
        )
    )
    commands.add_parser("info", help="versions, devices and backends")
    options = parser.parse_args(arguments)
    try:
        match options.command:
            case "info":
                return info()
            case "calibrate":
                return calibrate(options)
            case "compare":
                return comparing.run(request.read(options, PROMPTS))
        return generate(options)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        print(f"hicache {options.command}: {error}", file=sys.stderr)
        return 2


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = HiCacheConfig()
    parser.add_argument("prompts", nargs="*", default=list(PROMPTS), help='such as "a red ring on blue"')
    parser.add_argument(
        "--out", type=Path, default=Path("hicache.png"), help="the PNG to write (%(default)s)"
    )
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (%(default)s)")
    parser.add_argument("--interval", type=int, default=defaults.interval, help="N (%(default)s)")
    paper = parser.add_argument_group(
        "the paper's settings",
        "In place of what was fitted to the model for as many full steps, where something was.",
    )
    paper.add_argument("--order", type=int, help=f"O ({defaults.order})")
    paper.add_argument("--sigma", type=float, help=f"contraction ({defaults.sigma})")
    paper.add_argument("--warmup", type=int, help=f"full steps first ({defaults.warmup})")
    paper.add_argument("--basis", help=f"{', '.join(known_bases())} ({defaults.basis})")
    paper.add_argument(
        "--last-step-full", action="store_true", default=None, help="run the last step in full"
    )
    parser.add_argument("--speedup", type=float, help="bound to reach, in place of --interval")
    parser.add_argument("--guidance", type=float, default=4.0, help="classifier-free guidance (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the starting noise (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each kind; medians count")
    parser.add_argument(
        "--granularity", default="stack", help="what is cached: stack, low-rank, module or auto (%(default)s)"
    )
    parser.add_argument("--backend", default="auto", help="of hicache_kernels (%(default)s)")


def _calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = HiCacheConfig()
    parser.add_argument(
        "--model", help="folder of a diffusers pipeline, or its name; the bundled model where it is left out"
    )
    parser.add_argument("--prompts", type=Path, help="text file, a prompt a line, to fit to")
    parser.add_argument(
        "--held-out", type=Path, help="prompts that judge; those of --prompts, with other noise"
    )
    parser.add_argument("--held-out-pictures", type=int, default=16, help="how many judge (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("hicache.json"), help="the file (%(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (%(default)s)")
    parser.add_argument(
        "--interval", type=int, nargs="+", default=[defaults.interval], help="N, one or more (%(default)s)"
    )
    parser.add_argument("--order", type=int, default=defaults.order, help="O (%(default)s)")
    parser.add_argument("--sigma", type=float, default=defaults.sigma, help="contraction (%(default)s)")
    parser.add_argument("--basis", default=defaults.basis, help="where rows begin (%(default)s)")
    parser.add_argument("--schedule", help="places of the full steps, in place of --interval")
    parser.add_argument(
        "--method", default="trajectory", help="trajectory, heads or closed-form (%(default)s)"
    )
    parser.add_argument(
        "--places",
        default="given",
        help="of the full steps: given by the interval, or as many that are searched (%(default)s)",
    )
    parser.add_argument("--iterations", type=int, default=150, help="of the fit (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="pictures drawn together (%(default)s)")
    parser.add_argument("--guidance", type=float, help="guidance_scale of the pipeline; its own if left out")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture (%(default)s)")


def calibrate(options: argparse.Namespace) -> int:
    """Fit rows, and write them to a file."""
    from hicache.fitting.command import run

    return run(options)


def generate(options: argparse.Namespace) -> int:
    """Draw, save the picture and print the table."""
    try:
        from diffusers.utils.logging import disable_progress_bar
        from PIL import Image
        from rich.console import Console
        from rich.table import Table

        from hicache.demo.compare import compare
        from hicache.demo.sheet import side_by_side
    except ImportError as error:
        raise RuntimeError(f"needs the demo extra: pip install 'hicache[demo]' ({error})") from error
    import hicache.demo
    from hicache.pipeline import GRANULARITIES, check_backend, check_choice, check_speedup
    from hicache_kernels import BACKENDS

    if options.steps < 1:
        raise ValueError(f"--steps: expected at least 1, got {options.steps}")
    if options.repeats < 1:
        raise ValueError(f"--repeats: expected at least 1, got {options.repeats}")
    if options.out.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--out: expected the name of a picture such as hicache.png, got {options.out}")
    if not options.out.parent.is_dir():
        raise ValueError(f"--out: expected a file in an existing folder, got {options.out}")
    if not math.isfinite(options.guidance):
        raise ValueError(f"--guidance: expected a finite number, got {options.guidance}")
    if not -(2**63) <= options.seed < 2**63:
        raise ValueError(f"--seed: expected a number of 64 bits, got {options.seed}")
    check_choice("granularity", options.granularity, GRANULARITIES)
    check_choice("backend", options.backend, ("auto", *BACKENDS))
    check_speedup(options.speedup, counted=True)
    _check_writable(options.out)
    own = {name: getattr(options, name) for name in PAPERS if getattr(options, name) is not None}
    config = HiCacheConfig(interval=options.interval, **own)
    no_bars = not sys.stderr.isatty()
    if no_bars:
        disable_progress_bar()
    pipe = hicache.demo.load()
    check_backend(options.backend, pipe.transformer)
    if not own and options.speedup is None:
        config = _fitted(pipe, config, options.steps)
    pipe.set_progress_bar_config(desc="denoising", leave=False, disable=no_bars)
    result = compare(
        pipe,
        options.prompts,
        None if options.speedup is not None and not own else config,  # None: what is fitted, at that speed-up
        speedup=options.speedup,
        steps=options.steps,
        guidance_scale=options.guidance,
        seed=options.seed,
        granularity=options.granularity,
        backend=options.backend,
        repeats=options.repeats,
    )
    side_by_side(options.prompts, result).save(options.out)

    stats = result.stats
    rows: dict[str, tuple[str, str]] = {
        "full steps": (str(options.steps), str(stats.full_steps)),
        "skipped steps": ("0", str(stats.skipped_steps)),
        "seconds": (f"{result.full.seconds:.3f}", f"{result.cached.seconds:.3f}"),
        "speed-up, wall clock": ("1.00x", f"{result.speedup:.2f}x"),
        "bound, steps / full steps": ("1.00x", f"{stats.bound:.2f}x"),
        "PSNR against full, mean": ("", f"{_mean(result.psnr):.2f} dB"),
        "PSNR against full, worst": ("", f"{min(result.psnr):.2f} dB"),
        "SSIM against full, mean": ("", f"{_mean(result.ssim):.4f}"),
        "history": ("0 bytes", f"{stats.history_bytes:,} bytes"),
    }
    table = Table(title=f"{len(options.prompts)} pictures, {options.steps} steps, {stats.config.basis}")
    table.add_column("")
    table.add_column("full run", justify="right")
    table.add_column(f"HiCache N={stats.config.interval} O={stats.config.order}", justify="right")
    for name, (full, cached) in rows.items():
        table.add_row(name, full, cached)
    Console().print(table)
    print(f"saved {options.out}")
    return 0


def _fitted(pipe: Any, config: HiCacheConfig, num_steps: int) -> HiCacheConfig:
    """What was fitted to the model for as many full steps; ``config`` where nothing was."""
    found, count = shipped(pipe), len(full_steps(config, num_steps))
    counts = [] if found is None else [(entry.num_steps, len(entry.full_steps)) for entry in found.entries]
    if found is None or (num_steps, count) not in counts:
        return config
    return replace(HiCacheConfig.of(found, count), interval=config.interval)


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


def info() -> int:
    """Print versions, devices, and which backends are usable and why the others are not."""
    import torch

    from hicache_kernels import auto_backend, backend_status
    from hicache_kernels.backends import native

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    rows: list[tuple[str, Any]] = [("hicache", hicache.__version__), ("python", platform.python_version())]
    rows += [(name, version(name)) for name in ("torch", "diffusers", "transformers", "triton")]
    rows.append(("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads"))
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        rows += [(str(device), torch.cuda.get_device_name(device)) for device in devices[1:]]
    else:
        rows.append(("cuda", "no device"))
        built = native.target(torch.device("cuda")) if native.cuda_archs() else "not built"
        rows.append(("native on cuda", built))
    for device in devices:
        for name, reason in backend_status(device).items():
            if reason is not None:
                state = f"not usable: {reason}"
            else:
                state = f"usable ({native.target(device)})" if name == "native" else "usable"
            rows.append((f"{name} on {device}", state))
        rows.append((f"auto on {device}", auto_backend(device)))
    rows.append(("bases", ", ".join(known_bases())))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
