"""What is to be drawn: pictures, each with a number and a seed, in groups that one call draws.

A picture's number and seed depend on its place among the prompts and on nothing else. So does its group, and
a group of which only some are missing is drawn as a whole: what is drawn together rounds together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from hicache.checks import check_whole
from hicache.launch.prompts import Prompt
from hicache.launch.settings import Settings


@dataclass(frozen=True)
class Picture:
    """One picture, or video, to draw.

    Args:
        index: its number.
        seed: of its starting noise.
        prompt: what it is of.
    """

    index: int
    seed: int
    prompt: Prompt


@dataclass(frozen=True)
class Task:
    """Pictures of one call: of equal settings, but for prompts and seeds.

    Args:
        pictures: all that are drawn.
        wanted: indices of those that are kept.
    """

    pictures: tuple[Picture, ...]
    wanted: frozenset[int]

    @property
    def overrides(self) -> dict[str, Any]:
        """What its prompts want otherwise, but for their seeds."""
        return {name: value for name, value in self.pictures[0].prompt.overrides.items() if name != "seed"}

    def halves(self) -> list[Task]:
        """It in two, those without a wanted picture left out."""
        middle = -(-len(self.pictures) // 2)
        parts = (self.pictures[:middle], self.pictures[middle:])
        return [part for half in parts for part in (Task(half, self.wanted),) if part.keeps()]

    def singles(self) -> list[Task]:
        """Its wanted pictures, one at a time."""
        return [Task((picture,), self.wanted) for picture in self.keeps()]

    def keeps(self) -> list[Picture]:
        """The pictures that are kept."""
        return [picture for picture in self.pictures if picture.index in self.wanted]


@dataclass(frozen=True)
class Selection:
    """Which prompts are drawn.

    Args:
        offset: prompts left out first.
        limit: how many at most; None for all.
        stride: of those after ``offset``, every so many-th.
    """

    offset: int = 0
    limit: int | None = None
    stride: int = 1

    def __post_init__(self) -> None:
        check_whole("--offset", self.offset, 0)
        check_whole("--stride", self.stride)
        if self.limit is not None:
            check_whole("--limit", self.limit)

    def of(self, prompts: Iterable[Prompt]) -> Iterator[Prompt]:
        """The prompts that are."""
        return itertools.islice(itertools.islice(prompts, self.offset, None, self.stride), self.limit)


@dataclass(frozen=True)
class Work:
    """All that is to be drawn, gone through as often as is needed without being held.

    Args:
        prompts: gone through anew each time.
        settings: resolved.
        selection: which prompts.
        batch: pictures of a call, at most.
    """

    prompts: Iterable[Prompt]
    settings: Settings
    selection: Selection = field(default_factory=Selection)
    batch: int = 1

    def pictures(self) -> Iterator[Picture]:
        """Every picture, in the order of their numbers."""
        count = self.settings.images_per_prompt
        for prompt in self.selection.of(self.prompts):
            for copy in range(count):
                index = prompt.index * count + copy
                own = prompt.overrides.get("seed")
                yield Picture(index, self.settings.seed + index if own is None else own + copy, prompt)

    def tasks(self, missing: Callable[[Picture], bool]) -> Iterator[Task]:
        """What is missing, in groups.

        Args:
            missing: whether a picture is.
        """
        for _, alike in itertools.groupby(
            self.pictures(), lambda picture: Task((picture,), frozenset()).overrides
        ):
            while group := tuple(itertools.islice(alike, self.batch)):
                wanted = frozenset(picture.index for picture in group if missing(picture))
                if wanted:
                    yield Task(group, wanted)
