"""docs/results.md, from the tables: ``python -m benchmarks.peers.page --write docs/results.md``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.judging import NOISE_SEED, PROMPT_SEED, prompts
from benchmarks.common.tables import markdown, shown
from benchmarks.peers import rows
from benchmarks.peers.__main__ import FILES
from benchmarks.peers.method import INTERVALS, WARMUP
from benchmarks.peers.models import MODELS
from benchmarks.peers.rows import Row
from benchmarks.peers.table import METHODS, OURS
from benchmarks.peers.wins import Win, no_more_full_steps, no_slower, wins
from hicache.calibration.reader import load
from hicache.calibration.shipped import NAME
from hicache.demo import MODEL
from hicache.demo.prompts import random_prompts
from hicache.fitting.command import FITTED_SEED

_INTERVAL = 7.0  # at which methods are compared in full

Sections = list[str]


def text(bundled: Sequence[Row], flux: Sequence[Row]) -> str:
    """Return the page of the tables of the bundled model and of FLUX's number of blocks."""
    measured = [row for row in bundled if not row.note]
    sections = [
        *_head(bundled),
        *_where_peers_win(measured, bundled),
        *_by_full_steps(measured),
        *_by_interval(measured),
        *_by_threshold(measured),
        *_costs(measured),
        *_flux([row for row in flux if not row.note]),
        *_left_out(bundled, flux),
        *_missing(bundled, flux),
    ]
    return "\n\n".join(sections) + "\n"


_HEAD = """# Results, side by side

Made of `benchmarks/results/peers.csv` and `benchmarks/results/peers-flux.csv` by
`python -m benchmarks.peers.page --write docs/results.md`; those by `python -m benchmarks.peers`.

The bundled model, {steps} steps, guidance 4 in one batch, the first {warmup} steps full, {pictures} pictures that nothing
was fitted to (`benchmarks/common/judging.py`, seeds {prompt_seed:,} and {noise_seed:,}). dB are PSNR against the full run of
the same prompt and noise: the mean, and the worst picture. A small model on small pictures is a hint, not a proof, for
a large one.

- **Full steps** are those at which every block ran, counted; **blocks** is the share of the weights of the full run's
  blocks that was used: a method that runs a part of them at every step shows it here. With `"module"` the modulations
  of all blocks are computed anew, which are weights too.
- **Bytes** are all tensors held after a step beyond those of an uncached run, for one picture.
- **Operators** are torch's that compute, in a whole skipped step, with its head and the scheduler.
- **Times** are of loops of one picture, against uncached ones in the same process, in turn.
- LPIPS is not measured: its weights are a download of their own.
- **hicache, fitted** is what comes with the bundled model, rows and places of full steps ([calibrating.md](calibrating.md)):
  as many full steps as the interval makes, of which the first alone has to be full; by stack, or by **output**, of which
  a skipped step runs nothing. Both were fitted to {fitted} pictures, none of them judged here; {shared} of their prompts are,
  with other noise. Of the others MagCache is calibrated, where it says so."""  # noqa: E501


def _head(bundled: Sequence[Row]) -> Sections:
    pictures = max((row.pictures for row in bundled), default=0)
    fitted = int(load(MODEL / NAME).settings["prompts"])
    said = _HEAD.format(
        steps=MODELS["bundled"].steps,
        warmup=WARMUP,
        pictures=pictures,
        fitted=fitted,
        shared=len({*prompts(pictures)} & {*random_prompts(fitted, FITTED_SEED)}),
        prompt_seed=PROMPT_SEED,
        noise_seed=NOISE_SEED,
    )
    plots = {"steps": "PSNR over full steps", "seconds": "PSNR over seconds"}
    shown_here = {} if not bundled else plots if _timed(bundled) else {"steps": plots["steps"]}
    drawn = [f"![{what}](../benchmarks/results/peers-{name}.png)" for name, what in shown_here.items()]
    return [said, *drawn]


_WINS = """Each setting of a peer against the best of all of ours that costs no more. Ours have {most:g} full steps at most:
peers with more are compared with those. Of the peers' {wanted} settings {there} have rows so far, and {timed} are timed: by
seconds the others are not compared. Where rows are missing, the last section names them: a peer may win there unseen."""  # noqa: E501


