"""Prompts that the bundled model understands: eight to show, and any number at random."""

from __future__ import annotations

from typing import Final

import torch

from hicache.demo.pictures import sample

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


def random_prompts(count: int, seed: int) -> list[str]:
    """Such as ``"a small red ring at the top left on blue"``.

    Args:
        count: of prompts.
        seed: of the choice; other seeds draw independently.
    """
    captions, _ = sample(count, torch.Generator().manual_seed(seed), size=1)
    return [str(caption) for caption in captions]
