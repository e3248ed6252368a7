"""Editing models: only the tokens of the picture drawn are recorded and forecast, as only they are read."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hicache.fast
import hicache.reference
from hicache import HiCacheConfig
from hicache.adapters import given_pictures, registry
from hicache.adapters.flux import Flux
from hicache_kernels.history import history_nbytes
from tests.support import models, pipelines
from tests.support.comparisons import first, relative_rms, snapshot
from tests.support.runs import Run, by_fast, by_reference, recorded, recorded_in, replay, trace
from tests.support.runs import drawn as drawn_part
from tests.support.schedulers import CountingScheduler

CONFIG = HiCacheConfig(interval=3, order=2, warmup=3)
# pipelines that are given pictures: tokens of the picture drawn, and of all
DRAWN = {
    "flux_kontext": (16, 32),
    "flux2_edit": (16, 48),
    "qwen_edit": (16, 32),
    "qwen_edit_2509": (16, 48),
    "qwen_edit_plus": (16, 32),
    "qwen_layered": (48, 64),
    "hunyuan_picture": (8, 12),
}
every_pipeline = pytest.mark.parametrize("name", DRAWN)
both = pytest.mark.parametrize("granularity", ["module", "stack"])


@both
@every_pipeline
def test_the_history_is_of_drawn_tokens_only(name: str, granularity: str):
    pipe, arguments = pipelines.build(name)
    adapter = registry.find(pipe.transformer)
    features = adapter.num_features({}) if granularity == "module" else 1
    feature = (1, DRAWN[name][0], adapter.channels)
    with hicache.fast.apply(pipe, CONFIG, granularity=granularity) as handle:
        pipelines.draw(pipe, arguments, 5)
        stats = handle.stats
    expected = history_nbytes([feature] * features, CONFIG.order, torch.float32)
    assert stats.granularity == granularity
    assert stats.history_bytes == expected * len(stats.contexts)


@pytest.mark.few(4)
@both
@pytest.mark.parametrize("name", ["flux_kontext", "flux2_edit", "qwen_edit", "qwen_edit_2509"])
def test_given_pictures_are_planned_to_take_no_history(name: str, granularity: str):
    pipe, arguments = pipelines.build(name)
    drawn, tokens = DRAWN[name]
    size = {"height": arguments["height"], "width": arguments["width"]}
    plan = hicache.fast.plan(pipe, CONFIG, granularity=granularity, more_tokens=tokens - drawn, **size)
    alone = hicache.fast.plan(pipe, CONFIG, granularity=granularity, **size)
    assert plan.history_bytes == alone.history_bytes
    [one], [other] = plan.denoisers.values(), alone.denoisers.values()
    assert one.hidden == other.hidden
    assert (one.module_bytes, one.stack_bytes) == (other.module_bytes, other.stack_bytes)
    assert one.low_rank_bytes == other.low_rank_bytes
    with hicache.fast.apply(pipe, CONFIG, granularity=granularity) as handle:
        pipelines.draw(pipe, arguments, 5)
        assert handle.stats.history_bytes == plan.history_bytes


def outputs(pipe: Any, arguments: dict[str, Any], steps: int = 7) -> list[Tensor]:
    """All that the transformer returns, tokens of given pictures too; then the picture."""
    returned: list[Tensor] = []
    hook = pipe.transformer.register_forward_hook(lambda *call: returned.append(first(call[-1])))
    try:
        torch.manual_seed(0)
        return [*returned, pipelines.draw(pipe, arguments, steps)]
    finally:
        hook.remove()


@pytest.mark.few(6)
@both
@every_pipeline
def test_what_is_returned_has_the_same_shape_at_every_step(name: str, granularity: str):
    pipe, arguments = pipelines.build_randomized(name)
    plain = outputs(pipe, arguments)
    with hicache.fast.apply(pipe, HiCacheConfig(interval=1), granularity=granularity):
        assert all(map(torch.equal, outputs(pipe, arguments), plain))
    with hicache.fast.apply(pipe, CONFIG, granularity=granularity) as handle:
        cached = outputs(pipe, arguments)
        assert handle.stats.skipped_steps > 0
    assert [one.shape for one in cached] == [one.shape for one in plain]
    assert all(map(torch.equal, outputs(pipe, arguments), plain))


@pytest.mark.parametrize("name", ["flux_kontext", "qwen_edit_plus"])
def test_the_stack_of_drawn_tokens_is_that_of_all(name: str, monkeypatch: pytest.MonkeyPatch):
    """What is forecast of a token depends on no other: the pictures are equal, bit for bit."""
    pipe, arguments = pipelines.build_randomized(name)
    with hicache.fast.apply(pipe, CONFIG, granularity="stack"):
        drawn = trace(pipe, arguments)
    monkeypatch.setattr(type(registry.find(pipe.transformer)), "drawn", lambda self, kwargs, n: range(n))
    with hicache.fast.apply(pipe, CONFIG, granularity="stack"):
        assert torch.equal(trace(pipe, arguments), drawn)


# The same forms of arguments, another picture in them.


def split(run: Run, drawn: int) -> Run:
    """Kontext's calls, as if another number of tokens were those of the picture drawn."""
    run = copy.deepcopy(run)
    for calls in run:
        for _, kwargs in calls:
            kwargs["img_ids"][:, 0] = torch.arange(len(kwargs["img_ids"])) >= drawn
    return run


