"""CUDA graphs by output, without a GPU: full steps are captured, and skipped ones have nothing to capture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import hicache.fast
from hicache.cuda_graphs.capture import CudaBackend
from tests.support import pipelines, unets
from tests.support.cuda.runtime import Runtime
from tests.support.fitted import entry_of, file_of
from tests.support.graphs import CONFIG, STEPS, FakeBackend, connect

NOTHING = "nothing of the model runs at skipped steps"
NAMES = ("sd15", "sdxl", "flux", "flux_cfg", "dit")


class Backend(CudaBackend):
    """Takes a denoiser on the CPU for one on ``cuda:1``."""

    def unavailable(self, device: torch.device) -> str | None:
        return super().unavailable(torch.device("cuda", 1))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    monkeypatch.setattr(hicache.fast, "CudaBackend", Backend)
    with Runtime(tensors=1).installed() as mocked:
        yield mocked


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeBackend.made.clear()
    monkeypatch.setattr(FakeBackend, "room", FakeBackend.room)
    monkeypatch.setattr(hicache.fast, "CudaBackend", FakeBackend)


def build(name: str) -> Any:
    return (unets if name in unets.PIPELINES else pipelines).build(name)


def apply(pipe: Any, **more: Any) -> hicache.fast.Handle:
    return hicache.fast.apply(pipe, CONFIG, granularity="output", **more)


def draw(pipe: Any, arguments: dict[str, Any], steps: int = STEPS) -> Tensor:
    with torch.no_grad():
        return pipelines.draw(pipe, arguments, steps)


def runs(arguments: dict[str, Any]) -> list[tuple[dict[str, Any], int]]:
    """Two runs alike, then one of two pictures and fewer steps, and the first again."""
    many = {name: 2 for name in ("num_images_per_prompt",) if "class_labels" not in arguments}
    return [(arguments, STEPS), (arguments, STEPS), ({**arguments, **many}, STEPS - 3), (arguments, STEPS)]


@pytest.mark.few(3)
@pytest.mark.parametrize("name", NAMES)
def test_replays_equal_eager(name: str, faked: None):
    """Into memory that the next replay spoils: what is recorded and returned is a copy."""
    pipe, arguments = build(name)
    given = runs(arguments)
    with apply(pipe, cuda_graphs=False):
        expected = [draw(pipe, *one) for one in given]
    with connect(apply(pipe)) as handle:
        drawn = [draw(pipe, *one) for one in given]
        [stats] = handle.stats.graphs.values()
        contexts = len(handle.stats.contexts)
    assert all(map(torch.equal, drawn, expected))
    assert stats.eager is None
    assert stats.partly == f"only full steps are captured: {NOTHING}"
    # one of each form of call
    assert stats.captures == (1 if name == "dit" else 2)
    assert stats.replays > 12 * contexts


@pytest.mark.few(2)
@pytest.mark.parametrize("name", NAMES)
def test_recorded_operators_equal_eager(name: str, recorded: Runtime):
    pipe, arguments = build(name)
    given = runs(arguments)
    with apply(pipe, cuda_graphs=False):
        expected = [draw(pipe, *one) for one in given]
    with apply(pipe) as handle:
        drawn = [draw(pipe, *one) for one in given]
        [stats] = handle.stats.graphs.values()
    assert all(map(torch.equal, drawn, expected))
    assert (stats.captures, stats.eager) == (1 if name == "dit" else 2, None)


def test_graphs_follow_from_run_to_run_what_is_cached(recorded: Runtime, monkeypatch: pytest.MonkeyPatch):
    """By output in the runs that a file by output holds for, else by module, with skipped steps, too."""
    pipe, arguments = build("flux")
    by_output = file_of(pipe, entry_of(0.01, CONFIG, STEPS), "output")
    monkeypatch.setattr("hicache.offers.shipped", lambda *_: [by_output])
    others = STEPS - 1
    given = [STEPS, STEPS, others, others, STEPS, others, STEPS]
    with hicache.fast.apply(pipe, cuda_graphs=False) as handle:
        expected = [draw(pipe, arguments, steps) for steps in given]
        assert handle.stats.granularity == "output"
    with hicache.fast.apply(pipe) as handle:
        captures, partly, replays = [], [], 0
        for steps, picture in zip(given, expected, strict=True):
            assert torch.equal(draw(pipe, arguments, steps), picture)
            [stats] = handle.stats.graphs.values()
            assert stats.eager is None
            assert stats.replays > replays
            replays = stats.replays
            captures.append(stats.captures)
            partly.append(stats.partly)
    only_full = f"only full steps are captured: {NOTHING}"
    assert partly == [only_full if steps == STEPS else None for steps in given]
    assert captures[:2] == [1, 1]
    # what the modules' graphs read is freed in a run by output, and what its graph reads is nobody's history
    assert captures[2] > 1
    assert captures[3] == captures[4] < captures[5] == captures[6]


def test_skipped_steps_alone_are_nothing_to_capture(faked: None):
    pipe, arguments = build("sd15")
    with connect(apply(pipe, cuda_graphs="skipped")) as handle:
        draw(pipe, arguments)
        [stats] = handle.stats.graphs.values()
    reason = f"{NOTHING}, and full steps are not captured: asked for"
    assert (stats.captures, stats.eager, stats.partly) == (0, reason, None)


def test_graphs_that_leave_too_little_memory_are_not_kept(faked: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(FakeBackend, "room", (100, 10))
    pipe, arguments = build("sd15")
    with apply(pipe, cuda_graphs=False):
        expected = draw(pipe, arguments)
    with connect(apply(pipe)) as handle:
        assert torch.equal(draw(pipe, arguments), expected)
        [stats] = handle.stats.graphs.values()
    assert (stats.captures, stats.partly) == (0, None)
    assert stats.eager is not None
    assert "takes 100 bytes" in stats.eager


def test_a_capture_that_fails_is_not_tried_block_by_block(faked: None):
    """Nothing is known of blocks."""
    pipe, arguments = build("flux")
    with apply(pipe, cuda_graphs=False):
        expected = draw(pipe, arguments)
    with connect(apply(pipe)) as handle:
        [backend] = FakeBackend.made
        backend.fails = RuntimeError("not today")
        assert torch.equal(draw(pipe, arguments), expected)
        [stats] = handle.stats.graphs.values()
    assert backend.captures == 1
    assert (stats.captures, stats.partly) == (0, None)
    assert stats.eager is not None
    assert "not today" in stats.eager
