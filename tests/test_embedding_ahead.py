"""What a model's embedder of timesteps gives at skipped steps is computed at the full step before."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hicache.fast
from hicache.runtime.gate_prefetch import GatePrefetch
from tests.support import models, pipelines
from tests.support.comparisons import close
from tests.support.graphs import CONFIG, STEPS, FakeBackend, connect
from tests.support.schedulers import flow_matching
from tests.support.skipped_steps import operations, skipped

NAMES = ("flux", "flux_cfg", "flux_kontext", "qwen", "sd3")
TOLERANCE = 2e-6
FULL = {0, 1, 2, 5, 8, 11}  # of CONFIG in 14 steps

by_each = pytest.mark.parametrize("granularity", ["module", "low-rank", "stack"])


def cached(pipe: Any, arguments: dict[str, Any], granularity: str, **more: Any) -> Tensor:
    with hicache.fast.apply(pipe, CONFIG, granularity=granularity):
        return pipelines.draw(pipe, arguments, STEPS, **more)


def without(call: Callable[[], Tensor]) -> Tensor:
    """The same with every step computing what it needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GatePrefetch, "fetch", lambda *args, **more: None)
        return call()


def counting(monkeypatch: pytest.MonkeyPatch, embedder: nn.Module) -> list[int]:
    """How often a module runs from now on, in a list of one."""
    ran, kind, own = [0], type(embedder), type(embedder).forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        ran[0] += self is embedder
        return own(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", counted)
    return ran


def each_step(pipe: Any, arguments: dict[str, Any], ran: list[int]) -> list[int]:
    """How often it runs in each step of a picture."""
    seen = [ran[0]]

    def callback(pipe: Any, step: int, *rest: Any) -> dict[str, Any]:
        seen.append(ran[0])
        return {}

    pipelines.draw(pipe, arguments, STEPS, callback_on_step_end=callback)
    return [after - before for before, after in itertools.pairwise(seen)]


@pytest.mark.few(5)
@by_each
@pytest.mark.parametrize("name", NAMES)
def test_the_embedder_runs_at_no_skipped_step(name: str, granularity: str, monkeypatch: pytest.MonkeyPatch):
    pipe, arguments = pipelines.build(name)
    embedder = pipe.transformer.time_text_embed
    kind = type(embedder)
    ran = counting(monkeypatch, embedder)
    plain = each_step(pipe, arguments, ran)[0]
    with hicache.fast.apply(pipe, CONFIG, granularity=granularity):
        for _ in range(2):
            steps = each_step(pipe, arguments, ran)
            # by low rank the first full step computes for the whole run
            assert all(bool(count) == (step in FULL) for step, count in enumerate(steps)), steps
    assert type(embedder) is kind
    assert each_step(pipe, arguments, ran) == [plain] * STEPS


@pytest.mark.few(5)
@pytest.mark.parametrize("granularity", ["module", "stack"])
@pytest.mark.parametrize("name", NAMES)
def test_the_picture_is_that_of_embeddings_computed_at_each_step(name: str, granularity: str):
    pipe, arguments = pipelines.build(name)
    ahead = cached(pipe, arguments, granularity)
    assert close(ahead, without(lambda: cached(pipe, arguments, granularity)), TOLERANCE)


def test_a_skipped_step_launches_no_embedding():
    """By stack: what a step would do that computes it, less the two dozen operations of FLUX's embedder."""
    seen = skipped(operations(*pipelines.build("flux"), "stack"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GatePrefetch, "fetch", lambda *args, **more: None)
        before = skipped(operations(*pipelines.build("flux"), "stack"))
    for ours, theirs in zip(seen, before, strict=True):
        assert ours.total() <= theirs.total() - 24
        # is the timestep the scheduler's? of a run's steps views are made once
        assert set(ours - theirs) <= {"aten.ne.Tensor", "aten.unbind.int"}


# What makes another embedding.


def _replace(transformer: Any) -> None:
    embedder = copy.copy(transformer.time_text_embed)
    embedder._modules = dict(embedder._modules)
    plain = embedder.timestep_embedder.linear_2
    other = nn.Linear(plain.in_features, plain.out_features)
    embedder.timestep_embedder = copy.copy(embedder.timestep_embedder)
    embedder.timestep_embedder._modules = {**embedder.timestep_embedder._modules, "linear_2": other}
    embedder.__class__ = type(embedder).__mro__[2]  # not the hooked one's
    embedder.__dict__.pop("_hicache_recall", None)
    transformer.time_text_embed = embedder


def _replace_part(transformer: Any) -> None:
    plain = transformer.time_text_embed.timestep_embedder.linear_2
    transformer.time_text_embed.timestep_embedder.linear_2 = nn.Linear(plain.in_features, plain.out_features)


def _write(transformer: Any) -> None:
    with torch.no_grad():
        transformer.time_text_embed.timestep_embedder.linear_2.weight.mul_(0.5)


def _set(transformer: Any) -> None:
    linear = transformer.time_text_embed.timestep_embedder.linear_2
    linear.weight.data = linear.weight.data * 0.5


CHANGES = {"replaced": _replace, "a part replaced": _replace_part, "written to": _write, "set": _set}


@pytest.mark.parametrize("granularity", ["module", "stack"])
@pytest.mark.parametrize("change", CHANGES)
def test_an_embedder_that_changes_in_a_callback_is_noticed_at_once(change: str, granularity: str):
    def draw() -> Tensor:
        torch.manual_seed(0)
        pipe, arguments = pipelines.build_randomized("flux")

        def callback(pipe: Any, step: int, *rest: Any) -> dict[str, Any]:
            if step == 6:  # skipped, and so is the next
                torch.manual_seed(1)
                CHANGES[change](pipe.transformer)
            return {}

        return cached(pipe, arguments, granularity, callback_on_step_end=callback)

    ahead = draw()
    assert close(ahead, without(draw), TOLERANCE)
    torch.manual_seed(0)
    pipe, arguments = pipelines.build_randomized("flux")
    assert not close(ahead, cached(pipe, arguments, granularity), 1e-4)


def skipped_by(pipe: Any, arguments: dict[str, Any]) -> set[int]:
    """The steps in which the embedder did not run, by stack."""
    with pytest.MonkeyPatch.context() as patch:
        ran = counting(patch, pipe.transformer.time_text_embed)
        with hicache.fast.apply(pipe, CONFIG, granularity="stack"):
            return {step for step, count in enumerate(each_step(pipe, arguments, ran)) if not count}


def test_an_embedder_that_is_given_more_than_the_familys_runs_at_each_step():
    pipe, arguments = pipelines.build("flux")
    assert skipped_by(pipe, arguments) == set(range(STEPS)) - FULL
    family = type(pipe.transformer)

    class Moved(family):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            moved = kwargs["pooled_projections"] + kwargs["hidden_states"].mean()
            return super().forward(*args, **{**kwargs, "pooled_projections": moved})

    pipe.transformer.__class__ = Moved
    assert not skipped_by(pipe, arguments)
    drawn = cached(pipe, arguments, "stack")
    assert torch.equal(drawn, without(lambda: cached(pipe, arguments, "stack")))


@pytest.mark.parametrize("granularity", ["module", "stack"])
@pytest.mark.parametrize("begins", [None, 5, 6], ids=["before", "at a full step", "at a skipped one"])
@pytest.mark.parametrize("factor", [1.5, 1 + 1e-5])
def test_hooks_of_the_embedder_see_each_embedding_once(factor: float, begins: int | None, granularity: str):
    def draw() -> Tensor:
        pipe, arguments = pipelines.build("flux")
        embedder = pipe.transformer.time_text_embed

        def callback(pipe: Any, step: int, *rest: Any) -> dict[str, Any]:
            if step == begins:
                embedder.register_forward_hook(lambda module, inputs, output: output * factor)
            return {}

        callback(pipe, None) if begins is None else None
        return cached(pipe, arguments, granularity, callback_on_step_end=callback)

    ahead = draw()
    assert close(ahead, without(draw), TOLERANCE)
    if factor > 1.1:
        assert not close(ahead, cached(*pipelines.build("flux"), granularity), 1e-4)


def test_a_subclass_that_has_no_prompt_of_its_familys_is_cached_by_stack():
    pipe, arguments = pipelines.build("flux")
    family = type(pipe.transformer)
    pooled = arguments["pooled_prompt_embeds"]

    class Own(family):
        def forward(self, hidden_states: Tensor, timestep: Tensor, guidance: Any, **kwargs: Any) -> Any:
            kwargs.pop("pooled_projections", None)
            given = {"timestep": timestep, "guidance": guidance, "pooled_projections": pooled, **kwargs}
            return super().forward(hidden_states, **given)

    inside = family.__call__
    with pytest.MonkeyPatch.context() as patch:
        # as a loop would call it that knows of no such argument
        def call(self: Any, *args: Any, pooled_projections: Any = None, **kwargs: Any) -> Any:
            return inside(self, *args, **kwargs)

        patch.setattr(Own, "__call__", call, raising=False)
        pipe.transformer.__class__ = Own
        drawn = cached(pipe, arguments, "stack")
    assert close(drawn, cached(*pipelines.build("flux"), "stack"), TOLERANCE)


def test_nothing_of_the_weights_is_held_after_a_run():
    pipe, arguments = pipelines.build("flux")
    with hicache.fast.apply(pipe, CONFIG, granularity="stack"):
        pipelines.draw(pipe, arguments, STEPS)
        linear = pipe.transformer.time_text_embed.timestep_embedder.linear_2
        other = nn.Parameter(torch.zeros_like(linear.weight), requires_grad=linear.weight.requires_grad)
        torch.utils.swap_tensors(linear.weight, other)
        assert not linear.weight.any()


@pytest.mark.parametrize("granularity", ["module", "stack"])
def test_timesteps_of_ones_own_and_another_prompt_are_embedded_at_each_step(granularity: str):
    def run(scale: float, changed: bool) -> Tensor:
        torch.manual_seed(0)
        transformer, scheduler = models.flux_transformer(), flow_matching()
        outputs = []
        with (
            torch.no_grad(),
            hicache.fast.apply(transformer, CONFIG, scheduler=scheduler, granularity=granularity),
        ):
            scheduler.set_timesteps(STEPS)
            guidance, pooled = torch.full((1,), 3.5), models.noise(1, 32)
            for step, t in enumerate(scheduler.timesteps):
                if changed and step == 6:
                    pooled.mul_(-1)
                given = {"guidance": guidance, "pooled_projections": pooled}
                call = models.flux_call(models.noise(1, 16, 4), t.expand(1) / 1000 * scale, **given)
                outputs.append(transformer(**call)[0])
                scheduler.step(outputs[-1], t, models.noise(1, 16, 4))
        return torch.stack(outputs)

    for how in ((0.9, False), (1.0, True)):
        assert close(run(*how), without(lambda how=how: run(*how)), TOLERANCE)


# With graphs.


def test_by_stack_a_graph_embeds_its_timestep(monkeypatch: pytest.MonkeyPatch):
    """A replay takes less of the host's time than a look at what was computed ahead."""
    monkeypatch.setattr(hicache.fast, "CudaBackend", FakeBackend)
    pipe, arguments = pipelines.build("flux")
    fetched: list[bool] = []
    fetch = GatePrefetch.fetch
    monkeypatch.setattr(GatePrefetch, "fetch", lambda *a, **k: fetched.append(True) or fetch(*a, **k))
    with connect(hicache.fast.apply(pipe, CONFIG, granularity="stack")) as handle:
        for _ in range(3):
            pipelines.draw(pipe, arguments, STEPS)
        assert handle.stats.graphs["transformer"].replays
    assert not fetched
