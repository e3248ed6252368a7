"""ControlNets: one runs at full steps only, and what it adds is forecast at the others."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from diffusers.models.controlnets.controlnet_flux import FluxControlNetOutput
from torch import Tensor

import hicache.fast
import hicache.reference
from hicache import HiCacheConfig
from hicache.hooks.deferred import DeferredTensor, OutputForm, real
from hicache.runtime.context import Context
from tests.support import pipelines
from tests.support.comparisons import cast, relative_rms, snapshot
from tests.support.control_loop import RESIDUALS, ControlLoop
from tests.support.graphs import FakeBackend, connect
from tests.support.models import Arguments
from tests.support.operations import Operations

CONFIG = HiCacheConfig(interval=4)
FULL = [0, 1, 2, 6, 10]  # of twelve steps
FAMILIES = ("flux_controlnet", "sd3_controlnet", "qwen_controlnet")
ALL = (*FAMILIES, "flux_controlnet_xlabs", *pipelines.CONTROLNETS)
BOTH = pytest.mark.parametrize("granularity", ["module", "stack"])


def draw(pipe: Any, arguments: Arguments, steps: int = 12, **more: Any) -> Tensor:
    torch.manual_seed(0)  # the control picture is encoded at random
    return pipelines.draw(pipe, arguments, steps, **more)


@contextmanager
def watched(pipe: Any) -> Iterator[list[int]]:
    """The steps at which the ControlNet runs."""
    steps: list[int] = []
    done = [0]
    scheduler = pipe.scheduler
    step_of, shadowed = scheduler.step, "step" in vars(scheduler)

    def step(*args: Any, **kwargs: Any) -> Any:
        done[0] += 1
        return step_of(*args, **kwargs)

    scheduler.step = step
    [net, *_] = getattr(pipe.controlnet, "nets", [pipe.controlnet])
    hook = net.controlnet_blocks[0].register_forward_pre_hook(
        lambda *_: None if done[0] in steps[-1:] else steps.append(done[0])
    )
    try:
        yield steps
    finally:
        hook.remove()
        del scheduler.step
        if shadowed:
            scheduler.step = step_of


# It runs at full steps only.


@pytest.mark.few(4)
@pytest.mark.parametrize("name", ALL)
def test_it_runs_at_full_steps_only_and_draws_what_the_reference_draws(name: str):
    """Each kind of ControlNet: by module as the reference forecasts its residuals, by stack unseen."""
    pipe, arguments = pipelines.build_randomized(name)
    pipe.to(torch.float64)
    arguments = cast(arguments, torch.float64)
    plain = draw(pipe, arguments)
    with watched(pipe) as ran, hicache.reference.apply(pipe, CONFIG) as reference:
        expected = draw(pipe, arguments)
        full = FULL[: reference.stats.full_steps]
    assert ran == full
    for granularity in ("module", "stack"):
        with hicache.fast.apply(pipe, CONFIG, granularity=granularity) as handle:
            with watched(pipe) as ran:
                drawn = draw(pipe, arguments)
        assert ran == full
        stats = handle.stats
        assert stats.granularity == granularity
        net = stats.controlnets["controlnet"]
        assert (net.calls, net.runs, net.always) == (stats.full_steps + stats.skipped_steps, len(full), None)
        if granularity == "module":
            assert relative_rms(drawn, expected) <= 1e-10
        assert 1e-6 < relative_rms(drawn, plain) < 0.15


@pytest.mark.few(2)
@pytest.mark.parametrize("name", [*FAMILIES, "flux_controlnets", "flux_controlnet_cfg"])
def test_a_run_without_skipped_steps_has_equal_bits(name: str):
    pipe, arguments = pipelines.build_randomized(name)
    plain = draw(pipe, arguments)
    for granularity in ("module", "stack"):
        with hicache.fast.apply(pipe, HiCacheConfig(interval=1), granularity=granularity):
            assert torch.equal(draw(pipe, arguments), plain)


@pytest.mark.parametrize("name", FAMILIES)
def test_low_precision(name: str):
    pipe, arguments = pipelines.build_randomized(name)
    pipe.to(torch.bfloat16)
    arguments = cast(arguments, torch.bfloat16)
    with hicache.reference.apply(pipe, CONFIG):
        expected = draw(pipe, arguments)
    with hicache.fast.apply(pipe, CONFIG, granularity="module") as handle:
        assert relative_rms(draw(pipe, arguments).float(), expected.float()) < 0.03
    assert handle.stats.controlnets["controlnet"].runs == 5


@pytest.mark.parametrize("name", FAMILIES)
def test_its_forecast_is_better_than_none(name: str, monkeypatch: pytest.MonkeyPatch):
    pipe, arguments = pipelines.build_randomized(name)
    plain = draw(pipe, arguments)
    with hicache.fast.apply(pipe, CONFIG, granularity="module"):
        error = relative_rms(draw(pipe, arguments), plain)
        monkeypatch.setattr(
            "hicache.runtime.module_recorder.write_total", lambda between, out, view: out.zero_()
        )
        assert relative_rms(draw(pipe, arguments), plain) > 2 * error


# It guides a part of the run.


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("name", "guided"),
    [
        ("flux_controlnet", {"control_guidance_end": 0.5}),
        ("flux_controlnet", {"control_guidance_start": 0.3}),
        ("sd3_controlnets", {"control_guidance_end": 0.5}),
    ],
    ids=str,
)
def test_where_it_begins_or_ends_to_count_all_begins_anew(name: str, guided: Arguments):
    """No feature is forecast across the jump; the reference has the same full steps."""
    pipe, arguments = pipelines.build_randomized(name)
    pipe.to(torch.float64)
    arguments = cast(arguments, torch.float64)
    change = 12 if "control_guidance_end" in guided else 8
    first = [0, 1, 2, *range(6, change, 4)]
    full = [*first, *(change + step for step in (0, 1, 2, 6, 10, 14) if change + step < 24)]
    if name == "sd3_controlnets":
        guided = {key: [value] * 2 for key, value in guided.items()}
        guided = {"control_guidance_start": [0.0] * 2, "control_guidance_end": [1.0] * 2, **guided}
    plain, plain_part = draw(pipe, arguments, 24), draw(pipe, arguments, 24, **guided)
    assert relative_rms(plain, plain_part) > 0.01
    with watched(pipe) as ran, hicache.reference.apply(pipe, CONFIG):
        expected = draw(pipe, arguments, 24, **guided)
    assert ran == full
    for granularity in ("module", "stack"):
        with hicache.fast.apply(pipe, CONFIG, granularity=granularity) as handle:
            constant = relative_rms(draw(pipe, arguments, 24), plain)
            with watched(pipe) as ran:
                drawn = draw(pipe, arguments, 24, **guided)
            assert ran == full
            assert handle.stats.full_steps == len(full)
        if granularity == "module":
            assert relative_rms(drawn, expected) <= 1e-10
        assert relative_rms(drawn, plain_part) < 2.5 * constant


def test_forecasts_across_the_jump_would_be_worse(monkeypatch: pytest.MonkeyPatch):
    pipe, arguments = pipelines.build_randomized("flux_controlnet")
    plain = draw(pipe, arguments, 24, control_guidance_end=0.5)
    errors = []
    for follows in (True, False):
        if not follows:
            monkeypatch.setattr(Context, "follow", lambda self, scale, *_: setattr(self, "scale", scale))
        with hicache.fast.apply(pipe, CONFIG, granularity="stack"):
            errors.append(relative_rms(draw(pipe, arguments, 24, control_guidance_end=0.5), plain))
    assert errors[0] < 0.6 * errors[1]


def test_a_scale_that_changes_in_every_step_makes_every_step_full():
    loop = ControlLoop.build(scale=lambda step: 1 - step / 20)
    plain = loop()
    with hicache.fast.apply(loop, CONFIG) as handle:
        assert torch.equal(loop(), plain)
    assert handle.stats.controlnets["controlnet"].runs == handle.stats.full_steps == 12


# Where a step runs in full after all, it gets what the ControlNet gives.


@BOTH
@pytest.mark.parametrize("first", [3, 5])
def test_a_context_that_begins_at_a_skipped_step(granularity: str, first: int):
    """A guider's second call: its first, at a step that the other context skips, is as without a cache."""
    waited: list[bool] = []
    given: list[Any] = []
    loop = ControlLoop.build(
        second_from=first,
        between=lambda step, residuals: (
            waited.append(isinstance(residuals[0][0], DeferredTensor)) or residuals
        ),
    )
    with hicache.fast.apply(loop, CONFIG, granularity=granularity) as handle:
        hook = loop.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: given.append(kwargs), with_kwargs=True
        )
        with watched(loop) as ran:
            loop()
        hook.remove()
        contexts = list(handle.stats.contexts.values())
    assert ran == sorted({*FULL, *(first + step for step in (0, 1, 2, 6) if first + step < 12)})
    assert waited[first]
    assert not waited[0]
    assert (contexts[0].full_steps, contexts[0].skipped_steps) == (5, 7)
    second = given[first + 1]  # what the blocks were given, after the cache had looked at it
    assert not any(isinstance(part, DeferredTensor) for name in RESIDUALS for part in second[name])
    with torch.no_grad():
        assert torch.equal(loop.transformer(**second)[0], loop.outputs[first][1])
        now = {name: second[name] for name in ("hidden_states", "timestep")}
        residuals = loop.residuals(now, step=first)
    assert all(
        torch.equal(one, other)
        for name, parts in zip(RESIDUALS, residuals, strict=True)
        for one, other in zip(second[name], parts, strict=True)
    )