@both
def test_a_picture_of_another_size_in_as_many_tokens(granularity: str):
    """From run to run: what was learned of the last one, and its memory, do not fit."""
    model, run = recorded("flux_kontext")
    runs = [split(run, drawn) for drawn in (16, 24, 32, 8)]
    alone = [by_fast(model, one, CONFIG, granularity) for one in runs]
    scheduler = CountingScheduler()
    held = []
    with hicache.fast.apply(model, CONFIG, scheduler=scheduler, granularity=granularity) as handle:
        for one, expected in zip(runs, alone, strict=True):
            assert torch.equal(replay(model, one, scheduler), expected)
            held.append(handle.stats.history_bytes)
    assert [bytes_held / held[2] for bytes_held in held] == [0.5, 0.75, 1, 0.25]


def sized(*counts: int, anew: bool = False) -> tuple[nn.Module, Run]:
    """Kontext's model in float64, and calls of so many drawn tokens in each step."""
    model, run = recorded_in("flux_kontext", torch.float64)
    given = [split(run, drawn)[0][0][1]["img_ids"] for drawn in counts]
    calls: Run = []
    for [(args, kwargs)] in run:
        ids = [one.clone() if anew else one for one in given]
        calls.append([(args, {**kwargs, "img_ids": one}) for one in ids])
    return model, calls


def said(cache: Any, model: nn.Module, run: Run) -> list[Tensor]:
    """Of the drawn tokens, call by call; the arguments are the run's own."""
    scheduler, found = CountingScheduler(), []
    with cache.apply(model, CONFIG, scheduler=scheduler), torch.no_grad():
        scheduler.set_timesteps(len(run))
        for calls in run:
            found += [drawn_part(model, kwargs, model(*args, **kwargs)) for args, kwargs in calls]
            scheduler.step()
    return found


@pytest.mark.parametrize("anew", [False, True], ids=["held", "made anew"])
def test_pictures_of_two_sizes_in_one_run(anew: bool):
    """Two calls a step that differ in nothing but where the picture drawn ends."""
    model, run = sized(16, 24, anew=anew)
    for ours, theirs in zip(said(hicache.fast, model, run), said(hicache.reference, model, run), strict=True):
        assert relative_rms(ours, theirs) <= 1e-10


