"""Who draws into a folder: one process at a time, and the others are told which."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

LOCK: Final = ".lock"
HOLDER: Final = ".lock.json"


class FolderLock:
    """A folder's lock, and beside it who has it.

    Args:
        path: of the folder, which is there.
    """

    def __init__(self, path: Path) -> None:
        self._lock = FileLock(path / LOCK, timeout=0)
        self._about = path / HOLDER

    def take(self) -> str | None:
        """Take it; returns who has it, where that is somebody else.

        Raises:
            OSError: nothing can be written there.
        """
        try:
            self._lock.acquire()
        except Timeout:
            return self._holder()
        about = {"pid": os.getpid(), "host": socket.gethostname(), "since": now()}
        self._about.write_text(json.dumps(about) + "\n", encoding="utf-8")
        return None

    def _holder(self) -> str:
        try:
            about = json.loads(self._about.read_text(encoding="utf-8"))
            return f"process {about['pid']} on {about['host']}, since {about['since']},"
        except (OSError, ValueError, KeyError):  # it has only just begun
            return "another process"

    def give_back(self) -> None:
        """Let others at it."""
        with contextlib.suppress(OSError):
            self._about.unlink(missing_ok=True)
        self._lock.release()


def now() -> str:
    """The time, as people and programs read it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
