"""What documents and comments refer to exists: sections, files, modules, packages."""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

import hicache
from hicache.runtime.gate_rank import GATE_TOLERANCE

ROOT = Path(hicache.__file__).parent.parent
FOLDERS = ("hicache", "hicache_kernels", "csrc", "benchmarks", "docs", "tests")
SUFFIXES = {".py", ".md", ".h", ".cpp", ".cu", ".cuh"}
DOCUMENTS = [
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "README.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "hicache_kernels" / "README.md",
]
FILES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]


def texts() -> Iterator[tuple[Path, str]]:
    """All that is written by hand."""
    yield ROOT / "README.md", (ROOT / "README.md").read_text()
    for path in FILES:
        if path.name != Path(__file__).name:
            yield path, path.read_text()


def citations(text: str) -> list[tuple[str, str]]:
    """Documents and sections that a text cites, as in: docs/some.md, "Some section"."""
    # a comment or docstring may break the line within the title
    found = re.findall(r'(docs/[\w-]+\.md),\s+(?:#\s+|//\s+)?"([^"]+)"', text)
    return [(document, re.sub(r"\s+(?:#\s+|//\s+)?", " ", section)) for document, section in found]


def sections(document: str) -> set[str]:
    """Headings of a document, and the items of its lists that have a title in bold."""
    text = (ROOT / document).read_text()
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    items = re.findall(r"^(?:\d+\.|-) \*\*(.+?)\*\*", text, re.MULTILINE)
    return {title.rstrip(".") for title in headings + items}


def missing(text: str) -> list[tuple[str, str]]:
    return [cited for cited in citations(text) if cited[1] not in sections(cited[0])]


def test_cited_sections_exist():
    cited = 0
    for path, text in texts():
        assert not missing(text), path
        cited += len(citations(text))
    assert cited >= 10  # else citations are written in another way by now


def test_a_citation_of_a_missing_section_is_found():
    assert not missing('(docs/algorithm.md, "Lazy update")')
    assert not missing('# docs/algorithm.md, "Lazy\n    # update"')
    assert missing('(docs/algorithm.md, "Lazy\n    updates")') == [("docs/algorithm.md", "Lazy updates")]


@pytest.mark.parametrize("name", ["matrix", "compilers", "sanitizers"])
def test_tables_of_installing_are_what_was_run(name):
    with (ROOT / "benchmarks" / "results" / f"{name}.csv").open() as file:
        rows = ["| " + " | ".join(row) + " |" for row in csv.reader(file)]
    lines = (ROOT / "docs" / "installing.md").read_text().splitlines()
    begin = lines.index(rows[0])
    assert lines[begin + 2 : begin + len(rows) + 1] == rows[1:]
    assert not lines[begin + len(rows) + 1]  # nothing below them


