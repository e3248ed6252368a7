"""hicache.reference stands by itself: it imports nothing of the fast path, and counts as that does by other
means."""

from __future__ import annotations

import ast
import contextlib
import copy
import inspect
import random
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import hicache.fast
import hicache.reference
from hicache import HiCacheConfig
from hicache.hooks.step_clock import SchedulerClock, TimestepClock
from hicache.reference.steps import SchedulerSteps, TimestepSteps
from tests.support import models

# What it is built on, beside torch: none of it counts steps, keeps contexts or sums a history.
ALLOWED = {
    "hicache.arguments",
    "hicache.basis",
    "hicache.calibration.file",
    "hicache.calibration.reader",
    "hicache.calibration.rules",
    "hicache.checks",
    "hicache.companion",
    "hicache.compat",
    "hicache.json_lines",
    "hicache.model_key",
    "hicache.noise_levels",
    "hicache.plain_data",
    "hicache.run",
    "hicache.tables",
    "hicache.weights",
    "hicache.mixin",
    "hicache.shadow",
    "hicache.config",
    "hicache.feature_rows",
    "hicache.input_filter",
    "hicache.schedule",
    "hicache.stats",
    "hicache.pipeline",
    "hicache.handle",
    # what is clustered, how, and which tokens are drawn; what becomes of them is its own
    "hicache.companions.clusca.draws",
    "hicache.companions.clusca.families",
    "hicache.companions.clusca.kmeans",
    "hicache.companions.clusca.settings",
    "hicache.numbers",
}
PACKAGE = Path(hicache.__file__).parent


