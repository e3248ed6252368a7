"""One HTML page that needs nothing beside it, and the JSON of its numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hicache.compare.metrics import METRICS, Metric
from hicache.compare.origin import Origin
from hicache.compare.plots import mode_colours, plots, variable
from hicache.compare.run import Comparison, Measured

TEMPLATES: Final = Path(__file__).parent / "templates"


def page(comparison: Comparison, origin: Origin) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        comparison=comparison,
        origin=origin,
        rows=[_row(comparison, one) for one in (comparison.full, *comparison.variants)],
        groups=_groups(comparison),
        cards=[_card(comparison, index) for index in comparison.worst_first()],
        orders=[("any variant", comparison.worst_first())]
        + [(one.name, comparison.worst_first(one)) for one in comparison.variants],
        plots=plots(comparison),
        lossy=comparison.full.pictures[0].startswith("data:image/webp"),
    )


def numbers(comparison: Comparison, origin: Origin) -> str:
    """The JSON: a null among scores is infinite, of a picture that equals the full run's."""
    asked = comparison.asked
    found = {
        "model": origin.model,
        "command": origin.command,
        "settings": dict(origin.settings),
        "versions": dict(origin.versions),
        "metrics": {
            metric.key: {"name": metric.name, "unit": metric.unit, "higher_is_better": metric.higher}
            for metric in comparison.metrics
        },
        "not_measured": dict(origin.missing),
        "pictures": [
            {"prompt": prompt, "seed": seed} for prompt, seed in zip(asked.prompts, asked.seeds, strict=True)
        ],
        "worst_first": comparison.worst_first(),
        "full": _plain(comparison, comparison.full),
        "variants": [_plain(comparison, one) for one in comparison.variants],
    }
    return json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(comparison: Comparison, measured: Measured) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": measured.name,
        "full_steps": measured.full_steps,
        "skipped_steps": measured.skipped_steps,
        "bound": measured.bound,
        "seconds": measured.least_seconds,
        "seconds_of_rounds": measured.seconds,
        "speedup": comparison.speedup(measured),
        "history_bytes": measured.history_bytes,
        "scores": {
            key: [value if math.isfinite(value) else None for value in values]
            for key, values in measured.scores.items()
        },
    }
    if measured.variant is not None:
        config = measured.variant.config
        found["mode"], found["interval"] = measured.variant.mode, config.interval
        found["places"], found["error_per_step"] = list(measured.places), list(measured.errors)
        found["config"] = json.loads(config.to_json())
    return found


def _row(comparison: Comparison, measured: Measured) -> dict[str, Any]:
    """A line of the table."""
    scores = [
        (metric.text(measured.mean(metric.key)), metric.text(metric.worst(measured.scores[metric.key])))
        if metric.key in measured.scores
        else None
        for metric in comparison.metrics
    ]
    return {
        "measured": measured,
        "colour": _colour(comparison, measured),
        "speedup": f"{comparison.speedup(measured):.2f}×",
        "bound": f"{measured.bound:.2f}×",
        "seconds": f"{measured.least_seconds / len(comparison.asked):.3f}",
        "scores": scores,
        "best": _best(comparison, measured),
    }


def _best(comparison: Comparison, measured: Measured) -> bool:
    """Whether none with as few full steps is closer to the full run."""
    if measured.variant is None:
        return False
    return not any(
        other.full_steps <= measured.full_steps and other.mean("psnr") > measured.mean("psnr")
        for other in comparison.variants
    )


def _colour(comparison: Comparison, measured: Measured) -> str | None:
    if measured.variant is None:
        return None
    return variable(mode_colours(comparison)[measured.variant.mode])


def _groups(comparison: Comparison) -> list[tuple[str, str, list[Measured]]]:
    """Mode, its colour, and its variants."""
    return [
        (
            mode,
            variable(colour),
            [one for one in comparison.variants if one.variant is not None and one.variant.mode == mode],
        )
        for mode, colour in mode_colours(comparison).items()
    ]


def _card(comparison: Comparison, index: int) -> dict[str, Any]:
    """What is shown of one picture."""
    lowest = min(comparison.variants, key=lambda one: one.scores["psnr"][index])
    return {
        "index": index,
        "prompt": comparison.asked.prompts[index],
        "seed": comparison.asked.seeds[index],
        "lowest": f"{PSNR.text(lowest.scores['psnr'][index])}, {lowest.name}",
        "lowest_name": lowest.name,
        "psnr": {one.name: PSNR.text(one.scores["psnr"][index]) for one in comparison.variants},
        "notes": {one.name: _note(comparison.metrics, one, index) for one in comparison.variants},
    }


def _note(metrics: Sequence[Metric], measured: Measured, index: int) -> str:
    """All numbers of one picture, under it where it is large."""
    return ", ".join(f"{metric.name} {metric.text(measured.scores[metric.key][index])}" for metric in metrics)


#: By which pictures are sorted.
PSNR: Final = METRICS[0]
