"""Copies of a scheduler that is watched: plain ones, which work by themselves and leave the run alone."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

import hicache.fast
import hicache.reference
from hicache import HiCacheConfig
from hicache.shadow import shadow
from tests.support import models
from tests.support.models import flux_call
from tests.support.schedulers import CountingScheduler, flow_matching

CONFIG = HiCacheConfig(interval=3, order=1, warmup=1)
STEPS = 7

COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "deepcopy among others": lambda scheduler: copy.deepcopy({"here": [scheduler]})["here"][0],
    **{
        f"pickle {protocol}": lambda scheduler, protocol=protocol: pickle.loads(
            pickle.dumps(scheduler, protocol)
        )
        for protocol in (0, 2, pickle.HIGHEST_PROTOCOL)
    },
    "from_config": lambda scheduler: type(scheduler).from_config(scheduler.config),
}
every_copy = pytest.mark.parametrize("name", COPIES)
every_owner = pytest.mark.parametrize("owner", [hicache.fast, hicache.reference], ids=["fast", "reference"])
every_scheduler = pytest.mark.parametrize(
    "make", [flow_matching, diffusers.DDIMScheduler], ids=["flow matching", "ddim"]
)


def run(scheduler: Any) -> torch.Tensor:
    """A run of a scheduler alone."""
    scheduler.set_timesteps(STEPS)
    sample = torch.ones(1, 4)
    for t in scheduler.timesteps:
        sample = scheduler.step(sample / 2, t, sample).prev_sample
    return sample


def draw(model: Any, scheduler: Any, between: Callable[[], Any] = lambda: None) -> torch.Tensor:
    """A run of a model; ``between`` is called in each of its steps."""
    scheduler.set_timesteps(STEPS)
    sample = models.noise(1, 16, 4)
    with torch.no_grad():
        for t in scheduler.timesteps:
            said = model(**flux_call(sample, t / 1000))[0]
            between()
            sample = scheduler.step(said, t, sample).prev_sample
    return sample


@every_scheduler
@every_owner
@every_copy
def test_copies_are_plain(name: str, owner: Any, make: Callable[[], Any]):
    model, scheduler = models.flux_transformer(), make()
    expected = run(make())
    with owner.apply(model, CONFIG, scheduler=scheduler):
        scheduler.set_timesteps(STEPS)
        twin = COPIES[name](scheduler)
        before = dict(vars(scheduler))
        assert type(twin) is type(scheduler) is type(make())
        assert not {"set_timesteps", "step", "__getstate__"} & set(vars(twin))
        # what pipelines read to see whether it takes sigmas of theirs
        for method in ("set_timesteps", "step"):
            own = inspect.signature(getattr(make(), method))
            assert inspect.signature(getattr(scheduler, method)) == own
            assert inspect.signature(getattr(twin, method)) == own
        assert torch.equal(run(twin), expected)
        assert vars(scheduler) == before
    assert not {"set_timesteps", "step", "__getstate__"} & set(vars(scheduler))
    assert torch.equal(run(twin), expected)


@every_owner
@every_copy
def test_a_copy_is_not_counted(name: str, owner: Any):
    """A copy that has runs of its own between the calls of a run leaves that one as it is."""
    model = models.flux_transformer()

    def drawn(with_copy: bool) -> tuple[torch.Tensor, tuple[int, int]]:
        scheduler = flow_matching()
        with owner.apply(model, CONFIG, scheduler=scheduler) as handle:
            twin = COPIES[name](scheduler)
            picture = draw(model, scheduler, lambda: run(twin) if with_copy else None)
            return picture, (handle.stats.full_steps, handle.stats.skipped_steps)

    assert drawn(True)[1] == drawn(False)[1] == (3, 4)
    assert torch.equal(drawn(True)[0], drawn(False)[0])


@every_owner
def test_a_copy_goes_on_where_the_run_was(owner: Any):
    """A pickled run can be taken up, and cached by itself."""
    model, scheduler = models.flux_transformer(), flow_matching()
    with owner.apply(model, CONFIG, scheduler=scheduler):
        scheduler.set_timesteps(STEPS)
        scheduler.step(torch.zeros(1, 4), scheduler.timesteps[0], torch.zeros(1, 4))
        twin = pickle.loads(pickle.dumps(scheduler))
    assert (twin.step_index, len(twin.timesteps)) == (1, STEPS)
    with owner.apply(model, CONFIG, scheduler=twin) as handle:
        draw(model, twin)
        assert (handle.stats.full_steps, handle.stats.skipped_steps) == (3, 4)


def test_both_watch_one_scheduler_and_either_goes_first():
    for order in ([0, 1], [1, 0]):
        scheduler = flow_matching()
        handles = [
            hicache.fast.apply(models.flux_transformer(), CONFIG, scheduler=scheduler),
            hicache.reference.apply(models.flux_transformer(), CONFIG, scheduler=scheduler),
        ]
        names = {"set_timesteps", "step", "__getstate__"}
        assert names <= set(vars(scheduler))
        assert not names & set(vars(copy.copy(scheduler)))
        handles[order[0]].remove()
        assert names <= set(vars(scheduler))
        assert not names & set(vars(copy.copy(scheduler)))
        handles[order[1]].remove()
        assert not names & set(vars(scheduler))


@every_owner
def test_what_a_scheduler_has_of_its_own_is_in_its_copies(owner: Any):
    class Own(CountingScheduler):
        def __getstate__(self) -> Any:
            return {**vars(self), "seen": True}

    def step() -> None:
        steps.append(1)

    steps: list[int] = []
    scheduler = Own()
    scheduler.step = step
    with owner.apply(models.flux_transformer(), CONFIG, scheduler=scheduler):
        twin = copy.copy(scheduler)
        assert vars(twin) == {"step": step, "seen": True}
        twin.step()
    assert steps == [1]
    assert vars(scheduler) == {"step": step}


@every_owner
@pytest.mark.parametrize("way", [copy.deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
def test_a_scheduler_that_copies_itself_is_refused(owner: Any, way: Callable[[Any], Any]):
    """Its copy would step the original."""
    scheduler = CopiesItself()
    with owner.apply(models.flux_transformer(), CONFIG, scheduler=scheduler):
        with pytest.raises(TypeError, match=r"this CopiesItself is watched.*remove\(\) the handle first"):
            way(scheduler)
    assert vars(way(scheduler) and scheduler) == {}


class CopiesItself(CountingScheduler):
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = type(self)()
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def __reduce__(self) -> Any:
        return type(self), (), vars(self)


# Shadows alone.


class Plain:
    """What is shadowed."""

    def name(self) -> str:
        return "own"


class WithSlots(Plain):
    __slots__ = ("extra",)


def test_what_somebody_else_puts_over_a_shadow_stays():
    thing = Plain()
    undo = shadow(thing, "name", lambda: "ours")
    thing.name = lambda: "theirs"
    undo()
    assert thing.name() == "theirs"
    assert list(vars(thing)) == ["name"]


def test_a_state_of_ones_own_comes_back():
    thing = Plain()
    thing.__getstate__ = lambda: {"kept": 1}
    state = thing.__getstate__
    undo = shadow(thing, "name", lambda: "ours")
    assert vars(copy.copy(thing)) == {"kept": 1}
    undo()
    assert vars(thing) == {"__getstate__": state}


@pytest.mark.skipif(not hasattr(object, "__getstate__"), reason="of Python 3.11 and later")
def test_slots_are_copied():
    thing = WithSlots()
    thing.extra = 3
    undo = shadow(thing, "name", lambda: "ours")
    twin = copy.copy(thing)
    assert (twin.extra, twin.name()) == (3, "own")
    undo()
    assert vars(thing) == {}
