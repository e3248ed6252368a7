"""What takes part in the full steps of a denoiser beside the cache: the one way in that both paths have.

A companion changes how a full step is computed, and knows nothing of forecasts: what a full step gives is
recorded as usual. It is made by settings that a user passes to ``apply()``, which only look at the denoiser,
so that a refusal leaves the pipeline as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn


@dataclass(frozen=True)
class FullCall:
    """A call of a denoiser at a full step, as a companion is told of it.

    Args:
        context: whose call it is: one object for all of a context's calls, and what is kept for it may go
            with it.
        ordinal: of the full step, counted from 0 since the context's history began.
        warmup: full steps that the run begins with.
        model_kwargs: the denoiser's arguments by name.
    """

    context: object
    ordinal: int
    warmup: int
    model_kwargs: Mapping[str, Any]


class Companion(Protocol):
    """Takes part in the full steps of one denoiser."""

    #: Why its full steps run eagerly where others are captured in CUDA graphs.
    eager: str

    def install(self) -> None:
        """Hook the denoiser. :meth:`remove` undoes it exactly."""

    def remove(self) -> None:
        """Leave the denoiser as it was."""

    def release(self) -> None:
        """Free what is held: every context begins anew."""

    def begin(self, call: FullCall) -> None:
        """A full step begins.

        Raises:
            ValueError: the denoiser or the call has become what it cannot take part in.
        """

    def end(self) -> None:
        """A call has ended, or never came to its end."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""

    def describe(self) -> str:
        """What it did in the last full step, for people."""


@runtime_checkable
class CompanionSettings(Protocol):
    """What a user passes to ``apply()``."""

    def beside(self, denoiser: nn.Module) -> Companion:
        """A companion of a denoiser, not installed yet.

        Raises:
            ValueError: it cannot take part in this denoiser's full steps.
        """


class Companions:
    """All that take part in one denoiser's full steps.

    Args:
        members: not installed yet.
    """

    def __init__(self, *members: Companion) -> None:
        self.members = members

    def install(self) -> None:
        """Hook the denoiser."""
        for member in self.members:
            member.install()

    def remove(self) -> None:
        """Leave the denoiser as it was."""
        for member in self.members:
            member.remove()

    def release(self) -> None:
        """Free what they hold."""
        for member in self.members:
            member.release()

    def begin(self, call: FullCall) -> None:
        """A full step begins."""
        for member in self.members:
            member.begin(call)

    def end(self) -> None:
        """A call has ended, or never came to its end."""
        for member in self.members:
            member.end()

    @property
    def eager(self) -> str | None:
        """Why full steps are not captured; None where they may be."""
        return next((member.eager for member in self.members), None)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(member.nbytes for member in self.members)

    def describe(self) -> str:
        """What they did, for people; "" where there is none."""
        return "; ".join(member.describe() for member in self.members)


def companions(
    denoisers: Mapping[str, nn.Module], **options: CompanionSettings | None
) -> dict[str, Companions]:
    """What takes part in the full steps of each denoiser, by the denoiser's name.

    Args:
        denoisers: by name.
        options: arguments of ``apply()`` by name; None where one is not used.

    Raises:
        TypeError: no settings of a companion.
        ValueError: a denoiser that one cannot take part in.
    """
    given = {option: settings for option, settings in options.items() if settings is not None}
    for option, settings in given.items():
        if not isinstance(settings, CompanionSettings):
            raise TypeError(
                f"hicache: expected {option}= to be settings of a companion or None, got {settings!r}"
            )
    return {
        name: Companions(*(settings.beside(module) for settings in given.values()))
        for name, module in denoisers.items()
    }
