"""The command line where the native extension cannot be imported: ``cli_without_extension.py PICTURE``."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class Missing:
    """A finder that comes first and does not find the extension."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "hicache_kernels._native":
            raise ModuleNotFoundError(f"No module named {name}")
        return None


def main() -> None:
    sys.meta_path.insert(0, Missing())
    from hicache.cli import main as run

    picture = ["demo", "a red ring on blue", "--out", sys.argv[1]]
    assert run(["info"]) == 0
    assert run([*picture, "--steps", "5"]) == 0
    assert run([*picture, "--backend", "native"]) == 2


if __name__ == "__main__":
    main()
