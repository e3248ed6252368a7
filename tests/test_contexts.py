"""Calls of one step are told apart by what they are for, not by their order alone."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks import LayerSkipConfig
from diffusers.modular_pipelines.wan.denoise import WanDenoiseStep
from torch import Tensor, nn

import hicache.fast
from hicache import HiCacheConfig
from hicache.runtime import context
from tests.support import models, pipelines
from tests.support.models import flux_call
from tests.support.schedulers import CountingScheduler, flow_matching

EVERY_THIRD = HiCacheConfig(interval=3)
STEPS = 14
# Which calls a step makes, in order, in which steps: as guiders begin and stop.
GUIDERS: dict[str, dict[str, Sequence[int]]] = {
    "guidance first, until step 7": {"uncond": range(7), "cond": range(STEPS)},
    "guidance from step 5 on": {"uncond": range(5, STEPS), "cond": range(STEPS)},
    "a third call for the second": {"cond": range(STEPS), "uncond": range(6), "other": range(6, STEPS)},
    "guidance pauses": {
        "cond": range(STEPS),
        "uncond": [*range(5), *range(9, STEPS)],
        "other": range(STEPS),
    },
}


def guided_loop(
    call: Callable[[str, Tensor, Tensor], Tensor], guider: str, step: Callable[[], None]
) -> Tensor:
    """A picture drawn by calls of these names."""
    latents = models.noise(1, 16, 4)
    for index, sigma in enumerate(torch.linspace(1, 0.1, STEPS)):
        velocities = [call(name, latents, sigma) for name, steps in GUIDERS[guider].items() if index in steps]
        latents = latents - (2 * velocities[-1] - velocities[0]) / STEPS
        step()
    return latents


@pytest.mark.few(5)
@pytest.mark.parametrize("told_by", ["tensors", "numbers", "names"])
@pytest.mark.parametrize("guider", GUIDERS)
def test_calls_that_come_and_go_have_their_own_history(guider: str, told_by: str):
    """As if each had a transformer of its own."""
    transformer = models.flux_transformer()
    names = list(GUIDERS[guider])
    texts = {name: models.noise(1, 6, 32) * (1 + i) for i, name in enumerate(names)}
    pooled = {name: models.noise(1, 32) * (1 + i) for i, name in enumerate(names)}

    def arguments(name: str, latents: Tensor, sigma: Tensor) -> dict[str, Any]:
        key = names[0] if told_by == "names" else name
        given = {"encoder_hidden_states": texts[key], "pooled_projections": pooled[key]}
        if told_by == "numbers":
            given = {argument: tensor.clone() for argument, tensor in given.items()}
        # calls of other names differ in what they are for, too, where embeddings are the same
        return flux_call(latents * (1 + names.index(name)), sigma, **given)

    @contextlib.contextmanager
    def named(model: Any, name: str) -> Iterator[None]:
        with model.cache_context(name) if told_by == "names" else contextlib.nullcontext():
            yield

    with torch.no_grad(), contextlib.ExitStack() as stack:
        copies: dict[str, nn.Module] = {}
        counters = [CountingScheduler() for _ in names]
        for name, counter in zip(names, counters, strict=True):
            copies[name] = copy.deepcopy(transformer)
            stack.enter_context(hicache.fast.apply(copies[name], EVERY_THIRD, scheduler=counter))
            counter.set_timesteps(STEPS)

        def call_copy(name: str, latents: Tensor, sigma: Tensor) -> Tensor:
            return copies[name](**arguments(name, latents, sigma))[0]

        apart = guided_loop(call_copy, guider, lambda: [counter.step() for counter in counters])

        scheduler = CountingScheduler()
        handle = stack.enter_context(hicache.fast.apply(transformer, EVERY_THIRD, scheduler=scheduler))

        def call(name: str, latents: Tensor, sigma: Tensor) -> Tensor:
            with named(transformer, name):
                return transformer(**arguments(name, latents, sigma))[0]

        for _ in range(2):
            scheduler.set_timesteps(STEPS)
            together = guided_loop(call, guider, scheduler.step)
            assert torch.equal(together, apart)
            assert len(handle.stats.contexts) == len(names)
            assert all(context.skipped_steps > 0 for context in handle.stats.contexts.values())


def test_a_prompt_changed_in_the_middle_starts_anew():
    """Nothing of the first prompt's features is in what is drawn of the second."""
    pipe, arguments = pipelines.build("flux")
    other = arguments["prompt_embeds"] * 4

    def change(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        return {"prompt_embeds": other} if step == 6 else tensors

    with hicache.fast.apply(pipe, EVERY_THIRD) as handle:
        pipelines.draw(
            pipe, arguments, callback_on_step_end=change, callback_on_step_end_tensor_inputs=["prompt_embeds"]
        )
        counted = [(c.full_steps, c.skipped_steps) for c in handle.stats.contexts.values()]
    assert counted == [(4, 3), (3, 2)]


def test_a_prompt_written_over_in_the_middle_starts_anew():
    pipe, arguments = pipelines.build("flux")
    embeddings = arguments["prompt_embeds"]

    def change(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        if step == 6:
            tensors["prompt_embeds"].mul_(4)
        return tensors

    with hicache.fast.apply(pipe, EVERY_THIRD) as handle:
        pipelines.draw(
            pipe,
            {**arguments, "prompt_embeds": embeddings.clone()},
            callback_on_step_end=change,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )
        counted = [(c.full_steps, c.skipped_steps) for c in handle.stats.contexts.values()]
    assert counted == [(4, 3), (3, 2)]


@pytest.mark.parametrize("every", [1, 4])
def test_a_static_buffer_refilled_with_the_same_prompt_keeps_its_history(every: int):
    """As loops do whose inputs are static; numbers that do change start anew."""
    transformer, scheduler = models.flux_transformer(), CountingScheduler()
    text = models.noise(1, 6, 32)
    static = torch.empty_like(text)
    with torch.no_grad(), hicache.fast.apply(transformer, EVERY_THIRD, scheduler=scheduler) as handle:
        scheduler.set_timesteps(20)
        for step, sigma in enumerate(torch.linspace(1, 0.1, 20)):
            if step % every == 0:
                static.copy_(text if step < 12 else 4 * text)
            transformer(**flux_call(models.noise(1, 16, 4), sigma, encoder_hidden_states=static))
            scheduler.step()
        counted = [(c.full_steps, c.skipped_steps) for c in handle.stats.contexts.values()]
    assert counted == [(6, 6), (4, 4)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_one_buffer_serves_two_calls_of_a_step(mode: Callable[[], Any]):
    """Also where one is left out, and where torch does not count what is written to the buffer."""
    transformer, scheduler = models.flux_transformer(), CountingScheduler()
    with mode(), hicache.fast.apply(transformer, EVERY_THIRD, scheduler=scheduler) as handle:
        static = torch.empty(1, 6, 32)
        scheduler.set_timesteps(STEPS)
        for step, sigma in enumerate(torch.linspace(1, 0.1, STEPS)):
            for number in (1, 2) if step < 7 else (2,):
                static.fill_(number)
                transformer(**flux_call(models.noise(1, 16, 4), sigma, encoder_hidden_states=static))
            scheduler.step()
        counted = [c.full_steps + c.skipped_steps for c in handle.stats.contexts.values()]
    assert counted == [7, STEPS]


def tiled_loop(transformer: nn.Module, tiles: Sequence[int], scheduler: CountingScheduler) -> list[Tensor]:
    """Pictures drawn tile by tile, each a call in every step with the same text."""
    fixed = dict(flux_call(models.noise(1, 16, 4), torch.tensor(1.0)))
    drawn = [models.noise(1, 16, 4) * (1 + tile / 7) for tile in tiles]
    scheduler.set_timesteps(STEPS)
    for sigma in torch.linspace(1, 0.1, STEPS):
        for place, latents in enumerate(drawn):
            fixed.update(hidden_states=latents, timestep=sigma.expand(1))
            drawn[place] = latents - transformer(**fixed)[0] / STEPS
        scheduler.step()
    return drawn


@pytest.mark.parametrize("granularity", ["module", "stack", "output"])
def test_tiles_have_histories_of_their_own_and_are_known_again_at_once(granularity: str, monkeypatch):
    tiles, seen = range(20), []
    transformer, scheduler = models.flux_transformer(), CountingScheduler()
    conditions = context.Conditions
    monkeypatch.setattr(context, "Conditions", lambda given: (seen.append(1), conditions(given))[1])
    options: dict[str, Any] = {"scheduler": scheduler, "granularity": granularity, "max_contexts": 20}
    with torch.no_grad():
        with hicache.fast.apply(transformer, EVERY_THIRD, **options) as handle:
            together = tiled_loop(transformer, tiles, scheduler)
            assert len(handle.stats.contexts) == len(tiles)
            text = flux_call(models.noise(1, 16, 4), torch.tensor(1.0))
            text = text["encoder_hidden_states"].nbytes + text["pooled_projections"].nbytes
            own = [
                kept.conditions.nbytes
                for kept in handle._denoisers[0].tracks._tracks.popitem()[1].contexts.current
            ]
        assert len(seen) == len(tiles)  # none after the first step is taken apart
        assert own == [text, *[0] * 19]  # one copy of the text serves all
        for tile in tiles:
            with hicache.fast.apply(transformer, EVERY_THIRD, **options):
                assert torch.equal(tiled_loop(transformer, [tile], scheduler)[0], together[tile])


def test_a_number_of_contexts_that_is_none_is_refused_and_nothing_is_hooked():
    transformer = models.flux_transformer()
    with pytest.raises(ValueError, match=r"max_contexts: expected an int >= 1, got 0"):
        hicache.fast.apply(transformer, max_contexts=0)
    assert not transformer._forward_hooks


def test_prompts_without_end_run_uncached():
    transformer, scheduler = models.flux_transformer(), CountingScheduler()
    with torch.no_grad(), hicache.fast.apply(transformer, EVERY_THIRD, scheduler=scheduler) as handle:
        scheduler.set_timesteps(20)
        kept = [models.noise(1, 6, 32) * (1 + i) for i in range(20)]
        for text in kept[:16]:
            transformer(**flux_call(models.noise(1, 16, 4), torch.tensor(0.5), encoder_hidden_states=text))
            scheduler.step()
        with pytest.warns(RuntimeWarning, match="in more than 16 forms or with as many prompts in one run"):
            transformer(
                **flux_call(models.noise(1, 16, 4), torch.tensor(0.5), encoder_hidden_states=kept[16])
            )
        assert len(handle.stats.contexts) == 16


# A guider, and the calls of its predictions in STEPS steps.
GUIDED: dict[str, tuple[Callable[[], Any], list[int]]] = {
    "guidance stops": (lambda: diffusers.ClassifierFreeGuidance(3.0, stop=0.5), [14, 7]),
    "guidance starts": (lambda: diffusers.ClassifierFreeGuidance(3.0, start=0.4), [14, 9]),
    "skip layer": (
        lambda: diffusers.SkipLayerGuidance(
            3.0,
            skip_layer_guidance_start=0.3,
            skip_layer_guidance_stop=0.9,
            skip_layer_config=LayerSkipConfig([1], fqn="blocks"),
            stop=0.6,
        ),
        # with the guidance over, diffusers gives the last of the three the negative prompt: a fourth
        [14, 8, 3, 4],
    ),
}


@pytest.mark.parametrize("guidance", GUIDED)
def test_modular_guiders_that_start_and_stop(guidance: str):
    """Every prediction has its own history; which it is, the guider says."""
    pipe, arguments = pipelines.build("wan")
    make, calls = GUIDED[guidance]
    prompts = {name: value for name, value in arguments.items() if name.endswith("prompt_embeds")}

    def draw() -> Tensor:
        modular = WanDenoiseStep().init_pipeline()
        scheduler = flow_matching()
        scheduler.set_timesteps(STEPS)
        modular.update_components(transformer=pipe.transformer, scheduler=scheduler, guider=make())
        given = {"latents": models.noise(1, 16, 3, 2, 2), "dtype": torch.float32, **prompts}
        drawn = modular(**given, timesteps=scheduler.timesteps, num_inference_steps=STEPS, output="latents")
        assert isinstance(drawn, Tensor)
        return drawn

    plain = draw()
    with hicache.fast.apply(pipe, HiCacheConfig(interval=1)):
        assert torch.equal(draw(), plain)
    with hicache.fast.apply(pipe, EVERY_THIRD) as handle:
        cached = draw()
        contexts = handle.stats.contexts.values()
        assert [context.full_steps + context.skipped_steps for context in contexts] == calls
        assert all(c.skipped_steps > 0 for c in contexts if c.full_steps + c.skipped_steps > 3)
        assert torch.equal(draw(), cached)
    assert (cached - plain).norm() < 0.05 * plain.norm()
