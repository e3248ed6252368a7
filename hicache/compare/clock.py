"""Seconds of a pipeline's denoising loops, by the progress bar that it opens around them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from typing_extensions import Self


def _now() -> float:
    """With what a GPU was given done."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class LoopClock:
    """Puts itself in the place of ``pipe.progress_bar``, which is the pipeline's again after :meth:`stop`.

    Neither text encoders nor the making of pictures count: they cost the same whatever is cached.

    Args:
        pipe: a ``DiffusionPipeline``.
        on_step: called after every step.

    Raises:
        TypeError: the pipeline has no progress bar.
    """

    def __init__(self, pipe: Any, on_step: Callable[[], None]) -> None:
        if not callable(getattr(pipe, "progress_bar", None)):
            raise TypeError(
                f"expected a pipeline of diffusers, with progress_bar(), got {type(pipe).__name__}"
            )
        self.on_step = on_step
        self._pipe = pipe
        self._seconds: float | None = None
        self._bar = pipe.progress_bar
        pipe.progress_bar = self._open

    def stop(self) -> None:
        del self._pipe.progress_bar

    def read(self) -> float:
        """Seconds of all loops since the last reading.

        Raises:
            RuntimeError: there was no loop.
        """
        seconds, self._seconds = self._seconds, None
        if seconds is None:
            raise RuntimeError(f"{type(self._pipe).__name__} opened no progress bar: its steps are not timed")
        return seconds

    def add(self, seconds: float) -> None:
        self._seconds = (self._seconds or 0.0) + seconds

    def _open(self, iterable: Any = None, total: int | None = None) -> _Bar:
        return _Bar(self, self._bar(iterable=iterable, total=total))


class _Bar:
    """A pipeline's progress bar, timed from its beginning to its end."""

    def __init__(self, clock: LoopClock, bar: Any) -> None:
        self._clock = clock
        self._bar = bar
        self._start = 0.0

    def __enter__(self) -> Self:
        self._bar.__enter__()
        self._start = _now()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clock.add(_now() - self._start)
        self._bar.__exit__(kind, error, trace)

    def __iter__(self) -> Iterator[Any]:
        start = _now()
        for item in self._bar:
            yield item
            self._clock.on_step()
        self._clock.add(_now() - start)

    def update(self, count: int = 1) -> None:
        self._bar.update(count)
        self._clock.on_step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)
