"""The picture world of the bundled model: captions, their encoding, and a renderer.

A caption names one coloured shape on a coloured background, and may say its size and its place: ``"a red ring
on blue"``, ``"a small white cross at the top left on green"``. A place not said is the center, a size not
said lies between small and large. Pictures are drawn from signed distance functions, so a batch is a few
tensor operations and every edge is anti-aliased.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

COLOURS: Final[dict[str, tuple[float, float, float]]] = {
    "red": (0.86, 0.12, 0.14),
    "orange": (0.98, 0.55, 0.08),
    "yellow": (0.98, 0.90, 0.20),
    "green": (0.13, 0.62, 0.24),
    "blue": (0.13, 0.30, 0.85),
    "purple": (0.52, 0.18, 0.66),
    "white": (0.97, 0.97, 0.97),
    "black": (0.06, 0.06, 0.07),
}
SHAPES: Final = ("circle", "ring", "square", "triangle", "cross", "diamond")
SIZES: Final[dict[str, tuple[float, float]]] = {
    "small": (0.15, 0.19),
    "large": (0.25, 0.29),
}  # radius / picture side
_USUAL_SIZE: Final = (0.20, 0.25)
_LEFT, _MID, _RIGHT = 0.31, 0.5, 0.69
POSITIONS: Final[dict[str, tuple[float, float]]] = {  # centre (x, y) as a share of the side, y downwards
    "center": (_MID, _MID),
    "left": (_LEFT, _MID),
    "right": (_RIGHT, _MID),
    "top": (_MID, _LEFT),
    "bottom": (_MID, _RIGHT),
    "top left": (_LEFT, _LEFT),
    "top right": (_RIGHT, _LEFT),
    "bottom left": (_LEFT, _RIGHT),
    "bottom right": (_RIGHT, _RIGHT),
}

_UNSAID = ""
# One slot a part of speech; the first entry of each is "not said".
SLOTS: Final[dict[str, tuple[str, ...]]] = {
    "size": (_UNSAID, *SIZES),
    "colour": (_UNSAID, *COLOURS),
    "shape": (_UNSAID, *SHAPES),
    "position": (_UNSAID, *POSITIONS),
    "background": (_UNSAID, *COLOURS),
}
NUM_SLOTS: Final = len(SLOTS)
VOCABULARY: Final = sum(len(words) for words in SLOTS.values())


@dataclass(frozen=True)
class Caption:
    """What a caption says; ``""`` in a field means it says nothing about it."""

    colour: str = _UNSAID
    shape: str = _UNSAID
    background: str = _UNSAID
    size: str = _UNSAID
    position: str = _UNSAID

    def __str__(self) -> str:
        place = f" at the {self.position}" if self.position else ""
        words = " ".join(w for w in (self.size, self.colour, self.shape) if w)
        return f"a {words}{place} on {self.background}"


def _one_of(words: Sequence[str]) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


_GRAMMAR = re.compile(
    rf"(?:an? )?(?:(?P<size>{_one_of(list(SIZES))}) )?(?P<colour>{_one_of(list(COLOURS))}) "
    rf"(?P<shape>{_one_of(SHAPES)})"
    rf"(?: (?:at|in|on) the (?P<position>{_one_of(list(POSITIONS))}))?"
    rf" on (?:an? )?(?P<background>{_one_of(list(COLOURS))})(?: background)?"
)


def parse(prompt: str) -> Caption:
    """Read a prompt such as ``"a small red ring at the top left on blue"``; ``""`` is the empty caption.

    Raises:
        ValueError: the prompt is not of this form; the message lists every known word.
    """
    text = " ".join(prompt.lower().replace("-", " ").replace(",", " ").strip(" .").split())
    text = text.replace("centre", "center").replace("middle", "center")
    if not text:
        return Caption()
    match = _GRAMMAR.fullmatch(text)
    if match is None:
        raise ValueError(
            f"cannot read the prompt {prompt!r}: expected 'a [SIZE] COLOUR SHAPE [at the POSITION] on "
            f"COLOUR', with COLOUR one of {', '.join(COLOURS)}; SHAPE one of {', '.join(SHAPES)}; SIZE one "
            f"of {', '.join(SIZES)}; POSITION one of {', '.join(POSITIONS)}"
        )
    return Caption(**{slot: word or _UNSAID for slot, word in match.groupdict().items()})


def encode(captions: Sequence[Caption]) -> torch.Tensor:
    """One-hot tokens of captions, one a slot: float32 ``[batch, NUM_SLOTS, VOCABULARY]``."""
    out = torch.zeros(len(captions), NUM_SLOTS, VOCABULARY)
    for row, caption in enumerate(captions):
        offset = 0
        for slot, (name, words) in enumerate(SLOTS.items()):
            out[row, slot, offset + words.index(getattr(caption, name))] = 1.0
            offset += len(words)
    return out


def coverage(shape: str, cx: torch.Tensor, cy: torch.Tensor, radius: torch.Tensor, size: int) -> torch.Tensor:
    """Anti-aliased coverage in [0, 1] of one shape: ``[batch, size, size]`` for ``[batch]`` centres and
    radii.

    Centres and radii are shares of the picture's side, y downwards.
    """
    grid = (torch.arange(size, dtype=torch.float32) + 0.5) / size
    x = grid[None, None, :] - cx[:, None, None]  # [B, 1, S]
    y = grid[None, :, None] - cy[:, None, None]  # [B, S, 1]
    r = radius[:, None, None]
    if shape == "circle":
        distance = torch.hypot(x, y) - r
    elif shape == "ring":
        distance = (torch.hypot(x, y) - 0.76 * r).abs() - 0.24 * r
    elif shape == "square":
        distance = torch.maximum(x.abs(), y.abs()) - 0.86 * r
    elif shape == "triangle":  # upright, its base at the bottom
        distance = torch.maximum(y - 0.72 * r, (x.abs() * 1.75 - y - 1.02 * r) / 2.0156)
    elif shape == "cross":  # an upright plus
        arm = 0.34 * r
        distance = torch.minimum(
            torch.maximum(x.abs() - arm, y.abs() - r), torch.maximum(x.abs() - r, y.abs() - arm)
        )
    elif shape == "diamond":
        distance = (x.abs() * 1.35 + y.abs() - 1.15 * r) / 1.68
    else:
        raise ValueError(f"unknown shape {shape!r}; expected one of {', '.join(SHAPES)}")
    return (0.5 - distance * size).clamp(0.0, 1.0)


def render(
    captions: Sequence[Caption],
    cx: torch.Tensor,
    cy: torch.Tensor,
    radius: torch.Tensor,
    size: int = 32,
) -> torch.Tensor:
    """Draw captions at given centres and radii: float32 ``[batch, 3, size, size]`` in [−1, 1].

    The background darkens by 12% from top to bottom, so that flat fills alone do not fit it.
    """
    mask = torch.empty(len(captions), size, size)
    for shape in SHAPES:
        rows = [i for i, c in enumerate(captions) if c.shape == shape]
        if rows:
            index = torch.tensor(rows)
            mask[index] = coverage(shape, cx[index], cy[index], radius[index], size)
    fill = torch.tensor([COLOURS[c.colour] for c in captions])[:, :, None, None]  # [B, 3, 1, 1]
    ground = torch.tensor([COLOURS[c.background] for c in captions])[:, :, None, None]
    shade = torch.linspace(1.0, 0.88, size)[:, None]  # [S, 1]
    picture = torch.lerp(ground * shade, fill.expand(-1, -1, size, size), mask[:, None])
    return picture * 2.0 - 1.0


def sample(batch: int, generator: torch.Generator, size: int = 32) -> tuple[list[Caption], torch.Tensor]:
    """Random captions and their pictures ``[batch, 3, size, size]``; half say the size, half the place."""

    def pick(count: int) -> list[int]:
        return torch.randint(count, (batch,), generator=generator).tolist()

    names = {key: list(words) for key, words in SLOTS.items()}
    colour, shape, shift = pick(len(COLOURS)), pick(len(SHAPES)), pick(len(COLOURS) - 1)
    extent, place, say = pick(len(SIZES)), pick(len(POSITIONS)), pick(4)
    jitter = torch.rand(3, batch, generator=generator)
    captions, geometry = [], []
    for i in range(batch):
        # the background is any colour but the shape's
        ground = (colour[i] + 1 + shift[i]) % len(COLOURS)
        caption = Caption(
            colour=names["colour"][1 + colour[i]],
            shape=names["shape"][1 + shape[i]],
            background=names["background"][1 + ground],
            size=names["size"][1 + extent[i]] if say[i] & 1 else _UNSAID,
            position=names["position"][1 + place[i]] if say[i] & 2 else _UNSAID,
        )
        low, high = SIZES.get(caption.size, _USUAL_SIZE)
        x, y = POSITIONS[caption.position or "center"]
        captions.append(caption)
        geometry.append((x, y, low + (high - low) * float(jitter[2, i])))
    cx, cy, radius = torch.tensor(geometry).unbind(1)
    cx = cx + (jitter[0] - 0.5) * 0.06
    cy = cy + (jitter[1] - 0.5) * 0.06
    return captions, render(captions, cx, cy, radius, size)


def read(pictures: torch.Tensor) -> list[Caption]:
    """Name what pictures ``[batch, 3, size, size]`` in [−1, 1] show: shape, colour, background, size and
    place.

    Fits every shape at a grid of places and sizes with the two colours that explain each picture best (least
    squares) and names the best fit. Used to score the model; it knows nothing of how a picture was made.
    """
    size = pictures.shape[-1]
    flat = ((pictures.float() + 1) / 2).reshape(len(pictures), 3, -1)  # [B, 3, P]
    labels, masks = [], []
    for shape in SHAPES:
        for position, (x, y) in POSITIONS.items():
            for word, (low, high) in {**SIZES, _UNSAID: _USUAL_SIZE}.items():
                for share in (0.0, 0.5, 1.0):
                    for dx, dy in ((0, 0), (-0.025, 0), (0.025, 0), (0, -0.025), (0, 0.025)):
                        centre = torch.tensor([x + dx]), torch.tensor([y + dy])
                        radius = torch.tensor([low + (high - low) * share])
                        masks.append(coverage(shape, *centre, radius, size).flatten())
                        labels.append((shape, position, word))
    mask = torch.stack(masks)  # [M, P]
    # least squares of picture ≈ a·mask + b·(1−mask), in closed form
    mm, mn = (mask * mask).sum(1), (mask * (1 - mask)).sum(1)
    nn = ((1 - mask) ** 2).sum(1)
    pm = torch.einsum("bcp,mp->bmc", flat, mask)
    pn = flat.sum(-1)[:, None] - pm
    det = (mm * nn - mn * mn)[None, :, None]
    fill = (pm * nn[None, :, None] - pn * mn[None, :, None]) / det
    ground = (pn * mm[None, :, None] - pm * mn[None, :, None]) / det
    explained = (fill * pm + ground * pn).sum(-1)  # [B, M]
    best = explained.argmax(1)
    palette = torch.tensor(list(COLOURS.values()))
    words = list(COLOURS)
    out = []
    for row, index in enumerate(best.tolist()):
        shape, position, word = labels[index]
        colour = words[int((palette - fill[row, index]).square().sum(1).argmin())]
        background = words[int((palette * 0.94 - ground[row, index]).square().sum(1).argmin())]
        out.append(Caption(colour=colour, shape=shape, background=background, size=word, position=position))
    return out
