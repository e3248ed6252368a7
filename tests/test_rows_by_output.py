"""Rows fitted to what denoisers return: U-Nets too, skipped as a whole, files of their own."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

import hicache
import hicache.demo
import hicache.fast
from hicache import Fitted, HiCacheConfig
from hicache.calibration.file import Calibration
from hicache.calibration.matching import model_keys
from hicache.demo.pipeline import ShapesPipeline
from hicache.fitting.judge import Verdict
from hicache.fitting.pictures import Pictures
from hicache.fitting.replay import Replay
from hicache.fitting.rows import ByRows, InFull, Layout
from hicache.fitting.trajectory import Search
from hicache.pipeline import find_denoisers
from hicache.run import Run
from tests.support import unets
from tests.support.fitted import PRIOR, entry_of, file_of

STEPS = 10
CONFIG = HiCacheConfig(interval=4)


def unet(name: str) -> Any:
    """A tiny pipeline with a U-Net that draws prompts, of which it knows the length."""
    pipe, given = unets.build(name)
    kinds = ("prompt", "negative_prompt", "pooled_prompt", "negative_pooled_prompt")
    embeds = [given[f"{kind}_embeds"] for kind in kinds if f"{kind}_embeds" in given]

    def encode(prompt: list[str], *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        return tuple(torch.cat([one * (1 + len(text) / 100) for text in prompts]) for one in embeds)

    pipe.encode_prompt = encode
    pipe.scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def calibrated(pipe: Any, **settings: Any) -> Calibration:
    return hicache.calibrate(
        pipe,
        ["a red ring", "a blue cross"],
        configs=[CONFIG],
        num_inference_steps=STEPS,
        call={"height": 32, "width": 32},
        granularity="output",
        held_out_pictures=2,
        **settings,
    )


def called(module: nn.Module) -> list[str]:
    """Grows with every call of a module from now on."""
    calls: list[str] = []
    module.register_forward_pre_hook(lambda module, args: calls.append(type(module).__name__))
    return calls


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_replay_of_a_unet_is_the_fast_path_and_skips_it_whole(name: str):
    pipe = unet(name)
    call = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "height": 32, "width": 32}
    pictures = Pictures(("a red ring", "a blue cross"), (1, 2), call, 2)
    inside = called(pipe.unet.conv_in)
    before = dict(pipe.unet.__dict__)
    with Replay(pipe, "output") as replay:
        layout = Layout.of(CONFIG, STEPS)
        full = replay.run(InFull(), pictures.arguments([0, 1], "latent")).output[0]
        inside.clear()
        rule = ByRows(layout, lambda context, step: layout.row(PRIOR, step))
        replayed = replay.run(rule, pictures.arguments([0, 1], "latent")).output[0]
        assert len(inside) == len(layout.full_steps)
        assert replay.contexts == ["unet[0]"]
    assert pipe.unet.__dict__.keys() == before.keys()
    assert torch.equal(pipe(**pictures.arguments([0, 1], "latent"))[0], full)
    with hicache.fast.apply(pipe, CONFIG, granularity="output"):
        drawn = pipe(**pictures.arguments([0, 1], "latent"))[0]
    assert (drawn - replayed).abs().max() <= 1e-4


@pytest.mark.parametrize("method", ["trajectory", "heads", "closed-form"])
def test_a_unet_is_calibrated_and_its_file_is_used(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pipe = unet("sd15")
    monkeypatch.setattr(Verdict, "better", True)  # whatever a network that was never trained says
    found = calibrated(pipe, method=method, search=Search(iterations=2, batch=2, tail=0.5))
    assert found.granularity == "output"
    [entry] = found.entries
    assert entry.rows.keys() == {"unet[0]"}
    layout = Layout.of(CONFIG, STEPS)
    assert any(tuple(layout.row(PRIOR, step).tolist()) != row for step, row in entry.rows["unet[0]"].items())
    inside = called(pipe.unet.conv_in)
    found.save(tmp_path / "rows.json")
    with hicache.fast.apply(pipe, HiCacheConfig.load(tmp_path / "rows.json")) as handle:
        pipe("a red ring", num_inference_steps=STEPS, height=32, width=32, output_type="latent")
        assert (handle.stats.granularity, handle.stats.config.fallbacks) == ("output", [])
    assert len(inside) == len(layout.full_steps)


def test_places_are_searched_by_what_is_returned(monkeypatch: pytest.MonkeyPatch):
    """A U-Net has no stack to search them by."""
    pipe = unet("sd15")
    monkeypatch.setattr(Verdict, "better", True)
    monkeypatch.setattr(importlib.import_module("hicache.fitting.calibrate"), "CHOOSING", 2)
    found = calibrated(pipe, places="searched", search=Search(iterations=1, batch=2))
    assert len(found.entries[0].full_steps) == len(Layout.of(CONFIG, STEPS).full_steps)


def test_a_call_that_returns_nothing_to_forecast_is_refused_and_leaves_the_pipeline(
    monkeypatch: pytest.MonkeyPatch,
):
    pipe = hicache.demo.load()
    pipe.set_progress_bar_config(disable=True)
    forward = type(pipe.transformer).forward
    before = dict(pipe.transformer.__dict__)
    with monkeypatch.context() as patch:
        patch.setattr(type(pipe.transformer), "forward", lambda *args, **kwargs: (None,))
        with pytest.raises(ValueError, match="granularity='output': FluxTransformer2DModel returns no float"):
            hicache.calibrate(pipe, ["a red ring on blue"], num_inference_steps=STEPS, granularity="output")
    assert type(pipe.transformer).forward is forward
    assert pipe.transformer.__dict__.keys() == before.keys()
    assert torch.is_grad_enabled()
    pipe("a red ring on blue", STEPS)


def test_each_granularity_may_have_a_file_beside_the_model(tmp_path: Path):
    hicache.demo.load().save_pretrained(tmp_path)
    pipe = ShapesPipeline.from_pretrained(tmp_path, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)

    def used(granularity: str) -> tuple[str, str | None]:
        """What was cached, and by which file."""
        with hicache.fast.apply(pipe, granularity=granularity) as handle:
            pipe("a red ring on blue", STEPS, output_type="latent")
            stats = handle.stats
        basis = stats.config.basis
        return stats.granularity, basis.calibration.source if isinstance(basis, Fitted) else None

    file_of(pipe, entry_of(0.02, CONFIG, STEPS), "output").save(tmp_path / "hicache.output.json")
    assert used("output") == ("output", "hicache.output.json")
    assert used("auto") == ("output", "hicache.output.json")
    file_of(pipe, entry_of(0.01, CONFIG, STEPS), "stack").save(tmp_path / "hicache.json")
    assert used("output") == ("output", "hicache.output.json")
    assert used("auto") == ("output", "hicache.output.json")
    assert used("stack") == ("stack", "hicache.json")
    assert used("module") == ("module", None)
    (tmp_path / "hicache.output.json").unlink()
    assert used("output") == ("output", None)
    assert used("auto") == ("stack", "hicache.json")
    # a file that is beside the model for all may be by output, too
    file_of(pipe, entry_of(0.02, CONFIG, STEPS), "output").save(tmp_path / "hicache.json")
    assert used("auto") == ("output", "hicache.json")


class Beside:
    """A pipeline with a file by output for runs of :data:`STEPS` steps, and others beside it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pipe = hicache.demo.load()
        self.pipe.set_progress_bar_config(disable=True)
        self.by_output = file_of(self.pipe, entry_of(0.02, CONFIG, STEPS), "output")
        self.found: list[Calibration] = [self.by_output]
        monkeypatch.setattr("hicache.offers.shipped", lambda *_: self.found)

    def drawn(self, steps: int, seed: int = 0) -> torch.Tensor:
        noise = torch.Generator().manual_seed(seed)
        return self.pipe("a red ring on blue", steps, generator=noise, output_type="latent").images

    def alone(self, steps: int, config: HiCacheConfig, granularity: str, seed: int = 0) -> torch.Tensor:
        with hicache.fast.apply(self.pipe, config, granularity=granularity):
            return self.drawn(steps, seed)


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Beside:
    return Beside(monkeypatch)


