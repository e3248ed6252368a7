"""A calibration that comes with a model: ``hicache.json`` in the folder that the pipeline was loaded from.

Beside it there may be one for each granularity that is asked for by name, such as ``hicache.output.json``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from hicache.calibration.file import Calibration
from hicache.calibration.reader import load

NAME: Final = "hicache.json"


def name_for(granularity: str) -> str:
    """The name of the file that serves one granularity alone."""
    return f"hicache.{granularity}.json"


def shipped(pipe: Any, granularity: str = "auto") -> Calibration | None:
    """The calibration beside a pipeline's own files that serves a granularity; None where none does.

    Args:
        pipe: the pipeline.
        granularity: what is to be cached; ``"auto"``: what the file says.

    Raises:
        CalibrationError: it is damaged.
    """
    folder = getattr(pipe, "name_or_path", None)
    if not isinstance(folder, (str, Path)):
        return None
    names = [NAME] if granularity == "auto" else [name_for(granularity), NAME]
    found = next((path for name in names if (path := Path(folder) / name).is_file()), None)
    calibration = None if found is None else load(found)
    if calibration is None or granularity in ("auto", calibration.granularity or granularity):
        return calibration
    return None
