"""All situations, in the page's order."""

from __future__ import annotations

from typing import Final

from tests.compatibility.registry import Row
from tests.compatibility.situations import (
    breaks,
    guidance,
    handles,
    modes,
    offloading,
    refusals,
    requests,
    schedulers,
    sharing,
    weights,
)

THEMES: Final = (
    handles.THEME,
    requests.THEME,
    guidance.THEME,
    schedulers.THEME,
    weights.LORA,
    weights.THEME,
    offloading.THEME,
    sharing.THEME,
    breaks.THEME,
    modes.THEME,
    refusals.THEME,
)


def rows() -> list[Row]:
    """Every situation with each of its models."""
    return [
        Row(situation, model)
        for theme in THEMES
        for situation in theme.situations
        for model in situation.models
    ]
