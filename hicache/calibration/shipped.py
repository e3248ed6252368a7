"""A calibration that comes with a model: ``hicache.json`` in the folder that the pipeline was loaded from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from hicache.calibration.file import Calibration
from hicache.calibration.reader import load

NAME: Final = "hicache.json"


def shipped(pipe: Any) -> Calibration | None:
    """The calibration beside a pipeline's own files; None where there is none.

    Raises:
        CalibrationError: it is damaged.
    """
    folder = getattr(pipe, "name_or_path", None)
    if not isinstance(folder, (str, Path)) or not (Path(folder) / NAME).is_file():
        return None
    return load(Path(folder) / NAME)