def test_what_is_cached_changes_from_run_to_run_with_the_file_that_holds(beside: Beside):
    """By output and by stack in the runs that files so fitted hold for, and as without them in others."""
    by_stack = file_of(beside.pipe, entry_of(0.01, CONFIG, STEPS + 2), "stack")
    beside.found.append(by_stack)
    kinds = {
        STEPS: (HiCacheConfig.of(beside.by_output), "output"),
        STEPS + 2: (HiCacheConfig.of(by_stack), "stack"),
        STEPS + 3: (HiCacheConfig(), "module"),
    }
    runs = list(enumerate([*kinds, *kinds, *reversed(kinds)]))
    wanted = [beside.alone(steps, *kinds[steps], seed) for seed, steps in runs]
    blocks = called(beside.pipe.transformer.transformer_blocks[0])
    embedded = called(beside.pipe.transformer.x_embedder)
    with hicache.fast.apply(beside.pipe) as handle:
        for (seed, steps), picture in zip(runs, wanted, strict=True):
            blocks.clear()
            embedded.clear()
            assert torch.equal(beside.drawn(steps, seed), picture)
            stats, granularity = handle.stats, kinds[steps][1]
            assert stats.granularity == granularity
            assert len(blocks) == stats.full_steps < steps
            assert len(embedded) == (stats.full_steps if granularity == "output" else steps)
            assert stats.full_steps + stats.skipped_steps == steps
            if granularity == "output":
                assert stats.choices == {"transformer": "output: what comes with the model is fitted to it"}
        planned = {steps: hicache.fast.plan(beside.pipe, height=32, width=32, steps=steps) for steps in kinds}
    for steps, (config, granularity) in kinds.items():
        assert {one.granularity for one in planned[steps].denoisers.values()} == {granularity}
        assert planned[steps].full_steps == len(hicache.full_steps(config.for_run(Run(steps)), steps))