@pytest.mark.filterwarnings("ignore:hicache.*not finite")
def test_a_step_after_one_that_was_not_finite():
    loop = ControlLoop.build()
    block = loop.transformer.transformer_blocks[0].attn.to_out[0]
    with hicache.fast.apply(loop, CONFIG), watched(loop) as ran:
        loop.between = lambda step, residuals: (
            setattr(block, "broken", step == 6) or residuals  # what the attention gives at step 6
        )
        hook = block.register_forward_hook(
            lambda module, args, output: output * torch.nan if module.broken else output
        )
        stepped = loop.scheduler.step
        loop.scheduler.step = lambda output, *more, **kw: stepped(output.nan_to_num(), *more, **kw)
        loop()
        hook.remove()
    del block.broken
    assert ran == [0, 1, 2, 6, 7, 11]


# What comes of its residuals on their way.


def halved(residuals: Any) -> Any:
    return [[part * 0.5 for part in parts] for parts in residuals]


def test_a_pipeline_that_changes_its_residuals_has_it_run_at_every_step():
    loop = ControlLoop.build(
        between=lambda step, residuals: [[p * 0.5 for p in parts] for parts in residuals]
    )
    plain = loop()
    with hicache.fast.apply(loop, CONFIG) as handle, watched(loop) as ran:
        drawn = loop()
        net = handle.stats.controlnets["controlnet"]
        assert "runs at every step: the transformer is not given its residuals" in str(handle.stats)
    assert ran == [*range(12)]
    assert net.always is not None
    assert handle.stats.full_steps == 5
    assert relative_rms(drawn, plain) < 0.05


