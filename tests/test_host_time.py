"""What the host does in a skipped step, counted: calls of functions, weights looked at, trees taken apart."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import hicache.fast
from benchmarks.host_time.probe import NothingReplayed
from hicache import Engine, HiCacheConfig, compat, register_basis
from hicache.basis import unregister_basis
from hicache.hooks.caller import CallerFinder
from hicache.hooks.timesteps import Rule
from hicache.runtime.known_call import KnownCall
from hicache.runtime.timestep_check import TimestepCheck
from hicache.trees import leaves_of, put_together, take_apart, tensors_of
from tests.support import pipelines
from tests.support.graphs import CONFIG
from tests.support.schedulers import flow_matching

PACKAGE = str(Path(hicache.__file__).parent)
STEP = 10  # a skipped one of CONFIG that takes in no update


class Calls:
    """Counts, while it is entered, functions of hicache that are called and weights' addresses asked for."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        self.of_hicache: Counter[str] = Counter()
        self.addresses = 0
        self._weights = {id(weight) for weight in weights}

    def _see(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            self.of_hicache[frame.f_code.co_qualname if sys.version_info >= (3, 11) else "call"] += 1
        if event == "c_call" and getattr(argument, "__name__", "") == "data_ptr":
            self.addresses += id(getattr(argument, "__self__", None)) in self._weights

    def __enter__(self) -> Calls:
        sys.setprofile(self._see)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)


def skipped_step(
    monkeypatch: pytest.MonkeyPatch, granularity: str, graphs: bool, blocks: int = 2
) -> tuple[Calls, Any]:
    """What a skipped step calls in the third picture, and the handle's statistics."""
    monkeypatch.setattr(hicache.fast, "CudaBackend", NothingReplayed)
    pipe, arguments = pipelines.flux(blocks, blocks)
    transformer = pipe.transformer
    inside = [
        weight
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
        for weight in block.parameters()
    ]
    calls = Calls(inside)
    seen: list[int] = []

    class Watched(torch.nn.Module):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(len(seen))
            call = super().__call__
            if len(seen) - 1 != 2 * 14 + STEP:
                return call(*args, **kwargs)
            with calls:
                return call(*args, **kwargs)

    wanted = "auto" if graphs else False
    with hicache.fast.apply(pipe, CONFIG, granularity=granularity, cuda_graphs=wanted) as handle:
        cls = type(transformer)
        transformer.__class__ = type(cls)(cls.__name__, (Watched, cls), {"__module__": cls.__module__})
        for _ in range(3):
            pipelines.draw(pipe, arguments, 14)
        stats = handle.stats
        transformer.__class__ = cls
    assert len(seen) == 3 * 14
    return calls, stats


@pytest.mark.parametrize(
    ("granularity", "graphs", "most"),
    [("module", True, 143), ("stack", True, 123), ("module", False, 152), ("stack", False, 146)],
)
def test_calls_of_a_skipped_step(granularity: str, graphs: bool, most: int, monkeypatch: pytest.MonkeyPatch):
    calls, stats = skipped_step(monkeypatch, granularity, graphs)
    if graphs:
        assert stats.graphs["transformer"].replays
    assert 20 < sum(calls.of_hicache.values()) <= most, calls.of_hicache.most_common()


@pytest.mark.parametrize("granularity", ["module", "stack"])
def test_calls_do_not_grow_with_depth(granularity: str, monkeypatch: pytest.MonkeyPatch):
    few, many = (skipped_step(monkeypatch, granularity, True, blocks)[0] for blocks in (2, 4))
    assert sum(many.of_hicache.values()) == sum(few.of_hicache.values()), many.of_hicache - few.of_hicache


def test_no_weight_of_a_block_is_looked_at_in_a_skipped_step_of_the_stack(monkeypatch: pytest.MonkeyPatch):
    calls, _ = skipped_step(monkeypatch, "stack", True)
    assert calls.addresses == 0


# Calls that are like the last one.


def call() -> dict[str, Any]:
    return {
        "hidden_states": torch.zeros(1, 4, 8),
        "encoder_hidden_states": torch.zeros(1, 3, 8),
        "timestep": torch.zeros(1),
        "attention_kwargs": {"scale": 1.0},
        "mode": "read",
        "return_dict": False,
    }


def test_a_call_with_another_hidden_state_is_like_the_last():
    first = call()
    known = KnownCall("cond", first)
    later = {**first, "hidden_states": torch.ones(1, 4, 8), "timestep": torch.ones(1)}
    assert known.is_like("cond", later)


@pytest.mark.parametrize(
    "change",
    [
        lambda given: given.update(hidden_states=torch.zeros(1, 5, 8)),
        lambda given: given.update(hidden_states=torch.zeros(1, 4, 8, dtype=torch.float64)),
        lambda given: given.update(hidden_states=torch.zeros(1, 4, 8, device="meta")),
        lambda given: given.update(hidden_states=None),
        lambda given: given.update(encoder_hidden_states=torch.zeros(1, 3, 8)),
        lambda given: given["encoder_hidden_states"].add_(1),
        lambda given: given.update(attention_kwargs={"picture": torch.zeros(1)}),
        lambda given: given.update(attention_kwargs={"layers": [3]}),
        lambda given: given.update(mode="write"),
        lambda given: given.update(more=None),
        lambda given: given.pop("mode"),
        lambda given: given.update(return_dict=torch.zeros(1)),
    ],
)
def test_a_call_of_another_form_or_prompt_is_not(change: Any):
    first = call()
    known = KnownCall("cond", first)
    later = dict(first)
    change(later)
    assert not known.is_like("cond", later)


