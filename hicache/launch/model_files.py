"""What a model's folder has, looked at before it is loaded: its pipeline's class, whether it is whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch

import hicache.demo
from hicache import compat
from hicache.launch.backends import BUNDLED

INDEX: Final = "model_index.json"
#: By the names of safetensors.
_DTYPES: Final = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_LENGTH: Final = 8  # bytes of a safetensors file that say how long its header is
_AGAIN: Final = "fetch or copy the model again"


class ModelError(ValueError):
    """A model that cannot be loaded: says why, and what to do."""


def folder_of(model: str) -> Path | None:
    """The folder of a model, where it is one; None for a name of the hub.

    Raises:
        ModelError: it looks like a folder, and there is none.
    """
    if model == BUNDLED:
        return hicache.demo.MODEL
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise ModelError(
            f"--model: expected a folder of a diffusers pipeline or a name of the hub, got {model}"
        )
    return None


def index_of(model: str) -> dict[str, Any]:
    """A pipeline's own description: its class, and its parts' classes by name.

    Raises:
        ModelError: there is none, or it cannot be read or fetched.
    """
    folder = folder_of(model)
    if folder is None:
        return _index_of_name(model)
    path = folder / INDEX
    if not path.is_file():
        raise ModelError(f"{folder}: expected a folder of a diffusers pipeline, got one without {INDEX}")
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: expected the description of a pipeline: {error}: {_AGAIN}") from error
    return index


def kind_of(model: str) -> str:
    """The class of a model's pipeline.

    Raises:
        ModelError: its description is not there, or says none.
    """
    kind = compat.pipeline_kind(index_of(model))
    if kind is None:
        raise ModelError(f"{model}: expected the description of a pipeline, got {INDEX} without its class")
    return kind


def _index_of_name(model: str) -> dict[str, Any]:
    from diffusers import DiffusionPipeline

    try:
        return dict(DiffusionPipeline.load_config(model))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"--model: {model} is no folder here, nor in the cache of downloads, nor can it be fetched: "
            f"{_first_line(error)}"
        ) from error


def class_of(kind: str) -> Any:
    """A class of diffusers, or the bundled model's pipeline.

    Raises:
        ModelError: no such class.
    """
    import diffusers

    if kind == "ShapesPipeline":
        from hicache.demo.pipeline import ShapesPipeline

        return ShapesPipeline
    found = getattr(diffusers, kind, None)
    if found is None:
        raise ModelError(f"--model: diffusers {diffusers.__version__} has no {kind}")
    return found


def stored_dtype(folder: Path) -> torch.dtype:
    """What the weights of a pipeline's denoiser are stored in; float32 where that is not told."""
    for path in sorted([*folder.glob("transformer/*.safetensors"), *folder.glob("unet/*.safetensors")]):
        for name, entry in _header(path).items():
            if name != "__metadata__" and entry["dtype"] in _DTYPES:
                return _DTYPES[entry["dtype"]]
    return torch.float32


def check_whole_folder(folder: Path) -> None:
    """Find files that a stopped download or copy left out or cut off.

    Raises:
        ModelError: the first that is found.
    """
    index = index_of(str(folder))
    for name, part in index.items():
        if not isinstance(part, list) or part[0] is None:
            continue
        if not (folder / name).is_dir():
            raise ModelError(f"{folder}: its part {name} is missing: {_AGAIN}")
    for path, expected in _weights(folder):
        if not path.is_file():
            raise ModelError(f"{folder}: {path.relative_to(folder)} is missing: {_AGAIN}")
        if path.stat().st_size != expected:
            raise ModelError(
                f"{folder}: {path.relative_to(folder)} has {path.stat().st_size:,} of {expected:,} bytes: "
                f"{_AGAIN}"
            )


def _weights(folder: Path) -> Iterator[tuple[Path, int]]:
    """Files of weights, and how many bytes each should have; those of unfinished downloads too."""
    for path in sorted(folder.rglob("*.incomplete")):
        yield path.with_suffix(""), -1
    for path in sorted(folder.glob("*/*.index.json")):
        shards = json.loads(path.read_text(encoding="utf-8")).get("weight_map", {}).values()
        for shard in sorted(set(shards)):
            if not (path.parent / shard).is_file():
                yield path.parent / shard, -1
    for path in sorted(folder.glob("*/*.safetensors")):
        yield path, _expected_bytes(path)


def _header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: dtype, shape and place of each tensor.

    Raises:
        ModelError: the file ends before it does, or is none.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        text = file.read(length) if length <= os.path.getsize(path) else b""
    try:
        found: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise ModelError(f"{path}: expected weights, got a file that is cut off: {_AGAIN}") from error
    return found


def _expected_bytes(path: Path) -> int:
    """What the header of a safetensors file says of its length."""
    header = _header(path)
    ends = (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
    return _LENGTH + length + max(ends, default=0)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