@BOTH
@pytest.mark.parametrize("late", [7, 10], ids=["at skipped steps", "at a full step"])
def test_a_pipeline_that_begins_to_change_them_gets_what_it_gives(granularity: str, late: int):
    """Whoever does anything with a residual that waits has it made."""
    loop = ControlLoop.build(between=lambda step, residuals: halved(residuals) if step >= late else residuals)
    plain = loop()
    with hicache.fast.apply(loop, CONFIG, granularity=granularity) as handle, watched(loop) as ran:
        drawn = loop()
        assert len(handle.stats.contexts) == 2  # another kind of call, which warms up
    assert ran == [0, 1, 2, 6, *range(late, 12)]
    assert relative_rms(drawn, plain) < 0.05


def test_residuals_that_wait():
    made = []

    def call() -> Any:
        made.append(None)
        return [torch.ones(2, 3), None], {"a": torch.full((4,), 2.0)}

    form = OutputForm(call())
    made.clear()
    [one, nothing], named = form.defer(call)
    assert isinstance(one, DeferredTensor)
    assert nothing is None
    assert (one.shape, one.dtype, one.device.type, len(one)) == ((2, 3), torch.float32, "cpu", 2)
    assert one.untyped_storage().nbytes() == 4
    assert not made
    with pytest.raises(RuntimeError, match="not supported for tensor subclasses"):
        one.numpy()
    assert torch.equal(torch.zeros(2, 3) + one, torch.ones(2, 3))
    assert type(named["a"] * 1) is Tensor
    assert torch.equal(real(named["a"]), torch.full((4,), 2.0))
    assert real(5) == 5
    assert len(made) == 1
    [one, _], _ = form.defer(call)
    one.mul_(3)
    assert torch.equal(one.clone(), torch.full((2, 3), 3.0))


