"""Programs that tests run in processes of their own: what they import is there, for timed tests too."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SCRIPTS = sorted(TESTS.rglob("scripts/*.py"))


def missing(source: str) -> set[str]:
    """Modules of this project that a program imports and that do not exist."""
    named: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            named.add(node.module)
    ours = {
        name for name in named if name.split(".")[0] in ("benchmarks", "hicache", "hicache_kernels", "tests")
    }
    return {name for name in ours if not _found(name)}


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_what_a_script_imports_exists(script: Path):
    assert missing(script.read_text()) == set()


def test_a_module_that_moved_is_found_out():
    moved = "from benchmarks.machine import last_level_cache\nimport hicache.tracker\nimport torch"
    assert missing(moved) == {"benchmarks.machine", "hicache.tracker"}
