"""Pictures and videos as the bytes of files, with what they were made by in their metadata."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

_QUALITY: Final = 95  # of JPEG
_DESCRIPTION, _SOFTWARE = 0x010E, 0x0131  # of EXIF
_USER_COMMENT: Final = 0x9286


def picture_bytes(
    picture: Image.Image, kind: str, prompt: str, software: str, about: Mapping[str, Any]
) -> bytes:
    """A PNG or a JPEG.

    Args:
        picture: as drawn.
        kind: ``"png"`` or ``"jpg"``.
        prompt: what was drawn.
        software: what drew it.
        about: all settings, plain data.
    """
    file, text = io.BytesIO(), json.dumps(dict(about), ensure_ascii=False, sort_keys=True)
    if kind == "png":
        info = PngInfo()
        for name, value in {"Description": prompt, "Software": software, "hicache": text}.items():
            info.add_itxt(name, value)
        picture.save(file, "PNG", pnginfo=info)
    else:
        exif = Image.Exif()
        exif[_DESCRIPTION], exif[_SOFTWARE] = prompt.encode(), software
        exif[_USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-le")
        picture.convert("RGB").save(file, "JPEG", quality=_QUALITY, subsampling=0, exif=exif)
    return file.getvalue()


def video_bytes(frames: Any, fps: int, prompt: str, software: str, about: Mapping[str, Any]) -> bytes:
    """An MP4 (H.264), equal for equal frames.

    Args:
        frames: ``[frames, height, width, 3]`` in [0, 1], as pipelines give arrays.
        fps: frames a second.
        prompt: what was drawn.
        software: what drew it.
        about: all settings, plain data.

    Raises:
        RuntimeError: ``imageio`` with ``ffmpeg`` is not installed.
    """
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise RuntimeError(f"videos need the cli extra: pip install 'hicache[cli]' ({error})") from error
    text = json.dumps(dict(about), ensure_ascii=False, sort_keys=True)
    metadata = {"title": prompt, "artist": software, "comment": text}
    options = [part for name, value in metadata.items() for part in ("-metadata", f"{name}={value}")]
    # one thread, no date, no version of the encoder: the same bytes from the same frames
    options += ["-threads", "1", "-fflags", "+bitexact", "-flags:v", "+bitexact"]
    shown = (np.clip(np.asarray(frames), 0, 1) * 255).round().astype("uint8")
    height, width = shown.shape[1:3]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        writer = imageio_ffmpeg.write_frames(
            str(path),
            (width, height),
            fps=fps,
            codec="libx264",
            quality=8,
            macro_block_size=2,
            output_params=options,
        )
        writer.send(None)
        for frame in shown:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
        return path.read_bytes()


def read_pictures(paths: Sequence[str]) -> list[Image.Image]:
    """Pictures that are given to be changed: RGB, upright.

    Raises:
        ValueError: one of them cannot be read.
    """
    return [_read_picture(path) for path in paths]


def _read_picture(path: str) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"image: expected a picture, got {path}, which is none") from error
    except OSError as error:
        raise ValueError(f"image: cannot read {path}: {error.strerror or error}") from error
