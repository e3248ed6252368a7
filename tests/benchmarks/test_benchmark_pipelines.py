"""The benchmark of whole loops: models of true size, parity checks that catch errors, rows that add up."""

from __future__ import annotations

import csv
import time
from dataclasses import fields, replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import hicache.fast
from benchmarks.common.machine import place
from benchmarks.gpu.__main__ import time_pipelines
from benchmarks.kernels.parity import WrongResult
from benchmarks.pipelines import __main__ as command
from benchmarks.pipelines import bench as loops
from benchmarks.pipelines import measure as measuring
from benchmarks.pipelines.bench import Bench, Variant, compiled_blocks
from benchmarks.pipelines.measure import (
    Measured,
    Notes,
    check_parity,
    measure,
    measure_model,
    measure_variant,
    rows_of,
)
from benchmarks.pipelines.models import MODELS, build, denoise, random_inputs
from benchmarks.pipelines.rows import Row, page
from hicache import HiCacheConfig
from tests.support.graphs import FakeBackend, connect

CONFIG = HiCacheConfig(interval=3, order=1, warmup=2)
STEPS = 7  # 0, 1 and 4 are full
# of the published checkpoints
BILLIONS = {"flux": 11.90, "sd3": 2.24, "qwen": 20.43, "wan-1.3b": 1.42, "wan-14b": 14.29}
# small enough for a test: two blocks of each, 16 image tokens
TINY = {"height": 64, "width": 64}
SMALLER = {
    "flux": {"num_layers": 1, "num_single_layers": 1},
    "sd3": {"num_layers": 2, "dual_attention_layers": (0,), "pos_embed_max_size": 8},
    "qwen": {"num_layers": 2},
    "wan": {"num_layers": 2},
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Models of the same classes that run in milliseconds."""
    models = {
        key: replace(model, changes={**model.changes, **SMALLER[key]}, drawn={**model.drawn, **TINY}, text=4)
        for key, model in MODELS["cpu"].items()
    }
    monkeypatch.setitem(MODELS, "cpu", models)
    monkeypatch.setitem(measuring._LEAST, "cpu", 0.0)


def bench(key="flux", deadline=float("inf")):
    return Bench(MODELS["cpu"][key], CONFIG, STEPS, "cpu", deadline)


@pytest.mark.few(2)
@pytest.mark.parametrize("key", MODELS["cuda"])
def test_models_of_a_gpu_are_of_true_size(key):
    """They are built in bf16, without memory, and two blocks of each go through a step."""
    model = MODELS["cuda"][key]
    transformer = build(model, "meta", torch.bfloat16)
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    assert round(parameters / 1e9, 2) == BILLIONS[key]
    inputs = random_inputs(model, transformer, "meta", torch.bfloat16)
    shallow = {name: value for name, value in SMALLER[key.split("-")[0]].items() if "layers" in name}
    shallower = build(replace(model, changes={**model.changes, **shallow}), "meta", torch.bfloat16)
    latents = denoise(shallower, inputs, FlowMatchEulerDiscreteScheduler(), 50, stop=1)
    assert (latents.shape, latents.dtype) == (inputs.latents.shape, torch.bfloat16)
    # the tokens that plan() expects, and the calls
    [plan] = hicache.fast.plan(transformer, CONFIG, **model.drawn).denoisers.values()
    assert plan.contexts == len(inputs.calls)
    assert plan.hidden[0] == inputs.samples


@pytest.mark.few(1)
@pytest.mark.parametrize("key", MODELS["cpu"])
def test_rows_of_every_model(key):
    notes = Notes()
    [rows] = measure("cpu", [key], CONFIG, STEPS, notes, rounds=2)
    assert [row.variant for row in rows] == ["uncached", "stack", "module"]
    assert notes.failed == []
    assert notes.left_out == ["CUDA graphs: left out: a CPU has none"]
    uncached, *cached = rows
    assert (uncached.full_steps, uncached.over_uncached, uncached.share_of_bound) == (STEPS, 1.0, None)
    assert uncached.history_bytes == 0
    for row in cached:
        assert (row.steps, row.full_steps, row.loops) == (STEPS, 3, 2)
        assert row.bound == STEPS / 3
        assert row.over_uncached == uncached.seconds / row.seconds
        assert row.share_of_bound == row.over_uncached / row.bound
        assert min(row.full_step_ms, row.skipped_step_ms, row.cache_ms) > 0
        assert row.peak_bytes is None


@pytest.mark.few(1)
@pytest.mark.parametrize("granularity", ["stack", "module"])
def test_history_is_the_planned_one(granularity):
    one = bench("wan")
    variant = Variant(granularity)
    taken = measure_model(one, False, 1, Notes())[variant]
    plan = hicache.fast.plan(one.transformer, CONFIG, **one.model.drawn, granularity=granularity)
    assert taken.history_bytes == plan.history_bytes > 0


@pytest.mark.parametrize("granularity", ["stack", "module"])
def test_parity_checks_compare_bits(granularity):
    one = bench()
    check_parity(one, granularity)
    one.reference = one.reference.nextafter(one.reference + 1)
    with pytest.raises(WrongResult, match=f"{granularity}, interval=1: its latents differ"):
        check_parity(one, granularity)


def test_parity_checks_refuse_what_is_not_finite():
    one = bench()
    one.inputs.latents[0, 0, 0] = float("nan")
    one.reference = one.run(2)
    with pytest.raises(WrongResult, match="not finite"):
        check_parity(one, "stack")


@pytest.mark.parametrize("stop", [STEPS, None])
def test_loops_must_equal_those_before(stop):
    one, variant, known = bench(), Variant("stack"), {}
    measure_variant(one, variant, Measured(), known, whole=True)
    assert list(known) == [(variant, STEPS), (variant, None)]
    known[variant, stop] = known[variant, stop] + 1
    with pytest.raises(WrongResult, match="latents differ"):
        measure_variant(one, variant, Measured(), known, whole=True)


@pytest.mark.parametrize("granularity", ["stack", "module"])
def test_graphs_must_equal_the_same_steps_run_eagerly(granularity, monkeypatch):
    """Against a faked capture."""
    monkeypatch.setattr(hicache.fast, "CudaBackend", FakeBackend)
    apply = Bench.apply

    def apply_faked(self, variant):
        return connect(apply(self, variant))

    monkeypatch.setattr(Bench, "apply", apply_faked)
    one, variant, taken, known = bench(), Variant(granularity, graphs=True), Measured(), {}
    assert measure_variant(one, variant, taken, known, whole=True) is None
    assert taken.seconds
    assert taken.skipped_ms is not None
    known[variant, one.first_steps(variant, whole=True)] += 1
    with pytest.raises(WrongResult, match="latents differ"):
        measure_variant(one, variant, Measured(), known, whole=True)


def test_graphs_that_cannot_be_had_are_not_timed():
    with pytest.warns(RuntimeWarning, match="runs without CUDA graphs"):
        reason = measure_variant(bench(), Variant("stack", graphs=True), Measured(), {}, whole=True)
    assert reason == "the transformer is on cpu"


def test_a_loop_that_skips_other_steps_is_refused(monkeypatch):
    one = bench()
    monkeypatch.setattr(Bench, "apply", lambda self, variant: hicache.fast.apply(
        self.transformer, replace(CONFIG, interval=2), scheduler=self.scheduler, granularity="stack"
    ))  # fmt: skip
    with pytest.raises(WrongResult, match="expected 3 full steps, got 4"):
        measure_variant(one, Variant("stack"), Measured(), {}, whole=True)


def test_what_fails_is_said_and_not_timed(monkeypatch, capsys):
    def refuse(one, granularity):
        if granularity == "module":
            raise WrongResult("wrong")

    monkeypatch.setattr(measuring, "check_parity", refuse)
    notes = Notes()
    found = measure_model(bench(), False, 1, notes)
    assert list(found) == [Variant(None), Variant("stack")]
    assert notes.failed == ["FLUX.1, small, module, interval=1: FAILED: WrongResult: wrong"]
    assert "Traceback" in capsys.readouterr().err


def test_a_model_that_breaks_leaves_the_others(monkeypatch):
    broken = replace(MODELS["cpu"]["sd3"], changes={"unheard_of": 1}, kind="NoTransformer")
    monkeypatch.setitem(MODELS["cpu"], "sd3", broken)
    notes = Notes()
    [rows] = measure("cpu", ["sd3", "flux"], CONFIG, STEPS, notes, rounds=1)
    assert {row.model for row in rows} == {"FLUX.1, small"}
    [failed] = notes.failed
    assert "SD3.5, small: FAILED: AttributeError" in failed


def test_a_history_that_does_not_fit_is_left_out(monkeypatch):
    monkeypatch.setattr(loops, "available_bytes", lambda device: 1000)
    notes = Notes()
    assert Variant("module") not in measure_model(bench(), False, 1, notes)
    assert notes.left_out == ["FLUX.1, small, module: left out: its history does not fit in memory"]


def test_without_time_for_loops_steps_are_timed_alone():
    one = bench()
    one._deadline = time.monotonic() + 60
    one.full_seconds = 4.0  # as if: 2 steps a parity check and 4 a variant fit, those of a whole loop do not
    notes = Notes()
    taken = measure_model(one, False, 2, notes)
    assert notes.left_out == ["FLUX.1, small, whole loops: left out: out of time; steps are timed alone"]
    assert taken[Variant(None)].full_ms == 4000.0
    for granularity in ("stack", "module"):
        found = taken[Variant(granularity)]
        assert found.seconds == []
        assert found.cache_ms is None
        assert found.full_ms > 0
        assert found.skipped_ms > 0
    [*rows] = rows_of(one, taken)
    assert [row.seconds for row in rows] == [row.share_of_bound for row in rows] == [None] * 3


def test_out_of_time():
    notes = Notes()
    assert list(measure("cpu", list(MODELS["cpu"]), CONFIG, STEPS, notes, deadline=0.0)) == []
    assert [note for note in notes.left_out if "out of time" in note] == [
        f"{model.name}: left out: out of time" for model in MODELS["cpu"].values()
    ]


def test_results_are_written(tmp_path, capsys):
    table, summary = tmp_path / "pipelines.csv", tmp_path / "pipelines.md"
    notes = command.run("cpu", ["flux"], CONFIG, STEPS, 1.0, rounds=1, csv=table, markdown=summary)
    assert notes.failed == []
    rows = list(csv.DictReader(table.open()))
    assert list(rows[0]) == [*(field.name for field in fields(Row)), "device", "driver", "versions"]
    assert [row["variant"] for row in rows] == ["uncached", "stack", "module"]
    assert f"torch {torch.__version__}" in rows[0]["versions"]
    assert "diffusers" in rows[0]["versions"]
    text = summary.read_text()
    assert "7 steps, N=3, O=1, w=2" in text
    assert "CUDA graphs: left out" in text
    assert capsys.readouterr().out.count("FLUX.1, small") == 3


def test_page_without_rows():
    assert "- nothing fits" in page([], ["nothing fits"], place("cpu"))


def test_blocks_are_compiled_for_as_long_as_asked():
    one = bench()
    blocks = [one.transformer.transformer_blocks[0], one.transformer.single_transformer_blocks[0]]
    with compiled_blocks(one.transformer):
        assert all(block._compiled_call_impl is not None for block in blocks)
    assert all(block._compiled_call_impl is None for block in blocks)


def test_stage_of_the_gpu_command(tmp_path, monkeypatch):
    """Its dry run, without the build."""
    monkeypatch.setitem(MODELS, "cpu", {"flux": MODELS["cpu"]["flux"]})
    assert time_pipelines("cpu", tmp_path, 1.0)
    assert {path.name for path in tmp_path.iterdir()} == {"pipelines.csv", "pipelines.md"}
    page = (tmp_path / "pipelines.md").read_text()
    assert "12 steps, N=7, O=2, w=3" in page
    assert page.count("| stack |") == 1


def test_command_names_what_it_does_not_know(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pipelines", "--device", "cpu", "--models", "flax"])
    with pytest.raises(SystemExit):
        command.main()
    assert "--models: unknown on cpu: flax; known: flux, sd3, qwen, wan" in capsys.readouterr().err


def test_command_fails_where_a_check_does(monkeypatch, capsys):
    """The cache is broken by hand; what it draws is not timed."""
    run = Bench.run
    monkeypatch.setattr(
        Bench,
        "run",
        lambda self, *args: run(self, *args) + ("_hicache_handle" in self.transformer.__dict__),
    )
    arguments = ["--device", "cpu", "--models", "flux", "--steps", "5", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", ["pipelines", *arguments])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    assert "FLUX.1, small, stack, interval=1: FAILED: WrongResult" in err
    assert "uncached" in out
    assert "stack" not in out
