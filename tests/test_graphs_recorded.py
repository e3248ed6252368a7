"""CUDA graphs by the code that captures on a GPU, over a strict mock of torch.cuda that records operators.

A replay runs no Python: it is the operators of the capture, at the addresses of the capture, and memory that
was freed since is an error. Another device is current than the transformer's, as where a pipeline is on
``cuda:1``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import hicache.fast
from hicache import AnalyticHermite
from hicache.runtime.stream_order import StreamOrder
from hicache.stats import GraphStats
from tests.support import pipelines
from tests.support.comparisons import close
from tests.support.cuda.on_host import Backend, recorded_on_another_device
from tests.support.cuda.runtime import Runtime, Stream, Violation
from tests.support.cuda.tape import FreedMemory
from tests.support.graphs import CONFIG, PIPELINES, STEPS, other_prompt


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    with recorded_on_another_device(monkeypatch) as mocked:
        yield mocked


@pytest.fixture
def backend() -> Backend:
    made = Backend()
    assert made.unavailable(torch.device("cpu")) is None
    return made


def draw(pipe: Any, arguments: dict[str, Any], steps: int = STEPS) -> Tensor:
    with torch.no_grad():
        return pipelines.draw(pipe, arguments, steps)


def runs(arguments: dict[str, Any]) -> list[tuple[dict[str, Any], int]]:
    """Other prompts, resolutions and step counts, and the first run again."""
    larger = {"height": 96} if arguments.get("height") == 64 else {}
    other = other_prompt(arguments)
    return [
        (arguments, STEPS),
        (other, STEPS),
        ({**arguments, **larger}, STEPS),
        (arguments, STEPS - 3),
        ({**other, **larger}, STEPS),
        (arguments, STEPS),
    ]


@pytest.mark.few(2)
@pytest.mark.parametrize("granularity", ["module", "stack"])
@pytest.mark.parametrize(
    ("name", "number"),
    [
        pytest.param(name, number, marks=[pytest.mark.slow] * (number > 2), id=f"{name}, {number} runs")
        for name, number in [("flux", 2), ("wan", 2), *((name, 6) for name in PIPELINES)]
    ],
)
def test_replays_equal_eager(name: str, number: int, granularity: str, runtime: Runtime):
    pipe, arguments = pipelines.build(name)
    wanted = runs(arguments)[:number]
    with hicache.fast.apply(pipe, CONFIG, granularity=granularity, cuda_graphs=False):
        expected = [draw(pipe, given, steps) for given, steps in wanted]
    with hicache.fast.apply(pipe, CONFIG, granularity=granularity) as handle:
        drawn = [draw(pipe, given, steps) for given, steps in wanted]
        [stats] = handle.stats.graphs.values()
        assert stats.eager is None
        assert stats.partly is None
        assert stats.captures == runtime.captures
        assert stats.replays == runtime.replays > 0
        assert stats.pool_nbytes == 1000 * stats.captures
    for ours, theirs in zip(drawn, expected, strict=True):
        assert close(ours, theirs)
    assert runtime.device == 0


def test_replays_take_coefficients_by_feature_that_were_measured_since(runtime: Runtime):
    """A σ for every layer, of each run its own."""
    pipe, arguments = pipelines.build("flux")
    config = replace(CONFIG, basis=AnalyticHermite(alpha=0.1))
    wanted = runs(arguments)[:2]
    with hicache.fast.apply(pipe, config, cuda_graphs=False):
        expected = [draw(pipe, given, steps) for given, steps in wanted]
    with hicache.fast.apply(pipe, config) as handle:
        drawn, sigmas = [], []
        for given, steps in wanted:
            drawn.append(draw(pipe, given, steps))
            sigmas.append(handle.stats.sigmas["transformer[0]"])
        [stats] = handle.stats.graphs.values()
        assert stats.eager is None
        assert stats.replays == runtime.replays > 0
    for ours, theirs in zip(drawn, expected, strict=True):
        assert close(ours, theirs)
    assert all(sigmas[0][layer] != sigmas[1][layer] for layer in sigmas[0])


@pytest.mark.parametrize("granularity", ["module", "stack"])
def test_a_run_on_another_stream_waits_for_the_one_before(
    granularity: str, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
):
    """As those of two threads: what graphs read and write is there once."""
    follow = StreamOrder.follow
    there = torch.device("cuda", runtime.tensors)
    monkeypatch.setattr(StreamOrder, "follow", lambda order, device: follow(order, there))
    pipe, arguments = pipelines.build("flux")
    default = runtime.default(runtime.tensors)
    streams = [Stream(runtime, runtime.tensors) for _ in range(2)]
    for stream in streams:
        stream.wait_stream(default)
    with hicache.fast.apply(pipe, CONFIG, granularity=granularity) as handle:
        drawn = []
        for stream in [*streams, *streams]:
            with torch.cuda.stream(stream):
                drawn.append(draw(pipe, arguments))
        assert handle.stats.graphs["transformer"].replays > 0
    for stream in streams:
        default.wait_stream(stream)
    assert all(torch.equal(picture, drawn[0]) for picture in drawn)


def test_full_steps_alone_are_eager_where_there_is_no_room(runtime: Runtime):
    pipe, arguments = pipelines.build("flux")
    with hicache.fast.apply(pipe, CONFIG, cuda_graphs=False):
        expected = draw(pipe, arguments)
    runtime.takes = runtime.free * 2 // 3
    with hicache.fast.apply(pipe, CONFIG) as handle:
        assert close(draw(pipe, arguments), expected)
        partly = handle.stats.graphs["transformer"].partly
    assert partly is not None
    assert "only skipped steps are captured: that of a full step takes" in partly


def test_a_capture_that_fails_leaves_streams_pools_and_device(runtime: Runtime, backend: Backend):
    """And the next one succeeds."""
    given = torch.ones(3)

    def fails() -> Tensor:
        return given * 2 if (given * 2).sum().item() else given

    backend.warm(lambda: given * 2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            backend.capture(fails)
        assert runtime.graph is None
        assert not runtime.allocating
        assert (runtime.device, runtime.stream()) == (0, runtime.default(0))
        torch.cuda.empty_cache()
    captured = backend.capture(lambda: given * 3)
    given.fill_(2)
    captured.replay()
    assert (captured.output == 6).all()


def _let_embedding_wait(pipe: Any) -> None:
    """Have the embedding before the blocks read a number from the device."""
    embed = pipe.transformer.x_embedder.forward

    class Waiting(type(pipe.transformer.x_embedder)):  # type: ignore[misc]
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden) if hidden.sum().item() else embed(hidden)

    pipe.transformer.x_embedder.__class__ = Waiting


def test_a_failed_capture_of_a_whole_call_is_followed_by_blocks(runtime: Runtime):
    """An embedding that waits for the device is found before its capture is begun."""
    pipe, arguments = pipelines.build("flux")
    _let_embedding_wait(pipe)
    with hicache.fast.apply(pipe, CONFIG, cuda_graphs=False):
        expected = draw(pipe, arguments)
    with hicache.fast.apply(pipe, CONFIG) as handle:
        assert close(draw(pipe, arguments), expected)
        assert close(draw(pipe, arguments), expected)
        stats = handle.stats.graphs["transformer"]
    assert stats.eager is None
    assert "only its blocks are captured" in (stats.partly or "")
    assert runtime.replays == stats.replays > 0
    assert runtime.captures == stats.captures  # none was begun in vain


def test_a_pool_without_graphs_is_not_captured_into(runtime: Runtime, backend: Backend):
    given = torch.ones(3)
    kept = backend.capture(lambda: given * 2).output  # the graph is gone, a tensor of its pool is not
    backend.drop()
    assert backend.capture(lambda: given * 3).output is not kept


def test_what_the_mock_finds(runtime: Runtime, backend: Backend, monkeypatch: pytest.MonkeyPatch):
    """The rules that the tests above rest on, each broken once."""
    given = [torch.ones(3)]
    captured = backend.capture(lambda: given[0] * 2)
    with pytest.raises(RuntimeError, match="use_count"):
        pool = torch.cuda.graph_pool_handle()
        pool.used = True
        backend._pool = pool
        backend.capture(lambda: given[0] * 2)
    given.clear()
    with pytest.raises(FreedMemory):
        captured.replay()
    side = torch.cuda.Stream()
    with pytest.raises(Violation, match="may not have written"), torch.cuda.device(1):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            made = torch.ones(3) * 2
        made + 1
    with pytest.raises(Violation, match="capture on cuda:0"):
        torch.cuda.CUDAGraph().capture_begin(torch.cuda.graph_pool_handle())
    with pytest.raises(RuntimeError, match="non-default stream"), torch.cuda.device(1):
        torch.cuda.CUDAGraph().capture_begin(torch.cuda.graph_pool_handle())


# Memory.


def _held(handle: Any) -> GraphStats:
    [stats] = handle.stats.graphs.values()
    return stats


def test_release_frees_all_that_graphs_have_of_the_device(runtime: Runtime):
    """Pools are the device's again, and so is what stands beside them."""
    runtime.takes = None
    pipe, arguments = pipelines.build("flux_cfg")
    with hicache.fast.apply(pipe, CONFIG) as handle:
        draw(pipe, arguments)
        before = handle.stats
        assert runtime.pool_nbytes == _held(handle).pool_nbytes > 0
        assert before.nbytes == sum(
            (before.history_bytes, before.gates_bytes, before.kept_bytes, _held(handle).nbytes)
        )
        assert min(before.gates_bytes, before.kept_bytes, _held(handle).input_nbytes) > 0
        handle.release()
        assert runtime.pool_nbytes == handle.stats.nbytes == 0
        draw(pipe, arguments)
        assert runtime.pool_nbytes > 0
    assert runtime.pool_nbytes == 0


