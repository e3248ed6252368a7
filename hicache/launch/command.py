"""``hicache generate``, once its options are read."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hicache.launch.backends import Backend
from hicache.launch.forecast import memory_plan, steps_line
from hicache.launch.hiring import hire
from hicache.launch.loading import resolve
from hicache.launch.manifest import RunFolder
from hicache.launch.prompts import Prompt, PromptFile, given
from hicache.launch.run import run
from hicache.launch.settings import Settings
from hicache.launch.tasks import Selection, Work
from hicache.launch.workers import Staff


@dataclass(frozen=True)
class Request:
    """What the command line asks for: settings of the picture, and what has no influence on it.

    Args:
        settings: as given.
        texts: prompts, or ``prompts``, a file of them.
        out: the folder.
        offset: of :class:`Selection`, as ``limit`` and ``stride``.
        batch: pictures of a call.
        gpus: of :class:`Staff`, as ``workers``, ``ray``, ``offload`` and ``threads``.
        force: throw away what is in the folder.
        dry_run: only tell.
    """

    settings: Settings
    texts: list[str] | None = None
    prompts: Path | None = None
    out: Path = Path("hicache-out")
    offset: int = 0
    limit: int | None = None
    stride: int = 1
    batch: int = 1
    gpus: str | None = None
    workers: int | None = None
    ray: str | None = None
    offload: str = "none"
    threads: int | None = None
    force: bool = False
    dry_run: bool = False

    def source(self) -> Iterable[Prompt]:
        """The prompts.

        Raises:
            ValueError: none, or two kinds of them.
        """
        if bool(self.texts) == (self.prompts is not None):
            raise ValueError(
                "expected prompts, or --prompts with a file of them, got both"
                if self.texts
                else "expected prompts, or --prompts with a file of them, got none"
            )
        return given(self.texts or []) if self.prompts is None else PromptFile(self.prompts)

    def staff(self) -> Staff:
        """Who draws."""
        return Staff(self.gpus, self.workers, self.ray, self.offload, self.threads)


def carry_out(request: Request) -> int:
    """Draw, or tell what would be drawn; returns the exit status.

    Raises:
        ValueError, RuntimeError: what cannot be drawn, in one line.
    """
    source = request.source()
    if isinstance(source, PromptFile) and (unused := source.unused()):
        _note(f"{source.path}: nothing is taken from {', '.join(unused)}")
    settings, backend = resolve(request.settings)
    selection = Selection(request.offset, request.limit, request.stride)
    batch = 1 if backend.edits or settings.image else request.batch
    work = Work(source, settings, selection, batch)
    staff = request.staff()
    if staff.ray is None:
        staff.cards()  # a GPU that is not there is told of before anything is made
    if request.dry_run:
        _tell(work, request, settings)
        return 0
    return _draw(work, request, settings, backend, staff)


def _draw(work: Work, request: Request, settings: Settings, backend: Backend, staff: Staff) -> int:
    from hicache.launch.screen import Screen

    # reads all prompts: what is wrong in them is told before a folder is made
    if not sum(1 for _ in work.pictures()):
        raise ValueError("expected prompts to draw, got none after --offset")
    screen = Screen(settings.tag)
    with RunFolder(request.out, settings, request.force) as folder, screen.bar() as show:
        summary = run(work, folder, lambda: hire(staff, settings, backend), show)
    screen.end(summary, str(request.out))
    return summary.status


def _tell(work: Work, request: Request, settings: Settings) -> None:
    print(f"{sum(1 for _ in work.pictures())} pictures into {request.out}, {settings.tag}")
    print(steps_line(settings))
    try:
        plan = memory_plan(settings, work.batch)
    except (ValueError, TypeError) as error:
        print(f"memory of the cache: not planned: {error}")
        return
    if plan is not None:
        print(plan)


def _note(text: str) -> None:
    print(text, file=sys.stderr)
