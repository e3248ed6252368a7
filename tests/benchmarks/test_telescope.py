"""The study of S0, the sum of what constant gates weigh: added up, or what the other sums leave."""

from __future__ import annotations

import pytest
import torch

from benchmarks import telescope
from tests.support.comparisons import relative_rms


@pytest.fixture(autouse=True)
def _shallow(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(telescope, "DEPTHS", dict.fromkeys(telescope.DEPTHS, 3))


@pytest.mark.parametrize("name", telescope.DEPTHS)
def test_what_the_other_sums_leave_is_what_is_added_up(name: str):
    """Exactly, but for rounding; with a ControlNet or a hook between the blocks it would not be."""
    model, call = telescope.model_of(name, "strong")
    watched = telescope.Watched(model.double())
    arguments = {key: _double(value) for key, value in call(0.5).items()}
    with torch.no_grad(), telescope.double_throughout():
        ran = watched.run(arguments)
        assert torch.equal(watched.head(arguments, ran.left), ran.output)
    added, *shared = ran.features("added")
    for kind in ("left", "left of kept"):
        left, *others = ran.features(kind)
        assert relative_rms(left, added) <= 1e-13
        assert all(map(torch.equal, others, shared))


def test_errors_of_one_model():
    model, call = telescope.model_of("sana", "random")
    forecasts = telescope.Forecasts(model.bfloat16(), call, "near")
    with torch.no_grad():
        forecasts.run()
    rounding = {kind: forecasts.errors["output", kind, "rounding"].value for kind in telescope.SIDES}
    assert 0 < rounding["added"] < min(rounding["left"], rounding["left of kept"]) < 0.1
    assert rounding["reference"] < 0.1
    assert forecasts.errors["hidden", "model", "own"].value == 0


def _double(value: object) -> object:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
