"""Pictures as arrays, and as what a page shows of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from PIL import Image

#: One picture ``[height, width, 3]``, a video ``[frames, height, width, 3]``, or several, in [0, 1].
Array = np.ndarray[Any, Any]

#: Pixels a side up to which a picture is shown as it is, as PNG.
LOSSLESS: Final = 256
#: Of WebP, above that.
QUALITY: Final = 90


def as_arrays(drawn: Any) -> list[Array]:
    """What a pipeline returned at ``output_type="np"``, picture by picture.

    Raises:
        TypeError: it is not pictures or videos of three channels.
    """
    found = [np.asarray(one, np.float32) for one in drawn]
    for one in found:
        if one.ndim not in (3, 4) or one.shape[-1] != 3:
            raise TypeError(
                "expected pictures [height, width, 3] or videos [frames, height, width, 3], got "
                f"{list(one.shape)}"
            )
    return found


def frames(picture: Array) -> Array:
    """``[frames, height, width, 3]``: a picture is a video of one frame."""
    return picture if picture.ndim == 4 else picture[None]


def as_image(picture: Array) -> Image.Image:
    """What is shown of it: a picture, or the frame in the middle of a video."""
    every = frames(picture)
    return Image.fromarray((every[len(every) // 2].clip(0, 1) * 255).round().astype("uint8"))


def data_uri(image: Image.Image) -> str:
    """A picture in an address: PNG where it is small, else WebP, which loses a little."""
    stream = io.BytesIO()
    small = max(image.size) <= LOSSLESS
    if small:
        image.save(stream, "PNG", optimize=True)
    else:
        image.save(stream, "WEBP", quality=QUALITY)
    return f"data:image/{'png' if small else 'webp'};base64," + base64.b64encode(stream.getvalue()).decode()


def enlarged(image: Image.Image, side: int) -> Image.Image:
    """At least ``side`` pixels on the shorter side, by whole copies of its pixels."""
    factor = -(-side // min(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def size_text(sizes: Sequence[Array]) -> str:
    """Such as ``32 × 32`` or ``25 frames of 64 × 48``, of the first."""
    every = frames(sizes[0])
    text = f"{every.shape[2]} × {every.shape[1]}"
    return text if len(every) == 1 else f"{len(every)} frames of {text}"
