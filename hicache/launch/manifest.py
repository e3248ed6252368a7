"""A folder of pictures and what is known of it: ``run.json``, ``done.jsonl`` and a lock.

``run.json`` has the settings, ``done.jsonl`` a line a picture. A picture is written under another name; then
its line is, then it is renamed. So a picture under its own name is whole and has its line, and what was
stopped between the two is finished at the next start: the line has the digest of the bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hicache._version import __version__
from hicache.launch.folder_lock import FolderLock, now
from hicache.launch.settings import Settings
from hicache.launch.tasks import Picture

RUN, DONE = "run.json", "done.jsonl"
_PART: Final = ".part"
_SYNC_SECONDS: Final = 1.0
_OURS: Final = re.compile(r"\d{6,}\.(png|jpg|mp4)(\.part)?")


class FolderError(ValueError):
    """A folder that cannot be drawn into: says why, and what to do."""


@dataclass(frozen=True)
class Made:
    """A picture of a worker: its bytes, or why there are none, and what is told of it.

    Args:
        index: its number.
        data: of the file; None where it failed.
        facts: for its line, by name: seed, full and skipped steps, seconds.
        error: why it failed.
    """

    index: int
    data: bytes | None
    facts: Mapping[str, Any]
    error: str | None = None


class RunFolder:
    """A folder that this process draws into; a ``with`` block lets it go.

    Args:
        path: made where it is not there.
        settings: resolved; those of pictures that are there must be equal.
        force: throw away pictures of other settings.

    Raises:
        FolderError: other settings, somebody else's files, another process at work, or it cannot be written.
    """

    def __init__(self, path: str | Path, settings: Settings, force: bool = False) -> None:
        self.path, self._settings = Path(path), settings
        self._done: dict[int, str] = {}  # index → digest of its prompt
        self._synced = 0.0  # when the disk had all
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.path)
            holder = self._lock.take()
        if holder is not None:
            raise FolderError(f"{self.path}: {holder} draws into it: wait, or end it")
        try:
            with self._writing():
                self._prepare(force)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others at it."""
        self._lock.give_back()

    # What is there.

    def _prepare(self, force: bool) -> None:
        """Read what is there, finish what was stopped, and write the settings where there are none."""
        if force:
            self._empty()
        names = {entry.name for entry in os.scandir(self.path)}
        if RUN in names:
            self._check_settings()
        elif DONE in names or any(_OURS.fullmatch(name) for name in names):
            raise FolderError(f"{self.path} has pictures but no {RUN}: draw into another folder")
        else:
            self._write_run()
        self._read_done(names)
        for name in names:
            if name.endswith(_PART) and _OURS.fullmatch(name):
                (self.path / name).unlink(missing_ok=True)

    def _empty(self) -> None:
        for entry in list(os.scandir(self.path)):
            if entry.name in (RUN, DONE) or _OURS.fullmatch(entry.name):
                os.unlink(entry.path)

    def _check_settings(self) -> None:
        there = json.loads((self.path / RUN).read_text(encoding="utf-8"))["settings"]
        wanted = self._settings.plain()
        names = sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))
        names = [name for name in names if name != "config"] or names
        if names:
            differ = ", ".join(f"{name} {there.get(name)!r}, not {wanted.get(name)!r}" for name in names)
            raise FolderError(
                f"{self.path} was drawn with {differ}: draw into another folder, or throw it away with "
                "--force"
            )

    def _write_run(self) -> None:
        about = {
            "tag": self._settings.tag,
            "settings": self._settings.plain(),
            "hicache": __version__,
            "python": platform.python_version(),
            "begun": now(),
        }
        part = self.path / (RUN + _PART)
        part.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.rename(self.path / RUN)

    def _read_done(self, names: set[str]) -> None:
        """Take what is done: of a line whose picture is missing, the written one under its other name."""
        path = self.path / DONE
        if not path.exists():
            return
        with path.open("r+b") as file:
            whole = 0
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    file.truncate(whole)  # it was stopped as it was being written
                    break
                whole += len(line)
                try:
                    entry = json.loads(line)
                    index, name, error = entry["index"], entry["file"], entry["error"]
                except (ValueError, KeyError, TypeError) as broken:
                    raise FolderError(f"{path}: line {number} is none of ours: {broken!r}") from broken
                if error is None and (name in names or self._finish(name, entry["sha256"], names)):
                    self._done[index] = entry["prompt_digest"]

    def _finish(self, name: str, sha256: str, names: set[str]) -> bool:
        """Rename a picture that was stopped before it was, if it is that one."""
        part = self.path / (name + _PART)
        if name + _PART not in names or hashlib.sha256(part.read_bytes()).hexdigest() != sha256:
            return False
        part.rename(self.path / name)
        names.discard(name + _PART)
        names.add(name)
        return True

    def __len__(self) -> int:
        """Pictures that are done."""
        return len(self._done)

    def missing(self, picture: Picture) -> bool:
        """Whether a picture is still to be drawn.

        Raises:
            FolderError: it is there, of another prompt.
        """
        there = self._done.get(picture.index)
        if there is not None and there != picture.prompt.digest:
            raise FolderError(
                f"{self.path}: picture {picture.index} is of another prompt than "
                f"{picture.prompt.text[:60]!r}: prompts may be added at the end, not changed; draw into "
                "another folder"
            )
        return there is None

    # What is made.

    def file_name(self, index: int) -> str:
        """Of a picture: its number, never its prompt."""
        return f"{index:06d}{self._settings.suffix}"

    def add(self, picture: Picture, made: Made) -> None:
        """Write a picture and its line.

        Raises:
            FolderError: they cannot be written.
        """
        name = self.file_name(picture.index)
        line = {
            "index": picture.index,
            "prompt": picture.prompt.text,
            "prompt_digest": picture.prompt.digest,
            "seed": picture.seed,
            "file": name,
            "sha256": None if made.data is None else hashlib.sha256(made.data).hexdigest(),
            "settings": {"tag": self._settings.tag, **picture.prompt.overrides},
            **made.facts,
            "error": made.error,
        }
        part = self.path / (name + _PART)
        with self._writing():
            try:
                sync = self._is_sync_due()
                if made.data is not None:
                    _write(part, "wb", made.data, sync)
                _write(self.path / DONE, "ab", (json.dumps(line, ensure_ascii=False) + "\n").encode(), sync)
                if made.data is not None:
                    part.rename(self.path / name)
            except OSError:
                with contextlib.suppress(OSError):
                    part.unlink(missing_ok=True)
                raise
        if made.error is None:
            self._done[picture.index] = picture.prompt.digest

    def _is_sync_due(self) -> bool:
        """Whether to wait for the disk: not where pictures come faster than that is worth it.

        A process that is killed loses nothing of what it has written in any case; a machine may.
        """
        due = time.monotonic() - self._synced > _SYNC_SECONDS
        if due:
            self._synced = time.monotonic()
        return due

    @contextlib.contextmanager
    def _writing(self) -> Any:
        try:
            yield
        except OSError as error:
            raise FolderError(
                f"{self.path}: cannot write {error.filename or ''}: {error.strerror}; what is there stays: "
                "make room and start again"
            ) from error


def _write(path: Path, mode: str, data: bytes, sync: bool) -> None:
    """Write bytes, with ``sync`` to the disk itself; a line that did not fit is taken back."""
    before = path.stat().st_size if mode == "ab" and path.exists() else 0
    try:
        with path.open(mode) as file:
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
    except OSError as error:
        if mode == "ab" and path.exists():
            os.truncate(path, before)
        error.filename = error.filename or str(path)
        raise