def sources() -> dict[str, str]:
    """Module -> its source, of the whole package."""
    return {
        ".".join(("hicache", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
            ".__init__"
        ): path.read_text()
        for path in PACKAGE.rglob("*.py")
    }


def imported(source: str, modules: Iterable[str]) -> set[str]:
    """The modules that a source imports anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not followed"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    # the package itself is imported with each of its modules, and gives them nothing
    return names & set(modules) - {"hicache"}


def reached(start: str, sources: Mapping[str, str]) -> set[str]:
    """All modules that the package ``start`` imports, directly or through others."""
    found: set[str] = set()
    waiting = [name for name in sources if f"{name}.".startswith(f"{start}.")]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += imported(sources[name], sources)
    return found


def others(sources: Mapping[str, str]) -> set[str]:
    return {name for name in reached("hicache.reference", sources) if "hicache.reference" not in name}


def test_it_imports_nothing_of_the_fast_path():
    compat = {name for name in sources() if name.startswith("hicache.compat.")}  # names of torch, by subject
    assert others(sources()) <= ALLOWED | compat


@pytest.mark.parametrize("module", ["hicache.reference.steps", "hicache.handle", "hicache.stats"])
def test_an_import_of_the_fast_path_would_be_found(module: str):
    """Wherever it stands: in the reference, in what it imports, in a function."""
    mutated = sources()
    mutated[module] += "\n\ndef later():\n    from hicache.engine import Engine\n"
    assert "hicache.engine" in others(mutated)


def test_the_package_gives_it_nothing():
    """``from hicache import …`` would bring the engine in unseen."""
    for name, source in sources().items():
        if name.startswith("hicache.reference") or name in ALLOWED:
            for node in ast.walk(ast.parse(source)):
                taken = isinstance(node, ast.ImportFrom) and node.module == "hicache"
                assert not taken or all(f"hicache.{alias.name}" in sources() for alias in node.names), name


# Counting steps.


class Scheduler:
    """The least there is to count."""

    def __init__(self, timesteps: Any = ()) -> None:
        self.timesteps = timesteps
        self.begin_index: int | None = None

    def set_timesteps(self, count: int) -> None:
        if count < 0:
            raise ValueError(count)
        self.timesteps = list(range(count))

    def step(self, fails: bool = False) -> str:
        if fails:
            raise ArithmeticError
        return "stepped"


class Loop:
    """Somebody's denoising loop, of which one counter notes what it sees."""

    def __init__(self, count: Callable[[Any], Any]) -> None:
        self.first = self.scheduler = Scheduler()
        self.counter = count(lambda: self.scheduler)
        self.tick = getattr(self.counter, "count", None) or self.counter.tick
        self.seen: list[tuple[int, int, int | None]] = []
        self._runs: list[int] = []

    def set(self, count: int) -> None:
        with contextlib.suppress(ValueError):
            self.scheduler.set_timesteps(count)

    def call(self, times: int = 1) -> None:
        for _ in range(times):
            self.tick(torch.nn.Identity(), {})
            if self.counter.run not in self._runs[-1:]:
                self._runs.append(self.counter.run)
            # runs by their ordinal: which numbers they have is a counter's own affair
            self.seen.append((len(self._runs), self.counter.step, self.counter.num_steps))

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            assert self.scheduler.step() == "stepped"

    def fail(self) -> None:
        with pytest.raises(ArithmeticError):
            self.scheduler.step(fails=True)

    def go(self, steps: int, calls: int = 1) -> None:
        for _ in range(steps):
            self.call(calls)
            self.step()

    def begin(self, index: int) -> None:
        self.scheduler.begin_index = index

    def abort(self) -> None:
        self.counter.abort()

    def restart(self) -> None:
        self.counter.restart()

    def swap(self, timesteps: int) -> None:
        self.scheduler = Scheduler(list(range(timesteps)))

    def back(self, _: int) -> None:
        self.scheduler = self.first


class FollowingClock(SchedulerClock):
    """The fast path's, told at every call which scheduler it is of."""

    def __init__(self, source: Callable[[], Any]) -> None:
        super().__init__(source())
        self._source = source

    def tick(self, module: torch.nn.Module, kwargs: Mapping[str, Any]) -> None:
        if self._source() is not self.scheduler:
            self.follow(self._source())
        super().tick(module, kwargs)


# What a loop does, in order: a method of Loop and its arguments.
LOOPS: dict[str, list[tuple[Any, ...]]] = {
    "a run": [("set", 6), ("go", 6)],
    "two runs": [("set", 6), ("go", 6), ("set", 4), ("go", 4)],
    "two calls a step": [("set", 4), ("go", 4, 2), ("set", 4), ("go", 4, 2)],
    "set_timesteps twice": [("set", 6), ("set", 5), ("go", 5)],
    "set_timesteps twice in a run": [("set", 6), ("go", 3), ("set", 6), ("set", 6), ("go", 6)],
    "set_timesteps fails": [("set", 6), ("go", 2), ("set", -1), ("go", 4)],
    "no set_timesteps": [("go", 4)],
    "steps before set_timesteps": [("step", 3), ("call",), ("set", 3), ("go", 3)],
    "steps before the first call": [("set", 6), ("step", 4), ("go", 2)],
    "aborted, and the next run": [("set", 6), ("go", 2), ("call",), ("abort",), ("set", 6), ("go", 6)],
    "aborted, and going on": [("set", 6), ("go", 2), ("call",), ("abort",), ("call",), ("step",), ("go", 3)],
    "a step that fails": [("set", 6), ("go", 2), ("call",), ("fail",), ("call",), ("step",), ("go", 3)],
    "begin_index": [("set", 10), ("begin", 4), ("go", 6), ("go", 2)],
    "begin_index set late": [("set", 10), ("go", 1), ("begin", 4), ("go", 8)],
    "another picture, same timesteps": [("set", 4), ("go", 4), ("go", 4), ("set", 4), ("go", 4)],
    "steps beyond the end": [("set", 3), ("go", 2), ("step", 4), ("call", 2), ("go", 5)],
    "steps beyond the end of a run not seen": [("set", 3), ("step", 5), ("go", 3)],
    "restart": [("set", 6), ("go", 3), ("restart",), ("go", 6)],
    "restart, then set_timesteps": [("set", 6), ("go", 3), ("restart",), ("set", 6), ("go", 6)],
    "restart, then steps": [("set", 6), ("go", 3), ("restart",), ("step", 2), ("go", 3)],
    "another scheduler": [("set", 6), ("go", 2), ("swap", 4), ("go", 4), ("set", 3), ("go", 3)],
    "another scheduler and back": [("set", 6), ("go", 2), ("swap", 4), ("go", 1), ("back", 0), ("go", 4)],
    "another scheduler without timesteps": [
        ("set", 6),
        ("go", 2),
        ("swap", 0),
        ("go", 3),
        ("set", 2),
        ("go", 2),
    ],
}


def seen_by(
    counter: Callable[[Any], Any], events: list[tuple[Any, ...]]
) -> list[tuple[int, int, int | None]]:
    """Run, step and number of steps at every call."""
    loop = Loop(counter)
    for name, *arguments in events:
        getattr(loop, name)(*arguments)
    loop.counter.detach()
    for scheduler in (loop.first, loop.scheduler):
        assert set(vars(scheduler)) == {"timesteps", "begin_index"}
    return loop.seen


@pytest.mark.parametrize("name", LOOPS)
def test_both_count_a_scheduler_alike(name: str):
    seen = seen_by(SchedulerSteps, LOOPS[name])
    assert seen
    assert seen == seen_by(FollowingClock, LOOPS[name])


def test_both_count_any_loop_alike():
    """Three hundred loops that nobody would write."""
    choose = random.Random(0)
    names = ("set", "call", "call", "step", "step", "fail", "begin", "abort", "restart", "swap", "back")
    for _ in range(300):
        events: list[tuple[Any, ...]] = [("call",)]
        for name in choose.choices(names, k=40):
            events.append(
                (name, choose.randint(0, 5)) if name in ("set", "begin", "swap", "back") else (name,)
            )
        assert seen_by(SchedulerSteps, events) == seen_by(FollowingClock, events), events


# Timesteps of calls, in order; "restart" and "abort" between them.
BARE: dict[str, list[Any]] = {
    "falling": [9.0, 7.0, 3.0, 0.0],
    "rising": [0.0, 0.2, 0.9],
    "twice each": [9, 9, 7, 7, 3, 3],
    "two runs": [9.0, 5.0, 1.0, 9.0, 5.0, 1.0],
    "two runs up": [0.1, 0.5, 0.1, 0.5],
    "one step each": [9.0, 9.0, 9.0],
    "aborted, and the next run": [9.0, 7.0, "abort", 9.0, 7.0, 3.0],
    "aborted, and going on": [9.0, 7.0, "abort", 3.0, 1.0],
    "stopped early, a later start": [9.0, 7.0, 5.0, 3.0],
    "stopped early, restarted": [9.0, 7.0, "restart", 5.0, 3.0],
    "there and back": [3.0, 5.0, 4.0, 6.0, 6.0, 5.0],
    "numbers and tensors": [9, torch.tensor(9), torch.tensor([7.5, 7.5]), 3.25],
    "tokens that are given": [
        torch.tensor([[9.0, 0.0]]),
        torch.tensor([[7.0, 0.0]]),
        torch.tensor([[9.0, 0.0]]),
    ],
    "half precision": list(torch.linspace(1, 0, 5).bfloat16()),
}


@pytest.mark.parametrize("argument", ["timestep", "timesteps", "t"])
@pytest.mark.parametrize("name", BARE)
def test_both_count_timesteps_alike(name: str, argument: str):
    traces = []
    for counter in (TimestepSteps(), TimestepClock()):
        tick = getattr(counter, "count", None) or counter.tick
        runs: list[int] = []
        trace = []
        for timestep in BARE[name]:
            if isinstance(timestep, str):
                getattr(counter, timestep)()
                continue
            tick(torch.nn.Identity(), {"hidden_states": None, argument: timestep})
            if counter.run not in runs[-1:]:
                runs.append(counter.run)
            trace.append((len(runs), counter.step, counter.num_steps))
        traces.append(trace)
    assert traces[0] == traces[1]


@pytest.mark.parametrize("counter", [TimestepSteps(), TimestepClock()], ids=["reference", "fast"])
def test_a_call_without_a_timestep_cannot_be_counted(counter: Any):
    tick = getattr(counter, "count", None) or counter.tick
    with pytest.raises(ValueError, match=r"expected Identity to be called with `timestep`, got x; pass"):
        tick(torch.nn.Identity(), {"x": 1})


# The scheduler in between.


def test_its_scheduler_is_left_as_it_was():
    scheduler = Scheduler()
    own = scheduler.step = lambda: "own"
    one, other = SchedulerSteps(lambda: scheduler), SchedulerSteps(lambda: scheduler)
    assert scheduler.step() == "own"
    assert (one.step, other.step) == (1, 1)
    assert list(inspect.signature(scheduler.set_timesteps).parameters) == ["count"]
    one.detach()
    assert scheduler.step() == "own"
    assert other.step == 2
    other.detach()
    assert scheduler.step is own
    assert set(vars(scheduler)) == {"timesteps", "begin_index", "step"}


def test_a_scheduler_wrapped_by_somebody_since_stays_wrapped():
    scheduler = Scheduler()
    steps = SchedulerSteps(lambda: scheduler)
    inner = scheduler.step
    theirs = scheduler.step = lambda: inner() + " twice"
    steps.detach()
    assert scheduler.step is theirs
    assert scheduler.step() == "stepped twice"
    assert "set_timesteps" not in vars(scheduler)


def test_a_copied_scheduler_drives_itself():
    scheduler = Scheduler()
    steps = SchedulerSteps(lambda: scheduler)
    twin = copy.deepcopy(scheduler)
    twin.set_timesteps(4)
    twin.step()
    assert (steps.step, scheduler.timesteps, twin.timesteps) == (0, (), [0, 1, 2, 3])
    steps.detach()


@pytest.mark.parametrize("first", [0, 1], ids=["fast", "reference"])
def test_one_scheduler_can_drive_both(first: int):
    """One on each of two transformers; the last one that came goes first."""
    scheduler = Scheduler()
    counters = [FollowingClock, SchedulerSteps]
    outer, inner = counters[1 - first], counters[first]
    below = inner(lambda: scheduler)
    above = outer(lambda: scheduler)
    scheduler.set_timesteps(4)
    scheduler.step()
    for counter in (below, above):
        (getattr(counter, "count", None) or counter.tick)(torch.nn.Identity(), {})
    assert (below.step, above.step) == (1, 1)
    above.detach()
    scheduler.step()
    assert below.step == 2
    below.detach()
    assert set(vars(scheduler)) == {"timesteps", "begin_index"}


# Contexts.


def test_both_tell_contexts_apart_alike():
    """Calls of one step and of other forms: as many contexts, with the same steps."""
    model, call = models.build("flux")
    plain = call(1.0)
    wide = {
        **plain,
        "hidden_states": torch.cat([plain["hidden_states"]] * 2, 1),
        "img_ids": torch.cat([plain["img_ids"]] * 2),
    }
    listed = {
        **plain,
        "controlnet_block_samples": [torch.zeros_like(model.x_embedder(plain["hidden_states"]))],
    }
    longer = {**listed, "controlnet_block_samples": listed["controlnet_block_samples"] * 2}
    named = {**plain, "joint_attention_kwargs": {}}
    runs = [
        [[plain, plain]] * 6,
        [[plain, wide]] * 6,
        [[plain], [plain], [wide], [plain], [wide], [plain]],
        [[plain], [listed], [longer], [plain], [listed], [longer]],
        [[plain, plain, plain], [plain], [plain, plain], [plain], [plain, plain, plain], [plain]],
        [[plain], [named], [plain], [named]],
        [[plain] * 17] * 2,  # more calls than a step can have: the last one runs uncached
    ]
    results = []
    for package in (hicache.fast, hicache.reference):
        scheduler, contexts = Scheduler(), []
        options = {"granularity": "stack"} if package is hicache.fast else {}
        settings = HiCacheConfig(interval=2, warmup=1)
        with (
            torch.no_grad(),
            warnings.catch_warnings(record=True) as warned,
            package.apply(model, settings, scheduler=scheduler, **options) as handle,
        ):
            for run in runs:
                scheduler.set_timesteps(len(run))
                for step in run:
                    for arguments in step:
                        model(**arguments)
                    scheduler.step()
                counted = handle.stats.contexts.items()
                contexts.append({label: (seen.full_steps, seen.skipped_steps) for label, seen in counted})
        results.append((contexts, [str(warning.message) for warning in warned]))
    (fast, said), (reference, says) = results
    assert fast == reference
    [more] = said  # the reference has 16 contexts at most
    assert [more.removesuffix("; tiles need apply(..., max_contexts=...)")] == says
    assert [len(contexts) for contexts in reference] == [2, 2, 2, 3, 3, 1, 16]
    assert len(says) == 1
