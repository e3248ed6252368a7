"""Calibrations whose features have rows of their own: the file, both paths, and where they cannot be had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hicache.demo
import hicache.fast
import hicache.reference
from hicache import Fitted, HiCacheConfig
from hicache.adapters import registry
from hicache.adapters.flux import Flux
from hicache.basis import Named
from hicache.calibration.file import Calibration, Entry
from hicache.calibration.matching import model_keys
from hicache.calibration.reader import CalibrationError, load, parse
from hicache.fitting.features import OfModules
from hicache.fitting.pictures import Pictures
from hicache.fitting.replay import Replay
from hicache.fitting.rows import ByRows, Layout
from hicache.fitting.trajectory import plain
from hicache.pipeline import find_denoisers
from tests.support import models, pipelines, runs

STEPS = 12
CONFIG = HiCacheConfig(interval=4, order=2, warmup=3)
PRIOR = Named("hermite", 0.5)
DEMO = 8  # features of the bundled model


def moved(features: int, steps: int = STEPS, contexts: int = 2) -> Entry:
    """Rows of the prior, each feature's and each context's changed by another number."""
    layout = Layout.of(CONFIG, steps, features)
    draw = torch.Generator().manual_seed(features)
    rows = {
        f"transformer[{context}]": {
            step: layout.row(PRIOR, step)
            + 0.05 * torch.randn(at.num_coeffs, features, generator=draw, dtype=torch.float64)
            for step, at in layout.positions.items()
        }
        for context in range(contexts)
    }
    return Entry(steps, CONFIG.order, CONFIG.warmup, layout.full_steps, plain(rows))


def file_of(entry: Entry, pipe: Any = None, granularity: str | None = "module") -> Calibration:
    keys = {} if pipe is None else model_keys(find_denoisers(pipe))
    return Calibration(keys, None, PRIOR, (entry,), granularity=granularity)


def fitted(calibration: Calibration) -> HiCacheConfig:
    return HiCacheConfig(interval=4, order=2, warmup=3, basis=Fitted(calibration))


def count_of(model: nn.Module) -> int:
    adapter = registry.find(model)
    assert adapter is not None
    return adapter.num_features({})


# The file.


def test_a_file_is_read_as_it_was_written(tmp_path: Path):
    written = file_of(moved(3))
    written.save(tmp_path / "rows.json")
    read = load(tmp_path / "rows.json")
    assert read.entries == written.entries
    assert read.entries[0].rows == written.entries[0].rows
    assert (read.by_feature, read.entries[0].features) == (True, 3)
    config = HiCacheConfig.load(tmp_path / "rows.json")
    assert config.by_feature
    assert HiCacheConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows["3"].append([1.0]), "rows of 3 features as those before"),
        (lambda rows: rows["4"][0].pop(), "rows of 3 features as those before"),
        (lambda rows: rows.update({"4": [0.5]}), "rows of 3 features as those before"),
        (lambda rows: rows.update({"3": [0.5]}), "rows of no features as those before"),
        (lambda rows: rows["3"][0].append("x"), "a list of finite numbers"),
        (lambda rows: rows["3"].append(1.0), "a list of finite numbers"),
    ],
)
def test_a_damaged_row_is_an_error_that_names_the_line(change: Any, message: str):
    data = json.loads(file_of(moved(3)).text())
    rows = data["entries"][0]["rows"]["transformer[0]"]
    rows["3"] = rows["3"][:2]
    change(rows)
    with pytest.raises(CalibrationError, match=rf"rows\.json: line \d+: expected {message}"):
        parse("rows.json", json.dumps(data, indent=1))


@pytest.mark.parametrize("granularity", [None, "stack"])
def test_rows_by_feature_are_of_modules(granularity: str | None):
    text = file_of(moved(3), granularity=granularity).text()
    line = text[: text.index('"granularity"')].count("\n") + 1
    with pytest.raises(CalibrationError, match=f"line {line}: expected 'module', as features have rows"):
        parse("rows.json", text)


# Both paths.


@pytest.mark.few(3)
@pytest.mark.parametrize("name", pipelines.BY_LAYER)
def test_the_fast_path_equals_the_reference(name: str):
    model, run = runs.recorded_in(name, torch.float64)
    scheduler = runs.CountingScheduler()
    drawn = {}
    for rows in (moved(count_of(model), len(run)), None):
        config = CONFIG if rows is None else fitted(file_of(rows))
        for path in (hicache.reference, hicache.fast):
            with path.apply(model, config, scheduler=scheduler) as handle:
                drawn[path, rows is None] = runs.replay(model, run, scheduler)
                assert handle.stats.skipped_steps > 0
        expected, found = drawn[hicache.reference, rows is None], drawn[hicache.fast, rows is None]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert handle.stats.config == CONFIG
    far = [(a - b).abs().max() for a, b in zip(drawn[hicache.fast, False], found, strict=True)]
    assert max(far) > 1e-6, "the rows count"


def test_other_features_than_they_were_fitted_to_have_the_prior_s_row():
    pipe, arguments = pipelines.build_randomized("flux")
    with hicache.fast.apply(pipe, CONFIG, granularity="module"):
        prior = pipelines.draw(pipe, arguments, STEPS)
    config = fitted(file_of(moved(count_of(pipe.transformer) + 1)))
    with pytest.warns(RuntimeWarning, match=r"it has rows for \d features, not \d"):
        with hicache.fast.apply(pipe, config):
            drawn = pipelines.draw(pipe, arguments, STEPS)
    assert (drawn - prior).abs().max() <= 1e-5


def test_a_run_that_it_does_not_hold_for_takes_the_prior_and_warns_once():
    pipe, arguments = pipelines.build_randomized("flux")
    with hicache.fast.apply(pipe, CONFIG, granularity="module"):
        prior = pipelines.draw(pipe, arguments, STEPS + 1)
    with pytest.warns(RuntimeWarning, match="it is for 12 steps, not 13") as warned:
        with hicache.fast.apply(pipe, fitted(file_of(moved(count_of(pipe.transformer))))) as handle:
            drawn = pipelines.draw(pipe, arguments, STEPS + 1)
            pipelines.draw(pipe, arguments, STEPS + 1)
            assert not handle.stats.config.by_feature
    assert len([one for one in warned if "hicache" in str(one.message)]) == 1
    assert torch.equal(drawn, prior)


def test_a_stack_has_one_feature():
    pipe, _ = pipelines.build("flux")
    before = dict(pipe.transformer.__dict__)
    config = fitted(file_of(moved(4)))
    with pytest.raises(ValueError, match="granularity='stack': the residual of all layers is one feature"):
        hicache.fast.apply(pipe, config, granularity="stack")
    assert pipe.transformer.__dict__.keys() == before.keys()


def test_beside_the_model_it_is_used_by_module_and_for_its_classes_alone(tmp_path: Path):
    from hicache.demo.pipeline import ShapesPipeline

    hicache.demo.load().save_pretrained(tmp_path)
    pipe = ShapesPipeline.from_pretrained(tmp_path, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)

    def stats(**settings: Any) -> hicache.fast.Stats:
        with hicache.fast.apply(pipe, **settings) as handle:
            pipe("a red ring on blue", STEPS, output_type="latent")
            return handle.stats

    calibration = file_of(moved(DEMO, contexts=1), pipe)
    calibration.save(tmp_path / "hicache.json")
    for granularity in ("auto", "module"):
        found = stats(granularity=granularity)
        assert (found.granularity, isinstance(found.config.basis, Fitted)) == ("module", True)
    for granularity in ("stack", "low-rank", "output"):
        assert stats(granularity=granularity).config == HiCacheConfig()
    text = calibration.text()
    (tmp_path / "hicache.json").write_text(text.replace("FluxTransformer2DModel", "OtherModel"))
    assert stats(granularity="stack").granularity == "stack"
    assert stats().config == HiCacheConfig()


# Fitting.


def test_a_replay_by_feature_is_the_fast_path():
    pipe = hicache.demo.load()
    pipe.set_progress_bar_config(disable=True)
    entry = moved(DEMO, contexts=1)
    rows = {step: torch.tensor(row).double() for step, row in entry.rows["transformer[0]"].items()}
    pictures = Pictures(("a red ring on blue",), (3,), {"num_inference_steps": STEPS}, 1)
    with Replay(pipe, "module") as replay:
        assert replay.features == DEMO
        rule = ByRows(Layout.of(CONFIG, STEPS, DEMO), lambda context, step: rows[step])
        replayed = replay.run(rule, pictures.arguments([0], "latent")).output[0]
    with hicache.fast.apply(pipe, fitted(file_of(entry, pipe))):
        drawn = pipe(**pictures.arguments([0], "latent"))[0]
    assert (drawn - replayed).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["wan", "pixart"])
def test_models_whose_layers_share_features_cannot_be_fitted_by_module(name: str):
    with pytest.raises(ValueError, match="share their gates"):
        OfModules(models.build(name)[0])


def test_models_whose_modules_are_not_known_cannot_be_fitted_by_module():
    pipe = hicache.demo.load()
    pipe.transformer.__class__ = type("Unknown", (nn.Module,), {})
    with pytest.raises(ValueError, match="the modules of Unknown are not known; use 'stack'"):
        OfModules(pipe.transformer)


def doubled(gates: Any) -> Any:
    return lambda self, block_kwargs, base: 2 * gates(self, block_kwargs, base)


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("refusal", lambda *_: "of no reason", "FluxTransformer2DModel cannot be fitted: of no reason"),
        ("token_timesteps", lambda *_: torch.ones(1, 4), "tokens have timesteps of their own"),
        ("between", lambda *_: [torch.ones(1)], "a ControlNet adds to the hidden state"),
        ("num_features", lambda self, kwargs: DEMO + bool(kwargs), "an adapter adds to the hidden state"),
        ("gates", doubled(Flux.gates), r"does not add gate · feature of its modules alone"),
    ],
)
def test_calls_with_other_features_cannot_be_fitted_by_module(
    method: str, given: Any, message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Flux, method, given)
    pipe = hicache.demo.load()
    pipe.set_progress_bar_config(disable=True)
    before = sum(len(module._forward_hooks) for module in pipe.transformer.modules())
    with pytest.raises(ValueError, match=message):
        hicache.calibrate(pipe, ["a red ring on blue"], num_inference_steps=8, granularity="module")
    assert sum(len(module._forward_hooks) for module in pipe.transformer.modules()) == before


def test_a_granularity_that_cannot_be_fitted():
    with pytest.raises(
        ValueError, match="unknown granularity 'low-rank'; expected one of stack, module, output"
    ):
        hicache.calibrate(hicache.demo.load(), ["a red ring on blue"], granularity="low-rank")