def test_residuals_that_wait_are_made_in_the_modes_of_their_call():
    layer = torch.nn.Linear(3, 3)
    form = OutputForm(torch.zeros(2, 3))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        waiting = form.defer(lambda: layer(torch.ones(2, 3)))
    made = real(waiting)
    assert made.dtype == torch.bfloat16
    assert not made.requires_grad
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()


def test_outputs_that_may_have_tensors_inside_have_no_form():
    given = FluxControlNetOutput([torch.ones(2)], [torch.ones(2) * 2])
    waiting = OutputForm(given).defer(lambda: given)
    assert type(waiting) is FluxControlNetOutput
    assert (waiting.controlnet_single_block_samples[0] * 1).tolist() == [2.0, 2.0]
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        OutputForm(FluxControlNetOutput([torch.ones(2)], None))
    with pytest.raises(TypeError, match="expected tensors and plain values, got SimpleNamespace"):
        OutputForm([SimpleNamespace(inside=torch.ones(2))])


@BOTH
def test_a_call_that_is_given_no_residuals_has_no_say(granularity: str):
    """A guider's second call without the ControlNet: that runs when the first one needs it."""
    loop = ControlLoop.build(second_from=3)
    second = loop.call["encoder_hidden_states"] * 0.3

    def drop(module: Any, args: Any, kwargs: Any) -> Any:
        if torch.equal(kwargs["encoder_hidden_states"], second):
            kwargs = {**kwargs, **dict.fromkeys(RESIDUALS)}
        return args, kwargs

    hook = loop.transformer.register_forward_pre_hook(drop, with_kwargs=True)
    with hicache.fast.apply(loop, CONFIG, granularity=granularity) as handle, watched(loop) as ran:
        loop()
        assert ran == FULL
        net = handle.stats.controlnets["controlnet"]
        assert (net.runs, net.always) == (5, None)
        assert len(handle.stats.contexts) == 2
    hook.remove()


# Whose call it is.


def test_a_loop_of_ones_own_gets_what_it_gives():
    """Residuals that a user computed are new in every step, and added as they come."""
    loop = ControlLoop.build()
    plain = loop()
    with hicache.fast.apply(loop, CONFIG, granularity="module") as handle, watched(loop) as ran:
        drawn = loop.run()
        assert ran == [*range(12)]
        assert handle.stats.full_steps == 5
        assert handle.stats.controlnets["controlnet"].calls == 0
    assert relative_rms(drawn, plain) < 0.02


