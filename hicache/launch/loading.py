"""Loads a pipeline and puts it where it runs."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from hicache.launch import backends
from hicache.launch.backends import BUNDLED, Backend
from hicache.launch.model_files import (
    ModelError,
    check_whole_folder,
    class_of,
    folder_of,
    kind_of,
    stored_dtype,
)
from hicache.launch.settings import Settings
from hicache.pipeline import check_choice, find_denoisers

OFFLOADS: Final = ("none", "model", "sequential", "group")
DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Place:
    """Where a pipeline runs; of no influence on what it draws.

    Args:
        device: such as ``"cuda:0"`` or ``"cpu"``.
        offload: of :data:`OFFLOADS`.
        threads: of the CPU; None leaves torch's own.
    """

    device: str = "cpu"
    offload: str = "none"
    threads: int | None = None

    def __post_init__(self) -> None:
        check_choice("offload", self.offload, OFFLOADS)
        if self.offload != "none" and self.device == "cpu":
            raise ValueError(f"--offload {self.offload}: expected a GPU to offload from, got the CPU")


def resolve(settings: Settings) -> tuple[Settings, Backend]:
    """Settings with the family's own where none are given, and the family; reads no weights.

    Raises:
        ValueError: an unknown family, a model that is not there or of another family, or settings it has no
            use for.
    """
    asked = backends.named(settings.backend)
    model = backends.model_of(settings.model, asked)
    kind = kind_of(model)
    backend = asked or backends.of_pipeline(kind) or backends.by_signature(kind, call_of(kind))
    if kind not in backend.pipelines:
        raise ModelError(
            f"--backend {backend.name}: expected a {' or '.join(backend.pipelines)}, got {model}, a {kind}"
        )
    folder = folder_of(model)
    if folder is not None and model != BUNDLED:
        model = str(folder.resolve())
    return settings.resolved(model, backend), backend


def call_of(kind: str) -> inspect.Signature:
    """What a class of pipelines is called with.

    Raises:
        ModelError: no such class.
    """
    return inspect.signature(class_of(kind).__call__)


def pipeline(model: str | None, place: Place | None = None) -> Any:
    """The pipeline of a folder or a name; None is the bundled one.

    Args:
        model: the folder or the name.
        place: where it is to run; None: on a GPU if there is one, the bundled one on the CPU.

    Raises:
        ModelError: it is not there, or cannot be loaded.
    """
    settings, _ = resolve(Settings(model=model or BUNDLED))
    on_gpu = model is not None and torch.cuda.is_available()
    return load(settings, place or Place("cuda:0" if on_gpu else "cpu"))


def load(settings: Settings, place: Place) -> Any:
    """The pipeline, on its device, with LoRA, quiet.

    Args:
        settings: resolved.
        place: where it is to run.

    Raises:
        ModelError: it cannot be loaded.
        ValueError: a LoRA that cannot be read.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if place.threads is not None:
        torch.set_num_threads(place.threads)
    model = settings.model or BUNDLED
    try:
        folder = folder_of(model) or Path(DiffusionPipeline.download(model))
        check_whole_folder(folder)
        dtype = DTYPES.get(settings.dtype) or stored_dtype(folder)
        if settings.dtype == "auto" and dtype == torch.float16 and place.device == "cpu":
            dtype = torch.float32  # which a CPU has all operations for
        with warnings.catch_warnings():
            # "dtype" is what 0.42 calls it, and older ones do not know
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            pipe: Any = class_of(kind_of(model)).from_pretrained(folder, torch_dtype=dtype)
    except ModelError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ModelError(f"--model: cannot load {model}: {' '.join(str(error).split())}") from error
    pipe.set_progress_bar_config(disable=True)
    _add_lora(pipe, settings.lora)
    _put(pipe, place)
    if settings.compile:
        for denoiser in find_denoisers(pipe).values():
            denoiser.compile()
    return pipe


def _add_lora(pipe: Any, lora: tuple[str, ...]) -> None:
    names, weights = [], []
    for number, text in enumerate(lora):
        path, weight = _weighed(text)
        names.append(f"lora_{number}")
        weights.append(weight)
        try:
            pipe.load_lora_weights(path, adapter_name=names[-1])
        except Exception as error:  # whatever loaders of other packages raise
            raise ValueError(f"--lora: cannot load {path}: {' '.join(str(error).split())}") from error
    if names:
        pipe.set_adapters(names, weights)


def _weighed(text: str) -> tuple[str, float]:
    """``"path:0.8"`` as the path and its weight."""
    path, colon, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if colon else (text, 1.0)
    except ValueError:  # a colon of the path's own
        return text, 1.0


def _put(pipe: Any, place: Place) -> None:
    if place.offload == "model":
        pipe.enable_model_cpu_offload(device=place.device)
    elif place.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=place.device)
    elif place.offload == "group":
        pipe.enable_group_offload(torch.device(place.device), offload_type="leaf_level", use_stream=True)
    else:
        pipe.to(place.device)
