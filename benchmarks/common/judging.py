"""Pictures by which methods are judged, and nothing else is done with them.

Rows are fitted, thresholds chosen and schedules searched on other pictures: the two seeds here are for
judging alone. Prompts are of the grammar that :func:`hicache.demo.pictures.parse` reads; each picture has
noise of its own, so the n-th of them is the same however many are drawn.
"""

from __future__ import annotations

import random
from typing import Final, NamedTuple

import torch
from torch import Tensor

from hicache.demo import packing
from hicache.demo.pictures import COLOURS, POSITIONS, SHAPES, SIZES, Caption
from hicache.demo.prompts import PROMPTS

PROMPT_SEED: Final = 990_099
NOISE_SEED: Final = 991_000  # the n-th picture's noise is of this seed + n


class Subject(NamedTuple):
    """What a judged picture is drawn from."""

    prompt: str
    latents: Tensor  # [1, tokens, channels], fp32


def prompts(count: int) -> list[str]:
    """Return the first prompts of the judged ones: all different, and none of ``hicache demo``'s.

    Half of them say a size and half a place, as the model's training pictures do.
    """
    draw = random.Random(PROMPT_SEED)
    found: dict[str, None] = {}
    while len(found) < count:
        colour, background = draw.sample(list(COLOURS), 2)
        shape, size, place = draw.choice(SHAPES), draw.choice(list(SIZES)), draw.choice(list(POSITIONS))
        says_size, says_place = draw.random() < 0.5, draw.random() < 0.5
        caption = Caption(colour, shape, background, size if says_size else "", place if says_place else "")
        if str(caption) not in PROMPTS:
            found[str(caption)] = None
    return list(found)


def subjects(count: int) -> list[Subject]:
    """Return the first ``count`` judged pictures: their prompts and their noise."""
    tokens = (packing.PICTURE_SIZE // packing.PATCH) ** 2
    shape = (1, tokens, packing.CHANNELS)
    return [
        Subject(prompt, torch.randn(shape, generator=torch.Generator().manual_seed(NOISE_SEED + index)))
        for index, prompt in enumerate(prompts(count))
    ]
