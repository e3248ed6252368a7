"""Calibrations: the file and what is wrong with one, the runs it holds for, fits that are exact, refusals."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import hicache
import hicache.demo
import hicache.fast
import hicache.reference
from hicache import Fitted, FittedSteps, HiCacheConfig, Steps, full_steps
from hicache.basis import Named
from hicache.calibration.file import Calibration, Entry
from hicache.calibration.matching import guidance_of, model_keys
from hicache.calibration.reader import CalibrationError, load, parse
from hicache.demo.prompts import random_prompts
from hicache.fitting import CalibrationRefused
from hicache.fitting.closed_form import Grams
from hicache.fitting.judge import Verdict
from hicache.fitting.replay import Replay
from hicache.fitting.rows import ByRows, InFull, Layout
from hicache.fitting.trajectory import Search
from hicache.model_key import ModelKey
from hicache.pipeline import find_denoisers
from tests.support import pipelines

STEPS = 10
CONFIG = HiCacheConfig(interval=3)
PRIOR = Named("hermite", 0.5)


def entry_of(config: HiCacheConfig = CONFIG, change: float = 0.0, **more: Any) -> Entry:
    """Rows of the prior, changed a little, for the skipped steps of a tiny run."""
    layout = Layout.of(config, STEPS)
    rows = {step: tuple((layout.row(PRIOR, step) + change).tolist()) for step in layout.positions}
    return Entry(STEPS, config.order, config.warmup, layout.full_steps, {"transformer[0]": rows}, **more)


def file_of(pipe: Any, *entries: Entry, **more: Any) -> Calibration:
    return Calibration(model_keys(find_denoisers(pipe)), None, PRIOR, entries, **more)


# The file.


def test_a_file_is_read_as_it_was_written(tmp_path: Path):
    pipe, _ = pipelines.build("flux")
    scores = {"fitted mean dB": 40.0}
    written = file_of(pipe, entry_of(sigmas=(1.0, 0.5)), entry_of(HiCacheConfig(interval=4), scores=scores))
    written.save(tmp_path / "rows.json")
    read = load(tmp_path / "rows.json")
    assert dataclasses.replace(read, source=written.source) == written
    assert not list(tmp_path.glob("*.partial"))
    # a row a line, so that a change can be read in a diff
    assert re.search(r'^ +"3": \[[-\d., e]+\],?$', written.text(), re.M)
    config = HiCacheConfig.load(tmp_path / "rows.json")
    assert config.basis == Fitted(read)
    assert config.schedule == FittedSteps(read)
    for given in (config, HiCacheConfig(basis=str(tmp_path / "rows.json"))):
        assert HiCacheConfig.from_json(given.to_json()) == given


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"order": 2', '"order": "two"', r"line {line}: expected order to be an int, got 'two'"),
        ('"full_steps": [0, 1', '"full_steps": [1, 0', r"line {line}: expected rising steps from 0 to 9"),
        ('"rows": {', '"rows": 3, "old": {', r"line {line}: expected rows to be an object, got 3"),
        ('"4": [', '"4": ["x", ', r"line {line}: expected"),
        ('"4": [', '"4": [NaN, ', r"line {line}: expected"),
        ('"4": [', '"2": [', r"line {line}: expected a skipped step below 10 for a key, got '2'"),
        ('"kind": "Named"', '"kind": "Nomad"', r"line \d+: prior: expected a kind of"),
        ('"version": 1', '"version": 9', r"line {line}: expected version 1, got 9"),
        ('"models": {', '"modells": {', r"line 1: expected models to be an object"),
        ('"format": "hicache calibration"', '"format": "x"', r"line 1: expected a file of format"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_the_line(old: str, new: str, message: str, tmp_path: Path):
    pipe, _ = pipelines.build("flux")
    text = file_of(pipe, entry_of()).text()
    assert old in text
    line = text[: text.index(old)].count("\n") + 1
    (tmp_path / "rows.json").write_text(text.replace(old, new, 1))
    with pytest.raises(CalibrationError, match="rows.json: " + message.replace("{line}", str(line))):
        HiCacheConfig(basis=str(tmp_path / "rows.json"))


def test_every_truncated_file_is_an_error_that_names_a_line():
    pipe, _ = pipelines.build("flux")
    text = file_of(pipe, entry_of()).text().rstrip()
    for length in range(0, len(text) - 1, 7):
        with pytest.raises(CalibrationError, match=r"rows.json: line \d+"):
            parse("rows.json", text[:length])


def test_every_value_of_another_kind_is_an_error_or_is_free():
    """Whatever is replaced, reading does not fail in another way."""
    pipe, _ = pipelines.build("flux")
    data = json.loads(file_of(pipe, entry_of()).text())

    def places(value: Any, path: tuple[Any, ...] = ()):
        yield path
        items = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        for key, part in items:
            yield from places(part, (*path, key))

    for path in list(places(data))[1:]:
        for wrong in (None, "x", -1, [], {}, [None], True):
            changed = json.loads(json.dumps(data))
            holder = changed
            for key in path[:-1]:
                holder = holder[key]
            holder[path[-1]] = wrong
            with contextlib.suppress(CalibrationError):  # and no other error
                parse("rows.json", json.dumps(changed))


# Runs that it holds for, and others.


def test_settings_with_a_calibration_have_a_hash():
    """Equal ones the same: a set of configs holds each once."""
    pipe, _ = pipelines.build("flux")
    configs = [
        HiCacheConfig(
            basis=Fitted(file_of(pipe, entry_of())), schedule=FittedSteps(file_of(pipe, entry_of()))
        )
        for _ in range(2)
    ]
    others = [HiCacheConfig(basis=Fitted(file_of(pipe, entry_of(change=0.05))))]
    assert configs[0] is not configs[1]
    assert len({*configs, *others}) == 2


def test_rows_are_used_in_the_run_they_were_fitted_to():
    pipe, arguments = pipelines.build("flux")
    sigmas = Replay(pipe)
    with Replay(pipe) as replay:
        replay.run(InFull(), {**arguments, "num_inference_steps": STEPS, "output_type": "latent"})
        sigmas = replay.sigmas
    exact, changed = entry_of(sigmas=sigmas), entry_of(change=0.05, sigmas=sigmas)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = {}
        for name, basis in {
            "prior": "hermite",
            "same": Fitted(file_of(pipe, exact)),
            "changed": Fitted(file_of(pipe, changed)),
        }.items():
            with hicache.fast.apply(pipe, HiCacheConfig(interval=3, basis=basis)) as handle:
                drawn[name] = pipelines.draw(pipe, arguments, STEPS)
                assert handle.stats.config.fallbacks == []
    assert torch.equal(drawn["same"], drawn["prior"])
    assert not torch.equal(drawn["changed"], drawn["prior"])


@pytest.mark.parametrize(
    ("why", "change"),
    [
        ("it is for 11 steps, not 10", {"num_steps": 11}),
        ("other noise levels", {"sigmas": (0.5,) * STEPS}),
        ("no rows for these 5 full steps", {"full_steps": (0, 1, 2, 6)}),
        ("order=1, not 2", {"order": 1}),
        ("warmup=2, not 3", {"warmup": 2}),
    ],
)
def test_a_run_that_it_does_not_hold_for_takes_the_prior_and_warns_once(why: str, change: dict[str, Any]):
    pipe, arguments = pipelines.build("flux")
    with hicache.fast.apply(pipe, CONFIG):
        prior = pipelines.draw(pipe, arguments, STEPS)
    other = Fitted(file_of(pipe, dataclasses.replace(entry_of(change=0.05), **change)))
    with hicache.fast.apply(pipe, HiCacheConfig(interval=3, basis=other)):
        with pytest.warns(RuntimeWarning, match=why) as caught:
            assert torch.equal(pipelines.draw(pipe, arguments, STEPS), prior)
            assert torch.equal(pipelines.draw(pipe, arguments, STEPS), prior)
    assert len(caught) == 1


def test_another_model_takes_the_prior():
    pipe, arguments = pipelines.build("flux")
    calibration = file_of(pipe, entry_of(change=0.05))
    for weight in pipe.transformer.parameters():
        weight.data.mul_(1.2)
    with hicache.fast.apply(pipe, CONFIG):
        prior = pipelines.draw(pipe, arguments, STEPS)
    with (
        pytest.warns(RuntimeWarning, match="with other weights"),
        hicache.fast.apply(pipe, HiCacheConfig(interval=3, basis=Fitted(calibration))),
    ):
        assert torch.equal(pipelines.draw(pipe, arguments, STEPS), prior)


def test_a_model_is_known_in_other_dtypes_and_not_by_other_names():
    pipe, _ = pipelines.build("flux")
    key = ModelKey.of(pipe.transformer)
    assert key.differs(ModelKey.of(pipe.transformer.bfloat16())) is None
    assert "other weights" in str(key.differs(dataclasses.replace(key, weights=(9.0,) * len(key.weights))))
    assert "another config" in str(key.differs(dataclasses.replace(key, config="0")))
    assert "not Other" in str(key.differs(dataclasses.replace(key, name="Other")))
    # weights that cannot be read are not compared
    assert key.differs(ModelKey.of(pipe.transformer.to("meta"))) is None


def test_guidance_is_read_off_pipelines():
    flux, _ = pipelines.build("flux")
    flux._guidance_scale = 3.5
    assert guidance_of(flux) in ("embedded", "classifier-free")
    demo = hicache.demo.load()
    demo("a red ring on blue", 1, guidance_scale=1.0)
    assert guidance_of(demo) == "none"
    demo("a red ring on blue", 1, guidance_scale=4.0)
    assert guidance_of(demo) == "classifier-free"
    assert guidance_of(object()) is None


def test_full_steps_come_from_the_file_and_speedup_chooses_among_them():
    pipe, arguments = pipelines.build("flux")
    entries = [
        entry_of(HiCacheConfig(schedule=Steps(*steps))) for steps in ((0, 1, 2, 6), (0, 1, 2, 4, 6, 8))
    ]
    schedule = FittedSteps(file_of(pipe, *entries))
    for speedup, steps in ((None, entries[0]), (10 / 6, entries[1]), (2.5, entries[0])):
        with hicache.fast.apply(pipe, HiCacheConfig(schedule=schedule), speedup=speedup) as handle:
            pipelines.draw(pipe, arguments, STEPS)
            assert tuple(full_steps(handle.stats.config, STEPS)) == steps.full_steps
    for speedup, count in ((3.3, 3), (1.25, 8)):
        with pytest.warns(RuntimeWarning, match=f"it has no places for {count} full steps"):
            with hicache.fast.apply(pipe, HiCacheConfig(schedule=schedule), speedup=speedup) as handle:
                pipelines.draw(pipe, arguments, STEPS)
                assert len(full_steps(handle.stats.config, STEPS)) <= count
    with pytest.warns(RuntimeWarning, match="full steps are as in Interval"):
        with hicache.fast.apply(pipe, HiCacheConfig(schedule=schedule)):
            pipelines.draw(pipe, arguments, STEPS + 2)


def test_the_reference_weighs_by_the_same_rows():
    pipe, arguments = pipelines.build("flux")
    config = HiCacheConfig(interval=3, basis=Fitted(file_of(pipe, entry_of(change=0.02))))
    with hicache.fast.apply(pipe, config, granularity="module"):
        fast = pipelines.draw(pipe, arguments, STEPS)
    with hicache.reference.apply(pipe, config):
        reference = pipelines.draw(pipe, arguments, STEPS)
    assert (fast - reference).abs().max() <= 1e-4


# Fitting.


def polynomials(layout: Layout) -> dict[int, torch.Tensor]:
    """Of a run whose features are polynomials of order 2 in the step: ``[features, 1, 1, 64]`` by step."""
    steps = torch.arange(layout.num_steps, dtype=torch.float64)
    powers = torch.stack([steps**power for power in range(3)], 1)  # [steps, K]
    found = [powers @ torch.randn(3, 64, dtype=torch.float64) for _ in range(layout.features or 1)]
    return dict(enumerate(torch.stack(found, 1)[:, :, None, None]))


@pytest.mark.parametrize("count", [None, 1, 3])
@pytest.mark.parametrize("config", [CONFIG, HiCacheConfig(schedule=Steps(0, 1, 2, 5, 6, 9), order=2)])
def test_without_a_ridge_polynomials_are_exact(config: HiCacheConfig, count: int | None):
    torch.manual_seed(0)
    layout = Layout.of(config, 14, count)
    grams = Grams(layout)
    for _ in range(4):
        for step, feature in polynomials(layout).items():
            grams.take("t[0]", step, feature)
    rows = grams.rows(PRIOR, ridge=0)["t[0]"]
    given = polynomials(layout)
    rule = ByRows(layout, lambda context, step: rows[step])
    for step, feature in given.items():
        if rule.is_full(step):
            rule.record("t[0]", step, feature)
        elif layout.positions[step].num_coeffs == 3:
            assert torch.allclose(rule.forecast("t[0]", step), feature, rtol=1e-6)


def test_features_have_the_rows_that_each_would_have_alone():
    torch.manual_seed(0)
    layout, alone = Layout.of(CONFIG, 14, 3), Layout.of(CONFIG, 14)
    together, apart = Grams(layout), [Grams(alone) for _ in range(3)]
    for step, feature in polynomials(layout).items():
        feature = feature + torch.randn_like(feature)
        together.take("t[0]", step, feature)
        for index, grams in enumerate(apart):
            grams.take("t[0]", step, feature[index : index + 1])
    for step, rows in together.rows(PRIOR)["t[0]"].items():
        own = [grams.rows(PRIOR)["t[0]"][step] for grams in apart]
        assert torch.allclose(rows, torch.stack(own, 1), rtol=1e-9)
        assert not torch.allclose(own[0], own[1], rtol=1e-3)


@pytest.mark.parametrize("count", [None, 3])
@pytest.mark.parametrize("ridge", [float("inf"), 1e30])
def test_with_a_large_ridge_rows_are_the_prior_bit_for_bit(ridge: float, count: int | None):
    layout = Layout.of(CONFIG, 14, count)
    grams = Grams(layout)
    for step, feature in polynomials(layout).items():
        grams.take("t[0]", step, feature)
    for step, row in grams.rows(PRIOR, ridge)["t[0]"].items():
        assert torch.equal(row, layout.row(PRIOR, step))


@pytest.mark.parametrize("granularity", ["stack", "module", "output"])
def test_a_replay_by_the_prior_s_rows_is_the_fast_path(granularity: str):
    pipe = hicache.demo.load()
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": ["a red ring on blue"], "num_inference_steps": 12, "output_type": "latent"}

    def seeded() -> dict[str, Any]:
        return {**call, "generator": torch.Generator().manual_seed(3), "return_dict": False}

    with Replay(pipe, granularity) as replay:
        layout = Layout.of(CONFIG, 12, replay.features)
        plain = replay.run(InFull(), seeded()).output[0]
        rows = replay.run(ByRows(layout, lambda context, step: layout.row(PRIOR, step)), seeded()).output[0]
        moved = replay.run(
            ByRows(layout, lambda context, step: layout.row(PRIOR, step)), seeded(), gradients=True
        ).output[0]
        assert replay.contexts == ["transformer[0]"]
    assert torch.equal(pipe(**seeded())[0], plain), "the pipeline is as it was"
    with hicache.fast.apply(pipe, CONFIG, granularity=granularity):
        fast = pipe(**seeded())[0]
    assert (fast - rows).abs().max() <= 1e-4
    assert torch.equal(rows, moved.detach())
    assert all(weight.requires_grad for weight in pipe.transformer.parameters())


def test_a_few_iterations_bring_fitted_pictures_nearer(tmp_path: Path):
    pipe = hicache.demo.load()
    pipe.set_progress_bar_config(disable=True)
    prompts = random_prompts(4, 1)
    out = tmp_path / "rows.json"
    seen = []

    def calibrated() -> Calibration:
        return hicache.calibrate(
            pipe,
            prompts,
            configs=[HiCacheConfig(interval=4)],
            num_inference_steps=16,
            search=Search(iterations=12, batch=4, rate=0.05),
            held_out_pictures=8,
            out=out,
            progress=seen.append,
        )

    found = calibrated()
    [entry] = found.entries
    assert entry.scores["fitted mean dB"] > entry.scores["prior mean dB"]
    assert len(seen) == 12
    assert seen[-1].loss < seen[0].loss
    # what is there is not made again, and the same seed makes the same file
    text = out.read_text()
    assert calibrated().entries == found.entries
    assert len(seen) == 12
    out.unlink()
    calibrated()
    assert out.read_text() == text
    # used by the path that users run, it draws what the judge saw
    config = HiCacheConfig.load(out)
    with hicache.fast.apply(pipe, config) as handle:
        pipe(prompts[0], 16)
        assert handle.stats.config.fallbacks == []
        assert handle.stats.full_steps == len(entry.full_steps)


@pytest.mark.few(2)
@pytest.mark.parametrize("granularity", ["stack", "module", "output"])
@pytest.mark.parametrize("method", ["trajectory", "closed-form"])
def test_every_config_gets_rows_and_noise_levels(
    method: str, granularity: str, monkeypatch: pytest.MonkeyPatch
):
    pipe = hicache.demo.load()
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(Verdict, "better", True)  # whatever the few pictures say
    found = hicache.calibrate(
        pipe,
        random_prompts(2, 1),
        configs=[HiCacheConfig(interval=4), HiCacheConfig(interval=3)],
        num_inference_steps=8,
        method=method,
        granularity=granularity,
        search=Search(iterations=2, batch=2, rate=0.05),
        held_out_pictures=2,
    )
    assert len(found.entries) == 2
    assert found.granularity == granularity
    for entry in found.entries:
        assert entry.features == (8 if granularity == "module" else None)
        assert entry.rows.keys() == {"transformer[0]"}
        assert entry.sigmas is not None
        assert len(entry.sigmas) == 8


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["heads", "closed-form"])
def test_heads_alone_and_closed_form_move_rows(method: str, monkeypatch: pytest.MonkeyPatch):
    pipe = hicache.demo.load()
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(Verdict, "better", True)  # whatever the few pictures say
    found = hicache.calibrate(
        pipe,
        random_prompts(4, 1),
        configs=[HiCacheConfig(interval=4)],
        num_inference_steps=16,
        method=method,
        search=Search(iterations=4, batch=4, rate=0.05),
        held_out_pictures=4,
    )
    assert found.settings["method"] == method
    layout = Layout.of(HiCacheConfig(interval=4), 16)
    for step, row in found.entries[0].rows["transformer[0]"].items():
        moved = torch.tensor(row) - layout.row(PRIOR, step)
        assert 0 < moved.abs().max() < 5


def test_noise_for_features_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from hicache.fitting import closed_form

    pipe = hicache.demo.load()
    pipe.set_progress_bar_config(disable=True)
    take = Grams.take
    monkeypatch.setattr(
        closed_form.Grams, "take", lambda self, c, s, feature: take(self, c, s, torch.randn_like(feature))
    )
    before = pipe(
        "a red ring on blue", 8, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).images
    with (
        pytest.warns(RuntimeWarning, match="which is no gain"),
        pytest.raises(CalibrationRefused, match="no gain"),
    ):
        hicache.calibrate(
            pipe,
            ["a red ring on blue"],
            configs=[HiCacheConfig(interval=4)],
            num_inference_steps=16,
            method="closed-form",
            held_out_pictures=8,
            out=tmp_path / "rows.json",
        )
    assert not (tmp_path / "rows.json").exists()
    after = pipe("a red ring on blue", 8, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert torch.equal(before, after)


def test_a_gain_that_may_be_chance_is_none():
    assert Verdict((40.0, 38.0, 36.0), (41.0, 39.2, 36.9)).better
    assert not Verdict((40.0, 38.0, 36.0), (46.0, 36.0, 37.0)).better
    assert not Verdict((40.0, 38.0), (39.0, 37.0)).better


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": "guess"}, ValueError, "expected method to be one of trajectory, heads, closed-form"),
        ({"prompts": []}, TypeError, "expected prompts to be a sequence of strings"),
        ({"prompts": "a red ring on blue"}, TypeError, "expected prompts to be a sequence of strings"),
        ({"num_inference_steps": 1}, ValueError, "num_inference_steps: expected an int >= 2, got 1"),
        ({"batch": 0}, ValueError, "batch: expected an int >= 1, got 0"),
        ({"configs": [HiCacheConfig(interval=1)]}, ValueError, "expected a config that skips steps"),
        ({"configs": [HiCacheConfig(), HiCacheConfig(basis="taylor")]}, ValueError, "configs of one basis"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str):
    pipe = hicache.demo.load()
    arguments = {"prompts": ["a red ring on blue"], **change}
    with pytest.raises(error, match=message):
        hicache.calibrate(pipe, arguments.pop("prompts"), **arguments)
    assert not pipe.transformer._forward_hooks


# Found with the model.


def test_a_file_beside_the_model_is_used_without_being_asked_for(tmp_path: Path):
    from hicache.demo.pipeline import ShapesPipeline

    hicache.demo.load().save_pretrained(tmp_path)
    pipe = ShapesPipeline.from_pretrained(tmp_path, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)

    def drawn(steps: int, **settings: Any) -> tuple[torch.Tensor, hicache.fast.Stats]:
        generator = torch.Generator().manual_seed(0)
        with hicache.fast.apply(pipe, **settings) as handle:
            pictures = pipe("a red ring on blue", steps, generator=generator, output_type="pt").images
            return pictures, handle.stats

    plain, _ = drawn(STEPS, granularity="stack")
    entries = [
        entry_of(HiCacheConfig(schedule=Steps(*steps)), 0.02) for steps in ((0, 1, 2, 6), (0, 1, 2, 4, 6, 8))
    ]
    file_of(pipe, *entries, granularity="stack").save(tmp_path / "hicache.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, stats = drawn(STEPS)
        assert not torch.equal(found, plain)
        assert (stats.granularity, stats.full_steps) == ("stack", 4)
        assert drawn(STEPS, speedup=10 / 6)[1].full_steps == 6
        # fewer full steps, or more, than the file has places for: what was asked for is had without the file
        for speedup in (3.3, 1.25):
            other = drawn(STEPS, speedup=speedup)[1]
            assert other.bound >= speedup
            assert other.config.basis == "hermite"
        # other steps than the file's: the defaults, without a word
        assert drawn(STEPS + 1)[1].config == HiCacheConfig()
        # and other settings are the user's own
        assert torch.equal(drawn(STEPS, config=HiCacheConfig(), granularity="stack")[0], plain)
    (tmp_path / "hicache.json").write_text("{}")
    with pytest.raises(CalibrationError, match=r"hicache\.json: line 1"):
        drawn(STEPS)


def test_rows_are_for_what_was_cached_as_they_were_fitted():
    pipe, arguments = pipelines.build("flux")
    fitted = HiCacheConfig(
        interval=3, basis=Fitted(file_of(pipe, entry_of(change=0.05), granularity="stack"))
    )
    with hicache.fast.apply(pipe, fitted) as handle:
        pipelines.draw(pipe, arguments, STEPS)
        assert handle.stats.granularity == "stack"
    with hicache.fast.apply(pipe, CONFIG, granularity="module"):
        prior = pipelines.draw(pipe, arguments, STEPS)
    with (
        pytest.warns(RuntimeWarning, match="it is for granularity='stack', not 'module'"),
        hicache.fast.apply(pipe, fitted, granularity="module"),
    ):
        assert torch.equal(pipelines.draw(pipe, arguments, STEPS), prior)


# The command.


def asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    """What ``hicache calibrate`` passes on to :func:`hicache.calibrate`."""
    from typer.testing import CliRunner

    from hicache.cli.app import app
    from hicache.fitting import command

    found: dict[str, Any] = {}

    def calibrate(pipe: Any, prompts: Any, **settings: Any) -> Calibration:
        found.update(settings, prompts=prompts)
        told = [f"{who} {what} dB" for who in ("prior", "fitted") for what in ("mean", "worst")]
        return file_of(pipe, entry_of(scores=dict.fromkeys(told, 1.0)))

    monkeypatch.setattr(command, "calibrate", calibrate)
    result = CliRunner().invoke(app, ["calibrate", "--out", str(tmp_path / "rows.json"), *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return {**found, "exit": result.exit_code, "said": result.output}


def test_the_command_fits_to_prompts_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = asked_for(
        tmp_path, monkeypatch, "--interval", "5,7", "--pictures", "6", "--granularity", "module"
    )
    assert [config.interval for config in asked["configs"]] == [5, 7]
    assert (len(asked["prompts"]), len(asked["held_out"])) == (6, 16)
    assert asked["granularity"] == "module"


def test_the_command_takes_the_places_of_a_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pipe, _ = pipelines.build("flux")
    places = [(0, 1, 2, 6), (0, 3, 6)]
    entries = [entry_of(HiCacheConfig(schedule=Steps(*steps), warmup=1)) for steps in places]
    file_of(pipe, *entries, granularity="stack").save(tmp_path / "places.json")
    arguments = ("--schedule", str(tmp_path / "places.json"), "--steps", str(STEPS), "--order", "3")
    configs = asked_for(tmp_path, monkeypatch, *arguments)["configs"]
    assert [tuple(full_steps(config, STEPS)) for config in configs] == places
    assert {(config.order, config.warmup, config.basis) for config in configs} == {(3, 1, "hermite")}


def test_the_command_takes_places_in_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = asked_for(tmp_path, monkeypatch, "--schedule", "0,2,5,9", "--tail", "0.5")
    [config] = asked["configs"]
    assert (full_steps(config, 50), config.warmup) == ([0, 2, 5, 9], 1)
    assert asked["search"].tail == 0.5
    with pytest.raises(ValueError, match="unknown schedule '0,1,two'"):
        asked_for(tmp_path, monkeypatch, "--schedule", "0,1,two")


def test_prompts_of_one_s_own_are_all_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "prompts.txt").write_text("a red ring on blue\n")
    with pytest.raises(ValueError, match="--pictures: expected no other prompts than those of --prompts"):
        asked_for(tmp_path, monkeypatch, "--prompts", str(tmp_path / "prompts.txt"), "--pictures", "6")
