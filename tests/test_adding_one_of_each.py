"""How many files it touches to add a basis, a schedule and a model: counted in a copy of the tree, and used.

Tests, and the tables in them, do not count (docs/architecture.md).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.pages import code_of
from tests.support.scripts import ROOT, run_script

# Where each is added today.
BASES = "hicache/basis.py"
SCHEDULE = "hicache/schedule.py"
REGISTRY = "hicache/adapters/registry.py"
ADAPTER = "hicache/adapters/pebble.py"


def append(path: Path, source: str) -> None:
    path.write_text((path.read_text() if path.exists() else "") + source)


def insert(path: Path, before: str, source: str) -> None:
    """Put source before the one place where ``before`` stands."""
    text = path.read_text()
    assert text.count(before) == 1, (path, before)
    path.write_text(text.replace(before, source + before))


def add_a_basis(root: Path) -> None:
    append(
        root / BASES,
        '\n\n@register_basis("halved")\n'
        "def halved(gaps: Sequence[float], distance: float, terms: int, sigma: float) -> list[float]:\n"
        "    return [0.5**k for k in range(terms)]\n",
    )


def add_a_schedule(root: Path) -> None:
    """Every other step is full."""
    append(
        root / SCHEDULE,
        "\n\n@dataclass(frozen=True)\n"
        "class EveryOther(Schedule):\n"
        "    def is_full(self, step: int, last_full: int | None, num_steps: int | None = None) -> bool:\n"
        "        return step % 2 == 0\n",
    )


def add_a_model(root: Path) -> None:
    """The adapter of docs/adding-a-model.md, in a file of its own, and its line in the registry."""
    _, adapter, _ = code_of("adding-a-model.md")
    append(root / ADAPTER, f"from torch import nn\n\n{adapter}")
    insert(
        root / REGISTRY,
        '    "PixArtTransformer2DModel"',
        '    "Pebble": "hicache.adapters.pebble:PebbleAdapter",\n',
    )


# what is added → how, and the number of files that it touches
ADDITIONS: dict[str, tuple[Callable[[Path], None], int]] = {
    "basis": (add_a_basis, 1),
    "schedule": (add_a_schedule, 1),
    "model": (add_a_model, 2),
}


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of both packages, with the extension if it is built."""
    for package in ("hicache", "hicache_kernels"):
        ignore = shutil.ignore_patterns("__pycache__", "model")  # the bundled weights are not used
        shutil.copytree(ROOT / package, tmp_path / "tree" / package, ignore=ignore)
    return tmp_path / "tree"


def test_each_touches_as_few_files_as_promised_and_works(copied: Path, tmp_path: Path):
    for name, (add, files) in ADDITIONS.items():
        before = contents(copied)
        add(copied)
        after = contents(copied)
        assert before.keys() <= after.keys()
        touched = sorted(str(path.relative_to(copied)) for path in after if after[path] != before.get(path))
        assert len(touched) == files, (name, touched)

    model = tmp_path / "pebble.py"
    model.write_text(code_of("adding-a-model.md")[0])
    done = run_script("use_additions.py", model, cwd=copied)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["module", "6", "6"]