@BOTH
def test_a_pipeline_that_is_not_cached_may_share_it(granularity: str):
    pipe, arguments = pipelines.build_randomized("flux_controlnet")
    twin, _ = pipelines.build("flux_controlnet")
    twin.register_modules(controlnet=pipe.controlnet)
    plain, twins = draw(pipe, arguments), draw(twin, arguments)
    with hicache.fast.apply(pipe, CONFIG, granularity=granularity):
        cached = draw(pipe, arguments)
        assert torch.equal(draw(twin, arguments), twins)
        assert torch.equal(draw(pipe, arguments), cached)
    assert not torch.equal(cached, plain)


def test_cached_pipelines_may_share_it():
    """Each has its steps; whichever is removed first, the other goes on, and nothing stays."""
    pipe, arguments = pipelines.build_randomized("flux_controlnet")
    twin, _ = pipelines.build("flux_controlnet")
    twin.register_modules(controlnet=pipe.controlnet)
    draw(pipe, arguments)
    before = snapshot(pipe.controlnet)
    with hicache.fast.apply(pipe, CONFIG):
        expected = draw(pipe, arguments)
    with hicache.fast.apply(twin, HiCacheConfig(interval=3)):
        others = draw(twin, arguments)
    for first in (0, 1):
        handles = [hicache.fast.apply(pipe, CONFIG), hicache.fast.apply(twin, HiCacheConfig(interval=3))]
        assert torch.equal(draw(pipe, arguments), expected)
        assert torch.equal(draw(twin, arguments), others)
        handles[first].remove()
        if first:
            assert torch.equal(draw(pipe, arguments), expected)
        else:
            assert torch.equal(draw(twin, arguments), others)
        handles[1 - first].remove()
        assert snapshot(pipe.controlnet) == before


@pytest.mark.few(1)
@BOTH
def test_threads(granularity: str):
    """A server's pipelines over one transformer and one ControlNet, each with a scheduler of its own."""
    pipe, arguments = pipelines.build_randomized("flux_controlnet")
    with hicache.fast.apply(pipe, CONFIG, granularity=granularity):
        expected = [draw(pipe, {**arguments, "controlnet_conditioning_scale": s}) for s in (0.3, 1.0, 0.6)]
    drawn: dict[int, Tensor] = {}
    barrier = threading.Barrier(3)

    def request(number: int, scale: float) -> None:
        own = type(pipe).from_pipe(pipe, scheduler=copy.deepcopy(pipe.scheduler))
        own.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        barrier.wait()
        for _ in range(2):
            drawn[number] = own(
                num_inference_steps=12,
                generator=generator.manual_seed(0),
                **{**arguments, "controlnet_conditioning_scale": scale},
            )[0]

    pipe.vae.encode = lambda image, *_: _Encoded(image)  # the global generator is of all threads
    with hicache.fast.apply(pipe, CONFIG, granularity=granularity):
        expected = [draw(pipe, {**arguments, "controlnet_conditioning_scale": s}) for s in (0.3, 1.0, 0.6)]
    with hicache.fast.apply(pipe, CONFIG, granularity=granularity):
        threads = [threading.Thread(target=request, args=(i, s)) for i, s in enumerate((0.3, 1.0, 0.6))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(drawn[number], picture) for number, picture in enumerate(expected))


class _Encoded:
    """What an autoencoder gives, the same every time."""

    def __init__(self, image: Tensor) -> None:
        self.latent_dist = self
        self._latents = image[:, :1, ::8, ::8]

    def sample(self, generator: Any = None) -> Tensor:
        return self._latents