def _where_peers_win(measured: Sequence[Row], bundled: Sequence[Row]) -> Sections:
    """Say first where others are better."""
    questions = (
        ("Mean PSNR, at no more full steps", "psnr_mean", no_more_full_steps, _counted(measured)),
        ("The worst picture, at no more full steps", "psnr_worst", no_more_full_steps, _counted(measured)),
        ("Mean PSNR, no slower", "psnr_mean", no_slower, _timed(measured)),
        ("The worst picture, no slower", "psnr_worst", no_slower, _timed(measured)),
    )
    there = sum(row.package != OURS for row in bundled)
    timed = sum(row.package != OURS for row in _timed(measured))
    most = max((row.full_steps or 0 for row in measured if row.package == OURS), default=0)
    wanted = sum(
        len(MODELS["bundled"].settings(method)) for method in METHODS.values() if method.package != OURS
    )
    sections = [
        "## Where a peer wins",
        _WINS.format(there=there, wanted=wanted, timed=timed, most=most),
    ]
    for title, field, affordable, found in questions:
        sections.append(f"### {title}")
        if not found:
            sections.append("Not measured.")
            continue

        def value(row: Row, field: str = field) -> float | None:
            number: float | None = getattr(row, field)
            return number

        sections.append(_table_of_wins(wins(found, value, affordable)))
    return sections


def _table_of_wins(found: Sequence[Win]) -> str:
    if not found:
        return "Nowhere."
    by_method: dict[str, list[Win]] = {}
    for win in found:
        by_method.setdefault(win.peer.method, []).append(win)
    lines = []
    for method, mine in by_method.items():
        most = max(mine, key=lambda win: win.by)
        lines.append(
            [
                method,
                "some" if most.peer.runs_blocks else "none",
                ", ".join(f"{win.peer.setting:g}" for win in mine),
                f"{_name(most.peer)}: {_decibel(most.peer)}",
                f"{most.ours.method}, {_name(most.ours)}: {_decibel(most.ours)}" if most.ours else "none",
            ]
        )
    return markdown(
        ["peer", "blocks it runs at skipped steps", "ahead at", "the most: mean / worst", "ours there"], lines
    )


def _by_full_steps(measured: Sequence[Row]) -> Sections:
    """The best of each side at the numbers of full steps that our intervals have."""
    lines = []
    rivals = _counted(measured)
    ours = [row for row in rivals if row.package == OURS]
    default = {row.setting: row for row in ours if METHODS[row.method].default}
    fitted = [row for row in ours if METHODS[row.method].fitted]
    for interval, mine in sorted(default.items()):
        assert mine.full_steps is not None
        within = [row for row in rivals if no_more_full_steps(row, mine)]
        sides = (
            [row for row in within if row in fitted],
            [row for row in within if row.package == OURS and row not in fitted],
            [row for row in within if row.package != OURS and not row.runs_blocks],
            [row for row in within if row.package != OURS and row.runs_blocks],
        )
        cells = [_best_of(side) for side in sides]
        lines.append([f"{interval:g}", f"{mine.full_steps:g}", _decibel(mine), *cells])
    if not lines:
        return []
    return [
        "## By full steps",
        "The best of each side with no more full steps than our interval has: mean / worst dB.",
        markdown(
            [
                "N",
                "full steps",
                "our default",
                "fitted to the model",
                "our best fixed basis",
                "best peer that runs no block",
                "that runs some",
            ],
            lines,
        ),
    ]


def _by_interval(measured: Sequence[Row]) -> Sections:
    found = [row for row in measured if row.knob == "interval"]
    lines = []
    for method in dict.fromkeys(row.method for row in found):
        mine = {row.setting: row for row in found if row.method == method}
        lines.append([method, *(_decibel(mine[n]) if n in mine else "" for n in INTERVALS)])
    return [
        "## Methods with an interval",
        "Mean / worst dB by interval N. diffusers' TaylorSeer counts from a later step: one full step more.",
        markdown(["method", *(f"N={n:g}" for n in INTERVALS)], lines),
    ]


def _by_threshold(measured: Sequence[Row]) -> Sections:
    found = [row for row in measured if row.knob == "threshold"]
    return [
        "## Methods with a threshold",
        markdown(
            ["method", "threshold", "full steps", "blocks", "mean / worst dB", "SSIM", "faster by"],
            [
                [
                    row.method,
                    f"{row.setting:g}",
                    shown(row.full_steps, ".1f"),
                    shown(row.blocks_run, ".0%"),
                    _decibel(row),
                    shown(row.ssim_mean, ".4f"),
                    shown(row.speedup, ".2f", "×"),
                ]
                for row in found
            ],
        ),
    ]