def low_rank_results() -> dict[tuple[str, str, int, str], dict[str, str]]:
    """benchmarks/results/low-rank.csv by granularity, rank, interval and dtype of the history."""
    with (ROOT / "benchmarks" / "results" / "low-rank.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {(row["granularity"], row["rank"], int(row["interval"]), row["history"]): row for row in rows}


def low_rank_tables() -> list[str]:
    """The tables of docs/algorithm.md, "Gates of low rank": PSNR by rank, and of histories in bf16."""
    results = low_rank_results()

    def psnr(granularity: str, interval: int, rank: str = "", history: str = "float32") -> str:
        return f"{float(results[granularity, rank, interval, history]['mean PSNR dB']):.1f}"

    lines = ["| N | stack | " + " | ".join(f"R = {rank}" for rank in range(1, 9)) + " | module |"]
    lines.append("|" + "---|" * 11)
    for interval in (3, 5, 7):
        ranks = [
            f"{psnr('low-rank', interval, str(rank))} ({float(row['gate error']):.3f})"
            for rank in range(1, 9)
            for row in [results["low-rank", str(rank), interval, "float32"]]
        ]
        cells = [str(interval), psnr("stack", interval), *ranks, psnr("module", interval)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "| N | stack | the same in bf16 | low-rank | in bf16 | module | in bf16 |",
        "|" + "---|" * 7,
    ]
    for interval in (3, 5, 7):
        cells = [str(interval)]
        for granularity in ("stack", "low-rank", "module"):
            rank = taken_rank(interval) if granularity == "low-rank" else ""
            cells += [psnr(granularity, interval, rank, history) for history in ("float32", "bfloat16")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def taken_rank(interval: int) -> str:
    """The rank that is taken by default."""
    [rank] = [
        r for g, r, n, history in low_rank_results() if (g, n, history) == ("low-rank", interval, "bfloat16")
    ]
    return rank


def test_tables_of_low_rank_are_what_was_measured():
    assert "\n".join(low_rank_tables()) in (ROOT / "docs" / "algorithm.md").read_text()


def test_gates_of_low_rank_lose_no_half_decibel_to_modules():
    results = low_rank_results()
    for interval in (3, 5, 7):
        module = results["module", "", interval, "float32"]
        taken = results["low-rank", taken_rank(interval), interval, "float32"]
        assert float(taken["gate error"]) <= GATE_TOLERANCE
        assert float(taken["mean PSNR dB"]) >= float(module["mean PSNR dB"]) - 0.5
        assert int(taken["history bytes"]) < int(module["history bytes"])
        for granularity, rank in (("stack", ""), ("low-rank", taken_rank(interval)), ("module", "")):
            whole, half = (
                float(results[granularity, rank, interval, history]["mean PSNR dB"])
                for history in ("float32", "bfloat16")
            )
            assert half > whole - 0.1


def super_resolution_tables() -> list[str]:
    """The tables of docs/super-resolution.md: pictures of one call a step, and of four tiles."""
    with (ROOT / "benchmarks" / "results" / "super-resolution.csv").open() as file:
        rows = list(csv.DictReader(file))
    tables = []
    for pictures in ("whole", "tiled"):
        lines = [
            "| | full steps | PSNR to full, mean / worst | SSIM to full | PSNR to truth | SSIM to truth |",
            "|---|---|---|---|---|---|",
        ]
        for row in rows:
            if row["pictures"] == pictures:
                mean, worst = row["PSNR to full, mean"], row["PSNR to full, worst"]
                near = [f"{mean} / {worst}" if mean else "", row["SSIM to full, mean"]]
                true = [row["PSNR to truth, mean"], row["SSIM to truth, mean"]]
                cells = [row["method"].replace("HiCache ", ""), row["full steps"], *near, *true]
                lines.append("| " + " | ".join(cells) + " |")
        tables.append("\n".join(lines))
    return tables


def test_tables_of_super_resolution_are_what_was_measured():
    page = (ROOT / "docs" / "super-resolution.md").read_text()
    assert all(table in page for table in super_resolution_tables())


def extras_table() -> str:
    """The table of docs/companions.md: all of them beside plain HiCache."""
    with (ROOT / "benchmarks" / "results" / "extras.csv").open() as file:
        rows = list(csv.DictReader(file))
    lines = ["| | full steps | PSNR, mean / worst | SSIM | seconds | speed-up |", "|---|---|---|---|---|---|"]
    for row in rows:
        if row["pictures"] == "shapes":
            psnr = f"{row['mean PSNR dB']} / {row['worst PSNR dB']}" if row["mean PSNR dB"] else ""
            cells = [row["method"], row["full steps"], psnr, row["mean SSIM"]]
            lines.append("| " + " | ".join([*cells, row["seconds"], f"{row['speed-up']}x"]) + " |")
    return "\n".join(lines)


def test_table_of_companions_is_what_was_measured():
    assert extras_table() in (ROOT / "docs" / "companions.md").read_text()


def telescope_results() -> list[dict[str, str]]:
    """benchmarks/results/telescope.csv, what it says of outputs."""
    with (ROOT / "benchmarks" / "results" / "telescope.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["of"] == "output"]


def telescope_table() -> str:
    """The table of docs/algorithm.md, "Added up, not left over": means over the models, in bf16."""
    lines = [
        "| steps | weights | model itself | rounding: added | left | reference | own: added | left | "
        "reference | exact: added | left | reference |",
        "|" + "---|" * 12,
    ]
    sides = [
        f"{kind}: {off}" for off in ("rounding", "own", "exact") for kind in ("added", "left", "reference")
    ]
    for steps in ("far", "near"):
        for weights in ("random", "strong", "outliers"):
            rows = [
                row
                for row in telescope_results()
                if (row["steps"], row["weights"], row["dtype"]) == (steps, weights, "bf16")
            ]
            assert len(rows) == 4
            means = [
                f"{statistics.fmean(float(row[column]) for row in rows):.2%}".rstrip("%")
                for column in ("model: exact", *sides)
            ]
            lines.append(f"| {steps} | {weights} | " + " | ".join(means) + " |")
    return "\n".join(lines)


def test_table_of_added_and_left_sums_is_what_was_measured():
    assert telescope_table() in (ROOT / "docs" / "algorithm.md").read_text()


def test_what_is_added_up_is_rounded_less_than_what_is_left_over():
    """In bf16; in fp32 neither is seen."""
    ratios = []
    for row in telescope_results():
        added, left = (float(row[f"{kind}: rounding"]) for kind in ("added", "left"))
        if row["dtype"] == "bf16":
            ratios.append(left / added)
            assert float(row["added: own"]) < 1.01 * float(row["left: own"])
        else:
            assert max(added, left) < 2e-6
    said = f"rounds {min(ratios):.1f} to {max(ratios):.1f} times as much"
    assert said in (ROOT / "docs" / "algorithm.md").read_text()


def broken(document: Path, text: str) -> list[str]:
    """Links, files and modules named in a document that do not exist."""
    links = [target.split("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    found = [target for target in links if target and not (document.parent / target).exists()]
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", text)
    found += [path for path in named if not (ROOT / path).exists()]
    # a file named by the end of its path: `hooks/step_clock.py`, `config.py`
    for name in set(re.findall(r"`((?:\w+/)*\w+\.py)`", text)) - set(named):
        if not any(path.as_posix().endswith(f"/{name}") for path in FILES):
            found.append(name)
    for module in re.findall(r"python -m ((?:hicache|benchmarks)[\w.]*)", text):
        path = ROOT / module.rstrip(".").replace(".", "/")
        if not (path.with_suffix(".py").exists() or (path / "__main__.py").exists()):
            found.append(module)
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_document_names_exists(document: Path):
    assert not broken(document, document.read_text())


def test_a_document_that_names_what_is_gone_is_found():
    text = "`hicache/fast.py`, `demo/train.py`, [here](README.md), python -m hicache.demo.train"
    assert not broken(ROOT / "README.md", text)
    text = "`hicache/gone.py`, `demo/gone.py`, [there](gone.md), python -m hicache.gone"
    assert broken(ROOT / "README.md", text) == ["gone.md", "hicache/gone.py", "demo/gone.py", "hicache.gone"]


def test_the_map_of_the_code_names_every_package():
    """And no single file: one that names some of them is out of date with the next."""
    table = re.search(r"## How it works\n(.*?)\n\n\| backend", (ROOT / "README.md").read_text(), re.DOTALL)
    assert table is not None
    named = set(re.findall(r"^\| `(\w+(?:/\w+)*)/`", table[1], re.MULTILINE))
    packages = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "hicache").glob("*/__init__.py")}
    assert named == packages | {"hicache", "hicache_kernels", "csrc", "benchmarks", "tests"}
    assert ".py" not in table[1]


@pytest.mark.parametrize("name", ["hicache.json", "hicache.output.json"])
def test_the_page_on_calibrating_has_the_scores_of_the_bundled_files(name: str):
    from hicache.calibration.reader import load
    from hicache.demo import MODEL

    page = (ROOT / "docs" / "calibrating.md").read_text(encoding="utf-8")
    for entry in load(MODEL / name).entries:
        prior, fitted = (
            f"{entry.scores[f'{kind} mean dB']:.2f} / {entry.scores[f'{kind} worst dB']:.2f}"
            for kind in ("prior", "fitted")
        )
        places = " ".join(map(str, entry.full_steps))
        assert f"| {len(entry.full_steps)} | {places} | {prior} | {fitted} |" in page


def test_the_table_of_analytic_sigma_is_what_was_measured():
    with (ROOT / "benchmarks" / "results" / "analytic-sigma.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    page = (ROOT / "docs" / "companions.md").read_text(encoding="utf-8")
    assert len(rows) == 5
    for row in rows:
        assert f"| {' | '.join(row)} |" in page
