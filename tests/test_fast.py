"""hicache.fast on whole pipelines: what is drawn, what runs, and that all is undone."""

from __future__ import annotations

import copy
import itertools
import warnings
from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch import nn

import hicache.fast
import hicache.reference
from hicache import HiCacheConfig, full_steps
from hicache.adapters import registry
from hicache.adapters.base import ModuleAdapter, ModuleOutput
from tests.support import models, pipelines
from tests.support.comparisons import close, snapshot
from tests.support.models import flux_call
from tests.support.pipelines import denoisers
from tests.support.runs import blocks_of
from tests.support.schedulers import CountingScheduler, flow_matching

EVERY_THIRD = HiCacheConfig(interval=3)
every_pipeline = pytest.mark.parametrize("name", pipelines.CORE)


def everything(pipe):
    """All of a pipeline's objects that a hook could change."""
    scheduler = pipe.scheduler
    return {
        **{name: snapshot(part) for name, part in denoisers(pipe).items()},
        "scheduler": (type(scheduler), set(vars(scheduler)), scheduler.step, scheduler.set_timesteps),
        "pipe": set(vars(pipe)),
    }


class BlockCounter:
    """Blocks run in every call of the denoisers."""

    def __init__(self, pipe):
        self.calls = []
        self.hooks = []
        for part in denoisers(pipe).values():
            self.hooks.append(part.register_forward_pre_hook(lambda *_: self.calls.append(0)))
            for block in blocks_of(part):
                self.hooks.append(block.register_forward_hook(self._count))

    def _count(self, *_):
        self.calls[-1] += 1


@pytest.mark.few(7)
@every_pipeline
def test_interval_one_is_no_cache_and_remove_restores_all(name):
    pipe, arguments = pipelines.build(name)
    plain = pipelines.draw(pipe, arguments, 6)
    before = everything(pipe)
    handle = hicache.fast.apply(pipe, HiCacheConfig(interval=1))
    assert torch.equal(pipelines.draw(pipe, arguments, 6), plain)
    assert handle.stats.full_steps > 0
    assert handle.stats.skipped_steps == 0
    handle.remove()
    assert everything(pipe) == before
    with hicache.fast.apply(pipe, EVERY_THIRD):
        pipelines.draw(pipe, arguments, 6)
    after = everything(pipe)
    # a scheduler grows attributes of its own when it runs; ours must not be among them
    assert after == before
    assert not any(key.startswith("_hicache") for part in denoisers(pipe).values() for key in vars(part))
    assert torch.equal(pipelines.draw(pipe, arguments, 6), plain)


@every_pipeline
def test_skipped_steps_run_no_block(name):
    pipe, arguments = pipelines.build(name)
    counter = BlockCounter(pipe)
    with hicache.fast.apply(pipe, EVERY_THIRD) as handle:
        picture = pipelines.draw(pipe, arguments, 12)
    assert torch.isfinite(picture).all()
    contexts = handle.stats.contexts.values()
    assert counter.calls.count(0) == sum(c.skipped_steps for c in contexts) > 0
    assert sum(calls > 0 for calls in counter.calls) == sum(c.full_steps for c in contexts)
    if name not in ("wan22", "sd3_skip_layer"):  # there, contexts start in the middle of the run
        assert all((c.full_steps, c.skipped_steps) == (6, 6) for c in contexts)
        assert full_steps(EVERY_THIRD, 12) == [0, 1, 2, 5, 8, 11]


@every_pipeline
def test_cached_pictures_are_close_and_repeatable(name):
    pipe, arguments = pipelines.build(name)
    plain = pipelines.draw(pipe, arguments)
    with hicache.fast.apply(pipe, EVERY_THIRD):
        first, second = pipelines.draw(pipe, arguments), pipelines.draw(pipe, arguments)
    assert torch.equal(first, second)
    assert not torch.equal(first, plain)
    if name not in ("dit", "pixart"):  # random weights under DDIM leave little to compare
        assert (first - plain).norm() < 0.05 * plain.norm()


def test_contexts_have_their_own_history():
    pipe, arguments = pipelines.build("flux_cfg")
    with hicache.fast.apply(pipe, EVERY_THIRD) as handle:
        pipelines.draw(pipe, arguments)
        stats = handle.stats
    assert list(stats.contexts) == ["transformer[0]", "transformer[1]"]
    assert stats.full_steps == stats.skipped_steps == 6
    assert stats.bound == 2.0


def test_second_denoiser_is_cached_and_warms_up_when_it_starts():
    pipe, arguments = pipelines.build("wan22")
    with hicache.fast.apply(pipe, EVERY_THIRD) as handle:
        pipelines.draw(pipe, arguments)
        stats = handle.stats
    assert list(stats.contexts) == [f"{n}[{i}]" for n in ("transformer", "transformer_2") for i in (0, 1)]
    assert all(c.full_steps >= 3 for c in stats.contexts.values())
    assert stats.contexts["transformer_2[0]"].skipped_steps > 0