def _costs(measured: Sequence[Row]) -> Sections:
    found = [row for row in measured if row.knob == "interval" and row.setting == _INTERVAL]
    return [
        f"## What a skipped step costs, N={_INTERVAL:g}",
        _place(found),
        markdown(_COSTS, [_cost(row) for row in found]),
    ]


def _flux(measured: Sequence[Row]) -> Sections:
    return [
        "## FLUX.1's number of blocks",
        f"19 + 38 blocks two heads wide, random weights, {MODELS['flux'].steps} steps, N=7 or each method's "
        "largest threshold: what a skipped step\ncosts besides its sums. Pictures of random weights are not "
        "compared.",
        *_above_their_bound(measured, MODELS["flux"].steps),
        _place(measured),
        markdown(_COSTS, [_cost(row) for row in measured]),
    ]


def _above_their_bound(measured: Sequence[Row], steps: int) -> Sections:
    """Say how far times can be off: no loop is faster than its full steps allow."""
    over = [
        row.speedup * row.full_steps / steps - 1 for row in _timed(measured) if row.speedup and row.full_steps
    ]
    above = [one for one in over if one > 0]
    if not above:
        return []
    return [
        f"{len(above)} of {len(over)} loops are faster than their full steps allow, one by {max(above):.0%}: "
        "by so much times vary here."
    ]


_COSTS = [
    "method",
    "full steps",
    "blocks",
    "operators",
    "ms",
    "share of a full step",
    "loop faster by",
    "bytes",
]


def _cost(row: Row) -> list[str]:
    share = row.skipped_ms / row.full_ms if row.skipped_ms is not None and row.full_ms else None
    return [
        row.method,
        shown(row.full_steps, ".1f"),
        shown(row.blocks_run, ".0%"),
        shown(row.skipped_operators, ".0f"),
        shown(row.skipped_ms, ".2f"),
        shown(share, ".0%"),
        shown(row.speedup, ".2f", "×"),
        shown(row.cache_bytes, ",d"),
    ]


def _left_out(bundled: Sequence[Row], flux: Sequence[Row]) -> Sections:
    notes = {
        (model, row.method): row.note
        for model, table in (("bundled", bundled), ("flux", flux))
        for row in table
        if row.note
    }
    lines = [[method, model, note] for (model, method), note in notes.items()]
    return ["## What does not apply", markdown(["method", "model", "why"], lines) if lines else "Nothing."]


def _missing(bundled: Sequence[Row], flux: Sequence[Row]) -> Sections:
    """Say which settings have no row: a table is filled as there is time, what matters most first."""
    lines = []
    for model, table in (("bundled", bundled), ("flux", flux)):
        if not table:
            lines.append(["all", model, "all"])
            continue
        known = {row.key for row in table}
        for method in METHODS.values():
            settings = MODELS[model].settings(method)
            missing = [setting for setting in settings if (method.name, setting) not in known]
            if missing:
                listed = ", ".join(f"{setting:g}" for setting in missing)
                what = "all" if len(missing) == len(settings) else f"{method.knob} {listed}"
                lines.append([method.name, model, what])
    table_of = markdown(["method", "model", "settings"], lines) if lines else "Nothing."
    return ["## What is not measured yet", table_of]


def _place(found: Sequence[Row]) -> str:
    """Say where times were taken."""
    places = dict.fromkeys((row.device, row.versions) for row in _timed(found))
    return "\n\n".join(f"{device}; {versions}." for device, versions in places) or "Times are not measured."


def _counted(measured: Sequence[Row]) -> list[Row]:
    return [row for row in measured if row.full_steps is not None and row.psnr_mean is not None]


def _timed(measured: Sequence[Row]) -> list[Row]:
    return [row for row in measured if row.speedup is not None]


def _best_of(side: Sequence[Row]) -> str:
    row = max(side, key=lambda row: row.psnr_mean or 0.0, default=None)
    return "" if row is None else f"{_decibel(row)} ({row.method}, {_name(row)})"


def _name(row: Row) -> str:
    return f"N={row.setting:g}" if row.knob == "interval" else f"{row.knob} {row.setting:g}"


def _decibel(row: Row) -> str:
    return f"{row.psnr_mean:.1f} / {row.psnr_worst:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="file of the page; default: print it")
    options = parser.parse_args()
    page = text(*(list(rows.read(FILES[name]).values()) for name in ("bundled", "flux")))
    if options.write:
        options.write.write_text(page)
    else:
        print(page, end="")


if __name__ == "__main__":
    main()