def test_another_one_put_in_its_place_runs_at_every_step():
    pipe, arguments = pipelines.build_randomized("flux_controlnet")
    with hicache.fast.apply(pipe, CONFIG, granularity="module") as handle:
        draw(pipe, arguments)
        pipe.controlnet = copy.deepcopy(pipelines.build("flux_controlnet")[0].controlnet)
        with pytest.warns(RuntimeWarning, match=r"controlnet is another FluxControlNetModel"):
            with watched(pipe) as ran:
                drawn = draw(pipe, arguments)
        assert ran == [*range(12)]
        assert handle.stats.full_steps == 5
        assert handle.stats.controlnets["controlnet"].calls == 0
    assert relative_rms(drawn, draw(pipe, arguments)) < 0.05


# Nothing is left behind.


@pytest.mark.few(2)
@pytest.mark.parametrize("name", [*FAMILIES, "flux_controlnets"])
def test_it_is_left_as_it_was(name: str):
    pipe, arguments = pipelines.build(name)
    plain = draw(pipe, arguments)
    before = snapshot(pipe.controlnet)
    for cache in (hicache.fast, hicache.reference):
        handle = cache.apply(pipe, CONFIG)
        draw(pipe, arguments)
        with pytest.raises(TypeError, match="call remove"):
            if cache is hicache.fast:
                copy.deepcopy(pipe.controlnet)
            raise TypeError("call remove")
        cache.apply(pipe, HiCacheConfig(interval=3))
        assert not handle.active
        draw(pipe, arguments)
        cache.apply(pipe, CONFIG).remove()
        assert snapshot(pipe.controlnet) == before
    assert torch.equal(draw(pipe, arguments), plain)


