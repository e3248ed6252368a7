"""``hicache generate``: a file of prompts to a folder of pictures or videos."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from hicache.cli.options import assignments, take_file
from hicache.launch.backends import AUTO, BACKENDS
from hicache.launch.loading import OFFLOADS
from hicache.launch.settings import CLASSES, DTYPES, FORMATS, MODES, ORIGINAL, Settings
from hicache.pipeline import GRANULARITIES

_CACHE: Final = "What is cached, and how often"
_PICTURE: Final = "The picture"
_MODEL: Final = "The model"
_WHICH: Final = "Which prompts, and where to"
_WORK: Final = "Who draws"


def _option(panel: str, text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


def generate(
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]...", help="Prompts, where there is no file of them."),
    ] = None,
    prompts: Annotated[
        Path | None, _option(_WHICH, "File of prompts: text, .jsonl, .csv or .tsv.", "--prompts", "-p")
    ] = None,
    out: Annotated[Path, _option(_WHICH, "Folder to draw into.", "--out", "-o")] = Path("hicache-out"),
    offset: Annotated[int, _option(_WHICH, "Prompts left out first.")] = 0,
    limit: Annotated[int | None, _option(_WHICH, "Prompts drawn at most.")] = None,
    stride: Annotated[int, _option(_WHICH, "Of the prompts, every so many-th.")] = 1,
    force: Annotated[bool, _option(_WHICH, "Throw away what is in the folder.", "--force")] = False,
    dry_run: Annotated[
        bool, _option(_WHICH, "Only say what there is to do, and the memory it takes.", "--dry-run")
    ] = False,
    config: Annotated[
        Path | None,
        _option(_WHICH, "TOML file with any of these options.", callback=take_file, is_eager=True),
    ] = None,
    model: Annotated[
        str | None,
        _option(_MODEL, "Folder or name of a diffusers pipeline; else the bundled one.", "--model", "-m"),
    ] = None,
    backend: Annotated[str, _option(_MODEL, f"{', '.join((AUTO, *BACKENDS))}.")] = AUTO,
    dtype: Annotated[str, _option(_MODEL, f"{', '.join(DTYPES)}: as stored.")] = "auto",
    lora: Annotated[list[str] | None, _option(_MODEL, "Path or name, and :weight; may be repeated.")] = None,
    compile: Annotated[bool, _option(_MODEL, "Compile the transformer.", "--compile")] = False,
    mode: Annotated[
        str,
        _option(
            _CACHE, f"{', '.join((ORIGINAL, *MODES, *CLASSES))}, another basis, or a calibration's path."
        ),
    ] = "hicache",
    interval: Annotated[
        int | None, _option(_CACHE, "N: of N steps, one is full (7).", "--interval", "-i")
    ] = None,
    order: Annotated[int | None, _option(_CACHE, "O: the highest difference (2).")] = None,
    sigma: Annotated[float | None, _option(_CACHE, "Contraction (0.5).")] = None,
    warmup: Annotated[int | None, _option(_CACHE, "Full steps first (3).")] = None,
    speedup: Annotated[float | None, _option(_CACHE, "Bound to reach, in place of --interval.")] = None,
    schedule: Annotated[
        str | None, _option(_CACHE, "Full steps such as 0,1,2,9, or a schedule's name.")
    ] = None,
    last_step_full: Annotated[
        bool, _option(_CACHE, "Run the last step in full.", "--last-step-full")
    ] = False,
    history_dtype: Annotated[str | None, _option(_CACHE, "Of the history, such as float32.")] = None,
    granularity: Annotated[str, _option(_CACHE, f"{', '.join(GRANULARITIES)}.")] = "auto",
    steps: Annotated[int | None, _option(_PICTURE, "Denoising steps.", "--steps", "-s")] = None,
    width: Annotated[int | None, _option(_PICTURE, "Pixels.")] = None,
    height: Annotated[int | None, _option(_PICTURE, "Pixels.")] = None,
    frames: Annotated[int | None, _option(_PICTURE, "Of a video.")] = None,
    fps: Annotated[int | None, _option(_PICTURE, "Frames a second of a video's file.")] = None,
    guidance: Annotated[float | None, _option(_PICTURE, "Scale of guidance.")] = None,
    negative: Annotated[str | None, _option(_PICTURE, "Negative prompt.")] = None,
    image: Annotated[list[Path] | None, _option(_PICTURE, "Picture to change; may be repeated.")] = None,
    seed: Annotated[int, _option(_PICTURE, "Of the first picture; each next one has the next.")] = 0,
    images_per_prompt: Annotated[int, _option(_PICTURE, "Pictures of each prompt.")] = 1,
    format: Annotated[str, _option(_PICTURE, f"{' or '.join(FORMATS)}; videos are mp4.")] = "png",
    set: Annotated[
        list[str] | None, _option(_PICTURE, "NAME=VALUE: another argument of the pipeline.")
    ] = None,
    batch: Annotated[int, _option(_WORK, "Pictures drawn together, at most.", min=1)] = 1,
    gpus: Annotated[str | None, _option(_WORK, "all, cpu, or numbers such as 0,1; else the first.")] = None,
    workers: Annotated[int | None, _option(_WORK, "How many draw; one a GPU if left out.", min=1)] = None,
    ray: Annotated[str | None, _option(_WORK, "Address of a Ray cluster, or auto.")] = None,
    offload: Annotated[
        str, _option(_WORK, f"{', '.join(OFFLOADS)}: weights that wait off the GPU.")
    ] = "none",
    threads: Annotated[int | None, _option(_WORK, "Of each worker on a CPU.", min=1)] = None,
) -> None:
    """Draw prompts into a folder. What is there already is not drawn again: start it again to go on.

    [bold]Examples[/]

    hicache generate "a red ring on blue" "a green square on yellow" --out shapes

    hicache generate --model black-forest-labs/FLUX.1-dev --prompts prompts.txt --out flux --interval 5

    hicache generate --model ./Wan2.1 --backend wan --prompts videos.jsonl --out wan --gpus 0,1

    hicache generate --config run.toml --out run --dry-run
    """
    given = locals()
    from hicache.launch.command import Request, carry_out

    names = {field.name for field in fields(Settings)}
    chosen = {name: value for name, value in given.items() if name in names}
    chosen |= {
        "lora": tuple(lora or ()),
        "image": tuple(str(path.resolve()) for path in image or ()),
        "more": assignments(set or []),
    }
    more = {
        field.name: given[field.name]
        for field in fields(Request)
        if field.name in given and field.name != "settings"
    }
    status = carry_out(Request(Settings(**chosen), **more))
    raise typer.Exit(status)