def test_last_step_full():
    pipe, arguments = pipelines.build("flux")
    counter = BlockCounter(pipe)
    with hicache.fast.apply(pipe, HiCacheConfig(interval=5, last_step_full=True)):
        pipelines.draw(pipe, arguments, 11)
    assert [step for step, count in enumerate(counter.calls) if count] == [0, 1, 2, 7, 10]


@pytest.mark.parametrize("when", ["warm-up", "skipped", "full"])
def test_aborted_run_leaves_nothing_behind(when):
    pipe, arguments = pipelines.build("flux")
    with hicache.fast.apply(pipe, EVERY_THIRD):
        fresh = pipelines.draw(pipe, arguments)

    def abort(pipe, step, timestep, tensors):
        if step == {"warm-up": 1, "skipped": 6, "full": 8}[when]:
            raise KeyboardInterrupt
        return tensors

    with hicache.fast.apply(pipe, EVERY_THIRD):
        other = {**arguments, "prompt_embeds": arguments["prompt_embeds"] * 3}
        with pytest.raises(KeyboardInterrupt):
            pipelines.draw(pipe, other, callback_on_step_end=abort)
        assert torch.equal(pipelines.draw(pipe, arguments), fresh)


def test_exception_inside_a_block_leaves_nothing_behind():
    pipe, arguments = pipelines.build("flux")
    with hicache.fast.apply(pipe, EVERY_THIRD):
        fresh = pipelines.draw(pipe, arguments)
        calls = []

        def fail(*_):
            calls.append(1)
            if len(calls) == 5:
                raise MemoryError

        hook = pipe.transformer.single_transformer_blocks[1].register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            pipelines.draw(pipe, arguments)
        hook.remove()
        assert torch.equal(pipelines.draw(pipe, arguments), fresh)


def test_two_pipelines_interleaved():
    (one, arguments), (two, _) = pipelines.build("flux"), pipelines.build("flux")
    for parameter in two.transformer.parameters():
        parameter.data.mul_(1.1)
    others = {**arguments, "prompt_embeds": arguments["prompt_embeds"] * 2}
    with hicache.fast.apply(one, EVERY_THIRD), hicache.fast.apply(two, HiCacheConfig(interval=4, order=1)):
        alone = pipelines.draw(one, arguments), pipelines.draw(two, others, 9)
        nested = []

        def inner(pipe, step, timestep, tensors):
            if step in (3, 7):
                nested.append(pipelines.draw(two, others, 9))
            return tensors

        assert torch.equal(pipelines.draw(one, arguments, callback_on_step_end=inner), alone[0])
    assert len(nested) == 2
    assert all(torch.equal(picture, alone[1]) for picture in nested)


def test_other_resolution_batch_and_steps_between_runs():
    pipe, arguments = pipelines.build("flux")
    changes = [
        {},
        {"height": 96},
        {"num_images_per_prompt": 2},
        {"prompt_embeds": models.noise(1, 9, 32)},
        {},
    ]
    for steps, change in zip((12, 12, 10, 14, 12), changes, strict=True):
        wanted = {**arguments, **change}
        with hicache.fast.apply(pipe, EVERY_THIRD):
            fresh = pipelines.draw(pipe, wanted, steps)
        change["fresh"] = fresh
    with hicache.fast.apply(pipe, EVERY_THIRD) as handle:
        for steps, change in zip((12, 12, 10, 14, 12), changes, strict=True):
            fresh = change.pop("fresh")
            assert torch.equal(pipelines.draw(pipe, {**arguments, **change}, steps), fresh)
            assert len(handle.stats.contexts) == 1
        # what earlier shapes needed was given back
        assert handle.stats.history_bytes == handle.stats.contexts["transformer[0]"].history_bytes


def test_release_frees_and_the_next_run_allocates():
    pipe, arguments = pipelines.build("flux")
    with hicache.fast.apply(pipe, EVERY_THIRD) as handle:
        first = pipelines.draw(pipe, arguments)
        held = handle.stats.history_bytes
        assert held >= 3 * first.shape[1] * 32 * 4
        handle.release()
        assert handle.stats.history_bytes == 0
        assert torch.equal(pipelines.draw(pipe, arguments), first)
        assert handle.stats.history_bytes == held


@pytest.mark.parametrize(
    ("speedup", "steps", "full"), [(2.0, 12, 6), (3.0, 50, 14), (5.0, 50, 10), (1.0, 9, 9)]
)
def test_speedup_chooses_the_interval(speedup, steps, full):
    pipe, arguments = pipelines.build("flux")
    with hicache.fast.apply(pipe, speedup=speedup) as handle:
        pipelines.draw(pipe, arguments, steps)
        assert handle.stats.full_steps == full
        assert handle.stats.bound >= speedup
        pipelines.draw(pipe, arguments, 30)  # another count, another interval
        assert round(handle.stats.bound, 2) >= speedup


def test_speedup_out_of_reach_warns_and_does_its_best():
    pipe, arguments = pipelines.build("flux")
    with hicache.fast.apply(pipe, speedup=4.0) as handle:
        with pytest.warns(RuntimeWarning, match=r"speedup=4.0 is out of reach in 6 steps"):
            pipelines.draw(pipe, arguments, 6)
        assert handle.stats.full_steps == 3


