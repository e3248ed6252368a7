"""A calibration that comes with a model: ``hicache.json`` in the folder that the pipeline was loaded from.

Beside it there may be one for each granularity, such as ``hicache.output.json``.
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


def shipped(pipe: Any, granularity: str = "auto") -> list[Calibration]:
    """The calibrations beside a pipeline's own files that serve a granularity, the preferred first.

    Args:
        pipe: the pipeline.
        granularity: what is to be cached; ``"auto"``: what the files say, and first of all what the denoiser
            returns, as nothing of it runs at a skipped step then.

    Raises:
        CalibrationError: one is damaged.
    """
    folder = getattr(pipe, "name_or_path", None)
    if not isinstance(folder, (str, Path)):
        return []
    names = [name_for("output" if granularity == "auto" else granularity), NAME]
    found = [load(path) for name in names if (path := Path(folder) / name).is_file()]
    return [one for one in found if granularity in ("auto", one.granularity or granularity)]
