"""Situations by name: each is a function of a model's name that gives what came of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

import torch

from tests.compatibility.checks import Outcome, Wrong

WRONG: Final = "wrong"  # how an outcome begins that no page may have
Function = Callable[[str], Outcome]


@dataclass(frozen=True)
class Situation:
    """Something that happens to cached pipelines.

    Args:
        name: in the page.
        what: in a line.
        models: those it is tried with.
        run: tries it.
        costly: whether that takes seconds.
    """

    name: str
    what: str
    models: tuple[str, ...]
    run: Function
    costly: bool = False


@dataclass
class Theme:
    """Situations that stand together in the page."""

    title: str
    situations: list[Situation] = field(default_factory=list)

    def situation(
        self, name: str, what: str, models: Iterable[str], costly: bool = False
    ) -> Callable[[Function], Function]:
        """Register what a function tries."""

        def register(run: Function) -> Function:
            self.situations.append(Situation(name, what, tuple(models), run, costly))
            return run

        return register


@dataclass(frozen=True)
class Row:
    """One situation with one model."""

    situation: Situation
    model: str

    @property
    def key(self) -> str:
        """What tests and ``--only`` call it."""
        return f"{self.situation.name} / {self.model}"


def try_out(row: Row) -> Outcome:
    """What comes of a row; of one that goes wrong, what did."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return row.situation.run(row.model)
        except Wrong as error:
            return Outcome(f"{WRONG}: {error}")
        except Exception as error:
            return Outcome(f"{WRONG}: raises {type(error).__name__}: {error}")
