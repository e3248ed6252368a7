"""Prompts that the bundled model understands, drawn at random: for fitting and for judging."""

from __future__ import annotations

import torch

from hicache.demo.pictures import sample


def random_prompts(count: int, seed: int) -> list[str]:
    """Such as ``"a small red ring at the top left on blue"``.

    Args:
        count: of prompts.
        seed: of the choice; other seeds draw independently.
    """
    captions, _ = sample(count, torch.Generator().manual_seed(seed), size=1)
    return [str(caption) for caption in captions]
