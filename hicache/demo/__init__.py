"""The bundled model: a 5.1M-parameter FLUX transformer, trained by this project to draw coloured shapes.

>>> import hicache.demo
>>> pipe = hicache.demo.load()                                  # doctest: +SKIP
>>> pipe("a red ring on blue").images[0]                        # doctest: +SKIP
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from hicache.demo.pipeline import ShapesPipeline

MODEL: Final = Path(__file__).parent / "model"


def load(**kwargs: Any) -> ShapesPipeline:
    """The bundled pipeline, ready to call; arguments go to ``from_pretrained`` (``torch_dtype=…``)."""
    from hicache.demo.pipeline import ShapesPipeline

    pipeline: ShapesPipeline = ShapesPipeline.from_pretrained(MODEL, local_files_only=True, **kwargs)
    return pipeline
