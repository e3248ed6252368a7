"""docs/choosing.md: every figure in it stands in the row of the CSV that its note names."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import hicache

ROOT = Path(hicache.__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "choosing.md"
# what a note tells a row by, in this order
COLUMNS = {
    "quality.csv": ("granularity", "basis", "sigma", "interval"),
    "online.csv": ("basis", "schedule"),
    "low-rank.csv": ("granularity", "rank", "history", "interval"),
    "peers.csv": ("method", "setting"),
    "memory.csv": ("model",),
    "launches.csv": ("op", "features", "contestant"),
    "nvidia-h100-80gb-hbm3/pipelines.csv": ("model", "variant"),
}
UNITS = {"MB": 1e-6, "GB": 1e-9, "%": 100.0}
UNPROVEN = "## Not measured"

Row = dict[str, str]


def tables() -> dict[str, dict[tuple[str, ...], Row]]:
    """The rows that can be cited, by file and by what tells them."""
    found: dict[str, dict[tuple[str, ...], Row]] = {}
    for name, columns in COLUMNS.items():
        with (RESULTS / name).open(newline="") as file:
            rows = [(tuple(row[column] for column in columns), row) for row in csv.DictReader(file)]
        found[name] = dict(rows)
        assert len(found[name]) == len(rows), name
    return found


def notes(text: str) -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    """The rows that each note cites, as in: [^1]: `quality.csv`: stack / taylor / 0.5 / 5; …"""
    found = {}
    for name, file, rows in re.findall(r"^\[\^([\w-]+)\]: `([\w./-]+)`: (.+)$", text, re.MULTILINE):
        keys = [tuple(part.strip() for part in row.split(" / ")) for row in rows.split("; ")]
        found[name] = [(file, key) for key in keys]
    return found


def statements(text: str) -> Iterator[str]:
    """Paragraphs, items and lines of tables between the first section and what is not measured."""
    body = text[text.index("\n## ") : text.index(UNPROVEN)]
    body = re.sub(r"\n(?=[-|] ?)", "\n\n", body)
    for block in re.split(r"\n{2,}", body):
        line = " ".join(block.split())
        if line and not line.startswith(("#", "|---", "| case")):
            yield line


def figures(text: str) -> list[tuple[str, str]]:
    """Numbers outside of code and of names, with their units."""
    plain = re.sub(r"`[^`]*`|\]\([^)]*\)|\[\^[\w-]+\]", " ", text)
    return re.findall(r"(?<![\w.,-])(\d+(?:,\d{3})*(?:\.\d+)?)(?!\w|\.\d)(?:\s?(MB|GB|%))?", plain)


def has(row: Row, number: str, unit: str) -> bool:
    """Whether a cell of the row, rounded as the number is, is the number, or a name has it: σ=0.6 O=2."""
    value, digits = float(number.replace(",", "")), len(number.partition(".")[2])
    for cell in row.values():
        try:
            measured = float(cell) * UNITS.get(unit, 1.0)
        except ValueError:
            if number in re.findall(r"=([\d.]+)", cell):
                return True
            continue
        if abs(measured - value) <= 0.5000001 * 10**-digits:
            return True
    return False


def unfounded(text: str) -> list[str]:
    """What the page says without a row behind it, and the notes that nothing is said by."""
    cited, known, wrong = notes(text), tables(), []
    used: set[str] = set()
    for name, rows in cited.items():
        wrong += [f"[^{name}]: no row {file}: {key}" for file, key in rows if key not in known.get(file, {})]
    for statement in statements(text):
        *parts, rest = re.split(r"((?:\[\^[\w-]+\])+)", statement)
        if not parts or figures(rest):
            wrong.append(f"no note: {statement}")
        for said, markers in zip(parts[::2], parts[1::2], strict=True):
            names = re.findall(r"[\w-]+", markers)
            used.update(names)
            keys = [key for name in names for key in cited.get(name, [])]
            rows = [known[file][key] for file, key in keys if key in known.get(file, {})]
            for number, unit in figures(said):
                if not any(has(row, number, unit) for row in rows):
                    wrong.append(f"{number} {unit}".strip() + f" is not in {names}: {said}")
    return wrong + [f"[^{name}]: not used" for name in cited if name not in used]


def test_every_figure_is_in_the_row_that_its_note_names():
    text = PAGE.read_text(encoding="utf-8")
    assert unfounded(text) == []
    assert {file for rows in notes(text).values() for file, _ in rows} == set(COLUMNS)
    assert sum(len(figures(statement)) for statement in statements(text)) > 50


def test_what_is_not_measured_has_no_figures():
    text = PAGE.read_text(encoding="utf-8")
    end = text.index("\n[^")
    assert not figures(text[text.index(UNPROVEN) : end])


@pytest.mark.parametrize(
    ("statement", "complaint"),
    [
        ("By stack 43.7 dB, at worst 36.4.[^1]", None),
        ("By stack 43.73 dB[^1], or 44 if rounded up to whole ones.[^1]", None),
        ("By stack 43.8 dB.[^1]", "43.8 is not in"),
        ("By stack 43.7 dB.", "no note"),
        ("By stack 43.7 dB[^1], 12 full steps.", "no note"),
        ("By stack 43.7 dB.[^2]", "no row"),
        ("Of 43.7 dB nothing is said here.[^3]", "43.7 is not in"),
    ],
)
def test_a_figure_without_its_row_is_found(statement, complaint):
    keys = ("stack / taylor / 0.5 / 5", "stack / taylor / 0.5 / 99", "module / reuse / 0.5 / 3")
    cited = "".join(f"\n[^{number}]: `quality.csv`: {key}" for number, key in enumerate(keys, start=1))
    used = [name for name in "123" if f"[^{name}]" in statement]
    lines = [line for line in cited.splitlines() if line[2:3] in used]
    text = f"# Title\n\n## Section\n\n{statement}\n\n{UNPROVEN}\n\nMuch.\n\n" + "\n".join(lines) + "\n"
    wrong = unfounded(text)
    assert (complaint is None and not wrong) or any(complaint in one for one in wrong), wrong


def test_bytes_are_read_in_their_units():
    row = {"model": "FLUX.1-dev, 1024²", "module bytes": "5737807872", "share": "0.36"}
    assert has(row, "5.74", "GB")
    assert has(row, "5,738", "MB")
    assert has(row, "36", "%")
    assert not has(row, "5.73", "GB")
    assert figures("FLUX.1-dev on an H100 takes 5.74 GB, SD3.5 `9.9` with N=7[^4] in [7](a1.md)") == [
        ("5.74", "GB"), ("7", ""), ("7", ""),
    ]  # fmt: skip