@pytest.mark.parametrize("how", ["other ids", "written to"])
def test_a_picture_that_grows_in_the_middle_of_a_run(how: str):
    """At a step that would be skipped: it runs in full, and the tokens that have no history get one."""
    model, run = sized(16)
    _, larger = sized(24)
    ids, step, ran = run[0][0][1]["img_ids"], 7, []
    hook = model.transformer_blocks[0].register_forward_hook(lambda *_: ran.append(len(found)))
    scheduler, found = CountingScheduler(), []
    with hicache.fast.apply(model, CONFIG, scheduler=scheduler) as handle, torch.no_grad():
        scheduler.set_timesteps(len(run))
        for index, [(args, kwargs)] in enumerate(run):
            if index == step and how == "written to":
                ids.copy_(larger[0][0][1]["img_ids"])
            elif index >= step:
                kwargs = {**kwargs, "img_ids": larger[0][0][1]["img_ids"]}
            found.append(drawn_part(model, kwargs, model(*args, **kwargs)))
            scheduler.step()
        held = handle.stats.history_bytes
    hook.remove()
    assert [one.shape[1] for one in found] == [16] * step + [24] * (len(run) - step)
    assert step in ran
    assert step - 1 not in ran
    assert len(ran) < len(run) - 2
    with torch.no_grad():
        args, kwargs = larger[step][0]
        expected = drawn_part(model, kwargs, model(*args, **kwargs))
    assert torch.equal(found[step], expected)
    with hicache.fast.apply(model, CONFIG) as handle:
        replay(model, larger, None)
        assert handle.stats.history_bytes == held


def test_residuals_of_a_controlnet_are_added_to_drawn_tokens():
    model, run = recorded_in("qwen_edit_plus", torch.float64)
    run = copy.deepcopy(run)
    for calls in run:
        for _, kwargs in calls:
            tokens = kwargs["hidden_states"].shape[1]
            samples = models.noise(2, 1, tokens, 48).double() * kwargs["timestep"]
            kwargs["controlnet_block_samples"] = list(samples)
    expected = by_reference(model, run, CONFIG)
    assert relative_rms(by_fast(model, run, CONFIG), expected) <= 1e-10


def test_given_pictures_and_weights_that_come_and_go():
    """Gates of zero_cond_t, of weights at hand in their blocks only."""
    pipe, arguments = pipelines.build_randomized("qwen_edit_plus")
    with hicache.fast.apply(pipe, CONFIG, granularity="module"):
        expected = trace(pipe, arguments)
    pipelines.offload_groups(pipe)
    with hicache.fast.apply(pipe, CONFIG, granularity="module"):
        assert relative_rms(trace(pipe, arguments), expected) <= 1e-6


@pytest.mark.parametrize("name", ["flux_kontext", "qwen_edit_plus"])
def test_two_pictures_at_once(name: str):
    """Their drawn tokens do not lie side by side."""
    pipe, arguments = pipelines.build_randomized(name)
    arguments["num_images_per_prompt"] = 2
    with hicache.reference.apply(pipe, CONFIG):
        expected = trace(pipe, arguments)
    with hicache.fast.apply(pipe, CONFIG, granularity="module"):
        assert relative_rms(trace(pipe, arguments), expected) <= 2e-5


def test_a_picture_alone_of_a_model_that_edits():
    """zero_cond_t with nothing given: all tokens have the gates of now."""
    model, run = recorded_in("qwen_edit_plus", torch.float64)
    run = copy.deepcopy(run)
    for calls in run:
        for _, kwargs in calls:
            kwargs["hidden_states"] = kwargs["hidden_states"][:, :16]
            kwargs["img_shapes"] = [shapes[:1] for shapes in kwargs["img_shapes"]]
    assert relative_rms(by_fast(model, run, CONFIG), by_reference(model, run, CONFIG)) <= 1e-10


@pytest.mark.parametrize(
    ("shapes", "tokens", "refused"),
    [
        ([(1, 4, 4), (1, 4, 4)], 32, False),
        ([(1, 4, 4), (1, 4, 4)], 16, True),  # of two processes, which have a picture each
        ([(1, 4, 4), (1, 2, 4), (1, 2, 4)], 32, False),
        ([(1, 4, 4)], 16, False),
        ([(1, 4, 4)], 8, True),
    ],
)
def test_zero_cond_t_has_one_gate_where_the_first_picture_is_drawn(
    shapes: list[Any], tokens: int, refused: bool
):
    adapter = registry.find(pipelines.build("qwen_edit_plus")[0].transformer)
    block_kwargs = {"modulate_index": torch.zeros(1, tokens), "hidden_states": torch.zeros(1, tokens, 48)}
    refusal = adapter.refusal(block_kwargs, {"img_shapes": [shapes]})
    assert (refusal is not None) == refused


# Which tokens are drawn.


def kontext(*times: float) -> Tensor:
    return torch.tensor([[time, 3.0, 4.0] for time in times])