def test_nor_one_of_another_name_or_under_autocast():
    first = call()
    known = KnownCall("cond", first)
    assert not known.is_like("uncond", first)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not known.is_like("cond", first)


# Who calls.


class Pipeline:
    def __init__(self, transformer: Any) -> None:
        self.transformer, self.scheduler = transformer, flow_matching()

    def __call__(self, finder: CallerFinder) -> Any:
        return finder.find().scheduler


def test_the_pipeline_found_last_is_looked_at_again():
    transformer = torch.nn.Linear(1, 1)
    pipe, other = Pipeline(transformer), Pipeline(transformer)
    finder = CallerFinder(transformer)
    assert pipe(finder) is pipe(finder) is pipe.scheduler
    assert other(finder) is other.scheduler
    assert pipe(finder) is pipe.scheduler
    pipe.scheduler = flow_matching()
    assert pipe(finder) is pipe.scheduler
    pipe.transformer = torch.nn.Linear(1, 1)
    assert pipe(finder) is None
    pipe.module = torch.compile(transformer)
    assert pipe(finder) is pipe(finder) is pipe.scheduler


# Trees.

TREES = [
    (),
    {},
    None,
    torch.zeros(1),
    ((torch.zeros(1), 2.0), {"a": [None, "b"], "c": {"d": torch.ones(1)}}),
    {"b": OrderedDict(a=torch.zeros(1), b=(1,)), "a": torch.nn.Parameter(torch.zeros(1))},
    [object(), torch.float32],
]


@pytest.mark.parametrize("tree", TREES)
def test_trees_are_taken_apart_as_torch_does(tree: Any):
    leaves: list[Any] = []
    layout = take_apart(tree, leaves)
    theirs, _ = pytree.tree_flatten(tree)
    assert len(leaves) == len(theirs)
    assert all(map(lambda a, b: a is b, leaves, theirs))
    assert all(map(lambda a, b: a is b, leaves_of(put_together(layout, iter(leaves))), leaves))
    assert pytree.tree_structure(put_together(layout, iter(leaves))) == pytree.tree_structure(tree)
    assert tensors_of(tree) == [leaf for leaf in theirs if isinstance(leaf, torch.Tensor)]


def test_layouts_are_equal_where_trees_differ_in_leaves_alone():
    layouts = [take_apart(tree, []) for tree in ({"a": (1, None)}, {"a": (2.0, "x")})]
    assert layouts[0] == layouts[1]
    assert hash(layouts[0]) == hash(layouts[1])
    others = [{"a": [1, None]}, {"b": (1, None)}, {"a": (1,)}, {"a": OrderedDict(a=1)}, ({"a": (1, None)},)]
    assert all(take_apart(other, []) != layouts[0] for other in others)


# Coefficients.


@pytest.fixture
def asked() -> Iterator[list[float]]:
    """The distances that a basis was asked about."""
    distances: list[float] = []

    @register_basis("counting")
    def counting(gaps: Any, distance: float, num_coeffs: int, sigma: float) -> list[float]:
        distances.append(distance)
        return [distance, *[0.0] * (num_coeffs - 1)]

    yield distances
    unregister_basis("counting")


def forecasts(engine: Engine, steps: int = 12) -> list[float]:
    """Of a whole run whose features are all of ones."""
    found = []
    for step in range(steps):
        if engine.is_full(step):
            engine.record(step, [torch.ones(1)])
        else:
            found.append(engine.forecast(step)[0].item())
    return found


def test_a_basis_is_asked_once_about_a_place(asked: list[float]):
    """By the first skipped step about all of the run, and in later runs about what is another place there."""
    config = HiCacheConfig(interval=5, order=1, warmup=3, basis="counting")
    engine = Engine(config)
    engine.reset(num_steps=12)
    first = forecasts(engine)
    assert first == [1, 2, 3, 4] * 2
    assert len(asked) <= 1 + 2 * len(first)
    for change in (
        {},
        {"num_steps": 13},
        {"num_steps": 12, "context": "b"},
        {"num_steps": 12, "sigmas": [1.0] * 12},
    ):
        asked.clear()
        engine.reset(**({"num_steps": 12} | change))
        assert forecasts(engine) == first
        assert bool(asked) is bool(change)
    asked.clear()
    engine.reset(dataclasses.replace(config, sigma=0.25), num_steps=12)
    assert forecasts(engine) == first
    assert asked


def test_of_a_run_of_unknown_length_it_is_asked_step_by_step(asked: list[float]):
    engine = Engine(HiCacheConfig(interval=5, order=1, warmup=3, basis="counting"))
    assert forecasts(engine) == [1, 2, 3, 4] * 2
    assert asked == [1, 2, 3, 4] * 2
    engine.reset()
    assert forecasts(engine) == [1, 2, 3, 4] * 2
    assert len(asked) == 8


# Timesteps.


class Launched(compat.TorchDispatchMode):
    """Counts operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("wrong", [None, 3, 5])
def test_a_skipped_step_launches_one_operation_for_its_timestep(wrong: int | None):
    """And the next full step asks about all of them."""
    run = torch.linspace(1, 0.1, 10)
    check = TimestepCheck()
    check.ask([Rule(run, False, 0)], 2, run[2], ahead=False)
    assert not check.hear()
    for step in range(3, 7):
        given = run[step] + (0.5 if step == wrong else 0)
        with Launched() as launched:
            check.used(step, given)
        assert launched.count == 1
    check.ask([Rule(run, False, 0)], 7, run[7], ahead=False)
    if wrong is None:
        assert not check.hear()
    else:
        with pytest.warns(RuntimeWarning, match="timesteps that are not the scheduler's"):
            assert check.hear()