def test_only_graphs_that_fit_the_budget_beside_the_history_are_made(runtime: Runtime):
    """Full steps first go without, then skipped ones; the history and what is drawn stay the same."""
    pipe, arguments = pipelines.build("flux")
    with hicache.fast.apply(pipe, CONFIG, cuda_graphs=False) as handle:
        expected = draw(pipe, arguments)
        stats = handle.stats
        cached = stats.history_bytes + stats.gates_bytes + stats.kept_bytes
    runtime.takes = None
    wanted = {}
    for choice in ("auto", "skipped"):
        with hicache.fast.apply(pipe, CONFIG, cuda_graphs=choice) as handle:
            draw(pipe, arguments)
            wanted[choice] = _held(handle).nbytes
    assert wanted["skipped"] < wanted["auto"]
    budgets = {
        cached + wanted["auto"]: None,
        # less by more than the gates that the next skipped steps are waiting for
        cached + wanted["auto"] - 4096: "only skipped steps are captured: they would take about ",
        cached + wanted["skipped"]: "only skipped steps are captured: they would take about ",
        cached: "nothing more is captured in this run: they would take about ",
    }
    for budget, why in budgets.items():
        captures = runtime.captures
        with hicache.fast.apply(pipe, CONFIG, memory_budget=budget) as handle:
            for _ in range(2):
                assert close(draw(pipe, arguments), expected)
                stats = handle.stats
                assert (_held(handle).partly is None) if why is None else _held(handle).partly.startswith(why)
                assert stats.granularity == "module"
                assert runtime.pool_nbytes == _held(handle).pool_nbytes
                assert stats.nbytes <= budget
                assert (_held(handle).nbytes > 0) == (budget > cached)
        assert (runtime.captures > captures) == (budget > cached)  # what will not fit is not begun
        if why is not None:
            with hicache.fast.apply(pipe, CONFIG, memory_budget=budget, cuda_graphs="full") as handle:
                draw(pipe, arguments)
                assert _held(handle).partly is None
                assert _held(handle).nbytes == wanted["auto"]