@pytest.mark.few(1)
@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_transformer_has_graphs_of_both_kinds_of_runs(beside: Beside, whole: bool):
    """One of full steps by output, two by module; none is made anew when a run is of the other kind."""
    runs = (STEPS, STEPS + 2, STEPS, STEPS + 2)
    with hicache.fast.apply(beside.pipe):
        wanted = [beside.drawn(steps) for steps in runs]
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    if whole:
        beside.pipe.transformer = torch.compile(beside.pipe.transformer, backend="eager")
    else:
        beside.pipe.transformer.compile(backend="eager")
    graphs = []
    with hicache.fast.apply(beside.pipe):
        for steps, picture in zip(runs, wanted, strict=True):
            before = counters["stats"]["unique_graphs"]
            assert torch.equal(beside.drawn(steps), picture)
            graphs.append(counters["stats"]["unique_graphs"] - before)
    assert graphs == [1, 2, 0, 0]
    assert not counters["graph_break"]


def test_a_run_that_is_broken_off_leaves_nothing_to_one_by_another_granularity(beside: Beside):
    wanted = beside.alone(STEPS, HiCacheConfig.of(beside.by_output), "output")

    def stop(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 5:
            raise RuntimeError("stop")
        return {}

    with hicache.fast.apply(beside.pipe):
        for steps in (STEPS + 2, STEPS):
            with pytest.raises(RuntimeError, match="stop"):
                beside.pipe("a red ring on blue", steps, callback_on_step_end=stop)
        assert torch.equal(beside.drawn(STEPS), wanted)


def test_a_speed_up_is_of_the_first_file_that_has_it(beside: Beside):
    """And nothing is said of those that do not."""
    fewer = entry_of(0.0, HiCacheConfig(interval=7, warmup=2), STEPS)
    beside.found.append(file_of(beside.pipe, fewer, "stack"))
    for calibration, granularity in ((beside.by_output, "output"), (beside.found[1], "stack")):
        speedup = STEPS / len(calibration.entries[0].full_steps)
        with hicache.fast.apply(beside.pipe, speedup=speedup) as handle:
            beside.drawn(STEPS)
            assert (handle.stats.granularity, handle.stats.bound) == (granularity, pytest.approx(speedup))
            assert handle.stats.config.fallbacks == []


@pytest.mark.parametrize("granularity", ["output", None])
def test_a_file_beside_a_unet_is_used(granularity: str | None, monkeypatch: pytest.MonkeyPatch):
    """Of one that says by what, nothing has to be asked for."""
    pipe = unet("sd15")
    keys = model_keys(find_denoisers(pipe, unets=True))
    calibration = Calibration(keys, None, PRIOR, (entry_of(0.02, CONFIG, STEPS),), {}, granularity)
    monkeypatch.setattr("hicache.offers.shipped", lambda *_: [calibration])
    asked = {} if granularity else {"granularity": "output"}
    with hicache.fast.apply(pipe, **asked) as handle:
        pipe("a red ring", num_inference_steps=STEPS, height=32, width=32, output_type="latent")
        assert handle.stats.granularity == "output"
        assert isinstance(handle.stats.config.basis, Fitted)


@pytest.mark.parametrize("tail", [-0.1, 1.5, float("nan")])
def test_a_tail_that_cannot_be(tail: float):
    with pytest.raises(ValueError, match=r"Search\.tail: expected a number in \[0, 1\], got"):
        Search(tail=tail)


def test_a_tail_is_a_power_mean_of_squared_errors():
    from hicache.fitting.trajectory import _log_error

    torch.manual_seed(0)
    found, wanted = torch.randn(2, 5, 4, 3).unbind(0)
    found = wanted + found * torch.tensor([1e-3, 1e-2, 0.1, 1.0, 10.0]).view(-1, 1, 1)
    errors = (found - wanted).double().square().flatten(1).mean(1)
    for tail, expected in ((0.0, errors.log().mean()), (0.25, 4 * errors.pow(0.25).mean().log())):
        assert float(_log_error(found, wanted, 0.0, tail)) == pytest.approx(float(expected), rel=1e-5)
    assert float(_log_error(found, wanted, 0.0, 1.0)) == pytest.approx(float(errors.mean().log()), rel=1e-5)
