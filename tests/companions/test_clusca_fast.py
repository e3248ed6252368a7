"""ClusCa and Hi-ClusCa in the fast path: by the reference, without a wait, and under CUDA graphs."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hicache.fast
import hicache.reference
from benchmarks import waits
from hicache import AnalyticHermite, HiCacheConfig
from hicache.companions.clusca import ClusCa
from hicache.companions.clusca.correction import ClusterCorrection
from hicache.companions.clusca.draws import Groups
from hicache.companions.clusca.families import double_blocks
from hicache.companions.clusca.settings import LABELS, VARIANTS
from hicache.cuda_graphs.call_graph import CallArguments
from hicache.launch.drawing import Painter
from hicache.launch.loading import Place, load, resolve
from hicache.launch.prompts import Prompt
from hicache.launch.settings import Settings
from hicache.launch.tasks import Picture, Task
from hicache.runtime import finite
from hicache.step_plan import FullStep, RunningCall
from tests.support import pipelines
from tests.support.clusca import (
    CONFIG,
    FAMILIES,
    MANY,
    TAYLOR,
    Spy,
    by_reference,
    off,
    recorded,
    with_full_mlps,
)
from tests.support.comparisons import snapshot
from tests.support.cuda.on_host import recorded_on_another_device
from tests.support.cuda.runtime import Runtime
from tests.support.graphs import other_prompt
from tests.support.runs import recorded_in, replay
from tests.support.schedulers import CountingScheduler
from tests.support.skipped_steps import SYNCS, operations, skipped


def by_fast(name: str, clusters: ClusCa | None, config: HiCacheConfig = CONFIG, **more: Any) -> Tensor:
    model, run = recorded(name)
    scheduler = CountingScheduler()
    with hicache.fast.apply(model, config, scheduler=scheduler, clusters=clusters, **more) as handle:
        returned = replay(model, run, scheduler)
        assert handle.stats.granularity == "module"
    return returned


def settings(variant: str, **more: Any) -> ClusCa:
    return ClusCa(**{"clusters": 4, "rho": 0.1, "variant": variant, **more})


each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_family = pytest.mark.parametrize("name", FAMILIES)


@each_family
def test_1_interval_one_is_bit_for_bit_the_full_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr(Groups, "of", lambda *args: found.append(args))
    model, run = recorded(name)
    assert torch.equal(by_fast(name, settings("exact"), HiCacheConfig(interval=1)), replay(model, run))
    assert not found


@each_family
def test_2_no_clusters_is_plain_hicache(name: str) -> None:
    plain = by_fast(name, None, granularity="module")
    assert torch.equal(by_fast(name, ClusCa(clusters=0)), plain)
    assert off(by_fast(name, settings("exact")), plain) > 1e-4


@pytest.mark.parametrize("variant", ["exact", "residual"])
def test_3_mlps_that_give_the_forecast_change_nothing(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ρ = 0: the tables are made of what values are off by, which is nothing."""
    plain = by_fast("flux", None, granularity="module")
    tables = ClusterCorrection._tables

    def of_forecasts(correction: ClusterCorrection, total: Any, *given: Any) -> Any:
        ahead = type(total).ahead
        made: list[Tensor] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(total), "ahead", lambda *args: made.append(ahead(*args)) or made[-1])
            patch.setattr(
                type(correction.mlps),
                "on_rows",
                lambda mlps, present, *_: [
                    lambda rows, mlp=mlp: made[-1][mlp.feature].clone() for mlp in present
                ],
            )
            return tables(correction, total, *given)

    monkeypatch.setattr(ClusterCorrection, "_tables", of_forecasts)
    assert off(by_fast("flux", settings(variant, rho=0.0)), plain) < 1e-6


