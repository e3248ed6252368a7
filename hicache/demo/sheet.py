"""One picture that shows full and cached runs side by side, with captions."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hicache.demo.compare import Comparison

_TILE: Final = 160  # pixels a side of one picture
_GAP: Final = 12
_TEXT: Final = 40  # pixels for a caption
_HEADER: Final = 34
_COLUMNS: Final = 4  # pairs in a row


def side_by_side(prompts: Sequence[str], result: Comparison) -> Image.Image:
    """Every prompt's full and cached picture, with the prompt and its PSNR under them."""
    columns = min(_COLUMNS, len(prompts))
    rows = -(-len(prompts) // columns)
    pair = 2 * _TILE + 4
    width = columns * (pair + _GAP) + _GAP
    height = _HEADER + rows * (_TILE + _TEXT + _GAP) + _GAP
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    stats = result.stats
    title = (
        f"each pair: full run ({stats.full_steps + stats.skipped_steps} steps) | HiCache "
        f"({stats.full_steps} full steps, {result.speedup:.2f}x faster)"
    )
    draw.text((_GAP, 8), title, "black", font if width > 700 else small)
    for index, (prompt, psnr) in enumerate(zip(prompts, result.psnr, strict=True)):
        x = _GAP + index % columns * (pair + _GAP)
        y = _HEADER + index // columns * (_TILE + _TEXT + _GAP)
        sheet.paste(_tile(result.full.pictures[index]), (x, y))
        sheet.paste(_tile(result.cached.pictures[index]), (x + _TILE + 4, y))
        caption = textwrap.wrap(f"{prompt} ({psnr:.1f} dB)", 48)
        draw.multiline_text((x, y + _TILE + 4), "\n".join(caption[:2]), "black", small, spacing=2)
    return sheet


def _tile(picture: np.ndarray[Any, Any]) -> Image.Image:
    return Image.fromarray((picture * 255).round().astype("uint8")).resize(
        (_TILE, _TILE), Image.Resampling.NEAREST
    )
