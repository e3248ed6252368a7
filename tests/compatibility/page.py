"""The page: what each outcome means, and every row."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

import diffusers
import torch

from benchmarks.common.tables import markdown
from tests.compatibility.checks import Outcome
from tests.compatibility.registry import Row
from tests.compatibility.situations import THEMES
from tests.compatibility.subjects import MODELS

COMMAND: Final = "python -m tests.compatibility --write docs/compatibility.md"
_LEGEND: Final = {
    "*same as a fresh run*": (
        "bit by bit what a pipeline draws that was made, changed in the same way and only then cached; "
        "as many steps are skipped, and nothing is warned of. What comes after the comma is what that fresh "
        "run was held to"
    ),
    "*within … of the reference*": (
        "that far at most (relative root mean square) from `hicache.reference`, the paper's algorithm with "
        "every block called: 2e-5 in float32, 0.01 in float16 and 0.05 in bfloat16, whose own rounding is so "
        "large in models this small"
    ),
    "*uncached bits at interval 1*": (
        "the reference does not know the model's modules: with every step full the cache changes no bit, and "
        "with steps skipped it draws something else than the uncached run"
    ),
    "*uncached bits*": "what is drawn is what is drawn without a cache; where it *warns*, that is said",
    "*as if never cached*": "no class, attribute, hook or key is left, and the picture is the uncached one",
    "*refused: …*": "an error with this message; a cached pipeline draws on as before",
}
PAGE: Final = """\
# What works with what

Does the cache work with my LoRA, on Qwen-Image, under group offload? Every row here is one situation with one
model, and says what came of it. Nothing is assumed: each was run, and a test holds the page to what it finds.

How a row is made: a small model of the family, of diffusers' own classes and with random weights that make
every part count, draws on a CPU, in {steps} steps of which every third is full after a warm-up of three. What
is compared is the whole picture, as latents; of DiT and of loops, all that the transformer says.

{legend}

*Cached by* is what `granularity="auto"`, the default, took: each module's output before its gate, or the
residual of the stack of blocks. "Own loop" is a transformer without a pipeline. What depends on a card is not
in here: CUDA graphs are in [compile-and-graphs.md](compile-and-graphs.md).

{versions} `constraints.txt` pins them. Made by `{command}`;
`--jobs 2` makes it in two processes, `--only lora` prints the rows whose name has that in it.
{count}

{sections}
"""


def page(outcomes: Mapping[str, Outcome], steps: int) -> str:
    """Write the page.

    Args:
        outcomes: of every row, by its key.
        steps: of a run.
    """
    return PAGE.format(
        steps=steps,
        legend=markdown(["outcome", "means"], list(_LEGEND.items())),
        versions=versions(),
        command=COMMAND,
        count=count(outcomes),
        sections="\n\n".join(_sections(outcomes)),
    )


def versions() -> str:
    """What it was made with."""
    torch_version = torch.__version__.split("+")[0]
    return f"Made with torch {torch_version} and diffusers {diffusers.__version__}."


def count(outcomes: Mapping[str, Outcome]) -> str:
    """How many rows there are, and how many are refusals."""
    refusals = sum(found.text.startswith("refused") for found in outcomes.values())
    situations = sum(len(theme.situations) for theme in THEMES)
    return f"{len(outcomes)} rows, {situations} situations; {refusals} rows are refusals."


def _sections(outcomes: Mapping[str, Outcome]) -> Iterator[str]:
    for theme in THEMES:
        what = "\n".join(f"- **{situation.name}.** {situation.what}" for situation in theme.situations)
        lines = [
            (situation.name, MODELS[model].title, found.text, found.cached_by)
            for situation in theme.situations
            for model in situation.models
            for found in [outcomes[Row(situation, model).key]]
        ]
        table = markdown(["situation", "model", "outcome", "cached by"], lines)
        yield f"## {theme.title}\n\n{what}\n\n{table}"


def read(text: str) -> dict[tuple[str, str], Outcome]:
    """The outcomes of a page, by the names of situations and the titles of models."""
    begin = text.index("\n## ")
    found: dict[tuple[str, str], Outcome] = {}
    for line in re.findall(r"^\| (.+) \|$", text[begin:], re.MULTILINE):
        cells = line.split(" | ")
        if cells[0] != "situation":
            situation, title, outcome, cached_by = cells
            assert (situation, title) not in found, f"twice: {situation}, {title}"
            found[situation, title] = Outcome(outcome, cached_by)
    return found
