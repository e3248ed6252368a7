"""granularity="output": nothing of a denoiser runs at a skipped step, whatever the denoiser is."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import hicache.fast
from hicache import HiCacheConfig
from tests.support import models, pipelines, refused_models, unets
from tests.support.comparisons import cast, flat, relative_rms, snapshot
from tests.support.pipelines import randomize
from tests.support.schedulers import CountingScheduler
from tests.support.skipped_steps import counted

CONFIG = HiCacheConfig(interval=3, order=2, warmup=3)
FULL_STEPS = [0, 1, 2, 5, 8, 11]  # of CONFIG in twelve steps
TRANSFORMERS = ("flux", "flux_cfg", "qwen", "sd3_skip_layer", "wan22", "hunyuan", "ltx", "dit", "pixart")
WITHOUT_SCALE = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


def build(name: str, **changes: Any) -> Any:
    of_unets = name in {**unets.PIPELINES, **unets.CONTROLNETS}
    return unets.build(name, **changes) if of_unets else pipelines.build(name, **changes)


def denoisers(pipe: Any) -> list[nn.Module]:
    return [pipe.unet] if hasattr(pipe, "unet") else list(pipelines.denoisers(pipe).values())


def apply(pipe: Any, config: HiCacheConfig = CONFIG, **more: Any) -> hicache.fast.Handle:
    return hicache.fast.apply(pipe, config, granularity="output", **more)


def draw(pipe: Any, arguments: dict[str, Any], steps: int = 12, **more: Any) -> Tensor:
    torch.manual_seed(0)  # some pipelines encode their input picture at random
    return pipelines.draw(pipe, arguments, steps, **more)


# Pipelines.


@pytest.mark.few(9)
@pytest.mark.parametrize("name", [*unets.PIPELINES, *unets.CONTROLNETS, *TRANSFORMERS])
def test_exact_at_interval_one_and_left_as_it_was(name: str):
    pipe, arguments = build(name)
    expected = draw(pipe, arguments)  # some keep on themselves what their first call made
    before = [snapshot(denoiser) for denoiser in denoisers(pipe)]
    with apply(pipe, HiCacheConfig(interval=1)) as handle:
        assert torch.equal(draw(pipe, arguments), expected)
        assert handle.stats.granularity == "output"
        assert handle.stats.skipped_steps == 0
        assert set(handle.stats.choices.values()) == {"output: asked for"}
    assert [snapshot(denoiser) for denoiser in denoisers(pipe)] == before


@pytest.mark.few(9)
@pytest.mark.parametrize("name", [*unets.PIPELINES, *unets.CONTROLNETS, *TRANSFORMERS])
def test_nothing_of_it_runs_at_skipped_steps(name: str):
    """No module of it is called; and a run after the first draws what that drew."""
    pipe, arguments = build(name)
    calls: Counter[int] = Counter()
    with apply(pipe) as handle:
        hooks = [
            part.register_forward_pre_hook(lambda *_: calls.update([handle.stats.skipped_steps]))
            for denoiser in denoisers(pipe)
            for part in denoiser.modules()
        ]
        first = draw(pipe, arguments)
        whole, stats = calls.total(), handle.stats
        assert all(context.skipped_steps > 0 for context in stats.contexts.values())
        assert torch.equal(draw(pipe, arguments), first)
        for hook in hooks:
            hook.remove()
        full = sum(context.full_steps for context in stats.contexts.values())
    assert calls.total() == 2 * whole
    assert whole == full * _modules_of_one_call(pipe, arguments)


def _modules_of_one_call(pipe: Any, arguments: dict[str, Any]) -> float:
    """Calls of modules in a call of a denoiser: an uncached run's, by its calls."""
    calls: Counter[str] = Counter()
    hooks = [
        part.register_forward_pre_hook(lambda *_, path=path: calls.update([path or "itself"]))
        for denoiser in denoisers(pipe)
        for path, part in denoiser.named_modules()
    ]
    draw(pipe, arguments)
    for hook in hooks:
        hook.remove()
    return calls.total() / calls["itself"]


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux", "wan"])
def test_operations_of_a_skipped_step(name: str):
    """Of a call of the denoiser: one kernel, and views of what it wrote; no more where an update waits."""
    pipe, arguments = build(name)
    [denoiser] = denoisers(pipe)
    with apply(pipe), counted(denoiser) as calls:
        draw(pipe, arguments)
    contexts = len(calls) // 12
    skipped = [operations for index, operations in enumerate(calls) if index // contexts not in FULL_STEPS]
    assert len(skipped) == 6 * contexts
    for operations in skipped:
        kernels = {name: count for name, count in operations.items() if name.startswith("hicache.")}
        assert sum(kernels.values()) == 1, operations
        assert set(kernels) <= {"hicache.forecast.default", "hicache.update_forecast_.default"}
        assert operations.total() <= 5, operations
        assert not [name for name in operations if "_local_scalar_dense" in name or "convolution" in name]


@pytest.mark.few(10)
@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("basis", ["hermite", "taylor"])
@pytest.mark.parametrize("kind", ["unet", "flux", "dit"])
def test_forecasts_equal_differences_written_out(kind: str, basis: str, order: int):
    """In float64, of recorded outputs at the same inputs."""
    model, calls = _loop(kind)
    config = HiCacheConfig(interval=4, order=order, warmup=3, basis=basis, sigma=0.6)
    uncached = _outputs(model, calls)
    scheduler = CountingScheduler()
    with hicache.fast.apply(model, config, scheduler=scheduler, granularity="output") as handle:
        cached = _outputs(model, calls, scheduler)
        assert (handle.stats.full_steps, handle.stats.skipped_steps) == (5, 9)
    for step, expected in enumerate(_written_out(uncached, config)):
        assert (cached[step] - expected).abs().max() <= 1e-10 * expected.abs().max(), step


def _loop(kind: str) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A denoiser in float64, and what it is called with in fourteen steps."""
    torch.manual_seed(0)
    times = torch.linspace(900, 250, 14, dtype=torch.float64)
    if kind != "unet":
        model, call = models.build(kind)
        randomize(model)
        return model.double(), [cast(call(t / 1000), torch.float64) for t in times]
    start, text = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 4, 8, 8), (2, 6, 8)))
    return unets.unet().double(), [
        {"sample": start * t / 900, "timestep": t, "encoder_hidden_states": text} for t in times
    ]


def _outputs(
    model: nn.Module, calls: list[dict[str, Any]], scheduler: CountingScheduler | None = None
) -> list[Tensor]:
    scheduler = scheduler or CountingScheduler()
    scheduler.set_timesteps(len(calls))
    found = []
    for call in calls:
        with torch.no_grad():
            found.append(flat(model(**{**call, "return_dict": False})))
        scheduler.step()
    return found


def _written_out(outputs: list[Tensor], config: HiCacheConfig) -> list[Tensor]:
    """What a cache returns: differences of the full steps' outputs in plain torch, and Σ α_k D_k."""
    differences: list[Tensor] = []
    last, found = -1, []
    for step, output in enumerate(outputs):
        if step < config.warmup or step - last >= config.interval:
            new = [output]
            for k in range(min(len(differences), config.order) if step >= config.warmup - 1 else 0):
                new.append((new[k] - differences[k]) / (step - last))
            differences, last = new, step
            found.append(output)
            continue
        x, terms = step - last, []
        for k, difference in enumerate(differences):
            z = config.sigma * x
            hermite = [1, 2 * z, 4 * z**2 - 2, 8 * z**3 - 12 * z][k]
            weight = config.sigma**k * hermite if config.basis == "hermite" else x**k
            terms.append(weight / math.factorial(k) * difference)
        found.append(sum(terms[1:], terms[0]))
    return found


def test_contexts_have_histories_of_their_own():
    pipe, arguments = build("flux_cfg")
    with apply(pipe) as handle:
        draw(pipe, arguments)
        assert list(handle.stats.contexts) == ["transformer[0]", "transformer[1]"]
        assert {context.full_steps for context in handle.stats.contexts.values()} == {6}
        of_two = handle.stats.history_bytes
    pipe, arguments = build("flux")
    with apply(pipe) as handle:
        draw(pipe, arguments)
        assert of_two == 2 * handle.stats.history_bytes


def test_heun_calls_the_unet_twice_a_step_and_each_counts():
    """Its scheduler has a timestep for every call, and is stepped after each."""
    pipe, arguments = build("sd15_heun")
    with apply(pipe) as handle:
        draw(pipe, arguments)
        assert (handle.stats.full_steps, handle.stats.skipped_steps) == (9, 14)
        assert list(handle.stats.contexts) == ["unet[0]"]


@pytest.mark.parametrize(("name", "steps"), [("sd15_img2img", 9), ("sdxl_inpaint", 9)])
def test_steps_are_counted_from_where_a_run_begins(name: str, steps: int):
    pipe, arguments = build(name)
    with apply(pipe, speedup=1.5) as handle:
        draw(pipe, arguments)
        stats = handle.stats
    assert stats.full_steps + stats.skipped_steps == steps
    assert stats.bound >= 1.5


def test_batch_size_and_guidance_change_from_run_to_run():
    pipe, arguments = build("sd15")
    _, more = build("sd15_many")
    _, unguided = build("sd15_unguided")
    given = [arguments, more, unguided, arguments]
    alone = []
    for one in given:
        with apply(pipe):
            alone.append(draw(pipe, one))
    with apply(pipe) as handle:
        for one, expected in zip(given, alone, strict=True):
            assert torch.equal(draw(pipe, one), expected)
        assert handle.stats.history_bytes == 3 * 2 * 4 * 8 * 8 * 4


def test_guidance_that_ends_within_a_run_is_another_context():
    pipe, arguments = build("sd15")

    def end(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step != 5:
            return {}
        pipe._guidance_scale = 1.0
        return {"prompt_embeds": kwargs["prompt_embeds"].chunk(2)[-1]}

    ending = {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with apply(pipe) as handle:
        draw(pipe, arguments, **ending)
        found = {name: (c.full_steps, c.skipped_steps) for name, c in handle.stats.contexts.items()}
    assert list(found.values()) == [(4, 2), (4, 2)]


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_a_run_that_is_broken_off_leaves_nothing(error: type[BaseException]):
    pipe, arguments = build("sdxl")
    with apply(pipe):
        expected = draw(pipe, arguments)

    def stop(module: nn.Module, args: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise error

    calls: list[int] = []
    with apply(pipe) as handle:
        hook = pipe.unet.conv_out.register_forward_pre_hook(stop)
        with pytest.raises(error):
            draw(pipe, arguments)
        hook.remove()
        assert torch.equal(draw(pipe, arguments), expected)
        assert (handle.stats.full_steps, handle.stats.skipped_steps) == (6, 6)


def test_a_step_that_is_not_finite_is_not_forecast_from():
    pipe, arguments = build("sd15")

    def spoil(module: nn.Module, args: Any, output: Any) -> Any:
        calls.append(1)
        return (output[0] * (math.nan if len(calls) == 4 else 1.0),)

    calls: list[int] = []
    pipe.unet.register_forward_hook(spoil)
    with apply(pipe) as handle:
        with pytest.warns(RuntimeWarning, match="not finite"):
            draw(pipe, arguments)
        assert handle.stats.full_steps > 6


def test_several_threads_share_a_unet():
    pipe, arguments = build("sd15")
    with apply(pipe):
        expected = draw(pipe, arguments)
    others = [
        type(pipe).from_pipe(pipe, scheduler=diffusers.DDIMScheduler(), requires_safety_checker=False)
        for _ in range(3)
    ]
    for other in others:
        other.set_progress_bar_config(disable=True)
    start = threading.Barrier(3)

    def drawn(one: Any) -> Tensor:
        start.wait()
        return pipelines.draw(one, arguments, 12)

    with apply(pipe) as handle, ThreadPoolExecutor(3) as pool:
        for found in pool.map(drawn, others):
            assert torch.equal(found, expected)
        assert handle.active


# ControlNets.


@pytest.mark.parametrize("name", ["sd15_controlnet", "sd15_controlnets", "flux_controlnet"])
def test_a_controlnet_runs_at_full_steps_only(name: str):
    pipe, arguments = build(name)
    calls: list[int] = []
    hook = pipe.controlnet.register_forward_hook(lambda *_: calls.append(1))
    with apply(pipe) as handle:
        draw(pipe, arguments)
        [stats] = handle.stats.controlnets.values()
    hook.remove()
    assert len(calls) == len(FULL_STEPS)
    assert (stats.calls, stats.runs, stats.always) == (12, 6, None)


def test_a_controlnet_that_ends_begins_the_history_anew():
    pipe, arguments = build("sd15_controlnet")
    with apply(pipe) as handle:
        draw(pipe, {**arguments, "control_guidance_end": 0.5})
        assert handle.stats.full_steps == 4 + 4


def test_residuals_that_a_pipeline_changes_are_real():
    """In guess mode they are put together with zeros: the ControlNet runs at every step, and it says so."""
    pipe, arguments = build("sd15_controlnet")
    expected = draw(pipe, {**arguments, "guess_mode": True})
    with apply(pipe, HiCacheConfig(interval=1)):
        assert torch.equal(draw(pipe, {**arguments, "guess_mode": True}), expected)
    with apply(pipe) as handle:
        draw(pipe, {**arguments, "guess_mode": True})
        [stats] = handle.stats.controlnets.values()
        assert stats.runs == stats.calls == 12
        assert handle.stats.skipped_steps == 6


# What denoisers return.


@dataclass
class Loose:
    """A class that torch does not know how to take apart."""

    sample: Tensor


class Returns(nn.Module):
    """A denoiser that returns what a function makes of its input."""

    def __init__(self, make: Callable[..., Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.make = make
        self.calls = 0

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True) -> Any:
        self.calls += 1
        output = self.make(hidden_states * self.weight, self.calls)
        return output if return_dict else (output,)


OUTPUTS: dict[str, Callable[..., Any]] = {
    "a tensor": lambda hidden, calls: hidden,
    "a tuple": lambda hidden, calls: (hidden,),
    "a list of several shapes": lambda hidden, calls: [hidden, hidden[:, :1]],
    "a dictionary": lambda hidden, calls: {"sample": hidden, "sound": hidden[0]},
    "an output of diffusers": lambda hidden, calls: diffusers.models.unets.unet_2d.UNet2DOutput(
        sample=hidden
    ),
    "several dtypes": lambda hidden, calls: (hidden, hidden.half(), hidden.double()[0]),
    "with what stays": lambda hidden, calls: (hidden, torch.tensor(7), None, "word", 3, hidden[:0]),
    "transposed": lambda hidden, calls: hidden.transpose(1, 2),
    "one number": lambda hidden, calls: hidden.sum(),
}


def _run(model: nn.Module, scheduler: CountingScheduler, steps: int = 8, **more: Any) -> list[Any]:
    scheduler.set_timesteps(steps)
    found = []
    for step in range(steps):
        with torch.no_grad():
            hidden = torch.full((1, 4, 3), float(step)) + torch.arange(3)
            found.append(model(hidden, timestep=torch.tensor(step), **more))
        scheduler.step()
    return found


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("name", OUTPUTS)
def test_what_is_returned_keeps_its_form(name: str, return_dict: bool):
    """Of polynomials of the step, whose forecasts are exact."""
    model, scheduler = Returns(OUTPUTS[name]), CountingScheduler()
    expected = _run(model, scheduler, return_dict=return_dict)
    model.calls = 0
    config = HiCacheConfig(interval=3, order=1, warmup=2, basis="taylor")
    with apply(model, config, scheduler=scheduler) as handle:
        found = _run(model, scheduler, return_dict=return_dict)
        assert handle.stats.skipped_steps == 4
    assert model.calls == 4
    for one, other in zip(found, expected, strict=True):
        assert type(one) is type(other)
        for part, expected_part in zip(*map(pytree.tree_leaves, (one, other)), strict=True):
            assert type(part) is type(expected_part)
            if isinstance(part, Tensor):
                torch.testing.assert_close(part, expected_part, rtol=1e-3, atol=1e-3)
            else:
                assert part == expected_part


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda hidden, calls: Loose(hidden), "returns Loose, which may have tensors inside"),
        (lambda hidden, calls: (hidden.long(),), "returns no floating tensors"),
        (lambda hidden, calls: (hidden, hidden + 1j), "returns tensors that are complex"),
        (lambda hidden, calls: (hidden, hidden.to("meta")), "returns tensors on cpu and meta"),
    ],
)
def test_what_cannot_be_forecast_runs_uncached(make: Callable[..., Any], message: str):
    model, scheduler = Returns(make), CountingScheduler()
    with apply(model, scheduler=scheduler) as handle:
        with pytest.warns(RuntimeWarning, match=f"Returns {message}"):
            _run(model, scheduler)
        assert handle.stats.skipped_steps == 0
    assert model.calls == 8


def test_what_is_returned_may_be_written_to():
    model, scheduler = Returns(lambda hidden, calls: (hidden, torch.tensor([1]))), CountingScheduler()
    config = HiCacheConfig(interval=8, order=1, warmup=2, basis="taylor")
    with apply(model, config, scheduler=scheduler):
        scheduler.set_timesteps(8)
        for step in range(8):
            with torch.no_grad():
                hidden, number = model(torch.full((1, 4, 3), float(step)), timestep=torch.tensor(step))
            assert hidden.unique().item() == pytest.approx(step)
            assert number.item() == 1
            hidden.zero_()
            number.zero_()
            scheduler.step()


def test_a_call_that_wants_another_form_is_another_context():
    model, scheduler = Returns(lambda hidden, calls: hidden), CountingScheduler()
    with apply(model, HiCacheConfig(interval=8, warmup=2), scheduler=scheduler) as handle:
        scheduler.set_timesteps(8)
        for step in range(8):
            hidden = torch.full((1, 4, 3), float(step))
            with torch.no_grad():
                assert isinstance(model(hidden, timestep=torch.tensor(step)), Tensor)
                assert isinstance(model(hidden, timestep=torch.tensor(step), return_dict=False), tuple)
            scheduler.step()
        assert len(handle.stats.contexts) == 2


def test_a_history_of_another_dtype():
    """Outputs are what they were, and half as many bytes are held."""
    pipe, arguments = build("sd15")
    with apply(pipe) as handle:
        expected = draw(pipe, arguments)
        whole = handle.stats.history_bytes
    config = HiCacheConfig(interval=3, order=2, warmup=3, history_dtype=torch.bfloat16)
    with apply(pipe, config) as handle:
        drawn = draw(pipe, arguments)
        assert handle.stats.history_bytes == whole // 2
    assert drawn.dtype == expected.dtype
    assert relative_rms(drawn, expected) < 0.02


def test_two_streams_are_two_features():
    """LTX-2: the picture's and the sound's; by stack it is refused."""
    model = randomize(refused_models.build("LTX2VideoTransformer3DModel"))
    picture, sound, text = torch.randn(1, 8, 4), torch.randn(1, 5, 4), torch.randn(1, 6, 8)
    times = torch.linspace(900, 300, 8)

    def run(scheduler: CountingScheduler) -> list[tuple[Tensor, Tensor]]:
        scheduler.set_timesteps(8)
        found = []
        for t in times:
            with torch.no_grad():
                output = model(
                    hidden_states=picture * t / 900,
                    audio_hidden_states=sound * t / 900,
                    encoder_hidden_states=text,
                    audio_encoder_hidden_states=text,
                    timestep=t.expand(1, 8),
                    audio_timestep=t.expand(1, 5),
                    num_frames=2,
                    height=2,
                    width=2,
                    audio_num_frames=5,
                    return_dict=False,
                )
            found.append(output)
            scheduler.step()
        return found

    scheduler = CountingScheduler()
    uncached = run(scheduler)
    with apply(model, HiCacheConfig(interval=1), scheduler=scheduler):
        for one, other in zip(run(scheduler), uncached, strict=True):
            assert all(map(torch.equal, one, other))
    with apply(model, scheduler=scheduler) as handle:
        found = run(scheduler)
        assert handle.stats.skipped_steps == 4
    for stream in range(2):
        expected = _written_out([outputs[stream] for outputs in uncached], CONFIG)
        for step, outputs in enumerate(found):
            assert outputs[stream].shape == uncached[step][stream].shape
            assert relative_rms(outputs[stream], expected[step]) <= 1e-5, (stream, step)
            assert torch.equal(outputs[stream], uncached[step][stream]) == (step in FULL_STEPS)


OTHERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "without text": (
        "UNet2DModel",
        {**WITHOUT_SCALE, "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2},
        {"sample": torch.randn(1, 3, 8, 8)},
    ),
    "of a sound": (
        "UNet1DModel",
        {"block_out_channels": (32, 32, 64), "extra_in_channels": 64},
        {"sample": torch.randn(1, 2, 512)},
    ),
    "of a video": (
        "UNet3DConditionModel",
        {
            **WITHOUT_SCALE,
            "cross_attention_dim": 8,
            "attention_head_dim": 4,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
        {"sample": torch.randn(1, 4, 2, 8, 8), "encoder_hidden_states": torch.randn(1, 6, 8)},
    ),
    "whose lists of blocks take turns": (
        "LatteTransformer3DModel",
        refused_models.REFUSED["LatteTransformer3DModel"][0],
        {"hidden_states": torch.randn(1, 4, 2, 8, 8), "encoder_hidden_states": torch.randn(1, 6, 8)},
    ),
    "with motion": (
        "UNetMotionModel",
        {
            "block_out_channels": (32, 32),
            "layers_per_block": 1,
            "cross_attention_dim": 8,
            "num_attention_heads": 4,
            "motion_num_attention_heads": 4,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
        },
        {"sample": torch.randn(1, 4, 2, 8, 8), "encoder_hidden_states": torch.randn(2, 6, 8)},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others(name: str):
    """Bare, by the timestep of a call, or by its scheduler."""
    kind, settings, given = OTHERS[name]
    torch.manual_seed(0)
    model = randomize(getattr(diffusers, kind)(**settings)).eval()
    times = torch.linspace(900, 200, 12)

    def run() -> list[Tensor]:
        with torch.no_grad():
            return [flat(model(**given, timestep=t[None], return_dict=False)) for t in times]

    uncached = run()
    with apply(model, HiCacheConfig(interval=1)):
        assert all(map(torch.equal, run(), uncached))
    with apply(model) as handle:
        found = run()
        assert list(handle.stats.contexts) == ["unet[0]" if "UNet" in kind else "transformer[0]"]
        same = [step for step in range(12) if torch.equal(found[step], uncached[step])]
    assert same == FULL_STEPS


# Who else has a say in a call.


@pytest.mark.few(3)
@pytest.mark.parametrize("name", ["sd15", "flux"])
@pytest.mark.parametrize("order", ["before", "after", "in place", "in place, after"])
def test_compiled_as_a_whole(name: str, order: str):
    """One graph, of full steps; what was compiled is not entered at skipped ones."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    pipe, arguments = build(name)
    part = "unet" if name == "sd15" else "transformer"
    with apply(pipe):
        expected = draw(pipe, arguments)
    counter = CompileCounterWithBackend("eager")

    def compile_it() -> None:
        if order.startswith("in place"):
            getattr(pipe, part).compile(backend=counter, fullgraph=True)
        else:
            setattr(pipe, part, torch.compile(getattr(pipe, part), backend=counter, fullgraph=True))

    if "after" not in order:
        compile_it()
    with apply(pipe) as handle:
        if "after" in order:
            compile_it()
        for _ in range(2):
            torch.testing.assert_close(draw(pipe, arguments), expected)
            assert counter.frame_count == 1
            assert (handle.stats.full_steps, handle.stats.skipped_steps) == (6, 6)
        [graphs] = handle.stats.graphs.values()
    assert graphs.captures == 0
    torch._dynamo.reset()


def test_compiled_as_a_whole_and_our_graphs_are_not_both_to_be_had():
    pipe, arguments = build("sd15")
    pipe.unet.compile(backend="eager")
    with apply(pipe, cuda_graphs="auto") as handle:
        draw(pipe, arguments)
        [graphs] = handle.stats.graphs.values()
        assert graphs.eager is not None


def test_offloaded_weights_stay_where_they_are_at_skipped_steps():
    """accelerate's hooks bring weights in where the denoiser's forward is called; and they go with it."""
    hooks = pytest.importorskip("accelerate.hooks")
    pipe, arguments = build("sd15")

    class Counting(hooks.ModelHook):  # type: ignore[misc,name-defined]
        moves = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            Counting.moves += 1
            return args, kwargs

    with apply(pipe):
        expected = draw(pipe, arguments)
    hooks.add_hook_to_module(pipe.unet, Counting())
    with apply(pipe) as handle:
        assert torch.equal(draw(pipe, arguments), expected)
        assert Counting.moves == handle.stats.full_steps == 6
        hooks.remove_hook_from_module(pipe.unet)
        assert torch.equal(draw(pipe, arguments), expected)
    assert Counting.moves == 6


def test_groups_of_blocks_are_not_brought_in_at_skipped_steps():
    pipe, arguments = build("flux")
    with apply(pipe):
        expected = draw(pipe, arguments)
    moved: list[int] = []
    pipelines.offload_groups(pipe)
    from diffusers.hooks.group_offloading import ModuleGroup

    with pytest.MonkeyPatch.context() as patch, apply(pipe) as handle:
        onload = ModuleGroup.onload_
        patch.setattr(ModuleGroup, "onload_", lambda group: moved.append(1) or onload(group))
        assert torch.equal(draw(pipe, arguments), expected)
        cached, full = len(moved), handle.stats.full_steps
        handle.remove()
        moved.clear()
        draw(pipe, arguments)
    assert cached / full == len(moved) / 12


def test_hooks_of_others_see_full_steps():
    pipe, arguments = build("sd15")
    seen: list[int] = []
    pipe.unet.register_forward_hook(lambda *_: seen.append(1))
    with apply(pipe):
        draw(pipe, arguments)
    assert len(seen) == 6


def test_calls_for_gradients_run_uncached():
    model, scheduler = Returns(lambda hidden, calls: hidden), CountingScheduler()
    with apply(model, scheduler=scheduler) as handle, pytest.warns(RuntimeWarning, match="for its gradients"):
        scheduler.set_timesteps(4)
        for step in range(4):
            hidden = torch.ones(1, 4, 3, requires_grad=True)
            model(hidden, timestep=torch.tensor(step)).sum().backward()
            assert hidden.grad is not None
            scheduler.step()
        assert handle.stats.contexts == {}


def test_released_memory_is_allocated_anew():
    pipe, arguments = build("sdxl")
    with apply(pipe) as handle:
        expected = draw(pipe, arguments)
        handle.release()
        assert handle.stats.history_bytes == 0
        assert torch.equal(draw(pipe, arguments), expected)


# What apply() and plan() say.


@pytest.mark.parametrize("granularity", ["auto", "module", "stack", "low-rank"])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_unet_is_refused_otherwise_and_the_message_says_what_works(name: str, granularity: str):
    pipe, _ = build(name)
    before = snapshot(pipe.unet)
    message = "expected a component named 'transformer', got .*granularity='output'.* caches unet"
    with pytest.raises(ValueError, match=message):
        hicache.fast.apply(pipe, granularity=granularity)
    assert snapshot(pipe.unet) == before


@pytest.mark.parametrize("name", refused_models.REFUSED)
def test_transformers_that_are_refused_otherwise(name: str):
    """But those whose calls do more than to return something."""
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    model = refused_models.build(name)
    before = snapshot(model)
    keeps = "keep keys and values" in refused_models.REFUSED[name][1]
    with pytest.raises(ValueError, match=name) as raised:
        hicache.fast.apply(model)
    assert ("granularity='output' would cache what it returns" in str(raised.value)) != keeps
    if keeps:
        with pytest.raises(ValueError, match=f"{name} cannot be cached: its blocks keep keys and values"):
            apply(model)
    else:
        apply(model).remove()
    assert snapshot(model) == before


def test_nothing_to_cache_by_output():
    pipe, _ = build("sd15")
    pipe.unet = None
    with pytest.raises(ValueError, match="expected a component named 'transformer' or a U-Net, got vae"):
        apply(pipe)


@pytest.mark.parametrize("name", ["sd15", "sd15_unguided", "sd15_many", "sdxl"])
@pytest.mark.parametrize("order", [0, 2])
def test_the_plan_of_a_unet_is_what_a_run_holds(name: str, order: int):
    pipe, arguments = build(name)
    config = HiCacheConfig(interval=3, order=order)
    plan = hicache.fast.plan(
        pipe,
        config,
        height=64,
        width=64,
        granularity="output",
        guided="unguided" not in name,
        batch=2 if "many" in name else 1,
    )
    with apply(pipe, config) as handle:
        draw(pipe, arguments)
        assert plan.history_bytes == handle.stats.history_bytes
    assert str(plan).startswith(f"unet: output, {plan.history_bytes:,} bytes of history (output ")


def test_bytes_at_true_sizes():
    """FLUX.1-dev and SDXL at 1024², bf16, order 2."""
    with torch.device("meta"):
        flux = diffusers.FluxTransformer2DModel(guidance_embeds=True)
    size: dict[str, Any] = {"height": 1024, "width": 1024, "dtype": torch.bfloat16}
    [planned] = hicache.fast.plan(flux, granularity="output", **size).denoisers.values()
    assert planned.output_bytes == 3 * 4096 * 64 * 2 == 1_572_864
    [planned] = hicache.fast.plan(flux, **size).denoisers.values()
    assert planned.granularity == "module"
    [planned] = hicache.fast.plan(unets.unet(), granularity="output", **size).denoisers.values()
    assert planned.history_bytes == 3 * 2 * 4 * 128 * 128 * 2
