"""Gates of low rank: modules where all directions are kept, near them with few, never wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import hicache.fast
from hicache import Engine, HiCacheConfig
from hicache.runtime.gate_rank import GateBasis, forecast_misses
from tests.support import models, pipelines
from tests.support.comparisons import close, relative_rms
from tests.support.control_loop import ControlLoop
from tests.support.graphs import FakeBackend, connect, other_prompt
from tests.support.pipelines import build_randomized
from tests.support.runs import recorded_in, replay, trace
from tests.support.schedulers import RecordedScheduler, flow_matching

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # Chroma's

CONFIG = HiCacheConfig(interval=4, order=2, warmup=3)
# Random gates move far more than trained ones: with the default, and as few modules as these have, no rank is
# less than all of them. What rank 1 does:
LOOSE = 0.5
FAMILIES = {
    "flux": LOOSE,
    "hunyuan": LOOSE,
    "sd3": LOOSE,
    "qwen": LOOSE,
    "cogvideox": 0.7,
    "dit": LOOSE,
    "chroma": LOOSE,
}


def choice(handle: hicache.fast.Handle) -> str:
    [found] = handle.stats.choices.values()
    return found


def apply(pipe: Any, **more: Any) -> hicache.fast.Handle:
    return hicache.fast.apply(pipe, CONFIG, **{"granularity": "low-rank", **more})


# The numbers.


def smooth_gates(steps: int, features: int = 5, batch: int = 2, channels: int = 4) -> Tensor:
    """Gates that move smoothly in many directions, each less than the one before."""
    time = torch.linspace(0, 1, steps, dtype=torch.float64)
    waves = torch.stack([0.4**k * torch.cos(k * torch.pi * time) for k in range(steps)], 1)
    return (waves @ torch.randn(steps, features * batch * channels).double()).view(
        steps, features, batch, channels
    )


@pytest.mark.parametrize("basis", ["hermite", "taylor", "reuse"])
@pytest.mark.parametrize("first", [0, 5])
def test_what_gates_are_off_by_is_known_before(first: int, basis: str):
    """Of features that stay as they are: what a forecast makes of the rest, beside what that is."""
    engine = Engine(dataclasses.replace(CONFIG, basis=basis))
    rows = smooth_gates(30 - first)
    misses, skipped = forecast_misses(engine, first, 30)
    found = [GateBasis.of(rows, first, misses, skipped, tolerance) for tolerance in (0.3, 0.1, 0.03, 0.01)]
    bases = [one for one in found if one is not None]
    assert [one.rank for one in bases] == sorted(one.rank for one in bases)
    for one, tolerance in zip(bases, (0.3, 0.1, 0.03, 0.01), strict=True):
        assert one.error <= tolerance < one.errors[one.rank - 1] or one.rank == 1
        weights = torch.empty(5, one.rank + 1, 2, 1, 4, dtype=torch.float64)
        trial = Engine(dataclasses.replace(engine.config, history_dtype=torch.float64))
        trial.reset(num_steps=30)
        off, total = torch.zeros(2), torch.zeros(2)
        for step in range(first, 30):
            row = rows[step - first]
            if trial.is_full(step):
                one.write_weights(step, row, weights)
                exact = (weights[..., 0, :] * one.gates[step - first]).sum(1)
                assert close(exact, row, 1e-14)
                trial.record(step, list(weights.unbind(1)))
            else:
                ahead = torch.stack(trial.forecast(step), 1)[..., 0, :]
                off += ((ahead * one.gates[step - first]).sum(1) - row).square().sum((0, 2))
                total += row.square().sum((0, 2))
        assert bool(((off / total).sqrt() <= one.error * (1 + 1e-6)).all())
        stack = one.errors[0]
        assert one.error < stack


def test_gates_that_stand_still_need_no_direction():
    misses, skipped = forecast_misses(Engine(CONFIG), 0, 12)
    basis = GateBasis.of(torch.ones(12, 4, 1, 3), 0, misses, skipped, 0.0)
    assert basis is not None
    assert (basis.rank, basis.error) == (0, 0.0)


def test_gates_that_are_not_finite_have_no_basis():
    misses, skipped = forecast_misses(Engine(CONFIG), 0, 12)
    assert GateBasis.of(torch.full((12, 4, 1, 3), torch.nan), 0, misses, skipped, 0.1) is None


@pytest.mark.parametrize("name", FAMILIES)
def test_with_all_directions_it_is_modules(name: str):
    """Conditional and unconditional calls, each with gates of its own, and both in one batch."""
    model, run = recorded_in(name, torch.float64)
    scheduler = RecordedScheduler(torch.stack([calls[0][1]["timestep"].reshape(-1)[0] for calls in run]))
    with hicache.fast.apply(model, CONFIG, scheduler=scheduler, granularity="module"):
        expected = replay(model, run, scheduler)
    with apply(model, scheduler=scheduler, gate_tolerance=0.0) as handle:
        assert relative_rms(replay(model, run, scheduler), expected) <= 1e-10
        assert handle.stats.skipped_steps == 7
        assert handle.stats.granularity == "low-rank"
        assert "gates off by 0, " in choice(handle)


@pytest.mark.parametrize("name", ["flux", "sd3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_at_low_precision_it_is_as_near_to_float64_as_modules(dtype: torch.dtype, name: str):
    """Sums are in fp32, and levels rounded to few digits are made good by what is left at full steps."""

    def run(dtype: torch.dtype, granularity: str) -> Tensor:
        model, calls = recorded_in(name, dtype)
        scheduler = RecordedScheduler(torch.stack([c[0][1]["timestep"].reshape(-1)[0] for c in calls]))
        with apply(model, scheduler=scheduler, granularity=granularity, gate_tolerance=0.0):
            return replay(model, calls, scheduler)

    exact = run(torch.float64, "module")
    off = {
        granularity: relative_rms(run(dtype, granularity), exact) for granularity in ("module", "low-rank")
    }
    assert off["low-rank"] <= 1.2 * off["module"]


# Chosen.


def wanted_nbytes(handle: Any) -> int:
    """Bytes that its history wants, with the gates of the run."""
    return int(choice(handle).split("; ")[-1].split(" bytes")[0].replace(",", ""))


@pytest.mark.parametrize("name", FAMILIES)
def test_auto_takes_it_between_modules_and_the_stack(name: str):
    """Nearer to modules than the stack is, as its gates are said to be."""
    pipe, arguments = build_randomized(name)
    tolerance = {"gate_tolerance": FAMILIES[name]}
    drawn: dict[str, Tensor] = {}
    held: dict[str, int] = {}
    for granularity in ("module", "stack", "low-rank"):
        with apply(pipe, granularity=granularity, **tolerance) as handle:
            drawn[granularity] = trace(pipe, arguments, 12)
            held[granularity] = handle.stats.history_bytes
            told = handle
    wanted = wanted_nbytes(told)  # of low rank, the last
    assert held["stack"] < held["low-rank"] < held["module"]
    assert wanted > held["low-rank"]  # with the gates of the run
    if wanted >= held["module"]:  # which are more than a picture this small saves
        budget = {"memory_budget": held["module"] - 1, **tolerance}
        with apply(pipe, granularity="auto", **budget) as handle:
            assert torch.equal(trace(pipe, arguments, 12), drawn["stack"])
            assert handle.stats.granularity == "stack"
        return
    with apply(pipe, granularity="auto", memory_budget=wanted, gate_tolerance=FAMILIES[name]) as handle:
        chosen = trace(pipe, arguments, 12)
        assert handle.stats.granularity == "low-rank"
        assert handle.stats.history_bytes == held["low-rank"]
        assert "low-rank: rank " in choice(handle)
        assert f"memory_budget={wanted:,}" in choice(handle)
        assert handle.stats.skipped_steps == 7
        # by module, the second call of the first step was what did not fit
        assert len(handle.stats.contexts) > 1 or torch.equal(chosen, drawn["low-rank"])
    off = {granularity: relative_rms(drawn[granularity], drawn["module"]) for granularity in drawn}
    assert off["low-rank"] < 0.8 * off["stack"]
    assert relative_rms(chosen, drawn["module"]) < 0.8 * off["stack"]
    # where the second call of the first step is what does not fit, the first has the gates of a step less
    with apply(pipe, granularity="auto", memory_budget=held["low-rank"] - 1, **tolerance) as handle:
        assert torch.equal(trace(pipe, arguments, 12), drawn["stack"])
        assert handle.stats.granularity == "stack"
        assert "its modules' history" in choice(handle)
        assert "its history at rank" in choice(handle)


def test_plan_is_what_a_run_holds():
    pipe, arguments = build_randomized("flux_cfg")
    with apply(pipe, gate_tolerance=LOOSE) as handle:
        trace(pipe, arguments, 12)
        held, said, wanted = handle.stats.history_bytes, choice(handle), wanted_nbytes(handle)
        handle.release()
        assert handle.stats.history_bytes == handle.stats.gates_bytes == 0
    size = {"height": 64, "width": 64, "calls": 2, "steps": 12}
    plan = hicache.fast.plan(pipe, CONFIG, **size, memory_budget=wanted)
    assert hicache.fast.plan(pipe, CONFIG, **size, memory_budget=wanted - 1).denoisers["transformer"].rank < (
        plan.denoisers["transformer"].rank
    )
    [one] = plan.denoisers.values()
    assert one.granularity == "low-rank"
    assert f"rank {one.rank}, " in said
    assert one.history_bytes == one.low_rank_bytes[one.rank - 1] == held
    assert f"low-rank of at most rank {one.rank}, {held:,} bytes" in str(plan)


def test_where_it_cannot_be_had():
    for name, why in (("wan", "take 3 features as they are"), ("flux2", "cannot be computed ahead")):
        pipe, arguments = pipelines.build(name)
        with apply(pipe), pytest.raises(RuntimeError, match=f"granularity='low-rank' cannot be had.*{why}"):
            trace(pipe, arguments)
        with apply(pipe, granularity="auto", memory_budget=0) as handle:
            trace(pipe, arguments)
            assert choice(handle).startswith("stack: ")
            assert why in choice(handle)
    with pytest.raises(ValueError, match="granularity='low-rank': the gates of Wan"):
        hicache.fast.plan(pipelines.build("wan")[0], height=16, width=16, granularity="low-rank")
    with pytest.raises(ValueError, match="granularity='low-rank': the modules of AuraFlow"):
        hicache.fast.apply(models.build("auraflow")[0], granularity="low-rank")


def test_offloaded_weights_are_not_there_to_compute_ahead():
    pipe, arguments = pipelines.build("flux")
    pipelines.offload_groups(pipe)
    with apply(pipe, granularity="auto", memory_budget=0) as handle:
        trace(pipe, arguments)
        assert "there in their own blocks only" in choice(handle)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("0.1", TypeError, "expected gate_tolerance to be a number, got '0.1'"),
        (-0.1, ValueError, r"expected 0 <= gate_tolerance < 1, got -0\.1"),
        (float("nan"), ValueError, "expected 0 <= gate_tolerance < 1, got nan"),
    ],
)
def test_bad_tolerances(value: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        hicache.fast.apply(models.flux_transformer(), gate_tolerance=value)


# Runs that are not all alike.


def test_another_prompt_has_gates_of_its_own():
    pipe, arguments = build_randomized("flux_cfg")
    other = other_prompt(arguments)
    with apply(pipe, gate_tolerance=LOOSE):
        expected = trace(pipe, other, 12)
    with apply(pipe, gate_tolerance=LOOSE):
        first = trace(pipe, arguments, 12)
        assert torch.equal(trace(pipe, other, 12), expected)
        assert torch.equal(trace(pipe, arguments, 12), first)


def loop(transformer: Any, scheduler: Any, times: Any = None, guided: Any = None) -> list[Tensor]:
    """Fourteen steps whose inputs do not depend on what came before."""
    torch.manual_seed(0)
    scheduler.set_timesteps(14)
    guidance, prompt = torch.full((1,), 3.5), models.noise(1, 32)
    returned = []
    for step, t in enumerate(scheduler.timesteps):
        timestep = t.expand(1) / 1000
        call = models.flux_call(
            models.noise(1, 16, 4),
            timestep if times is None else times(timestep),
            guidance=guidance if guided is None else guided(step, guidance),
            pooled_projections=prompt,
        )
        with torch.no_grad():
            returned.append(transformer(**call)[0])
        scheduler.step(returned[-1], t, models.noise(1, 16, 4))
    return returned


def flux() -> Any:
    return pipelines.randomize(models.flux_transformer())


def test_other_guidance_half_way_is_a_full_step():
    """In place, and as another tensor: directions are those of the new one from there on."""

    def changed(step: int, guidance: Tensor) -> Tensor:
        if step == 4:
            guidance.mul_(2)
        return guidance + 1 if step >= 9 else guidance

    transformer, scheduler = flux(), flow_matching()
    full = loop(transformer, scheduler, guided=changed)
    drawn = {}
    for granularity in ("module", "low-rank"):
        with apply(transformer, scheduler=scheduler, granularity=granularity, gate_tolerance=0.0) as handle:
            drawn[granularity] = loop(transformer, scheduler, guided=changed)
            stats = handle.stats
    exact = [step for step, ours in enumerate(drawn["low-rank"]) if torch.equal(ours, full[step])]
    assert {4, 9} <= set(exact)
    assert len(exact) == stats.full_steps < 14
    # by module they are not
    assert not torch.equal(drawn["module"][4], full[4])


def test_guidance_that_changes_in_every_step_is_the_stacks():
    """Directions that hold for one step only would make every step full, without a word."""

    def moving(step: int, guidance: Tensor) -> Tensor:
        return guidance + 0.05 * step

    transformer, scheduler = flux(), flow_matching()
    budget = {"granularity": "auto", "memory_budget": 34_000, "gate_tolerance": 0.9}
    with apply(transformer, scheduler=scheduler, **budget) as handle:
        loop(transformer, scheduler, guided=moving)
        assert "changes from step to step" in choice(handle)
        assert handle.stats.skipped_steps >= 7
    with apply(transformer, scheduler=scheduler):
        with pytest.raises(RuntimeError, match="changes from step to step"):
            loop(transformer, scheduler, guided=moving)


@pytest.mark.parametrize("warmup", [1, 3])
@pytest.mark.parametrize("name", ["flux_controlnet", "sd3_controlnet"])
def test_what_a_controlnet_adds_is_added_once(name: str, warmup: int):
    """In the run that is learned from as in the next, which is as near to modules as without a ControlNet."""
    pipe, arguments = pipelines.build_randomized(name)
    config = HiCacheConfig(interval=4, warmup=warmup)
    drawn = {}
    for granularity in ("module", "low-rank"):
        with hicache.fast.apply(pipe, config, granularity=granularity, gate_tolerance=0.0):
            first = trace(pipe, arguments, 9)
            assert torch.equal(trace(pipe, arguments, 9), first)
            drawn[granularity] = first
    assert relative_rms(drawn["low-rank"], drawn["module"]) < 1e-5


@pytest.mark.parametrize("tolerance", [0.0, 0.05])
def test_a_context_that_begins_later_has_fewer_directions(tolerance: float):
    """Statistics are of the worst of both, and cannot keep a handle from being removed."""
    guided = ControlLoop.build(second_from=9)
    handle = hicache.fast.apply(
        guided, HiCacheConfig(interval=4), granularity="low-rank", gate_tolerance=tolerance
    )
    guided(14)
    stats = handle.stats.low_rank["transformer"]
    assert stats.error <= max(tolerance, 1e-6)
    handle.remove()
    assert not handle.active


def test_histories_over_budget_stay_where_they_are(monkeypatch: pytest.MonkeyPatch):
    """From run to run: graphs are captured once."""
    monkeypatch.setattr(hicache.fast, "CudaBackend", FakeBackend)
    pipe, arguments = pipelines.build_randomized("flux")
    for budget in (60_000, 0):  # low rank, the stack
        with connect(hicache.fast.apply(pipe, HiCacheConfig(interval=3), memory_budget=budget)) as handle:
            captures = []
            for _ in range(3):
                with torch.no_grad():
                    pipelines.draw(pipe, arguments, 14)
                captures.append(handle.stats.graphs["transformer"].captures)
            assert captures[0] == captures[1] == captures[2], choice(handle)


def test_timesteps_of_ones_own_are_the_stacks():
    transformer, scheduler = flux(), flow_matching()

    def own(timestep: Tensor) -> Tensor:
        return timestep * 0.9 + 0.01

    with apply(transformer, scheduler=scheduler, granularity="stack"):
        expected = loop(transformer, scheduler, own)
    with apply(transformer, scheduler=scheduler, granularity="auto", memory_budget=0) as handle:
        drawn = loop(transformer, scheduler, own)
        assert "need a scheduler whose timesteps the model is called with" in choice(handle)
    assert all(torch.equal(a, b) for a, b in zip(drawn, expected, strict=True))


def test_timesteps_that_turn_out_others_are_told_and_the_stacks():
    transformer, scheduler = flux(), flow_matching()

    def turned(timestep: Tensor) -> Tensor:
        return timestep if bool(timestep > 0.7) else timestep * 0.8

    more = {"granularity": "auto", "memory_budget": 34_000, "gate_tolerance": 0.9}
    with apply(transformer, scheduler=scheduler, **more) as handle:
        with pytest.warns(RuntimeWarning, match="timesteps that are not the scheduler's"):
            loop(transformer, scheduler, turned)
        assert "need a scheduler whose timesteps" in choice(handle)


def test_a_subclass_that_makes_more_of_its_embedding():
    pipe, arguments = pipelines.build("flux")
    family = type(pipe.transformer)

    class Moved(family):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            def add(module: Any, inputs: Any, output: Tensor) -> Tensor:
                hook.remove()
                return output + kwargs["hidden_states"].mean()

            hook = self.time_text_embed.register_forward_hook(add)
            return super().forward(*args, **kwargs)

    pipe.transformer.__class__ = Moved
    with apply(pipe), pytest.raises(RuntimeError, match="not those its family makes of the timestep"):
        trace(pipe, arguments)


def test_a_scale_of_lora_weighs_gates_ahead_too():
    peft = pytest.importorskip("peft", reason="LoRA of diffusers models needs peft")
    pipe, arguments = build_randomized("flux")
    pipe.transformer.add_adapter(
        peft.LoraConfig(r=2, target_modules=["norm1.linear", "norm.linear"], init_lora_weights=False)
    )
    arguments["joint_attention_kwargs"] = {"scale": 0.3}
    with apply(pipe, granularity="module"):
        expected = trace(pipe, arguments, 12)
    with apply(pipe, gate_tolerance=0.0):
        assert close(trace(pipe, arguments, 12), expected, 2e-5)
        assert close(trace(pipe, arguments, 12), expected, 2e-5)  # where the form of its calls is known


@pytest.mark.parametrize("by_block", [False, True])
def test_replays_equal_eager(by_block: bool, monkeypatch: pytest.MonkeyPatch):
    """Runs with other prompts write other weights where the graphs read them."""
    monkeypatch.setattr(hicache.fast, "CudaBackend", FakeBackend)
    pipe, arguments = pipelines.build("flux_cfg")
    given = [arguments, other_prompt(arguments), arguments]
    with apply(pipe, cuda_graphs=False, gate_tolerance=LOOSE):
        expected = [trace(pipe, each, 12) for each in given]
    FakeBackend.made.clear()
    with connect(apply(pipe, gate_tolerance=LOOSE)) as handle:
        if by_block:
            FakeBackend.made[0].fails_whole = RuntimeError("not as a whole")
        drawn = [trace(pipe, each, 12) for each in given]
        [stats] = handle.stats.graphs.values()
    assert stats.eager is None
    assert stats.replays > 20
    assert all(close(a, b) for a, b in zip(drawn, expected, strict=True))
