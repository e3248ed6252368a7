"""A pipeline without weights, on the meta device: what :func:`hicache.fast.plan` needs to know of a model."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from hicache.launch.model_files import ModelError, class_of, folder_of, index_of, kind_of

#: Parts that are made: those that denoise, and what says how pixels become latents.
_MADE = ("transformer", "transformer_2", "unet", "vae", "scheduler")


def skeleton(model: str) -> Any:
    """A pipeline whose transformers and autoencoder are of configurations alone, without its other parts.

    Args:
        model: a folder, a name of the hub, or ``"bundled"``.

    Raises:
        ModelError: a configuration that cannot be read.
    """
    kind = class_of(kind_of(model))
    wanted = inspect.signature(kind).parameters
    parts: dict[str, Any] = {
        name: None for name, parameter in wanted.items() if parameter.default is inspect.Parameter.empty
    }
    for name, described in index_of(model).items():
        if name in wanted and not isinstance(described, list):
            parts[name] = described
        elif name in _MADE and isinstance(described, list) and described[0] == "diffusers":
            parts[name] = _part(model, name, described[1])
    return kind(**parts)


def _part(model: str, name: str, kind: str) -> Any:
    made = class_of(kind)
    try:
        config = made.load_config(folder_of(model) or model, subfolder=name)
    except (OSError, ValueError) as error:
        raise ModelError(f"{model}: cannot read the configuration of {name}: {error}") from error
    with torch.device("meta"):
        return made.from_config(config)