@pytest.mark.parametrize(
    ("ids", "drawn"),
    [
        (kontext(0, 0, 1, 1), 2),
        (kontext(0, 0, 1, 1)[None].repeat(2, 1, 1), 2),
        (kontext(0, 0, 0, 0), 4),
        (kontext(0, 0, 1, 2), 4),  # a video, or more pictures than one
        (kontext(0, 1, 1, 0), 4),
        (kontext(1, 1, 0, 0), 4),
        (kontext(1, 1, 1, 1), 4),
        (torch.stack([kontext(0, 0, 1, 1), kontext(0, 1, 1, 1)]), 4),  # two pictures, of two sizes
        (kontext(0, 0, 1), 4),  # of other tokens than the hidden state's
        (None, 4),
    ],
)
def test_drawn_by_ids(ids: Any, drawn: int):
    by_ids = given_pictures.ByIds(lambda times: times == 1)
    assert by_ids(ids, 4) == range(drawn)
    assert by_ids(ids, 4) == range(drawn)


def test_ids_are_read_again_where_they_were_written_to():
    by_ids, ids = given_pictures.ByIds(lambda times: times == 1), kontext(0, 0, 1, 1)
    assert by_ids(ids, 4) == range(2)
    ids[1, 0] = 1
    assert by_ids(ids, 4) == range(1)
    assert by_ids(kontext(0, 0, 0, 1), 4) == range(3)


@pytest.mark.parametrize(
    ("shapes", "layered", "drawn"),
    [
        ([[(1, 2, 2), (1, 1, 3), (1, 1, 1)]], False, 4),
        ([[(1, 2, 2), (1, 1, 3), (1, 1, 1)]] * 2, False, 4),
        ([[(1, 2, 2), (1, 1, 3), (1, 1, 1)]], True, 7),
        ([[(1, 2, 4)]], False, 8),
        ([[(1, 2, 2), (1, 1, 4)], [(1, 1, 4), (1, 2, 2)]], False, 8),  # two pictures, of two sizes
        ([[(1, 2, 2), (1, 1, 3)]], False, 8),  # of other tokens than the hidden state's
        ([[(1, 2, 4)]], True, 8),
        ([(1, 2, 4)], False, 8),  # as ControlNet's pipeline has it
        ([], False, 8),
        (None, False, 8),
    ],
)
def test_drawn_by_shapes(shapes: Any, layered: bool, drawn: int):
    assert given_pictures.by_shapes(shapes, 8, layered) == range(drawn)


@pytest.mark.parametrize("wrong", [range(4, 20), range(0), range(0, 33), range(0, 32, 2)], ids=str)
def test_an_adapter_that_cuts_elsewhere(wrong: range, monkeypatch: pytest.MonkeyPatch):
    model, run = recorded("flux_kontext")
    monkeypatch.setattr(Flux, "drawn", lambda self, kwargs, tokens: wrong)
    scheduler = CountingScheduler()
    before = snapshot(model)
    with hicache.fast.apply(model, CONFIG, scheduler=scheduler):
        with pytest.raises(ValueError, match=r"Flux\.drawn\(\) to give a range .* the last of 32 tokens"):
            replay(model, run, scheduler)
    assert snapshot(model) == before


def test_an_adapter_of_ones_own_says_which(monkeypatch: pytest.MonkeyPatch):
    """A bare transformer: the last tokens are drawn, whatever the arguments."""

    class Last(Flux):
        def drawn(self, model_kwargs: Any, tokens: int) -> range:
            return range(tokens - 10, tokens)

    model, run = recorded_in("flux", torch.float64)
    monkeypatch.setitem(registry._ADAPTERS, "FluxTransformer2DModel", Last)
    assert relative_rms(_last(model, run, hicache.fast), _last(model, run, hicache.reference)) <= 1e-10


def _last(model: nn.Module, run: Run, cache: Any) -> Tensor:
    scheduler, found = CountingScheduler(), []
    with cache.apply(model, CONFIG, scheduler=scheduler), torch.no_grad():
        scheduler.set_timesteps(len(run))
        for [(args, kwargs)] in run:
            found.append(first(model(*args, **kwargs))[:, -10:])
            scheduler.step()
    return torch.cat(found)
