"""The runs that rows are fitted to and judged by: prompts, seeds, and a pipeline's other arguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Pictures:
    """Prompts, each with a seed of its own.

    Args:
        prompts: what is drawn.
        seeds: of the starting noise, one a prompt.
        call: other arguments of the pipeline, such as ``guidance_scale``.
        batch: prompts a call.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    call: Mapping[str, Any]
    batch: int

    def __len__(self) -> int:
        return len(self.prompts)

    def part(self, indices: Sequence[int]) -> Pictures:
        """Some of them, by themselves."""
        prompts, seeds = zip(*((self.prompts[index], self.seeds[index]) for index in indices), strict=True)
        return replace(self, prompts=prompts, seeds=seeds)

    def batches(self) -> Iterator[list[int]]:
        """Indices of the prompts of each call."""
        for first in range(0, len(self), self.batch):
            yield list(range(first, min(first + self.batch, len(self))))

    def arguments(self, indices: Sequence[int], output_type: str) -> dict[str, Any]:
        """The pipeline's arguments for some of them."""
        return {
            **self.call,
            "prompt": [self.prompts[index] for index in indices],
            "generator": [torch.Generator().manual_seed(self.seeds[index]) for index in indices],
            "output_type": output_type,
            "return_dict": False,
        }
