"""The comparison with other packages: its methods, what it counts, its table."""

from __future__ import annotations

import gc
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import TaylorSeerCacheConfig
from torch._subclasses.fake_tensor import FakeTensorMode

import hicache.demo
import hicache.fast
from benchmarks.common.judging import prompts, subjects
from benchmarks.peers import __main__ as command
from benchmarks.peers import counting, models, of_hicache, rows, worker
from benchmarks.peers.measure import Bench
from benchmarks.peers.method import INTERVALS, Method
from benchmarks.peers.of_cache_dit import full_steps
from benchmarks.peers.rows import Row
from benchmarks.peers.table import METHODS, OURS, chosen, installed
from hicache import HiCacheConfig
from hicache.calibration.reader import load
from hicache.calibration.shipped import NAME, name_for
from hicache.demo import MODEL
from hicache.demo.pictures import parse
from hicache.demo.prompts import PROMPTS
from hicache.run import Run
from hicache.schedule import with_speedup
from tests.support.operations import Operations

ROOT = Path(hicache.__file__).parent.parent
STEPS = 9
STACK = METHODS["hicache, stack, Hermite σ=0.5 O=2"]


@pytest.fixture(autouse=True, scope="module")
def nothing_old():
    """Leave millions of objects that are there already out of what is searched for tensors after a step."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def short():
    """Runs of a few steps."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, model in models.MODELS.items():
            monkeypatch.setitem(models.MODELS, name, replace(model, steps=STEPS))
        yield


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The file of pictures drawn in full, as the worker calls it."""
    return tmp_path_factory.mktemp("peers") / f"bundled-{torch.get_num_threads()}-threads.pt"


@pytest.fixture(scope="module")
def bench(short, full):
    return Bench("bundled", subjects(2), full)


def test_tensors_without_memory_hold_none():
    """Fake ones, which other code may have left, among them."""
    before = counting.held_bytes_at_rest()
    with FakeTensorMode():
        fake = torch.ones(1000)
    held = [fake, torch.ones(1000, device="meta"), torch.ones(1000)]
    assert counting.held_bytes_at_rest() - before == held[-1].nbytes


def test_judged_pictures_are_of_the_grammar_and_of_no_demo():
    found = prompts(64)
    assert len(set(found)) == 64
    assert not set(found) & set(PROMPTS)
    assert [str(parse(prompt)) for prompt in found] == found
    assert found[:10] == prompts(10)
    few, more = subjects(2), subjects(3)
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(few, more, strict=False))
    assert not torch.equal(more[0].latents, more[1].latents)


def test_methods_are_of_four_packages_and_have_one_default_of_ours():
    assert {method.package for method in METHODS.values()} == {
        "hicache", "diffusers", "cache-dit", "hicache-pp",
    }  # fmt: skip
    assert [name for name, method in METHODS.items() if method.package == OURS and method.default] == [
        "hicache, default"
    ]
    spaced = [method for method in METHODS.values() if method.knob == "interval"]
    assert all(set(method.settings) >= set(INTERVALS) for method in spaced)
    assert all(list(method.settings) == sorted(method.settings) for method in spaced)
    assert chosen(["hicache-pp"]) == [m for m in METHODS.values() if m.package == "hicache-pp"]
    assert len(chosen([])) == len(METHODS)
    with pytest.raises(ValueError, match=r"unknown: cache_dit; known: .*cache-dit"):
        chosen(["cache_dit"])


@pytest.mark.parametrize(
    ("file", "interval"),
    [*((NAME, n) for n in INTERVALS), *((name_for("output"), n) for n in of_hicache.OUTPUT_INTERVALS)],
)
def test_what_comes_with_the_model_has_as_many_full_steps_as_the_interval(file, interval):
    """And is what ``speedup=`` alone takes: no setting is without rows of its own."""
    made = of_hicache.fitted(file)(interval)["config"]
    run = Run(50, order=made.order, warmup=made.warmup)
    assert not made.for_run(run).fallbacks
    count = int(3 + 47 / interval)
    if interval == int(interval):
        assert count == len(hicache.full_steps(HiCacheConfig(interval=int(interval)), 50))
    assert len(hicache.full_steps(made.for_run(run), 50)) == count
    shipped = with_speedup(HiCacheConfig.of(load(MODEL / file)), 50 / count, 50, run)
    assert hicache.full_steps(shipped.for_run(run), 50) == hicache.full_steps(made.for_run(run), 50)


def test_what_was_fitted_to_a_model_is_measured_on_that_model_alone():
    fitted = METHODS["hicache, fitted"]
    assert models.MODELS["bundled"].settings(fitted) == INTERVALS
    assert models.MODELS["flux"].settings(fitted) == ()
    assert [method.name for method in METHODS.values() if method.fitted] == [
        fitted.name,
        f"{fitted.name}, output",
    ]


@pytest.mark.parametrize("interval", [3, 7, 10])
def test_the_mask_of_a_peer_has_our_full_steps(interval):
    mask = full_steps(interval, 50)
    assert [step for step, full in enumerate(mask) if full] == [0, 1, *range(2, 50, interval)]


def test_a_skipped_step_of_ours_runs_no_block_and_holds_its_history(bench):
    row = bench.row(STACK, 3.0, None, judge=True, rounds=0)
    assert (row.note, row.pictures, row.full_steps) == ("", 2, 5)  # steps 0, 1, 2, 5 and 8
    assert row.blocks_run == pytest.approx(5 / STEPS)
    assert row.skipped_operators < row.full_operators / 5
    pipe = models.load("bundled")
    with hicache.fast.apply(pipe, HiCacheConfig(interval=3), granularity="stack") as handle:
        counting.draw(pipe, bench.subjects[:1], STEPS)
        history = handle.stats.history_bytes
    assert history <= row.cache_bytes < 2 * history
    assert row.speedup is None


def test_methods_that_run_a_part_of_each_block_are_found_out(bench):
    """Attention alone is forecast: no step is free, and only a part of each block runs."""
    row = bench.row(METHODS["diffusers TaylorSeer"], 3.0, None, judge=True, rounds=0)
    lite = bench.row(METHODS["diffusers TaylorSeer lite"], 3.0, None, judge=True, rounds=0)
    assert row.full_steps == lite.full_steps == 5  # steps 0, 1, 2, 4 and 7
    assert lite.blocks_run == pytest.approx(5 / STEPS)
    assert 0.6 < (row.blocks_run * STEPS - 5) / (STEPS - 5) < 0.9  # of a skipped step
    assert row.cache_bytes > lite.cache_bytes > 0


def test_counting_leaves_a_pipeline_as_it_was():
    pipe = models.load("bundled")
    counter = counting.BlockCounter(pipe.transformer)
    latents, shares = counting.shares_of(pipe, counter, subjects(1), STEPS)
    assert shares == [1.0] * STEPS
    assert not any(module._forward_pre_hooks for module in pipe.transformer.modules())
    assert torch.equal(counting.draw(pipe, subjects(1), STEPS), latents)


def test_operators_are_counted_by_step():
    pipe = models.load("bundled")
    steps = counting.operators_of(pipe, subjects(1), STEPS)
    assert len(steps) == STEPS
    assert len(set(steps[1:])) == 1
    with Operations() as seen:  # views and empty memory too
        counting.draw(pipe, subjects(1), STEPS)
    assert sum(steps) < sum(seen.seen.values())


def test_pictures_drawn_together_are_those_drawn_one_by_one(bench):
    """What a method decides must not depend on the others in the loop, or it says that it looks."""
    together = bench.row(STACK, 3.0, None, judge=True, rounds=0)
    alone = bench.row(replace(STACK, looks=True), 3.0, None, judge=True, rounds=0)
    assert together.psnr_mean == pytest.approx(alone.psnr_mean, abs=0.05)


def test_times_are_added_to_a_row(bench):
    judged = bench.row(STACK, 3.0, None, judge=True, rounds=0)
    timed = bench.row(STACK, 3.0, judged, judge=False, rounds=2)
    assert (timed.psnr_mean, timed.pictures) == (judged.psnr_mean, 2)
    assert timed.speedup == timed.full_seconds / timed.seconds
    assert timed.skipped_ms < timed.full_ms


def test_what_does_not_apply_is_said_in_its_row(bench):
    def refuse(pipe, setting, steps):
        raise ValueError("not this model\nnor that one")

    row = bench.row(Method("refuses", "diffusers", refuse), 3.0, None, judge=True, rounds=1)
    assert row.note == "ValueError: not this model"
    assert row.psnr_mean is row.seconds is None
    assert row.done(pictures=48, timed=True)


def test_pictures_of_another_machine_are_refused(bench, full, tmp_path):
    path = tmp_path / "full.pt"
    torch.save([latents + 1 for latents in torch.load(full)], path)
    with pytest.raises(RuntimeError, match="its first picture is not the one that is drawn here"):
        Bench("bundled", subjects(2), path)


# cache-dit's F8B0 runs more blocks than the model has
OTHERS = [name for name, method in METHODS.items() if method.package != OURS and "F8B0" not in name]


@pytest.mark.few(8)
@pytest.mark.parametrize("name", OTHERS)
def test_others_draw_and_skip(name):
    """At the fastest setting; and a second run begins anew."""
    method = METHODS[name]
    if not installed(method.package):
        pytest.skip(f"{method.package} is not installed")
    pipe = models.load("bundled")
    counter = counting.BlockCounter(pipe.transformer)
    method.apply(pipe, method.settings[-1], STEPS)
    runs = [counting.shares_of(pipe, counter, subjects(1), STEPS) for _ in range(2)]
    (first, shares), (second, again) = runs
    assert shares == again
    assert torch.equal(first, second)
    assert counting.is_full(shares[0])
    assert not all(map(counting.is_full, shares))
    assert method.runs_blocks == (min(shares) > 0)


def test_a_context_is_given_at_each_call():
    """Without one diffusers refuses."""
    pipe = models.load("bundled")
    pipe.transformer.enable_cache(TaylorSeerCacheConfig())
    with pytest.raises(ValueError, match="No cache context"):
        counting.draw(pipe, subjects(1), STEPS)


def row(name="one", package="diffusers", setting=3.0, **more):
    return Row(name, package, "interval", setting, False, **more)


def test_tables_are_read_as_they_were_written(tmp_path):
    table = [
        row("b", setting=5.0, pictures=48, full_steps=12.0, psnr_mean=40.5, seconds=0.25, cache_bytes=7),
        row("a", note="does not, apply"),
        row("b", setting=3.0, versions="torch 2, python 3"),
        row("gone"),
    ]
    path = tmp_path / "peers.csv"
    rows.write(path, table, ["a", "b"])
    assert list(rows.read(path).values()) == [table[1], table[2], table[0]]
    assert rows.read(tmp_path / "none.csv") == {}


def test_rows_that_are_there_are_not_measured_again():
    given = Namespace(model="bundled", intervals=[3.0, 5.0, 7.0], pictures=48, untimed=False, again=False)
    given.timing_only = given.operators_only = False
    table = [
        row(STACK.name, OURS, 3.0, pictures=48, seconds=1.0),
        row(STACK.name, OURS, 5.0, pictures=48),
    ]
    table = {one.key: one for one in table}

    def wanted(**more):
        return list(command.wanted(STACK, Namespace(**{**vars(given), **more}), table))

    assert wanted() == [5.0, 7.0]
    assert wanted(untimed=True) == [7.0]
    assert wanted(pictures=64, untimed=True) == wanted(again=True) == [3.0, 5.0, 7.0]
    assert wanted(timing_only=True) == wanted(operators_only=True) == [3.0, 5.0]


def test_the_worker_adds_rows_to_the_table(full, tmp_path, monkeypatch, capsys):
    table = tmp_path / "peers.csv"
    rows.write(table, [row(STACK.name, OURS, 3.0, pictures=48)], METHODS)
    given = Namespace(model="bundled", pictures=2, rounds=1, untimed=False, threads=None, csv=table)
    given.timing_only = given.operators_only = False
    [_, _, _, *arguments] = command.worker(STACK, [5.0, 7.0], given)
    monkeypatch.setattr(sys, "argv", ["worker", *arguments, "--kept", str(full.parent)])
    worker.main()
    before, *measured = rows.read(table).values()
    assert (before.setting, before.pictures) == (3.0, 48)
    assert [(one.setting, one.pictures, one.full_steps) for one in measured] == [(5.0, 2, 4), (7.0, 2, 3)]
    assert all(one.speedup and one.psnr_mean for one in measured)
    assert "interval 7" in capsys.readouterr().out
    # operators alone
    was = [replace(one, skipped_operators=None) for one in measured]
    rows.write(table, [before, *was], METHODS)
    given.operators_only = True
    [_, _, _, *arguments] = command.worker(STACK, [5.0, 7.0], given)
    monkeypatch.setattr(sys, "argv", ["worker", *arguments, "--kept", str(full.parent)])
    worker.main()
    assert list(rows.read(table).values()) == [before, *measured]


@pytest.mark.slow
def test_the_command_measures_in_a_process_of_its_own(tmp_path, monkeypatch):
    """One setting of ours, from the command to the table; and the second time there is nothing to do."""
    table = tmp_path / "peers.csv"
    arguments = ["peers", "--model", "flux", "--methods", STACK.name, "--rounds", "1", "--csv", str(table)]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command.main()
    [found] = rows.read(table).values()
    assert (found.key, found.full_steps, found.psnr_mean) == ((STACK.name, 7.0), 5, None)
    assert found.seconds is not None
    monkeypatch.setattr(command, "worker", lambda *args: pytest.fail("measured again"))
    command.main()


def test_packages_that_are_not_installed_are_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "installed", lambda package: False)
    monkeypatch.setattr(sys, "argv", ["peers", "--methods", "hicache-pp", "--csv", str(tmp_path / "a.csv")])
    command.main()
    assert "hicache-pp auto: left out: hicache-pp is not installed" in capsys.readouterr().err


def test_ours_is_one_entry():
    """As a file of fitted rows would be: a name, and a function from the interval to arguments of apply()."""
    made = of_hicache.method(
        "mine", lambda interval: {"config": HiCacheConfig(interval=int(interval), order=1)}
    )
    pipe = models.load("bundled")
    counter = counting.BlockCounter(pipe.transformer)
    made.apply(pipe, 4.0, STEPS)
    _, shares = counting.shares_of(pipe, counter, subjects(1), STEPS)
    assert [step for step, share in enumerate(shares) if counting.is_full(share)] == [0, 1, 2, 6]
    assert (made.package, made.runs_blocks, made.settings) == (OURS, False, INTERVALS)
