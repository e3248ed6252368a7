"""The bundled models: FLUX transformers of 5.1M parameters, trained by this project on coloured shapes.

>>> import hicache.demo
>>> pipe = hicache.demo.load()                                  # doctest: +SKIP
>>> picture = pipe("a red ring on blue").images[0]              # doctest: +SKIP
>>> large = hicache.demo.load_upscaler()(picture).images[0]     # doctest: +SKIP
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from hicache.demo.pipeline import ShapesPipeline
    from hicache.demo.upscaler import ShapesUpscaler

MODEL: Final = Path(__file__).parent / "model"
UPSCALER: Final = Path(__file__).parent / "upscaler_model"


def load(**kwargs: Any) -> ShapesPipeline:
    """The bundled pipeline, ready to call; arguments go to ``from_pretrained`` (``torch_dtype=…``)."""
    from hicache.demo.pipeline import ShapesPipeline

    pipeline: ShapesPipeline = ShapesPipeline.from_pretrained(MODEL, local_files_only=True, **kwargs)
    return pipeline


def load_upscaler(**kwargs: Any) -> ShapesUpscaler:
    """The bundled super-resolution pipeline, ready to call; arguments go to ``from_pretrained``."""
    from hicache.demo.upscaler import ShapesUpscaler

    pipeline: ShapesUpscaler = ShapesUpscaler.from_pretrained(UPSCALER, local_files_only=True, **kwargs)
    return pipeline