def test_applying_again_replaces_the_settings():
    pipe, arguments = pipelines.build("flux")
    pipelines.draw(pipe, arguments, 2)  # diffusers itself leaves attributes behind
    before = everything(pipe)
    old = hicache.fast.apply(pipe, EVERY_THIRD)
    new = hicache.fast.apply(pipe, HiCacheConfig(interval=4))
    assert not old.active
    pipelines.draw(pipe, arguments)
    assert new.stats.full_steps == len(full_steps(HiCacheConfig(interval=4), 12))
    old.remove()  # does nothing more
    pipelines.draw(pipe, arguments)
    assert new.stats.skipped_steps > 0
    new.remove()
    assert everything(pipe) == before


def test_stats_stay_after_remove():
    pipe, arguments = pipelines.build("flux")
    with hicache.fast.apply(pipe, EVERY_THIRD) as handle:
        pipelines.draw(pipe, arguments)
    assert (handle.stats.full_steps, handle.stats.skipped_steps) == (6, 6)
    assert handle.stats.cache_ms > 0
    assert "transformer[0]: 6 full, 6 skipped" in str(handle.stats)


def test_scheduler_put_in_later_is_followed():
    pipe, arguments = pipelines.build("flux")
    with hicache.fast.apply(pipe, EVERY_THIRD) as handle:
        fresh = pipelines.draw(pipe, arguments)
        first = pipe.scheduler
        pipe.scheduler = flow_matching()
        assert torch.equal(pipelines.draw(pipe, arguments), fresh)
        assert handle.stats.skipped_steps == 6
        assert "step" not in vars(first)
    assert "step" not in vars(pipe.scheduler)


def test_custom_sigmas_and_a_scheduler_of_two_calls_a_step():
    pipe, arguments = pipelines.build("flux")
    with hicache.fast.apply(pipe, EVERY_THIRD) as handle:
        sigmas = torch.linspace(1.0, 0.1, 9).tolist()
        pipelines.draw(pipe, {**arguments, "sigmas": sigmas}, 9)
        assert handle.stats.full_steps + handle.stats.skipped_steps == 9
        pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            generator = torch.Generator().manual_seed(0)
            pipe.scheduler.set_timesteps(6)
            assert len(pipe.scheduler.timesteps) == 11
            pipe.transformer.train(False)
            for timestep in pipe.scheduler.timesteps:
                latents = torch.randn(1, 16, 4, generator=generator)
                pipe.transformer(**flux_call(latents, timestep / 1000))
                pipe.scheduler.step(latents, timestep, latents)
        assert handle.stats.full_steps + handle.stats.skipped_steps == 11


def test_copied_scheduler_drives_itself():
    pipe, _ = pipelines.build("flux")
    with hicache.fast.apply(pipe, EVERY_THIRD):
        twin = copy.deepcopy(pipe.scheduler)
        twin.set_timesteps(4)
        sample = torch.zeros(1, 2)
        pipe.scheduler.set_timesteps(4)
        twin.step(sample, twin.timesteps[0], sample)
        assert (twin.step_index, pipe.scheduler.step_index) == (1, None)


