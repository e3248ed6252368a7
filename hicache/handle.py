"""What ``apply()`` returns: the base of :mod:`hicache.fast`'s handle and of :mod:`hicache.reference`'s."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from torch import nn

from hicache.pipeline import HANDLE_ATTRIBUTES, refuse_other_caches
from hicache.stats import Stats

if TYPE_CHECKING:
    from typing_extensions import Self


class Hooked(Protocol):
    """One transformer of the pipeline and what hooks it."""

    module: nn.Module

    def install(self) -> None:
        """Hook it."""

    def remove(self) -> None:
        """Leave it as it was."""

    def release(self) -> None:
        """Free its histories."""


class Part(Protocol):
    """What else of the pipeline is hooked: a ControlNet."""

    def install(self) -> None:
        """Hook it."""

    def remove(self) -> None:
        """Leave it as it was; nothing where it is."""

    def release(self) -> None:
        """Free what it holds."""


class Steps(Protocol):
    """What counts the runs and steps of the pipeline."""

    def restart(self) -> None:
        """Start a new run at the next call."""

    def detach(self) -> None:
        """Leave the scheduler as it was."""


Denoiser = TypeVar("Denoiser", bound=Hooked)


class NotCopied:
    """A part of a cached pipeline: its hooks reach into that, and a copy's would reach into the original."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("hicache: a cached pipeline cannot be copied or pickled; call remove() first")


class BaseHandle(NotCopied, ABC, Generic[Denoiser]):
    """A cached pipeline: leave the ``with`` block or call :meth:`remove` to get it back as it was.

    Args:
        denoisers: the pipeline's, not hooked yet.
        steps: counts the steps of all of them.
        others: what else is hooked with them.
    """

    owner: ClassVar[str]  # who caches, of HANDLE_ATTRIBUTES

    def __init__(self, denoisers: list[Denoiser], steps: Steps, others: Sequence[Part] = ()) -> None:
        self._denoisers = denoisers
        self._steps = steps
        self._others = others
        self._final: Stats | None = None  # once removed
        self._refusals: dict[Denoiser, Callable[[], Any]] = {}  # of other caches: what undoes them

    @classmethod
    def remove_from(cls, modules: Iterable[nn.Module]) -> None:
        """Remove what earlier ``apply()`` of the same owner left on these transformers, and on no others."""
        modules = list(modules)
        for module in modules:
            previous = module.__dict__.get(HANDLE_ATTRIBUTES[cls.owner])
            if previous is not None:
                previous._let_go(modules)

    def _let_go(self, modules: list[nn.Module]) -> None:
        """Leave some transformers as they were; without any left, all of the pipeline."""
        kept = [denoiser for denoiser in self._denoisers if denoiser.module not in modules]
        if not kept:
            self.remove()
        for denoiser in [denoiser for denoiser in self._denoisers if denoiser not in kept]:
            self._leave(denoiser)
            self._denoisers.remove(denoiser)

    def _leave(self, denoiser: Denoiser) -> None:
        denoiser.remove()
        denoiser.release()
        if denoiser in self._refusals:
            self._refusals.pop(denoiser)()
        denoiser.module.__dict__.pop(HANDLE_ATTRIBUTES[self.owner], None)

    def install(self) -> None:
        """Hook all that is to be hooked, or nothing where a part of it fails."""
        try:
            for denoiser in self._denoisers:
                denoiser.module.__dict__[HANDLE_ATTRIBUTES[self.owner]] = self
                self._refusals[denoiser] = refuse_other_caches(denoiser.module, self.owner)
                denoiser.install()
            for other in self._others:
                other.install()
        except BaseException:
            self.remove()
            raise

    def restart(self) -> None:
        """Start a new run at the next call.

        A pipeline does this by itself. In a loop of your own without a scheduler, a run that goes on in the
        direction the last one's timesteps ran (that one stopped early, this one starts later) looks like the
        same run: call this before it.
        """
        self._steps.restart()

    @property
    def active(self) -> bool:
        """Whether the pipeline is cached."""
        return bool(self._denoisers)

    @property
    def stats(self) -> Stats:
        """Full and skipped steps by context, bytes held and cache milliseconds of the current or last run.

        After :meth:`remove`, as they stood then.
        """
        return self._read_stats() if self._final is None else self._final

    @abstractmethod
    def _read_stats(self) -> Stats:
        """The stats of this moment."""

    def release(self) -> None:
        """Free the memory of histories and graphs. The pipeline stays cached: its next run allocates anew."""
        for denoiser in self._denoisers:
            denoiser.release()
        for other in self._others:
            other.release()

    def remove(self) -> None:
        """Leave the pipeline exactly as ``apply()`` found it. Calling it again does nothing."""
        if self._final is not None:
            return
        try:
            self._final = self._read_stats()
        finally:  # whatever statistics make of it
            for other in self._others:
                other.remove()
            for denoiser in self._denoisers:
                self._leave(denoiser)
            self._denoisers.clear()
            self._steps.detach()

    def __enter__(self) -> Self:
        if not self.active:
            raise RuntimeError("hicache: this handle was removed; call apply() for a new one")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
