"""Where pictures are compared: a pipeline that is loaded, its variants, and what judges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.utils.logging import disable_progress_bar

from hicache.compare import metrics
from hicache.compare.origin import Origin, origin
from hicache.compare.request import Request
from hicache.compare.run import Comparison, compare
from hicache.compare.variants import variants
from hicache.fitting.pictures import Pictures
from hicache.pipeline import check_backend, find_denoisers


class Desk:
    """What a comparison needs, loaded once.

    Args:
        asked: what is compared.
        load: gives the pipeline of ``asked.model``.

    Raises:
        TypeError, ValueError: what was asked for cannot be.
    """

    def __init__(self, asked: Request, load: Callable[[str | None], Any]) -> None:
        self._asked = asked
        self._metrics, self._missing = metrics.load(asked.metrics)
        disable_progress_bar()
        self._pipe = load(asked.model)
        self._pipe.set_progress_bar_config(disable=True)
        for module in find_denoisers(self._pipe, unets=asked.cached == "output").values():
            check_backend(asked.backend, module)
        self._variants = variants(
            self._pipe, asked.mode, asked.interval, asked.steps, asked.base, asked.cached
        )

    @property
    def runs(self) -> int:
        """Of each batch of pictures: of every variant and the full one, timed and untimed, in every round."""
        return 2 * self._asked.repeats * (1 + len(self._variants))

    def origin(self) -> Origin:
        """Where the numbers come from."""
        return origin(self._asked, self._pipe, self._missing)

    def compare(self, pictures: Pictures, on_step: Callable[[], None] = lambda: None) -> Comparison:
        """Compare some of the pictures, or all.

        Raises:
            RuntimeError: a variant failed; the message names it.
        """
        return compare(
            self._pipe,
            pictures,
            self._variants,
            self._metrics,
            rounds=self._asked.repeats,
            granularity=self._asked.cached,
            backend=self._asked.backend,
            on_step=on_step,
        )