@pytest.mark.parametrize("takes", [136_000, 30_000], ids=["more than is left", "less"])
def test_graphs_never_make_a_history_coarser(takes: int, runtime: Runtime):
    """Those of a small picture go when a larger one wants their part of the budget, history or graphs."""
    pipe, arguments = pipelines.build("flux")
    larger = {**arguments, "height": 128}
    with hicache.fast.apply(pipe, CONFIG, cuda_graphs=False) as handle:
        expected = draw(pipe, larger)
        stats = handle.stats
        left = 400_000
        budget = stats.history_bytes + stats.gates_bytes + stats.kept_bytes + left
    runtime.takes = takes
    with hicache.fast.apply(pipe, CONFIG, memory_budget=budget) as handle:
        draw(pipe, arguments)
        assert _held(handle).pool_nbytes == 3 * takes
        assert (_held(handle).nbytes > left) == (takes == 136_000)
        draw(pipe, larger, steps=2)  # before anything is captured anew
        assert handle.stats.nbytes <= budget
        assert close(draw(pipe, larger), expected)
        assert handle.stats.granularity == "module"
        assert handle.stats.nbytes <= budget
        assert runtime.pool_nbytes == _held(handle).pool_nbytes
        assert (_held(handle).partly is None) == (takes == 30_000)


def test_blocks_alone_keep_to_the_budget(runtime: Runtime):
    pipe, arguments = pipelines.build("flux")
    _let_embedding_wait(pipe)
    with hicache.fast.apply(pipe, CONFIG) as handle:
        expected = draw(pipe, arguments)
        assert "only its blocks are captured" in (_held(handle).partly or "")
        stats = handle.stats
        cached = stats.nbytes - _held(handle).nbytes
    runtime.takes, captures = None, runtime.captures
    with hicache.fast.apply(pipe, CONFIG, memory_budget=cached) as handle:
        for _ in range(2):
            assert close(draw(pipe, arguments), expected)
            assert runtime.captures == captures  # what will not fit is not begun
            assert (_held(handle).partly or "").startswith("nothing more is captured in this run: ")
            assert _held(handle).nbytes == runtime.pool_nbytes == 0
            assert _held(handle).eager is None