def test_controlnet_residuals_are_not_added_twice():
    transformer = models.flux_transformer()
    scheduler = CountingScheduler()
    control = {"controlnet_block_samples": [models.noise(1, 16, 32)] * 2}
    call = {**flux_call(models.noise(1, 16, 4), torch.tensor(0.5)), **control}
    with (
        torch.no_grad(),
        hicache.fast.apply(transformer, HiCacheConfig(order=0), scheduler=scheduler) as handle,
    ):
        scheduler.set_timesteps(6)
        outputs = []
        for _ in range(6):
            outputs.append(transformer(**call)[0])
            scheduler.step()
        assert handle.stats.skipped_steps == 3
    torch.testing.assert_close(outputs[-1], outputs[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(
        outputs[0], transformer(**{**call, "controlnet_block_samples": None})[0], atol=1e-3
    )


def test_offload_comes_and_goes():
    pipe, arguments = pipelines.build("flux")
    plain = pipelines.draw(pipe, arguments)
    with hicache.fast.apply(pipe, HiCacheConfig(interval=1)):
        pipelines.offload_groups(pipe)
        assert torch.equal(pipelines.draw(pipe, arguments), plain)
    assert torch.equal(pipelines.draw(pipe, arguments), plain)


def test_lora_comes_and_goes():
    """On gates, on features and inside them: put in, scaled and deleted while the cache is there."""
    peft = pytest.importorskip("peft", reason="LoRA of diffusers models needs peft")
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["norm1.linear", "proj_out", "to_q"], init_lora_weights=False
    )
    pipe, arguments = pipelines.build("flux")
    plain = pipelines.draw(pipe, arguments)
    with hicache.fast.apply(pipe, EVERY_THIRD):
        cached = pipelines.draw(pipe, arguments)
    twin, _ = pipelines.build("flux")
    twin.transformer.add_adapter(config)
    weights = twin.transformer.state_dict()  # drawn at random
    adapted = pipelines.draw(twin, arguments)
    assert not torch.allclose(adapted, plain, rtol=1e-2)

    with hicache.fast.apply(pipe, HiCacheConfig(interval=1)):
        pipe.transformer.add_adapter(config)
        pipe.transformer.load_state_dict(weights)
        assert torch.equal(pipelines.draw(pipe, arguments), adapted)
        pipe.transformer.delete_adapters("default")
        assert torch.equal(pipelines.draw(pipe, arguments), plain)
    with hicache.fast.apply(twin, EVERY_THIRD):
        expected = pipelines.draw(twin, arguments)
    with hicache.fast.apply(pipe, EVERY_THIRD) as handle:
        pipelines.draw(pipe, arguments)
        pipe.transformer.add_adapter(config)
        pipe.transformer.load_state_dict(weights)
        assert close(pipelines.draw(pipe, arguments), expected)
        assert handle.stats.skipped_steps == 6
        pipe.transformer.delete_adapters("default")
        assert close(pipelines.draw(pipe, arguments), cached)
    assert torch.equal(pipelines.draw(pipe, arguments), plain)


def own_loop(transformer, steps=12, cfg=False):
    """A user's own loop: Euler steps around a bare transformer."""
    latents = models.noise(1, 16, 4)
    sigmas = torch.linspace(1, 0, steps + 1)
    with torch.no_grad():
        for sigma, following in itertools.pairwise(sigmas):
            velocity = transformer(**flux_call(latents, sigma))[0]
            if cfg:
                velocity = 2 * velocity - transformer(**flux_call(latents * 0.5, sigma))[0]
            latents = latents + (following - sigma) * velocity
    return latents


@pytest.mark.parametrize("cfg", [False, True], ids=["plain", "cfg"])
def test_bare_transformer_in_a_loop_of_ones_own(cfg):
    transformer = models.flux_transformer()
    plain = own_loop(transformer, cfg=cfg)
    with hicache.fast.apply(transformer, EVERY_THIRD) as handle:
        first = own_loop(transformer, cfg=cfg)
        assert len(handle.stats.contexts) == 1 + cfg
        assert (handle.stats.full_steps, handle.stats.skipped_steps) == (6, 6)
        assert torch.equal(own_loop(transformer, cfg=cfg), first)  # timesteps jump back: a new run
        handle.restart()
        assert torch.equal(own_loop(transformer, cfg=cfg), first)
    assert 0 < (first - plain).norm() < 0.05 * plain.norm()
    assert torch.equal(own_loop(transformer, cfg=cfg), plain)


def test_own_blocks_that_work_in_place():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            x += torch.tanh(self.linear(x))
            return x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x, timestep):
            x = x * timestep
            for block in self.blocks:
                x = block(x)
            return x

    model, scheduler = Model(), CountingScheduler()
    x, timestep = models.noise(2, 5, 8), torch.tensor(0.5)
    with torch.no_grad(), hicache.fast.apply(model, HiCacheConfig(), scheduler=scheduler) as handle:
        scheduler.set_timesteps(6)
        outputs = []
        for _ in range(6):
            outputs.append(model(x, timestep=timestep))
            scheduler.step()
        assert handle.stats.skipped_steps == 3
    torch.testing.assert_close(outputs[-1], outputs[0])


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("Linear", lambda: nn.Linear(2, 2)),
        (
            "UNet2DModel",
            lambda: diffusers.UNet2DModel(
                sample_size=8,
                block_out_channels=(32, 32),
                layers_per_block=1,
                down_block_types=("DownBlock2D",) * 2,
                up_block_types=("UpBlock2D",) * 2,
            ),
        ),
        ("DDPMPipeline", lambda: diffusers.DDPMPipeline(nn.Identity(), diffusers.DDPMScheduler())),
    ],
)
def test_nothing_to_hook_is_an_error_that_names_the_class(name, make):
    with pytest.raises(ValueError, match=f"nothing to hook in {name}"):
        hicache.fast.apply(make())


class IndexingModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x, timestep):
        for i in range(len(self.blocks)):
            x = self.blocks[i](x)
        return x


class AddingModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x, timestep):
        for block in self.blocks:
            x = block(x) + 1
        return x


