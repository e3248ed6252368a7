"""Prefetched gates: the ones each step would have computed, and none wrongly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

import hicache.fast
from hicache import HiCacheConfig
from hicache.runtime.gate_prefetch import GatePrefetch
from tests.support import models, pipelines
from tests.support.comparisons import close
from tests.support.schedulers import flow_matching

CONFIG = HiCacheConfig(interval=4, order=2, warmup=3)
TOLERANCE = 2e-6
PREFETCHED = ["flux", "flux_cfg", "qwen", "qwen_edit", "sd3", "hunyuan", "dit"]


@pytest.fixture
def prefetched(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the gates of every skipped step were prefetched, step by step."""
    seen: list[bool] = []
    ahead_of = GatePrefetch.ahead

    def watched(self: GatePrefetch, *args: Any) -> Any:
        result = ahead_of(self, *args)
        seen.append(result.gates is not None)
        return result

    monkeypatch.setattr(GatePrefetch, "ahead", watched)
    return seen


def cached(pipe: Any, arguments: dict[str, Any], **more: Any) -> torch.Tensor:
    with hicache.fast.apply(pipe, CONFIG, granularity="module"):
        return pipelines.draw(pipe, arguments, **more)


def without(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The same with every step computing its own gates."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GatePrefetch, "fetch", lambda *args, **more: None)
        return call()


@pytest.mark.parametrize("name", PREFETCHED)
def test_prefetched_gates_are_the_ones_of_the_step(name, prefetched):
    pipe, arguments = pipelines.build(name)
    ahead = cached(pipe, arguments)
    assert prefetched
    assert all(prefetched)
    prefetched.clear()
    each = without(lambda: cached(pipe, arguments))
    assert not any(prefetched)
    assert close(ahead, each, TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_timesteps_are_prefetched_as_the_pipeline_rounds_them(dtype, prefetched):
    pipe, arguments = pipelines.build("flux")
    pipe.transformer.to(dtype)
    arguments = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    ahead = cached(pipe, arguments).float()
    assert all(prefetched)
    each = without(lambda: cached(pipe, arguments)).float()
    assert (ahead - each).norm() <= (2e-6 if dtype == torch.float32 else 2e-2) * each.norm()


def test_a_second_order_scheduler_repeats_its_timesteps(prefetched):
    pipe, arguments = pipelines.build("dit")
    pipe.scheduler = diffusers.HeunDiscreteScheduler()
    ahead = cached(pipe, arguments)
    assert close(ahead, without(lambda: cached(pipe, arguments)), TOLERANCE)


def test_a_run_that_begins_in_the_middle(prefetched):
    """Image to image: the first timestep is not the scheduler's first."""
    transformer = models.flux_transformer()
    scheduler = flow_matching()

    def run() -> torch.Tensor:
        outputs = []
        with hicache.fast.apply(transformer, CONFIG, scheduler=scheduler, granularity="module"):
            scheduler.set_timesteps(16)
            scheduler.set_begin_index(4)
            guidance, pooled = torch.full((1,), 3.5), models.noise(1, 32)
            latents = models.noise(1, 16, 4)
            for t in scheduler.timesteps[4:]:
                output = transformer(
                    **models.flux_call(
                        latents, t.expand(1) / 1000, guidance=guidance, pooled_projections=pooled
                    )
                )[0]
                latents = scheduler.step(output, t, latents, return_dict=False)[0]
                outputs.append(output)
        return torch.stack(outputs)

    with torch.no_grad():
        ahead = run()
        assert len(prefetched) > 5
        assert all(prefetched)
        assert close(ahead, without(run), TOLERANCE)


@pytest.mark.parametrize("told", [True, False], ids=["begin_index", "none"])
def test_a_run_that_begins_where_narrow_timesteps_round_to_the_same(told, prefetched):
    """The first timestep fits the one before it, too; those after it do not."""
    transformer = models.flux_transformer()
    scheduler = flow_matching(shift=6.0)
    scheduler.set_timesteps(100)
    rounded = scheduler.timesteps.bfloat16() / 1000
    assert rounded[3] == rounded[2] != rounded[1]

    def run() -> torch.Tensor:
        outputs = []
        with hicache.fast.apply(transformer, CONFIG, scheduler=scheduler, granularity="module"):
            scheduler.set_timesteps(100)
            if told:
                scheduler.set_begin_index(3)
            guidance, pooled = torch.full((1,), 3.5), models.noise(1, 32)
            latents = models.noise(1, 16, 4)
            for t, timestep in zip(scheduler.timesteps[3:15], rounded[3:15], strict=True):
                output = transformer(
                    **models.flux_call(
                        latents, timestep.expand(1), guidance=guidance, pooled_projections=pooled
                    )
                )[0]
                latents = scheduler.step(output, t, latents, return_dict=False)[0]
                outputs.append(output)
        return torch.stack(outputs)

    with torch.no_grad():
        ahead = run()
        assert prefetched
        assert all(prefetched)
        assert close(ahead, without(run), TOLERANCE)


def loop(
    times: Callable[[torch.Tensor], torch.Tensor], pooled: Callable[[int, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    transformer = models.flux_transformer()
    scheduler = flow_matching()
    outputs = []
    with torch.no_grad(), hicache.fast.apply(transformer, CONFIG, scheduler=scheduler, granularity="module"):
        scheduler.set_timesteps(14)
        guidance, prompt = torch.full((1,), 3.5), models.noise(1, 32)
        for step, t in enumerate(scheduler.timesteps):
            timestep = times(t.expand(1) / 1000)
            outputs.append(
                transformer(
                    **models.flux_call(
                        models.noise(1, 16, 4),
                        timestep,
                        guidance=guidance,
                        pooled_projections=pooled(step, prompt),
                    )
                )[0]
            )
            scheduler.step(outputs[-1], t, models.noise(1, 16, 4))
    return torch.stack(outputs)


def test_another_prompt_half_way_is_noticed_at_once(prefetched):
    """In place, and as another tensor: the gates are those of the new one."""

    def changed(step: int, prompt: torch.Tensor) -> torch.Tensor:
        if step == 5:
            prompt.mul_(-1)
        return prompt + 1 if step >= 9 else prompt

    torch.manual_seed(0)
    ahead = loop(lambda t: t, changed)
    assert any(prefetched)
    assert not all(prefetched)
    torch.manual_seed(0)
    assert close(ahead, without(lambda: loop(lambda t: t, changed)), TOLERANCE)


def test_timesteps_of_ones_own_are_never_prefetched(prefetched):
    torch.manual_seed(0)
    ahead = loop(lambda t: t * 0.9 + 0.01, lambda step, prompt: prompt)
    assert prefetched
    assert not any(prefetched)
    torch.manual_seed(0)
    assert torch.equal(ahead, without(lambda: loop(lambda t: t * 0.9 + 0.01, lambda step, prompt: prompt)))


def test_timesteps_that_turn_out_others_are_told_and_no_longer_prefetched(prefetched):
    with pytest.warns(RuntimeWarning, match="timesteps that are not the scheduler's"):
        # from the second skipped step on: no full step shows it before
        loop(lambda t: t if t > 0.7 else t * 0.8, lambda step, prompt: prompt)
    assert prefetched[0]
    assert not any(prefetched[4:])


@pytest.mark.parametrize("own", [True, False])
def test_a_subclass_that_makes_more_of_its_embedding_computes_its_own_gates(own, prefetched):
    """Its blocks are its family's, so its modules are recorded; but nobody else knows its gates."""
    pipe, arguments = pipelines.build("flux")
    family = type(pipe.transformer)

    class Moved(family):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            # once a call, as if written between the embedding and the blocks
            def add(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
                hook.remove()
                return output + kwargs["hidden_states"].mean()

            hook = self.time_text_embed.register_forward_hook(add)
            return super().forward(*args, **kwargs)

    if own:
        pipe.transformer.__class__ = Moved
    drawn = cached(pipe, arguments)
    assert prefetched
    assert any(prefetched) is not own
    assert close(drawn, without(lambda: cached(pipe, arguments)), TOLERANCE)


# Weights.

LORA = {"flux": ["norm1.linear", "norm.linear"], "qwen": ["img_mod.1"], "hunyuan": ["norm1.linear"]}


def with_lora(name: str, *adapters: str) -> tuple[Any, dict[str, Any]]:
    peft = pytest.importorskip("peft", reason="LoRA of diffusers models needs peft")
    pipe, arguments = pipelines.build_randomized(name)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=LORA[name], init_lora_weights=False)
    for adapter in adapters:
        pipe.transformer.add_adapter(config, adapter)
    return pipe, arguments


@pytest.mark.parametrize("name", ["flux", "qwen", pytest.param("hunyuan", marks=pytest.mark.slow)])
def test_a_scale_of_lora_weighs_prefetched_gates_too(name, prefetched):
    pipe, arguments = with_lora(name, "one")
    unscaled = cached(pipe, arguments)
    arguments["joint_attention_kwargs" if name == "flux" else "attention_kwargs"] = {"scale": 0.3}
    ahead = cached(pipe, arguments)
    assert all(prefetched)
    assert close(ahead, without(lambda: cached(pipe, arguments)), TOLERANCE)
    assert not close(ahead, unscaled, 1e-3)


def _replace(transformer: Any) -> None:
    for block in transformer.transformer_blocks:
        plain = block.norm1.linear
        block.norm1.linear = torch.nn.Linear(plain.in_features, plain.out_features)


def _write(transformer: Any) -> None:
    with torch.no_grad():
        for block in transformer.transformer_blocks:
            block.norm1.linear.weight.mul_(0.5)


def _set_weight(transformer: Any) -> None:
    linear = transformer.time_text_embed.timestep_embedder.linear_2
    linear.weight.data = linear.weight.data * 0.5


CHANGES: dict[str, Callable[[Any], Any]] = {
    "layers replaced": _replace,
    "weights written to": _write,
    "weights of the embedding set": _set_weight,
    "another adapter": lambda transformer: transformer.set_adapters("two"),
    "an adapter's weight": lambda transformer: transformer.set_adapters(["one"], [0.2]),
    "adapters off": lambda transformer: transformer.disable_lora(),
    "fused": lambda transformer: transformer.fuse_lora(0.5),
    "deleted": lambda transformer: transformer.delete_adapters("one"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_in_a_callback_change_the_gates_at_once(change, prefetched):
    def draw() -> torch.Tensor:
        torch.manual_seed(0)
        adapters = () if change in ("layers replaced", "weights written to") else ("one", "two")
        pipe, arguments = with_lora("flux", *adapters)
        if adapters:
            pipe.transformer.set_adapters("one")

        def callback(pipe: Any, step: int, *rest: Any) -> dict[str, Any]:
            if step == 6:  # full; the next three are skipped
                CHANGES[change](pipe.transformer)
            return {}

        return cached(pipe, arguments, callback_on_step_end=callback)

    ahead = draw()
    assert prefetched == [True] * 3 + [False] * 3 + [True]
    assert close(ahead, without(draw), TOLERANCE)


@pytest.mark.parametrize("name", ["flux", "hunyuan"])
def test_a_first_run_whose_gates_cannot_be_prefetched_does_not_keep_later_ones_from_it(name, prefetched):
    """Two pictures of one prompt: given embeddings are there once, not once a picture."""
    pipe, arguments = pipelines.build(name)
    alone = cached(pipe, arguments)
    many = {"num_videos_per_prompt" if name == "hunyuan" else "num_images_per_prompt": 2}
    with hicache.fast.apply(pipe, CONFIG, granularity="module"):
        pipelines.draw(pipe, {**arguments, **many})
        assert not any(prefetched[-7:])
        prefetched.clear()
        assert torch.equal(pipelines.draw(pipe, arguments), alone)
    assert prefetched
    assert all(prefetched)
