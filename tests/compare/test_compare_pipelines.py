"""Pipelines of diffusers: their progress bars, callbacks and videos, with tiny random transformers."""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
import pytest

from hicache.compare import command
from tests.support.comparing import asked
from tests.support.pipelines import build

PROMPTS = ("one", "another")


def prompted(name: str) -> Any:
    """A pipeline without text encoders and VAE that takes prompts and gives pictures all the same."""
    pipe, arguments = build(name)
    kind = type(pipe)

    @functools.wraps(kind.__call__)
    def call(self, prompt, output_type, return_dict, **given):
        assert (len(prompt), output_type, return_dict) == (1, "np", False)
        assert prompt[0] in PROMPTS
        (drawn,) = kind.__call__(self, **{**arguments, **given}, return_dict=False)
        return (to_pictures(drawn),)

    pipe.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    return pipe


def to_pictures(drawn: Any) -> np.ndarray:
    """Of tokens, latents or pixels: three channels last, in [0, 1]."""
    array = drawn.float().cpu().numpy()
    if array.ndim == 3:  # tokens [1, n, channels]
        side = int(array.shape[1] ** 0.5)
        array = array[:, : side * side, :3].reshape(1, side, side, 3)
    else:  # channels first, of a video before its frames
        array = np.moveaxis(array[:, :3], 1, -1)
    return 1 / (1 + np.exp(-array))


@pytest.mark.parametrize(
    ("name", "latents", "size"),
    [("flux", True, "4 × 4"), ("wan", True, "3 frames of 2 × 2"), ("dit", False, "16 × 16")],
)
def test_a_pipeline_of_diffusers(name, latents, size, tmp_path):
    pipe = prompted(name)
    request = asked(
        tmp_path,
        model=name,
        prompt=PROMPTS,
        mode=("taylor",),
        interval=(1, 3),
        batch=1,
        metrics=("psnr",),
        granularity="stack",
        call={},
    )
    assert command.run(request, lambda model: pipe) == 0
    data, page = json.loads(request.numbers.read_text()), request.out.read_text(encoding="utf-8")
    same, other = data["variants"]
    assert same["scores"]["psnr"] == [None, None]
    assert all(value > 0 for value in other["scores"]["psnr"])
    assert (data["full"]["full_steps"], same["full_steps"], other["full_steps"]) == (12, 12, 6)
    assert data["full"]["seconds"] > 0
    assert len(other["error_per_step"]) == (12 if latents else 0)
    assert ("Error of latents" in page) == latents
    assert f"2 pictures\nof {size}, 12 steps" in page
    if latents:
        assert same["error_per_step"] == [0.0] * 12