class OwnCall(nn.Module):
    """Its class's ``__call__`` does more than its forward."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.norm_out = nn.Identity()

    def __call__(self, *args, **kwargs):
        return 2 * super().__call__(*args, **kwargs)

    def forward(self, hidden_states, timestep):
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return self.norm_out(hidden_states)


@torch.no_grad()
def test_a_call_that_its_class_makes_its_own_stays_so():
    model, x, timestep = OwnCall().eval(), torch.ones(1, 2, 4), torch.tensor(0.5)
    expected = model(x, timestep=timestep)
    with hicache.fast.apply(model):
        assert torch.equal(model(x, timestep=timestep), expected)


def test_an_object_without_weak_references_is_a_pipeline_too():
    model, scheduler = OwnCall().eval(), CountingScheduler()
    with hicache.fast.apply(SimpleNamespace(transformer=model, scheduler=scheduler)) as handle:
        assert handle.active


@pytest.mark.parametrize("failing", [5, 6, 7, 9])
@torch.no_grad()
def test_a_call_that_failed_may_be_made_again(failing: int):
    """The head runs out of memory once; what the sum before it did to the history is not done twice."""
    model, scheduler = models.flux_transformer(), CountingScheduler()
    error = torch.OutOfMemoryError("once")

    def fail(*_):
        hook.remove()
        raise error

    outputs = []
    with hicache.fast.apply(model, HiCacheConfig(interval=4), scheduler=scheduler) as handle:
        scheduler.set_timesteps(12)
        for step in range(12):
            call = models.flux_call(models.noise(1, 16, 4), torch.full((1,), 1 - step / 12))
            if step == failing:
                hook = model.norm_out.register_forward_pre_hook(fail)
                with pytest.raises(torch.OutOfMemoryError, match="once"):
                    model(**call)
            outputs.append(model(**call)[0])
            scheduler.step()
        assert len(handle.stats.contexts) == 1
    call = models.flux_call(models.noise(1, 16, 4), torch.full((1,), 1 - failing / 12))
    assert torch.equal(outputs[failing], model(**call)[0])  # a full step


def test_model_that_cannot_be_skipped_says_so():
    x = torch.ones(1, 2, 4)
    model = IndexingModel().eval()
    with hicache.fast.apply(model), pytest.raises(RuntimeError, match="IndexingModel runs without iterating"):
        model(x, timestep=1.0)
    assert model(x, timestep=1.0).shape == x.shape


def test_an_adapter_that_lists_blocks_does_not_make_them_skippable(monkeypatch):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.out(x)

    class Blocks(ModuleAdapter):
        def outputs(self):
            return [ModuleOutput(block.out, ((i, None),)) for i, block in enumerate(self.module.blocks)]

        def gates(self, call, base):
            return base.new_ones(2, len(base), base.shape[-1])

    monkeypatch.setitem(registry._ADAPTERS, "IndexingModel", Blocks)
    model = IndexingModel().eval()
    model.blocks = nn.ModuleList([Residual(), Residual()])
    with hicache.fast.apply(model), pytest.raises(RuntimeError, match="IndexingModel runs without iterating"):
        model(torch.ones(1, 2, 4), timestep=1.0)


def test_model_without_a_head_that_adds_between_blocks_is_found_out():
    class Headed(AddingModel):
        def __init__(self):
            super().__init__()
            self.norm_out = nn.LayerNorm(4)

        def forward(self, x, timestep):
            return self.norm_out(super().forward(x, timestep))

    model = Headed()
    with (
        torch.no_grad(),
        hicache.fast.apply(model),
        pytest.raises(RuntimeError, match="Headed changes the hidden"),
    ):
        for step in range(4):
            model(torch.ones(1, 2, 4), timestep=1.0 - 0.1 * step)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"config": {"interval": 3}}, TypeError, "expected config to be a HiCacheConfig"),
        ({"speedup": 0.5}, ValueError, "expected a finite speedup >= 1, got 0.5"),
        ({"speedup": "4"}, TypeError, "expected speedup to be a number"),
        (
            {"granularity": "modul"},
            ValueError,
            "unknown granularity 'modul'; expected one of auto, module, low-rank, stack",
        ),
        (
            {"backend": "cuda"},
            ValueError,
            "unknown backend 'cuda'; expected one of auto, reference, native, triton",
        ),
        ({"scheduler": object()}, TypeError, "expected a scheduler with set_timesteps"),
    ],
)
def test_bad_arguments_leave_the_pipeline_as_it_was(arguments, error, message):
    pipe, call = pipelines.build("flux")
    handle = hicache.fast.apply(pipe, EVERY_THIRD)
    with pytest.raises(error, match=message):
        hicache.fast.apply(pipe, **arguments)
    assert handle.active
    pipelines.draw(pipe, call)
    assert handle.stats.skipped_steps == 6


def test_speedup_of_a_bare_transformer_needs_a_scheduler():
    with pytest.raises(ValueError, match="needs the number of steps"):
        hicache.fast.apply(models.flux_transformer(), speedup=3.0)


def test_transformer_whose_scheduler_is_not_counted_stays_right():
    pipe, arguments = pipelines.build("flux")
    plain = pipelines.draw(pipe, arguments, 20)
    with hicache.fast.apply(pipe, EVERY_THIRD, scheduler=CountingScheduler()):  # not the run's
        with pytest.warns(RuntimeWarning, match="without a step of the scheduler"):
            picture = pipelines.draw(pipe, arguments, 20)
    assert torch.equal(picture, plain)


def test_a_scheduler_that_stands_still_is_told_at_the_second_step():
    pipe, arguments = pipelines.build("flux_cfg")
    plain = pipelines.draw(pipe, arguments, 4)
    with hicache.fast.apply(pipe, EVERY_THIRD, scheduler=CountingScheduler()):
        with pytest.warns(RuntimeWarning, match="with another timestep without a step of the scheduler"):
            assert torch.equal(pipelines.draw(pipe, arguments, 4), plain)


def test_training_is_left_alone():
    transformer = models.flux_transformer().train()
    with hicache.fast.apply(transformer, HiCacheConfig(warmup=1)) as handle:
        with pytest.warns(RuntimeWarning, match="is called for its gradients"):
            for sigma in (1.0, 0.9, 0.8):
                transformer(**flux_call(models.noise(1, 16, 4), torch.tensor(sigma)))[0].sum().backward()
        assert handle.stats.contexts == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("history", [None, torch.float32], ids=["same", "fp32"])
def test_dtypes(dtype, history):
    if dtype == torch.float64 and history is torch.float32:
        pytest.skip("a float64 model with a narrower history is covered by test_narrow_history")
    transformer = models.flux_transformer().to(dtype)
    scheduler = CountingScheduler()
    call = flux_call(models.noise(1, 16, 4), torch.tensor(0.5))
    call = {name: value.to(dtype) if torch.is_tensor(value) else value for name, value in call.items()}
    config = HiCacheConfig(history_dtype=history)
    with torch.no_grad(), hicache.fast.apply(transformer, config, scheduler=scheduler) as handle:
        scheduler.set_timesteps(8)
        outputs = []
        for _ in range(8):
            outputs.append(transformer(**call)[0])
            scheduler.step()
        assert handle.stats.skipped_steps == 5
    assert outputs[-1].dtype == dtype
    tolerance = {torch.bfloat16: 0.03, torch.float16: 4e-3, torch.float64: 1e-12}[dtype]
    assert (outputs[-1] - outputs[0]).norm() <= tolerance * outputs[0].norm()


def test_narrow_history():
    transformer, scheduler = models.flux_transformer(), CountingScheduler()
    call = flux_call(models.noise(1, 16, 4), torch.tensor(0.5))
    config = HiCacheConfig(history_dtype=torch.bfloat16)
    with (
        torch.no_grad(),
        hicache.fast.apply(transformer, config, scheduler=scheduler, granularity="stack") as handle,
    ):
        scheduler.set_timesteps(6)
        outputs = []
        for _ in range(6):
            outputs.append(transformer(**call)[0])
            scheduler.step()
        assert handle.stats.history_bytes == 3 * 16 * 32 * 2
    assert outputs[-1].dtype == torch.float32
    assert (outputs[-1] - outputs[0]).norm() <= 0.02 * outputs[0].norm()


def test_a_run_in_inference_mode_does_not_spoil_the_next():
    pipe, arguments = pipelines.build("flux")
    with hicache.fast.apply(pipe, EVERY_THIRD):
        with torch.inference_mode():
            first = pipelines.draw(pipe, arguments).clone()
        assert torch.equal(pipelines.draw(pipe, arguments), first)
        with torch.inference_mode():
            assert torch.equal(pipelines.draw(pipe, arguments), first)


def test_scheduler_used_for_two_pictures_without_a_new_run():
    """set_timesteps once, the loop twice: the second picture owes nothing to the first."""
    transformer, scheduler = models.flux_transformer(), CountingScheduler()

    def loop(latents):
        with torch.no_grad():
            for sigma in torch.linspace(1, 0.1, 12):
                latents = latents - transformer(**flux_call(latents, sigma))[0] / 12
                scheduler.step()
        return latents

    with hicache.fast.apply(transformer, EVERY_THIRD, scheduler=scheduler):
        scheduler.set_timesteps(12)
        loop(models.noise(1, 16, 4) * 3)
        second = loop(models.noise(1, 16, 4))
        scheduler.set_timesteps(12)
        assert torch.equal(loop(models.noise(1, 16, 4)), second)


def test_own_loop_aborted_in_a_call_starts_anew():
    transformer = models.flux_transformer()
    config = HiCacheConfig(interval=3, warmup=1)

    def later_half():
        latents = models.noise(1, 16, 4)
        with torch.no_grad():
            for sigma in torch.linspace(0.5, 0.1, 6):
                latents = latents - transformer(**flux_call(latents, sigma))[0] / 12
        return latents

    with hicache.fast.apply(transformer, config) as handle:
        fresh = later_half()
        failing = transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            transformer(**flux_call(models.noise(1, 16, 4) * 5, torch.tensor(0.9)))
        failing.remove()
        assert torch.equal(later_half(), fresh)
        transformer(
            **flux_call(models.noise(1, 16, 4) * 5, torch.tensor(0.9))
        )  # left by the caller: it cannot know
        handle.restart()
        assert torch.equal(later_half(), fresh)


def test_a_cached_pipeline_is_not_copied():
    pipe, arguments = pipelines.build("flux")
    with hicache.fast.apply(pipe, EVERY_THIRD):
        with pytest.raises(TypeError, match=r"cannot be copied or pickled; call remove\(\) first"):
            copy.deepcopy(pipe.transformer)
    twin = copy.deepcopy(pipe)
    assert torch.equal(pipelines.draw(twin, arguments, 3), pipelines.draw(pipe, arguments, 3))


def test_a_scheduler_that_cannot_be_watched_changes_nothing():
    class Slotted:
        __slots__ = ()

        def set_timesteps(self, count): ...

        def step(self): ...

    pipe, arguments = pipelines.build("flux")
    with hicache.fast.apply(pipe, EVERY_THIRD) as handle:
        with pytest.raises(TypeError, match="Slotted with __slots__"):
            hicache.fast.apply(pipe, scheduler=Slotted())
        scheduler, pipe.scheduler = pipe.scheduler, None
        with pytest.raises(TypeError, match="got NoneType without set_timesteps and step"):
            pipe.transformer(**flux_call(models.noise(1, 16, 4), torch.tensor(0.5)))
        pipe.scheduler = scheduler
        pipelines.draw(pipe, arguments)
        assert handle.stats.skipped_steps == 6
    assert "step" not in vars(scheduler)


def test_schedulers_shared_by_two_handles_removed_in_either_order():
    for first_out in (0, 1):
        (one, arguments), (two, _) = pipelines.build("flux"), pipelines.build("flux")
        two.scheduler = one.scheduler
        handles = [hicache.fast.apply(one, EVERY_THIRD), hicache.fast.apply(two, EVERY_THIRD)]
        pipelines.draw(one, arguments)
        handles[first_out].remove()
        left = (two, one)[first_out]
        pipelines.draw(left, arguments)
        assert handles[1 - first_out].stats.skipped_steps == 6
        handles[1 - first_out].remove()
        assert not {"step", "set_timesteps"} & set(vars(one.scheduler))


def test_nothing_of_a_call_is_held_after_it():
    pipe, arguments = pipelines.build("flux")
    with hicache.fast.apply(pipe, EVERY_THIRD) as handle:
        pipelines.draw(pipe, arguments)
        hooked = handle._denoisers[0].hooked
        assert hooked.returned is None
        assert hooked._expected is None
        assert hooked.call.plan is None
        assert not hooked.call.result.partial_sums


def test_gradients_through_inputs_run_uncached():
    transformer = models.flux_transformer().eval()
    latents = models.noise(1, 16, 4).requires_grad_()
    with hicache.fast.apply(transformer, HiCacheConfig(warmup=1)):
        with pytest.warns(RuntimeWarning, match="is called for its gradients"):
            for sigma in (1.0, 0.9, 0.8):
                [grad] = torch.autograd.grad(
                    transformer(**flux_call(latents, torch.tensor(sigma)))[0].sum(), latents
                )
                assert grad.any()


def test_bound_of_two_denoisers_counts_both():
    pipe, arguments = pipelines.build("wan22")
    with hicache.fast.apply(pipe, EVERY_THIRD) as handle:
        pipelines.draw(pipe, arguments)
        stats = handle.stats
    assert stats.full_steps + stats.skipped_steps == 12
    assert stats.bound == 12 / stats.full_steps


def test_release_in_the_middle_of_a_run_keeps_the_last_step_full():
    pipe, arguments = pipelines.build("flux")
    counter = BlockCounter(pipe)
    with hicache.fast.apply(pipe, HiCacheConfig(interval=5, last_step_full=True)) as handle:

        def release(pipe, step, timestep, tensors):
            if step == 8:
                handle.release()
            return tensors

        pipelines.draw(pipe, arguments, 13, callback_on_step_end=release)
    assert [step for step, count in enumerate(counter.calls) if count] == [0, 1, 2, 7, 9, 12]


def test_image_to_image_counts_only_its_own_steps():
    pipe, _ = pipelines.build("flux")
    with hicache.fast.apply(pipe, HiCacheConfig(interval=5, last_step_full=True)) as handle:
        pipe.scheduler.set_timesteps(20)
        pipe.scheduler.set_begin_index(8)
        latents = models.noise(1, 16, 4)
        with torch.no_grad():
            for timestep in pipe.scheduler.timesteps[8:]:
                velocity = pipe.transformer(**flux_call(latents, timestep / 1000))[0]
                latents = pipe.scheduler.step(velocity, timestep, latents)[0]
        assert handle.stats.full_steps == len(full_steps(HiCacheConfig(interval=5, last_step_full=True), 12))


def test_a_removed_handle_is_not_entered():
    pipe, _ = pipelines.build("flux")
    handle = hicache.fast.apply(pipe)
    handle.remove()
    with pytest.raises(RuntimeError, match="this handle was removed"), handle:
        pass


@pytest.mark.parametrize(
    "scheduler",
    ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"],
)
def test_other_schedulers(scheduler):
    pipe, arguments = pipelines.build("pixart")
    pipe.scheduler = getattr(diffusers, scheduler)()
    plain = pipelines.draw(pipe, arguments, 8)
    with hicache.fast.apply(pipe, HiCacheConfig(interval=1)):
        assert torch.equal(pipelines.draw(pipe, arguments, 8), plain)
    with hicache.fast.apply(pipe, EVERY_THIRD) as handle:
        pipelines.draw(pipe, arguments, 8)
        assert handle.stats.full_steps == len(full_steps(EVERY_THIRD, 8))
    assert torch.equal(pipelines.draw(pipe, arguments, 8), plain)


def test_rotary_embeddings_are_not_computed_on_skipped_steps():
    pipe, arguments = pipelines.build("flux_cfg")
    inner = type(pipe.transformer.pos_embed)
    with hicache.fast.apply(pipe, EVERY_THIRD) as handle:
        calls = []
        forward = inner.forward
        inner.forward = lambda self, ids: calls.append(1) or forward(self, ids)
        try:
            pipelines.draw(pipe, arguments)
        finally:
            inner.forward = forward
        assert len(calls) == 2 * handle.stats.full_steps == 12
        assert type(pipe.transformer.pos_embed) is not inner
    assert type(pipe.transformer.pos_embed) is inner


def test_another_transformer_put_in_is_told():
    pipe, arguments = pipelines.build("flux")
    other, _ = pipelines.build("flux")
    plain = pipelines.draw(other, arguments)
    with hicache.fast.apply(pipe, EVERY_THIRD) as handle:
        pipelines.draw(pipe, arguments)
        cached, pipe.transformer = pipe.transformer, other.transformer
        with pytest.warns(RuntimeWarning, match=r"FluxPipeline.transformer is another Flux.* runs uncached"):
            assert torch.equal(pipelines.draw(pipe, arguments), plain)
        assert handle.stats.contexts == {}  # not those of the run before
        assert handle.stats.full_steps == 0
        pipe.transformer = cached
        pipelines.draw(pipe, arguments)
        assert handle.stats.skipped_steps == 6
    with hicache.fast.apply(pipe, EVERY_THIRD), warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.transformer = other.transformer
        with hicache.fast.apply(pipe, EVERY_THIRD) as handle:
            pipelines.draw(pipe, arguments)
            assert handle.stats.skipped_steps == 6


def test_stats_of_a_denoiser_whose_turn_is_still_to_come_are_not_the_last_runs():
    pipe, arguments = pipelines.build("wan22")
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append({label.split("[")[0] for label in handle.stats.contexts})
        return tensors

    with hicache.fast.apply(pipe, EVERY_THIRD) as handle:
        pipelines.draw(pipe, arguments)
        pipelines.draw(pipe, arguments, callback_on_step_end=look)
    assert seen[0] == {"transformer"}
    assert seen[-1] == {"transformer", "transformer_2"}


@pytest.mark.parametrize("package", [hicache.fast, hicache.reference], ids=["fast", "reference"])
def test_settings_of_one_denoiser_leave_the_other_cached(package):
    pipe, arguments = pipelines.build("wan22")
    pipelines.draw(pipe, arguments)  # diffusers itself leaves attributes behind
    before = everything(pipe)
    with package.apply(pipe, EVERY_THIRD) as both:
        pipelines.draw(pipe, arguments)
        first = {label: c for label, c in both.stats.contexts.items() if label.startswith("transformer[")}
        with package.apply(pipe.transformer_2, HiCacheConfig(interval=2), scheduler=pipe.scheduler) as second:
            pipelines.draw(pipe, arguments)
            assert both.active
            assert both.stats.contexts == first
            assert all(c.skipped_steps > 0 for c in second.stats.contexts.values())
        assert both.active
    assert everything(pipe) == before


def test_a_second_handle_of_the_whole_pipeline_replaces_all_others():
    pipe, arguments = pipelines.build("wan22")
    both = hicache.fast.apply(pipe, EVERY_THIRD)
    second = hicache.fast.apply(pipe.transformer_2, EVERY_THIRD)
    with hicache.fast.apply(pipe, EVERY_THIRD) as handle:
        assert not both.active
        assert not second.active
        pipelines.draw(pipe, arguments)
        assert handle.stats.skipped_steps > 0


@pytest.mark.parametrize("strength", [0.5, 0.8])
def test_video_to_video_counts_only_its_own_steps(strength):
    """CogVideoX's schedulers have no begin index: the first timestep tells where the run begins."""
    made, arguments = pipelines.build("cogvideox")
    pipe = diffusers.CogVideoXVideoToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=made.transformer, scheduler=made.scheduler
    )
    pipe.set_progress_bar_config(disable=True)
    counter = BlockCounter(pipe)
    given = {name: value for name, value in arguments.items() if name != "num_frames"}
    latents = models.noise(1, 3, made.transformer.config.in_channels, 4, 4)
    steps = int(20 * strength)
    wanted = HiCacheConfig(interval=5, last_step_full=True)
    with hicache.fast.apply(pipe, wanted):
        pipelines.draw(pipe, {**given, "latents": latents, "strength": strength}, 20)
    assert [step for step, count in enumerate(counter.calls) if count] == full_steps(wanted, steps)
    with hicache.fast.apply(pipe, speedup=2.0) as handle:
        pipelines.draw(pipe, {**given, "latents": latents, "strength": strength}, 20)
        assert handle.stats.full_steps + handle.stats.skipped_steps == steps
        assert handle.stats.bound >= 2.0


def test_a_loop_over_a_slice_of_the_timesteps():
    pipe, _ = pipelines.build("flux")
    config = HiCacheConfig(interval=5, last_step_full=True)
    counter = BlockCounter(pipe)
    with torch.no_grad(), hicache.fast.apply(pipe, config):
        pipe.scheduler.set_timesteps(20)
        latents = models.noise(1, 16, 4)
        for timestep in pipe.scheduler.timesteps[8:]:
            velocity = pipe.transformer(**flux_call(latents, timestep / 1000))[0]
            latents = pipe.scheduler.step(velocity, timestep, latents)[0]
    assert [step for step, count in enumerate(counter.calls) if count] == full_steps(config, 12)