@pytest.mark.few(3)
@BOTH
@pytest.mark.parametrize("step", [1, 3], ids=["in its call", "in a call that waited"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupt_in_it(granularity: str, step: int, error: type[BaseException]):
    loop = ControlLoop.build(second_from=3)
    with hicache.fast.apply(loop, CONFIG, granularity=granularity) as handle:
        expected = loop()
        stats = handle.stats.contexts
        with watched(loop) as ran:

            def stop(*_: Any) -> None:
                if ran[-1] == step:
                    raise error

            hook = loop.controlnet.controlnet_blocks[0].register_forward_pre_hook(stop)
            with pytest.raises(error):
                loop()
            hook.remove()
        assert torch.equal(loop(), expected)
        assert handle.stats.contexts == stats


def test_no_memory_is_held():
    """At a skipped step there is neither a residual nor, once it has ended, what the call was given."""
    loop = ControlLoop.build()
    given: list[weakref.ref[Tensor]] = []
    held: list[int] = []
    controlnet = type(loop.controlnet).__call__

    def between(step: int, residuals: Any) -> Any:
        for parts in residuals:
            given.extend(weakref.ref(part) for part in parts)
        held.append(sum(ref() is not None for ref in given))
        if step in (3, 4, 5):
            assert all(p.untyped_storage().nbytes() == 4 for parts in residuals for p in parts)
        return residuals

    loop.between = between
    gc.disable()
    try:
        with hicache.fast.apply(loop, CONFIG):
            loop()
            assert max(held) <= 8  # of this step and of the one before, which the loop still has
            assert not [ref for ref in given if ref() is not None]
    finally:
        gc.enable()
    assert type(loop.controlnet).__call__ is controlnet


# With what else may be done to a model.


def test_weights_that_are_offloaded_are_not_brought_for_a_skipped_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pipe, arguments = pipelines.build_randomized("flux_controlnet")
    with hicache.fast.apply(pipe, CONFIG):
        expected = draw(pipe, arguments)
    cpu = torch.device("cpu")
    apply_group_offloading(
        pipe.controlnet, cpu, cpu, "block_level", num_blocks_per_group=1, offload_to_disk_path=str(tmp_path)
    )
    brought: list[int] = []
    onload, offload = ModuleGroup.onload_, ModuleGroup.offload_

    def taken(self: ModuleGroup) -> None:
        offload(self)
        for tensor in self.tensor_to_key:
            if tensor.is_floating_point():
                tensor.data.fill_(torch.nan)

    def bring(self: ModuleGroup) -> None:
        brought.append(1)
        onload(self)

    monkeypatch.setattr(ModuleGroup, "offload_", taken)
    monkeypatch.setattr(ModuleGroup, "onload_", bring)
    draw(pipe, arguments, 1)
    a_run, brought[:] = len(brought), []
    with hicache.fast.apply(pipe, CONFIG):
        assert torch.equal(draw(pipe, arguments), expected)
    assert len(brought) == 5 * a_run


def test_a_transformer_that_is_offloaded_in_groups_skips_as_well():
    """FLUX's pipelines with a ControlNet make a tensor of their guidance anew in every step."""
    pipe, arguments = pipelines.build_randomized("flux_controlnet")
    with hicache.fast.apply(pipe, CONFIG, granularity="module"):
        expected = draw(pipe, arguments)
    pipelines.offload_groups(pipe)
    with hicache.fast.apply(pipe, CONFIG, granularity="module") as handle, watched(pipe) as ran:
        assert relative_rms(draw(pipe, arguments), expected) < 1e-6
        assert ran == FULL
        assert handle.stats.full_steps == 5


def test_another_guidance_is_noticed_where_weights_are_offloaded_in_groups():
    """No step is skipped with the gates of the old one."""
    loop = ControlLoop.build()

    def guide(step: int, residuals: Any) -> Any:
        loop.call["guidance"] = torch.full((1,), 3.5 if step < 4 else 9.0)
        return residuals

    loop.between = guide
    pipelines.offload_groups(loop)
    with hicache.fast.apply(loop, CONFIG, granularity="module"), watched(loop) as ran:
        loop()
    assert ran == [0, 1, 2, 4, 8]


def test_hooks_of_accelerate():
    """As model offload puts them there: they come after, and are not asked at skipped steps."""
    hooks = pytest.importorskip("accelerate.hooks")

    class Counted(hooks.ModelHook):
        calls = 0

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            Counted.calls += 1
            return args, kwargs

    pipe, arguments = pipelines.build_randomized("flux_controlnet")
    with hicache.fast.apply(pipe, CONFIG):
        expected = draw(pipe, arguments)
        hooks.add_hook_to_module(pipe.controlnet, Counted())
        assert torch.equal(draw(pipe, arguments), expected)
        assert Counted.calls == 5
    assert torch.equal(draw(pipe, arguments, 1), draw(pipe, arguments, 1))
    assert Counted.calls == 7
    hooks.remove_hook_from_module(pipe.controlnet)
    assert type(pipe.controlnet) is diffusers.FluxControlNetModel


@pytest.mark.parametrize(
    "order", ["before", *(pytest.param(order, marks=pytest.mark.slow) for order in ("after", "in place"))]
)
def test_one_that_is_compiled(order: str):
    """In place it is as any other; what torch.compile() is around runs at every step, and stats say so."""
    torch._dynamo.reset()
    loop = ControlLoop.build()
    plain = loop()
    if order == "before":
        loop.controlnet = torch.compile(loop.controlnet, backend="eager")
    if order == "in place":
        loop.controlnet.compile(backend="eager")
    with hicache.fast.apply(loop, CONFIG) as handle:
        if order == "after":
            loop.controlnet = torch.compile(loop.controlnet, backend="eager", fullgraph=True)
        drawn = loop()
        net = handle.stats.controlnets["controlnet"]
    assert handle.stats.full_steps == 5
    assert relative_rms(drawn, plain) < 0.05
    assert (net.calls, net.runs) == ((12, 5) if order == "in place" else (0, 0))
    assert net.always == ("torch.compile() is around it" if order == "before" else None)
    torch._dynamo.reset()


@pytest.mark.parametrize("granularity", [pytest.param("module", marks=pytest.mark.slow), "stack"])
def test_a_transformer_compiled_as_a_whole(granularity: str):
    torch._dynamo.reset()
    pipe, arguments = pipelines.build_randomized("flux_controlnet")
    with hicache.fast.apply(pipe, CONFIG, granularity=granularity):
        expected = draw(pipe, arguments)
    pipe.transformer.compile(backend="eager")
    with hicache.fast.apply(pipe, CONFIG, granularity=granularity) as handle, watched(pipe) as ran:
        drawn = draw(pipe, arguments)
        assert ran == FULL
    assert handle.stats.granularity == granularity
    assert relative_rms(drawn, expected) < 1e-5
    torch._dynamo.reset()


@BOTH
def test_graphs_are_given_no_residuals_at_skipped_steps(granularity: str, monkeypatch: pytest.MonkeyPatch):
    FakeBackend.made.clear()
    monkeypatch.setattr(hicache.fast, "CudaBackend", FakeBackend)
    pipe, arguments = pipelines.build_randomized("flux_controlnet")
    with hicache.fast.apply(pipe, CONFIG, granularity=granularity, cuda_graphs=False):
        expected = draw(pipe, arguments)
    with connect(hicache.fast.apply(pipe, CONFIG, granularity=granularity)) as handle, watched(pipe) as ran:
        for _ in range(3):
            assert relative_rms(draw(pipe, arguments), expected) < 1e-5
        assert ran == [step + 12 * run for run in range(3) for step in FULL]
        [stats] = handle.stats.graphs.values()
        assert (stats.eager, stats.partly) == (None, None)
        assert stats.replays > 20
        [denoiser] = handle._denoisers
        tokens = pipe.transformer.config.num_attention_heads * pipe.transformer.config.attention_head_dim
        skipped = [g for key, g in denoiser.graphs.captures.graphs.items() if "Skipped" in str(key[0])]
        inputs = [tuple(t.shape) for graph in skipped for t in graph._inputs]
        assert skipped
        assert (1, 16, tokens) not in inputs  # a residual's shape


# What it costs.


@BOTH
def test_operations_of_a_skipped_step(granularity: str):
    """No more in the transformer than without a ControlNet, and in the ControlNet a view a residual."""

    def counted(name: str) -> dict[str, list[int]]:
        pipe, arguments = pipelines.build(name)
        counts: dict[str, list[int]] = {}
        with hicache.fast.apply(pipe, CONFIG, granularity=granularity):
            with pytest.MonkeyPatch.context() as patch:
                for part in ("transformer", "controlnet"):
                    if hasattr(pipe, part):
                        _count(patch, type(getattr(pipe, part)), counts.setdefault(part, []))
                draw(pipe, arguments)
        return {part: [n for i, n in enumerate(seen) if i not in FULL] for part, seen in counts.items()}

    with_one, without = counted("sd3_controlnet"), counted("sd3")
    assert with_one["transformer"] == without["transformer"]
    assert set(with_one["controlnet"]) == {2}


def _count(patch: pytest.MonkeyPatch, cls: type, counts: list[int]) -> None:
    original: Callable[..., Any] = cls.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with Operations() as mode:
            output = original(self, *args, **kwargs)
        counts.append(mode.seen.total())
        return output

    patch.setattr(cls, "__call__", call)


def test_the_plan_counts_what_it_adds():
    pipe, arguments = pipelines.build("flux_controlnet")
    plan = hicache.fast.plan(pipe, CONFIG, height=64, width=64)
    with hicache.fast.apply(pipe, CONFIG, granularity="module") as handle:
        draw(pipe, arguments)
        assert plan.denoisers["transformer"].num_features == 3 * 2 + 3 + 1
        assert plan.denoisers["transformer"].module_bytes == handle.stats.history_bytes
        assert "controlnet: 5 of 12 calls run" in str(handle.stats)
    alone = hicache.fast.plan(pipe.transformer, CONFIG, height=64, width=64)
    assert alone.denoisers["transformer"].num_features == 3 * 2 + 3
