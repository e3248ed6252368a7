"""A real browser without a window: the system's Chromium, driven by playwright. Where there is none, why."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def missing() -> str | None:
    """Why no browser can be had; None where one can."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed: pip install 'hicache[test]'"
    if program() is None:
        return f"no browser on the path ({', '.join(NAMES)}): apt-get install chromium"
    return None


def program() -> str | None:
    """The browser's path."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def browser() -> Iterator[Any]:
    """A browser of playwright's, until the block ends."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # a container's root has no sandbox; its pages are ours
        found = playwright.chromium.launch(executable_path=program(), args=["--no-sandbox"])
        try:
            yield found
        finally:
            found.close()