# of editing pipelines the tokens of the picture drawn are clustered; with a cluster a token that is no matter
@pytest.mark.few(6)
@pytest.mark.parametrize("name", [*FAMILIES, "flux_kontext", "qwen_edit", "qwen_edit_2509"])
@pytest.mark.parametrize("variant", ["exact", "residual"])
def test_4_a_cluster_a_token_runs_every_mlp_in_full(
    name: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = with_full_mlps(name, monkeypatch)
    assert off(by_fast(name, settings(variant, clusters=MANY)), wanted) < 1e-10


@pytest.mark.few(16)
@each_family
@each_variant
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("config", [CONFIG, TAYLOR], ids=["hermite", "taylor"])
def test_5_it_is_the_reference(name: str, variant: str, labels: str, config: HiCacheConfig) -> None:
    chosen = settings(variant, labels=labels)
    assert off(by_fast(name, chosen, config), by_reference(name, chosen, config)) < 1e-10


@each_variant
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_5_where_every_layer_has_coefficients_of_its_own(name: str, variant: str) -> None:
    config = HiCacheConfig(interval=4, basis=AnalyticHermite())
    chosen = settings(variant)
    assert off(by_fast(name, chosen, config), by_reference(name, chosen, config)) < 1e-10


@each_variant
@pytest.mark.parametrize("name", ["flux_many", "sd3_many", "sd3_skip_layer"])
def test_5_in_batches_and_beside_guidance(name: str, variant: str) -> None:
    assert off(by_fast(name, settings(variant)), by_reference(name, settings(variant))) < 1e-10


@each_variant
@pytest.mark.parametrize("clusters", [16, 64, MANY])
def test_5_with_as_many_clusters_as_tokens_or_more(variant: str, clusters: int) -> None:
    chosen = settings(variant, clusters=clusters)
    assert off(by_fast("flux", chosen), by_reference("flux", chosen)) < 1e-10


@each_variant
@pytest.mark.parametrize("order", [0, 1, 4])
def test_5_at_every_order_and_last_step_full(variant: str, order: int) -> None:
    config = HiCacheConfig(interval=3, order=order, last_step_full=True)
    chosen = settings(variant)
    assert off(by_fast("flux", chosen, config), by_reference("flux", chosen, config)) < 1e-10


@pytest.mark.few(4)
@each_variant
@pytest.mark.parametrize("name", FAMILIES)
def test_5_pictures_one_after_the_other_are_the_reference_too(name: str, variant: str) -> None:
    """Whole pipelines, where a step is made of what the last one gave: the same clusters, the same draws."""
    pipe, arguments = pipelines.in_float64(name)
    prompts = [arguments, other_prompt(arguments), arguments]
    if name == "dit":
        prompts[1] = {**arguments, "class_labels": [3]}
    drawn = []
    for module in (hicache.reference, hicache.fast):
        with module.apply(pipe, CONFIG, clusters=settings(variant)):
            drawn.append([pipelines.draw(pipe, given) for given in prompts])
    wanted, got = drawn
    for one, other in zip(got, wanted, strict=True):
        assert off(one.double(), other.double()) < 1e-10
    assert got[0].equal(got[2])
    assert not got[0].equal(got[1])


@pytest.mark.few(3)
@each_variant
@pytest.mark.parametrize("name", ["flux", "sd3", "qwen"])
def test_5_other_sizes_are_clustered_anew(name: str, variant: str) -> None:
    pipe, arguments = pipelines.in_float64(name)
    sizes = [arguments, {**arguments, "height": 96}, arguments]
    drawn = []
    for module in (hicache.reference, hicache.fast):
        with module.apply(pipe, CONFIG, clusters=settings(variant)):
            drawn.append([pipelines.draw(pipe, given) for given in sizes])
    for one, other in zip(*drawn, strict=True):
        assert off(one, other) < 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@each_variant
def test_5_in_low_precision_it_is_as_near_to_float64_as_the_reference(
    dtype: torch.dtype, variant: str
) -> None:
    chosen, (model, run) = settings(variant, labels="once-first-block"), recorded_in("flux", dtype)
    returned = []
    for module in (hicache.reference, hicache.fast):
        scheduler = CountingScheduler()
        with module.apply(model, CONFIG, scheduler=scheduler, clusters=chosen):
            returned.append(replay(model, run, scheduler))
    exact = by_reference("flux", chosen)
    theirs, ours = (float((one - exact).norm() / exact.norm()) for one in returned)
    assert ours <= 2 * theirs + 1e-6


@each_variant
def test_the_history_is_written_to_by_the_upstream_variant_alone(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a skipped step without a waiting update."""
    changed: list[bool] = []
    call = ClusterCorrection.__call__

    def watched(correction: ClusterCorrection, total: Any, *given: Any) -> Tensor:
        before = total.orders.clone()
        result = call(correction, total, *given)
        if total.inv_gap is None:
            filled = len(total.coeffs)
            changed.append(not total.orders[:filled].equal(before[:filled]))
        return result

    monkeypatch.setattr(ClusterCorrection, "__call__", watched)
    by_fast("flux", settings(variant))
    assert set(changed) == {variant == "upstream"}


def test_7_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    one = by_fast("flux", settings("upstream", seed=5))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(by_fast("flux", settings("upstream", seed=6)), one)


@pytest.mark.parametrize(("name", "calls"), [("flux", 1), ("flux_many", 2), ("sd3_many", 1), ("qwen", 2)])
@each_variant
def test_9_an_mlp_is_called_once_a_block_on_a_token_a_cluster(name: str, calls: int, variant: str) -> None:
    model, run = recorded(name)
    batch = len(run[0][0][1]["hidden_states"])
    with Spy(model) as shapes:
        by_fast(name, settings(variant, clusters=5))
    blocks = len(double_blocks(model))
    assert len(shapes) == calls * 12 * blocks
    few = [shape for shape in shapes if shape[1] == 5]
    assert len(few) == calls * 7 * blocks
    assert {shape[0] for shape in few} == {batch}


def test_9_lora_is_part_of_what_is_computed() -> None:
    """As it is of the reference: the module itself is called."""
    lora = pytest.importorskip("peft").LoraConfig
    pipe, arguments = pipelines.in_float64("flux")
    pipe.transformer.add_adapter(lora(r=2, target_modules=["ff.net.2"], init_lora_weights=False))
    pipe.transformer.to(torch.float64)
    drawn = []
    for module in (hicache.reference, hicache.fast):
        with module.apply(pipe, CONFIG, clusters=settings("exact")):
            drawn.append(pipelines.draw(pipe, arguments))
    assert off(*drawn) < 1e-10
    pipe.transformer.disable_adapters()
    with hicache.fast.apply(pipe, CONFIG, clusters=settings("exact")):
        assert off(pipelines.draw(pipe, arguments), drawn[0]) > 1e-6


# 10: what a skipped step costs.


@pytest.mark.few(3)
@pytest.mark.parametrize("name", ["flux", "sd3", "qwen"])  # whose pipelines tell of their steps
@each_variant
def test_10_no_later_step_waits_for_the_device(name: str, variant: str) -> None:
    labels = LABELS[name == "flux"]
    with waits.emulated() as seen, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe, arguments = waits.build(name, seen)
        chosen = settings(variant, labels=labels)
        with hicache.fast.apply(pipe, waits.CONFIG, clusters=chosen, cuda_graphs=False):
            runs = [waits.of_a_run(seen, pipe, arguments) for _ in range(2)]
    for run in runs:
        for kind in ("later full steps", "later skipped steps"):
            assert not [wait for step in waits.of_kind(run, kind) for wait in step if wait.own]
    first = [
        wait.function for step in waits.of_kind(runs[1], "first skipped step") for wait in step if wait.own
    ]
    assert not first


@each_variant
def test_10_no_skipped_step_of_dit_reads_the_device(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "reading", lambda flag: lambda: None)
    calls = operations(*pipelines.build("dit"), "module", clusters=settings(variant))
    assert not [name for seen in skipped(calls)[1:] for name in seen if name.split(".")[1] in SYNCS]


@pytest.mark.parametrize("variant", ["exact", "residual"])
def test_10_a_step_is_one_sum_over_the_history_and_a_table(variant: str) -> None:
    """Beside the sum there is one forecast, of a few rows; all tokens are touched once more, by a gather."""
    chosen = settings(variant)
    deep = skipped(operations(*pipelines.build("flux", doubles=4, singles=3), "module", clusters=chosen))
    shallow = skipped(operations(*pipelines.build("flux", doubles=2, singles=9), "module", clusters=chosen))
    for seen, other in zip(deep, shallow, strict=True):
        kernels = [name.split(".")[1] for name in seen.elements() if name.startswith("hicache.")]
        assert sorted("gated_sum" in name for name in kernels) == [False, True]
        assert not [name for name in seen if name.split(".")[1] in SYNCS]
        blocks = seen.total() - other.total()
        assert 0 < blocks <= 2 * 40  # of two more double blocks; singles cost nothing


# CUDA graphs.


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    with recorded_on_another_device(monkeypatch) as mocked:
        yield mocked


def some() -> Iterator[Any]:
    """Every fifth of what there is, and all of FLUX; the rest is slow."""
    for index, case in enumerate(itertools.product(FAMILIES, VARIANTS, LABELS)):
        slow = case[0] != "flux" and index % 5 > 0
        yield pytest.param(*case, id=", ".join(case), marks=[pytest.mark.slow] * slow)


@pytest.mark.few(3)
@pytest.mark.parametrize(("name", "variant", "labels"), [*some()])
def test_replays_equal_eager(name: str, variant: str, labels: str, runtime: Runtime) -> None:
    pipe, arguments = pipelines.build(name)
    other = {**arguments, "class_labels": [3]} if name == "dit" else other_prompt(arguments)
    wanted = [arguments, other, arguments, other]
    chosen = settings(variant, labels=labels)
    with torch.no_grad():
        with hicache.fast.apply(pipe, CONFIG, clusters=chosen, cuda_graphs=False):
            expected = [pipelines.draw(pipe, given) for given in wanted]
        with hicache.fast.apply(pipe, CONFIG, clusters=chosen) as handle:
            drawn = [pipelines.draw(pipe, given) for given in wanted]
            [stats] = handle.stats.graphs.values()
    assert stats.eager is None
    assert stats.partly is None
    assert stats.replays == runtime.replays > 0
    for ours, theirs in zip(drawn, expected, strict=True):
        assert off(ours, theirs) < 1e-5


@pytest.mark.few(1)
@each_variant
def test_blocks_may_be_compiled_one_by_one(variant: str) -> None:
    pipe, arguments = pipelines.build("flux")
    with hicache.fast.apply(pipe, CONFIG, clusters=settings(variant)):
        expected = pipelines.draw(pipe, arguments)
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    with hicache.fast.apply(pipe, CONFIG, clusters=settings(variant)):
        assert off(pipelines.draw(pipe, arguments), expected) < 1e-5
    torch._dynamo.reset()


def test_a_graph_of_a_full_step_serves_the_memory_it_was_captured_with() -> None:
    """What clusters are found in is written to as the history is: at the place of the capture."""
    call, slot, memory = RunningCall(), torch.zeros(1, 2, 3), [torch.zeros(1, 2, 3) for _ in range(2)]
    keys = []
    for place in (memory[0], memory[1], memory[0]):
        call.plan = FullStep((slot,), corrected_by=(place,))
        keys.append(CallArguments.of(call, (), {}).key)
    assert keys[0] == keys[2] != keys[1]


# What cannot be had.


def refused(name: str, **more: Any) -> str:
    """What is said of a pipeline as it draws; it draws on without."""
    pipe, arguments = pipelines.build(name)
    pipelines.draw(pipe, arguments)
    before = {part: snapshot(model) for part, model in pipelines.denoisers(pipe).items()}
    with (
        hicache.fast.apply(pipe, CONFIG, clusters=settings("exact"), **more),
        pytest.raises(RuntimeError) as raised,
    ):
        pipelines.draw(pipe, arguments)
    assert {part: snapshot(model) for part, model in pipelines.denoisers(pipe).items()} == before
    pipelines.draw(pipe, arguments)
    return str(raised.value)


def test_calls_whose_steps_between_blocks_are_not_known_are_refused_with_the_reason() -> None:
    assert "FluxTransformer2DModel cannot be corrected: a ControlNet adds" in refused("flux_controlnet")
    assert "SD3Transformer2DModel cannot be corrected: a ControlNet adds" in refused("sd3_controlnet")
    assert "an image prompt (IP-Adapter) adds to its hidden state" in refused("flux_ip_adapter")


@pytest.mark.parametrize("warmup", [1, 3])
def test_calls_without_the_last_double_block_are_refused_with_the_reason(warmup: int) -> None:
    """Skip-layer guidance leaves blocks out; which, is known once such a call has been made."""
    pipe, arguments = pipelines.build("sd3_skip_layer")
    last = len(pipe.transformer.transformer_blocks) - 1
    config = HiCacheConfig(interval=4, warmup=warmup)
    with (
        hicache.fast.apply(pipe, config, clusters=settings("exact")),
        pytest.raises(RuntimeError, match="its last double block is left out"),
    ):
        pipelines.draw(pipe, {**arguments, "skip_guidance_layers": [last]})


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_runs_in_either_mode_of_torch_go_on_from_each_other(mode: Any) -> None:
    pipe, arguments = pipelines.build("flux")
    with hicache.fast.apply(pipe, CONFIG, clusters=settings("upstream")):
        with torch.inference_mode():
            one = pipelines.draw(pipe, arguments).clone()
        with mode():
            two = pipelines.draw(pipe, arguments).clone()
        assert torch.equal(one, two)


def test_a_transformer_compiled_as_a_whole_is_refused_with_the_reason() -> None:
    pipe, arguments = pipelines.build("flux")
    pipe.transformer.compile(backend="eager")
    with (
        hicache.fast.apply(pipe, CONFIG, clusters=settings("exact")),
        pytest.raises(RuntimeError, match=r"compiled as a whole .*compile_repeated_blocks"),
    ):
        pipelines.draw(pipe, arguments)
    torch._dynamo.reset()


def test_offloaded_blocks_are_refused_with_the_reason() -> None:
    pipe, arguments = pipelines.build("flux")
    pipelines.offload_groups(pipe)
    with (
        hicache.fast.apply(pipe, CONFIG, clusters=settings("exact")),
        pytest.raises(RuntimeError, match=r"at hand in their own blocks only .*every skipped step would"),
    ):
        pipelines.draw(pipe, arguments)


@pytest.mark.parametrize(
    ("name", "given", "error", "said"),
    [
        ("wan", {}, ValueError, "MLPs of double blocks in WanTransformer3DModel are not known; known models"),
        (
            "flux",
            {"granularity": "stack"},
            ValueError,
            "expected granularity='module' or 'auto', got 'stack'",
        ),
        ("flux", {"granularity": "output"}, ValueError, "'auto', got 'output'"),
        (
            "flux",
            {"clusters": 16},
            TypeError,
            "expected clusters to be settings of a companion or None, got 16",
        ),
    ],
)
def test_a_bad_argument_says_what_was_expected_and_leaves_the_pipeline(
    name: str, given: dict[str, Any], error: type, said: str
) -> None:
    pipe, _ = pipelines.build(name)
    before = {part: snapshot(model) for part, model in pipelines.denoisers(pipe).items()}
    with pytest.raises(error) as raised:
        hicache.fast.apply(pipe, CONFIG, **{"clusters": ClusCa(), **given})
    assert said in str(raised.value)
    assert {part: snapshot(model) for part, model in pipelines.denoisers(pipe).items()} == before


def test_remove_takes_all_hooks_off() -> None:
    pipe, arguments = pipelines.build("flux")
    pipelines.draw(pipe, arguments)
    before = snapshot(pipe.transformer)
    handle = hicache.fast.apply(pipe, CONFIG, clusters=ClusCa(clusters=4))
    pipelines.draw(pipe, arguments)
    assert "4 clusters of tokens, exact, full-steps" in str(handle.stats)
    handle.remove()
    assert snapshot(pipe.transformer) == before


def test_what_it_holds_is_counted() -> None:
    """What clusters are found in, the clusters, and the numbers."""
    pipe, arguments = pipelines.build("flux")
    held = []
    for clusters in (None, ClusCa(clusters=4)):
        with hicache.fast.apply(pipe, CONFIG, clusters=clusters, granularity="module") as handle:
            pipelines.draw(pipe, arguments)
            held.append(handle.stats.kept_bytes)
    tokens, channels, features = 16, 32, 6
    hidden, labels = tokens * channels * 4, 2 * tokens * 8
    assert held[1] - held[0] == hidden + labels + 4 * channels * 4 + 2 * 4 * 8 + features * 8 + 257 * 4 * 8


def test_the_fast_path_does_not_import_it() -> None:
    import subprocess
    import sys

    code = "import sys, hicache.fast; print([name for name in sys.modules if 'clusca' in name])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_gradients_and_a_call_that_fails_leave_it_whole() -> None:
    """Half a run, then a whole one: as if the first had not been."""
    pipe, arguments = pipelines.build("flux")
    with hicache.fast.apply(pipe, CONFIG, clusters=settings("upstream")):
        wanted = pipelines.draw(pipe, arguments)

        def stop(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
            if step == 4:
                raise KeyboardInterrupt
            return given

        with pytest.raises(KeyboardInterrupt):
            pipelines.draw(pipe, other_prompt(arguments), callback_on_step_end=stop)
        assert pipelines.draw(pipe, arguments).equal(wanted)


# By the command line.


@pytest.mark.parametrize(("mode", "basis"), [("clusca", "taylor"), ("hi-clusca", "hermite")])
def test_modes_of_the_launcher(mode: str, basis: str) -> None:
    """The bundled model draws as it does by hand, and what made a picture is told of it."""
    chosen, backend = resolve(Settings(mode=mode, steps=8, interval=3))
    pipe = load(chosen, Place())
    painter = Painter(pipe, chosen, backend)
    arguments = painter.arguments(Task((Picture(0, 5, Prompt(0, "a red ring on blue")),), frozenset({0})))
    drawn = painter.drawn(arguments)
    assert painter._handle is not None
    assert "16 clusters of tokens" in str(painter._handle.stats)
    painter.close()
    arguments["generator"].manual_seed(5)
    with hicache.fast.apply(pipe, HiCacheConfig(interval=3, basis=basis), clusters=ClusCa()):
        again = painter.drawn(arguments)
    assert np.array_equal(np.asarray(drawn[0]), np.asarray(again[0]))
    assert chosen.granularity == "module"
    assert chosen.plain()["clusters"] == dataclasses.asdict(ClusCa())
    assert "clusters" not in Settings(mode=basis.replace("hermite", "hicache")).plain()
    with pytest.raises(ValueError, match="unknown granularity 'stack'; expected one of auto, module"):
        Settings(mode=mode, granularity="stack")
