"""What of a pipeline a calibration is to match."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from hicache.model_key import ModelKey
from hicache.run import Run


class PipelineFacts:
    """Adds what is known of a pipeline to what is known of a run; models are looked at once.

    Args:
        pipe: the pipeline, which is not kept alive, or a transformer.
        modules: its denoisers, by name.
    """

    def __init__(self, pipe: Any, modules: Mapping[str, nn.Module]) -> None:
        try:
            self._pipe = weakref.ref(pipe)
        except TypeError:
            self._pipe = lambda: pipe  # type: ignore[assignment]
        self._modules = modules
        self._keys: dict[str, ModelKey] | None = None

    def __call__(self, run: Run) -> Run:
        if self._keys is None:
            self._keys = model_keys(self._modules)
        return replace(run, models=self._keys, guidance=guidance_of(self._pipe()))


def model_keys(modules: Mapping[str, nn.Module]) -> dict[str, ModelKey]:
    """What identifies each denoiser's model; reads a part of their weights."""
    return {name: ModelKey.of(module) for name, module in modules.items()}


def guidance_of(pipe: Any) -> str | None:
    """How a pipeline that runs is guided: ``"classifier-free"``, ``"embedded"`` or ``"none"``.

    Returns:
        None: it does not say.
    """
    guided = getattr(pipe, "do_classifier_free_guidance", None)
    if guided is not None:
        return "classifier-free" if guided else "none"
    scale = getattr(pipe, "guidance_scale", None)
    if not isinstance(scale, (int, float)):
        return None
    config = getattr(getattr(pipe, "transformer", None), "config", None)
    if getattr(config, "guidance_embeds", False):
        return "embedded"
    return "classifier-free" if scale > 1 else "none"
