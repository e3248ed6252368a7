"""Plots as SVG in the colours of the page: they say ``var(--…)``, light and dark come by CSS."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any, Final

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hicache.compare.metrics import Metric
from hicache.compare.run import Comparison, Measured

#: Draws on a figure, and returns what is read aloud in its place.
Draw = Callable[[Figure, Comparison], str]
#: Colours of the page, and what stands for them while matplotlib draws, which knows no variables.
INK, GRID, SURFACE, FULL = "#b00001", "#b00002", "#b00003", "#b00004"
SERIES: Final = tuple(f"#a0000{number}" for number in range(1, 9))
VARIABLES: Final = {
    INK: "--soft",
    GRID: "--line",
    SURFACE: "--surface",
    FULL: "--ink",
    **{colour: f"--series-{number}" for number, colour in enumerate(SERIES, 1)},
}
DASHES: Final = ("-", "--", ":", "-.")
MARKERS: Final = "osD^vPXd"
STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",  # text stays text: it is read aloud, and as small as text is
    "font.size": 10,
    "axes.facecolor": "none",
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
}


@dataclass(frozen=True)
class Plot:
    """One picture of numbers.

    Args:
        title: above it.
        svg: an element, with no address of anything elsewhere in it.
    """

    title: str
    svg: str


def plots(comparison: Comparison) -> list[Plot]:
    """Quality over full steps and over seconds for every metric, speed-up, and the error per step."""
    drawn: dict[str, Draw] = {}
    for metric in comparison.metrics:
        drawn[f"{metric.name} over full steps"] = partial(_quality, metric, "full steps")
        drawn[f"{metric.name} over seconds"] = partial(_quality, metric, "seconds a picture")
    first = dict(list(drawn.items())[:2])
    first["Speed-up over full steps"] = _speed
    if any(one.errors for one in comparison.variants):
        first["Error of latents, step by step"] = _errors
    return [_plot(title, comparison, draw) for title, draw in {**first, **drawn}.items()]


def mode_colours(comparison: Comparison) -> dict[str, str]:
    """Colour of each mode, in the order they were asked for; they come again after eight."""
    modes = dict.fromkeys(one.variant.mode for one in comparison.variants if one.variant is not None)
    return {mode: SERIES[at % len(SERIES)] for at, mode in enumerate(modes)}


def variable(colour: str) -> str:
    """What CSS calls a colour of ours."""
    return VARIABLES[colour]


def _lines(comparison: Comparison) -> Iterator[tuple[str, str, str, list[Measured]]]:
    """Mode, colour, marker and variants of it."""
    for marker, (mode, colour) in zip(MARKERS * 9, mode_colours(comparison).items(), strict=False):
        mine = [one for one in comparison.variants if one.variant is not None and one.variant.mode == mode]
        yield mode, colour, marker, mine


def _quality(metric: Metric, label: str, figure: Figure, comparison: Comparison) -> str:
    panel = figure.subplots()
    said = []
    for mode, colour, marker, mine in _lines(comparison):
        costs = [
            one.full_steps if label == "full steps" else one.least_seconds / len(comparison.asked)
            for one in mine
        ]
        means = [one.mean(metric.key) for one in mine]
        points = sorted(point for point in zip(costs, means, strict=True) if math.isfinite(point[1]))
        panel.plot([x for x, _ in points], [y for _, y in points], color=colour, marker=marker, label=mode)
        said.append(f"{mode}: " + ", ".join(f"{metric.text(y)} at {x:.3g}" for x, y in points))
    if not metric.compares:
        own = comparison.full.mean(metric.key)
        panel.axhline(own, color=FULL, linestyle="--", linewidth=1.2, label="full run")
        said.append(f"full run: {metric.text(own)}")
    _label(panel, label, f"{metric.name}, mean{', ' if metric.unit else ''}{metric.unit}")
    return f"Mean {metric.name} over {label}. " + "; ".join(said)


def _speed(figure: Figure, comparison: Comparison) -> str:
    panel = figure.subplots()
    said = []
    for mode, colour, marker, mine in _lines(comparison):
        points = sorted((one.full_steps, comparison.speedup(one)) for one in mine)
        panel.plot([x for x, _ in points], [y for _, y in points], color=colour, marker=marker, label=mode)
        said.append(f"{mode}: " + ", ".join(f"{y:.2f} times at {x}" for x, y in points))
    bounds = sorted({(one.full_steps, one.bound) for one in comparison.variants})
    panel.plot(
        [x for x, _ in bounds],
        [y for _, y in bounds],
        color=FULL,
        linestyle="--",
        linewidth=1.2,
        label="bound",
        zorder=0,
    )
    _label(panel, "full steps", "times as fast as the full run")
    return "Speed-up over full steps. " + "; ".join(said)


def _errors(figure: Figure, comparison: Comparison) -> str:
    panel = figure.subplots()
    said = []
    for mode, colour, _, mine in _lines(comparison):
        for dash, one in zip(DASHES * 9, mine, strict=False):
            steps = [step for step, error in enumerate(one.errors) if error]  # equal ones have no logarithm
            panel.plot(
                steps, [one.errors[step] for step in steps], color=colour, linestyle=dash, linewidth=1.4
            )
            assert one.variant is not None
            said.append(f"{one.name}: {one.errors[-1]:.3g} after the last step")
        panel.plot([], [], color=colour, label=mode)
    intervals = dict.fromkeys(one.variant.config.interval for one in comparison.variants if one.variant)
    for dash, interval in zip(DASHES * 9, intervals, strict=False):
        panel.plot([], [], color=INK, linestyle=dash, linewidth=1.4, label=f"N={interval}")
    panel.set_yscale("log")
    _label(panel, "step", "relative to the full run's")
    return "Relative error of latents against the full run. " + "; ".join(said)


def _label(panel: Any, across: str, up: str) -> None:
    panel.set(xlabel=across, ylabel=up)
    panel.tick_params(which="both", length=0)
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=across != "seconds a picture"))
    panel.figure.legend(*panel.get_legend_handles_labels(), loc="outside upper left", ncols=4)


def _plot(title: str, comparison: Comparison, draw: Draw) -> Plot:
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(4.7, 3.3), layout="constrained")
        said = draw(figure, comparison)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator")))
    return Plot(title, _inline(stream.getvalue(), title, said))


def _inline(text: str, title: str, said: str) -> str:
    """The element alone: with names that no other plot has, the page's colours, and what is read aloud."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    prefix = re.sub(r"\W+", "-", title.lower())
    text = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    for colour, name in VARIABLES.items():
        text = text.replace(colour, f"var({name})")
    text = re.sub(r'(<svg)[^>]*?( viewBox="[^"]*")[^>]*>', r"\1\2 role=" + '"img">', text, count=1)
    return text.replace('role="img">', f'role="img" aria-label="{escape(said)}">', 1)
