"""Module granularity: a skipped step as one sum is the paper's, on every family and in whole pipelines."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn

import hicache.fast
import hicache.reference
from hicache import HiCacheConfig
from hicache.adapters import registry
from hicache.adapters.flux2 import Flux2
from hicache.adapters.ltx import LTX
from hicache.adapters.pixart import PixArt
from hicache.adapters.sana import Sana
from hicache.adapters.wan import Wan
from tests.support import models, pipelines
from tests.support.comparisons import cast, relative_rms, snapshot
from tests.support.pipelines import FAMILIES, build_randomized
from tests.support.runs import (
    Run,
    blocks_of,
    by_fast,
    by_reference,
    count_calls,
    recorded,
    recorded_in,
    replay,
    trace,
)
from tests.support.schedulers import CountingScheduler

pytestmark = [
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # Chroma's
]

CONFIG = HiCacheConfig(interval=3, order=2, sigma=0.5, warmup=3)
CONFIGS = {
    "hermite": CONFIG,
    "hermite-late": HiCacheConfig(interval=6, order=2, sigma=0.3, warmup=2, last_step_full=True),
    "taylor": HiCacheConfig(interval=5, order=3, warmup=1, basis="taylor"),
    "scaled-taylor": HiCacheConfig(interval=4, order=1, sigma=0.7, warmup=2, basis="scaled_taylor"),
    "reuse": HiCacheConfig(interval=2, order=0, warmup=1, basis="reuse"),
}
# Wan's blocks cast to float32 within, also those of a float64 model. The fast path does not run them on a
# skipped step, so it is the more precise of the two.
SINGLE_PRECISION = ("wan", "wan22", "wan_many", "wan_ti2v", "wan_ti2v_picture")

every_pipeline = pytest.mark.parametrize("name", pipelines.BY_MODULE)
every_family = pytest.mark.parametrize("name", FAMILIES)


# Equal to the reference.


@pytest.mark.few(14)
@every_pipeline
def test_whole_runs_equal_the_reference(name: str):
    """Latents feed back through the scheduler, in fp32: all that the transformer says is compared."""
    pipe, arguments = build_randomized(name)
    uncached = trace(pipe, arguments)
    for config in (CONFIG, CONFIGS["taylor"]):
        with hicache.reference.apply(pipe, config) as handle:
            expected = trace(pipe, arguments)
            contexts = {label: (c.full_steps, c.skipped_steps) for label, c in handle.stats.contexts.items()}
        with hicache.fast.apply(pipe, config, granularity="module") as handle:
            ours = trace(pipe, arguments)
            again = trace(pipe, arguments)
        stats = handle.stats
        assert stats.granularity == "module"
        assert all(choice.startswith("module: asked for") for choice in stats.choices.values())
        assert {n: (c.full_steps, c.skipped_steps) for n, c in stats.contexts.items()} == contexts
        assert relative_rms(ours, expected) <= 2e-5
        assert torch.equal(ours, again)
        assert relative_rms(expected, uncached) > 1e-3  # else nothing is shown
    assert torch.equal(trace(pipe, arguments), uncached)


def _cases() -> list[Any]:
    """Every pipeline with every configuration; by default one of each, and those most apart of a family."""
    cases = [(name, label) for name in pipelines.BY_MODULE for label in CONFIGS]
    more = [(name, label) for name in FAMILIES for label in ("hermite-late", "taylor")]
    quick = [case for case in cases if case[1] == "hermite" or case in more]
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.slow) for case in cases]


@pytest.mark.few(24)
@pytest.mark.parametrize(("name", "label"), _cases())
def test_float64_calls_equal_the_reference(name: str, label: str):
    model, run = recorded_in(name, torch.float64)
    tolerance = 1e-6 if name in SINGLE_PRECISION else 1e-10
    expected = by_reference(model, run, CONFIGS[label])
    assert relative_rms(by_fast(model, run, CONFIGS[label]), expected) <= tolerance
    if label in ("hermite", "reuse"):
        # caching the sum of what is gated is another algorithm: the gates are not of now
        assert relative_rms(by_fast(model, run, CONFIGS[label], "stack"), expected) > 1e-4


@pytest.mark.parametrize(
    "name", ["wan", *(pytest.param(name, marks=pytest.mark.slow) for name in SINGLE_PRECISION[1:])]
)
def test_wan_in_float64_throughout(name: str, monkeypatch: pytest.MonkeyPatch):
    """Its blocks compute in ``.float()``. Where that leaves float64 alone, Wan is equal like the others."""
    model, run = recorded_in(name, torch.float64)
    single = Tensor.float
    monkeypatch.setattr(Tensor, "float", lambda self: self if self.dtype == torch.float64 else single(self))
    for label, config in CONFIGS.items():
        assert relative_rms(by_fast(model, run, config), by_reference(model, run, config)) <= 1e-10, label


@pytest.mark.few(5)
@every_family
def test_bfloat16_is_as_close_to_float64_as_the_reference(name: str):
    model, run = recorded_in(name, torch.bfloat16)
    exact_run = cast(run, torch.float64)
    if name in ("flux", "flux2", "chroma"):
        # these multiply by a thousand in their own dtype
        for _, kwargs in (call for calls in exact_run for call in calls):
            for key in ("timestep", "guidance"):
                if kwargs.get(key) is not None:
                    kwargs[key] = (kwargs[key].bfloat16() * 1000).double() / 1000
    for config in (CONFIG, CONFIGS["scaled-taylor"]):
        exact = by_reference(copy.deepcopy(model).double(), exact_run, config)
        eager, ours = by_reference(model, run, config), by_fast(model, run, config)
        assert 0 < relative_rms(eager, exact) < 0.1
        assert relative_rms(ours, exact) <= 2 * relative_rms(eager, exact)
        assert (ours - exact).abs().max() <= 2 * (eager - exact).abs().max()


@every_family
def test_autocast_is_as_close_to_float32_as_the_reference(name: str):
    """Hidden states, embeddings and weights of two dtypes in one model."""
    model, run = recorded(name)
    exact = by_reference(model, run, CONFIG)
    with torch.autocast("cpu", torch.bfloat16):
        eager, ours = by_reference(model, run, CONFIG), by_fast(model, run, CONFIG)
    assert 0 < relative_rms(eager, exact) < 0.3
    assert relative_rms(ours, eager) < 0.01
    assert relative_rms(ours, exact) <= 2 * relative_rms(eager, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_history_dtype(name: str, dtype: torch.dtype):
    """Other than the model's, wider or narrower; features that share a term are added before they round."""
    config = HiCacheConfig(interval=3, order=2, warmup=3, history_dtype=dtype)
    for model_dtype in (torch.float32, torch.bfloat16):
        model, run = recorded_in(name, model_dtype)
        exact = by_reference(copy.deepcopy(model).double(), cast(run, torch.float64), CONFIG)
        eager, ours = by_reference(model, run, config), by_fast(model, run, config)
        small = 1e-6 if name in SINGLE_PRECISION else 1e-7
        assert relative_rms(ours, exact) <= 2 * relative_rms(eager, exact) + small


# Shared gates.


def _uncollapsed(adapter: type[Any]) -> type[Any]:
    return type(adapter.__name__, (adapter,), {"__init__": lambda self, m: adapter.__init__(self, m, False)})


@pytest.mark.parametrize(
    ("name", "adapter"),
    [("wan", Wan), ("ltx", LTX), ("pixart", PixArt), ("sana", Sana), ("flux2", Flux2)],
    ids=["wan", "ltx", "pixart", "sana", "flux2"],
)
def test_collapsed_is_exact(name: str, adapter: type[Any], monkeypatch: pytest.MonkeyPatch):
    model, run = recorded_in(name, torch.float64)
    scheduler = CountingScheduler()
    outputs, bytes_held = [], []
    for registered in (adapter, _uncollapsed(adapter)):
        monkeypatch.setitem(registry._ADAPTERS, type(model).__name__, registered)
        with hicache.fast.apply(model, CONFIG, scheduler=scheduler, granularity="module") as handle:
            outputs.append(replay(model, run, scheduler))
            bytes_held.append(handle.stats.history_bytes)
    collapsed, apart = outputs
    assert relative_rms(collapsed, apart) <= 1e-12
    outputs = _uncollapsed(adapter)(model).outputs()
    num_features = max(feature for output in outputs for feature, _ in output.features) + 1
    assert bytes_held[0] * num_features == bytes_held[1] * 3


@pytest.mark.parametrize("name", ["wan", "ltx", "pixart", "sana", "flux2"])
def test_collapsed_in_bfloat16_is_no_worse_than_apart(name: str, monkeypatch: pytest.MonkeyPatch):
    """Sums of many features round to the history's dtype: one rounding in place of one a feature."""
    model, run = recorded_in(name, torch.bfloat16)
    exact = by_fast(copy.deepcopy(model).double(), cast(run, torch.float64), CONFIG)
    collapsed = by_fast(model, run, CONFIG)
    adapter = type(registry.find(model))
    monkeypatch.setitem(registry._ADAPTERS, type(model).__name__, _uncollapsed(adapter))
    apart = by_fast(model, run, CONFIG)
    assert relative_rms(collapsed, exact) <= 2 * relative_rms(apart, exact)


# What a skipped step runs, and what is left behind.


@every_family
def test_skipped_steps_run_no_block_and_remove_restores_all(name: str):
    model, run = recorded(name)
    uncached = replay(model, run)
    before = snapshot(model)
    calls: Counter[int] = Counter()
    copied = copy.deepcopy(model)
    blocks = blocks_of(copied)
    count_calls(blocks, calls)
    counted = snapshot(copied)
    scheduler = CountingScheduler()
    with hicache.fast.apply(copied, CONFIG, scheduler=scheduler, granularity="module") as handle:
        replay(copied, run, scheduler)
        contexts = handle.stats.contexts.values()
    full = sum(context.full_steps for context in contexts)
    assert 0 < full < sum(len(calls) for calls in run)
    assert calls == Counter(dict.fromkeys(range(len(blocks)), full))
    assert snapshot(copied) == counted

    with hicache.fast.apply(model, HiCacheConfig(interval=1), scheduler=scheduler, granularity="module"):
        assert torch.equal(replay(model, run, scheduler), uncached)
    assert snapshot(model) == before
    assert torch.equal(replay(model, run), uncached)


@pytest.mark.parametrize("at", [0, 1, 4])
def test_an_exception_leaves_nothing_behind(at: int):
    """In a feature's module: the features before it are recorded, those after it not."""
    pipe, arguments = build_randomized("flux_cfg")
    trace(pipe, arguments)  # its first run leaves an attribute of the pipeline's own
    before = snapshot(pipe.transformer)
    with hicache.fast.apply(pipe, CONFIG, granularity="module"):
        expected = trace(pipe, arguments)
    with hicache.fast.apply(pipe, CONFIG, granularity="module"):
        runs = Counter[str]()

        def fail(*_: Any) -> None:
            runs["ff"] += 1
            if runs["ff"] == at + 1:
                raise KeyError("interrupted")

        hook = pipe.transformer.transformer_blocks[1].ff.register_forward_pre_hook(fail)
        with pytest.raises(KeyError):
            trace(pipe, arguments)
        hook.remove()
        assert torch.equal(trace(pipe, arguments), expected)
    assert snapshot(pipe.transformer) == before


def test_other_shapes_between_runs():
    pipe, arguments = build_randomized("flux")
    small = {**arguments, "height": 32}
    batch = {
        **arguments,
        "prompt_embeds": models.noise(2, 6, 32),
        "pooled_prompt_embeds": models.noise(2, 32),
    }
    expected = []
    for given in (arguments, small, batch):
        with hicache.fast.apply(pipe, CONFIG, granularity="module"):
            expected.append(trace(pipe, given))
    with hicache.fast.apply(pipe, CONFIG, granularity="module"):
        for given, alone in zip((arguments, small, batch, arguments), (*expected, expected[0]), strict=True):
            assert torch.equal(trace(pipe, given), alone)


def test_release_frees_and_the_next_run_is_the_same():
    pipe, arguments = build_randomized("flux_cfg")
    with hicache.fast.apply(pipe, CONFIG, granularity="module") as handle:
        expected = trace(pipe, arguments)
        held = handle.stats.history_bytes
        assert held > 0
        handle.release()
        assert handle.stats.history_bytes == 0
        assert torch.equal(trace(pipe, arguments), expected)
        assert handle.stats.history_bytes == held


@pytest.mark.parametrize("name", ["flux", "chroma", "dit", "wan"])
def test_a_run_in_inference_mode_does_not_spoil_the_next(name: str):
    model, run = recorded(name)
    expected = by_fast(model, run, CONFIG)
    scheduler = CountingScheduler()
    with hicache.fast.apply(model, CONFIG, scheduler=scheduler, granularity="module"):
        with torch.inference_mode():
            first = replay(model, run, scheduler)
        second = replay(model, run, scheduler)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)


@pytest.mark.parametrize("granularity", ["module", "stack"])
@pytest.mark.parametrize("first", [True, False])
def test_a_run_under_autocast_does_not_spoil_the_next(first: bool, granularity: str):
    pipe, arguments = pipelines.build("flux")

    def draw_under(autocast: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return trace(pipe, arguments)

    with hicache.fast.apply(pipe, CONFIG, granularity=granularity):
        expected = draw_under(not first)
    with hicache.fast.apply(pipe, CONFIG, granularity=granularity):
        draw_under(first)
        assert torch.equal(draw_under(not first), expected)


@pytest.mark.parametrize("first", [0, 1])
def test_other_layers_skipped_in_the_next_run(first: int):
    """Skip-layer guidance: which features a call has is learned of this call, not of the last run's."""
    pipe, arguments = pipelines.build("sd3_skip_layer")
    runs = [{**arguments, "skip_guidance_layers": [layer]} for layer in (first, 1 - first)]
    with hicache.fast.apply(pipe, CONFIG, granularity="module"):
        expected = trace(pipe, runs[1])
    with hicache.fast.apply(pipe, CONFIG, granularity="module"):
        assert not torch.equal(trace(pipe, runs[0]), expected)
        assert torch.equal(trace(pipe, runs[1]), expected)


def test_hooks_exchanged_between_runs_are_recorded():
    """As many as before, and after the tap that recorded the last run."""
    pipe, arguments = pipelines.build("flux")
    layer = pipe.transformer.transformer_blocks[1].ff
    hook = layer.register_forward_hook(lambda module, args, output: output * 0.5)
    with hicache.fast.apply(pipe, CONFIG, granularity="module"):
        trace(pipe, arguments)
        hook.remove()
        layer.register_forward_hook(lambda module, args, output: output * 2)
        drawn = trace(pipe, arguments)
    with hicache.fast.apply(pipe, CONFIG, granularity="module"):
        assert torch.equal(drawn, trace(pipe, arguments))


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_feature_modules_put_in_place_later_are_recorded(name: str):
    """As LoRA does: another module where the adapter found one, after the first run."""

    class Wrapped(nn.Module):
        def __init__(self, base: nn.Module, scale: float) -> None:
            super().__init__()
            self.base, self.scale = base, scale

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return self.base(*args, **kwargs) * self.scale

    model, run = recorded_in(name, torch.float64)
    before = snapshot(model)
    scheduler = CountingScheduler()
    owners = [
        (block, part)
        for block in blocks_of(model)
        for part in ("proj_out", "ff", "ffn")
        if hasattr(block, part)
    ]
    with hicache.fast.apply(model, CONFIG, scheduler=scheduler, granularity="module") as handle:
        plain = replay(model, run, scheduler)
        for block, part in owners:
            setattr(block, part, Wrapped(getattr(block, part), 0.5))
        wrapped = replay(model, run, scheduler)
        assert handle.stats.granularity == "module"
    expected = by_reference(model, run, CONFIG)
    assert relative_rms(wrapped, expected) <= (1e-6 if name in SINGLE_PRECISION else 1e-10)
    assert relative_rms(wrapped, plain) > 1e-3
    for block, part in owners:
        setattr(block, part, getattr(block, part).base)
    assert snapshot(model) == before


Change = Callable[[dict[str, Any]], dict[str, Any]]


def _residuals(count: int, tokens: int, width: int = models.WIDTH, batch: int = 1) -> list[Tensor]:
    return [models.noise(batch, tokens, width) * 0.3 * (index + 1) for index in range(count)]


# pipeline to start from, changes of the model's configuration, changes of its calls
VARIANTS: dict[str, tuple[str, dict[str, Any], Change]] = {
    "flux, few residuals for many blocks": (
        "flux",
        {"num_layers": 5, "num_single_layers": 7},
        lambda call: {
            "controlnet_block_samples": _residuals(2, 16),
            "controlnet_single_block_samples": _residuals(3, 16),
        },
    ),
    "flux, residuals repeat": (
        "flux",
        {"num_layers": 5},
        lambda call: {"controlnet_block_samples": _residuals(2, 16), "controlnet_blocks_repeat": True},
    ),
    "flux, no singles": ("flux", {"num_single_layers": 0}, lambda call: {}),
    "flux2, no singles": ("flux2", {"num_single_layers": 0}, lambda call: {}),
    "hunyuan, no singles": ("hunyuan", {"num_single_layers": 0}, lambda call: {}),
    "hunyuan, no guidance": ("hunyuan", {"guidance_embeds": False}, lambda call: {"guidance": None}),
    "chroma, residuals": (
        "chroma",
        {},
        lambda call: {
            "controlnet_block_samples": _residuals(1, 16),
            "controlnet_single_block_samples": _residuals(1, 16),
        },
    ),
    "chroma, residuals repeat": (
        "chroma",
        {},
        lambda call: {"controlnet_block_samples": _residuals(3, 16), "controlnet_blocks_repeat": True},
    ),
    "qwen, few residuals for many blocks": (
        "qwen",
        {"num_layers": 5},
        lambda call: {"controlnet_block_samples": _residuals(2, 16, 48)},
    ),
    "sd3, few residuals for many blocks": (
        "sd3",
        {"num_layers": 5},
        lambda call: {"block_controlnet_hidden_states": _residuals(2, 64, batch=2)},
    ),
    "sd3, two attentions everywhere": (
        "sd3",
        {"dual_attention_layers": (0, 1, 2), "qk_norm": "rms_norm"},
        lambda call: {},
    ),
    "sana, residuals": (
        "sana",
        {"num_layers": 4},
        lambda call: {"controlnet_block_samples": tuple(_residuals(2, 16, batch=2))},
    ),
    "sana, more residuals than blocks": (
        "sana",
        {},
        lambda call: {"controlnet_block_samples": tuple(_residuals(3, 16, batch=2))},
    ),
    "cogvideox, ofs": ("cogvideox", {"ofs_embed_dim": 8}, lambda call: {"ofs": torch.full((1,), 2.0)}),
    "pixart, sizes": (
        "pixart",
        {"use_additional_conditions": True},
        lambda call: {
            "added_cond_kwargs": {"resolution": torch.full((2, 2), 64.0), "aspect_ratio": torch.ones(2, 1)}
        },
    ),
    "wan, one block": ("wan", {"num_layers": 1}, lambda call: {}),
}


@pytest.mark.few(8)
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_a_family_equal_the_reference(name: str):
    start, changed, more = VARIANTS[name]
    original, run = recorded(start)
    model = pipelines.randomize(models.reconfigured(original, **changed)).double()
    run = cast(
        [[(args, {**kwargs, **more(kwargs)}) for args, kwargs in calls] for calls in run], torch.float64
    )
    expected = by_reference(model, run, CONFIG)
    assert relative_rms(by_fast(model, run, CONFIG), expected) <= (
        1e-6 if start in SINGLE_PRECISION else 1e-10
    )
    assert relative_rms(replay(model, run), expected) > 1e-3


@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_feed_forwards_in_chunks_are_found_out():
    """diffusers can call a feed-forward layer several times, each for some of the tokens."""
    model, run = recorded_in("sd3", torch.float64)
    model.enable_forward_chunking(chunk_size=2, dim=1)
    scheduler = CountingScheduler()
    with hicache.fast.apply(model, CONFIG, scheduler=scheduler) as handle:
        with pytest.warns(RuntimeWarning, match="expected FeedForward to give a hidden state"):
            ours = replay(model, run, scheduler)
    assert handle.stats.granularity == "stack"
    assert torch.equal(ours, by_fast(model, run, CONFIG, "stack"))


def test_residuals_that_come_and_go_within_a_run():
    """A ControlNet that guides a part of the run: on skipped steps the residuals of now, or none, count."""
    model, run = recorded_in("flux", torch.float64)
    width = models.WIDTH
    tokens = run[0][0][1]["hidden_states"].shape[1]
    residuals = [models.noise(1, tokens, width).double(), -models.noise(1, tokens, width).double()]
    for step, [(_, kwargs)] in enumerate(run):
        if 2 <= step < 7:
            kwargs["controlnet_block_samples"] = [residual * step for residual in residuals]
            kwargs["controlnet_single_block_samples"] = residuals[:1] if step > 4 else None
    # the arguments of a call are part of its context: each kind of call warms up on its own
    assert relative_rms(by_fast(model, run, CONFIG), by_reference(model, run, CONFIG)) <= 1e-10


def test_residuals_that_change_within_a_context():
    model, run = recorded_in("flux", torch.float64)
    tokens = run[0][0][1]["hidden_states"].shape[1]
    for step, [(_, kwargs)] in enumerate(run):
        kwargs["controlnet_block_samples"] = [models.noise(1, tokens, models.WIDTH).double() * (step - 5)]
    expected = by_reference(model, run, CONFIG)
    assert relative_rms(by_fast(model, run, CONFIG), expected) <= 1e-10
    assert relative_rms(by_fast(model, run, CONFIG, "stack"), expected) > 1e-2


# "auto".


def test_a_call_is_cached_alike_whatever_was_drawn_before():
    """With guidance two histories are too much; then without, one fits."""
    budget = held("flux_cfg") // 2
    pipe, arguments = build_randomized("flux_cfg")
    unguided = {k: v for k, v in arguments.items() if "negative" not in k and k != "true_cfg_scale"}
    with hicache.fast.apply(pipe, CONFIG, memory_budget=budget) as handle:
        expected = trace(pipe, unguided)
        assert handle.stats.granularity == "module"
        guided = trace(pipe, arguments)
        assert handle.stats.granularity == "stack"
        assert torch.equal(trace(pipe, unguided), expected)
        assert handle.stats.granularity == "module"
        assert torch.equal(trace(pipe, arguments), guided)


def held(name: str) -> int:
    """Bytes of history a run takes in module granularity, all contexts together."""
    pipe, arguments = build_randomized(name)
    with hicache.fast.apply(pipe, CONFIG, granularity="module") as handle:
        trace(pipe, arguments)
        return handle.stats.history_bytes


@pytest.fixture
def alone() -> Iterator[Callable[..., Tensor]]:
    """Draw in a granularity, from a pipeline built for it."""

    def run(name: str, granularity: str, config: HiCacheConfig = CONFIG) -> Tensor:
        pipe, arguments = build_randomized(name)
        with hicache.fast.apply(pipe, config, granularity=granularity):
            return trace(pipe, arguments)

    return run


@pytest.mark.few(10)
@pytest.mark.parametrize("warmup", [1, 2, 3])
@pytest.mark.parametrize("name", ["flux", "flux_cfg", "sd3_skip_layer"])
@pytest.mark.parametrize("share", [1.0, 0.999, 0.4, 0.0])
def test_auto_is_modules_where_all_histories_fit(name: str, share: float, warmup: int, alone: Any):
    """Also where the second context is what does not fit; and a second run draws what the first did."""
    config = HiCacheConfig(interval=3, order=2, warmup=warmup)
    budget = int(held(name) * share)
    pipe, arguments = build_randomized(name)
    # gates of no error, whose rank is no less than all modules take
    with hicache.fast.apply(pipe, config, memory_budget=budget, gate_tolerance=0.0) as handle:
        first = trace(pipe, arguments)
        assert handle.stats.history_bytes <= max(budget, held_by_stack(name))
        second = trace(pipe, arguments)
        stats = handle.stats
    assert torch.equal(first, second)
    chosen = "module" if share == 1.0 else "stack"
    assert stats.granularity == chosen
    [choice] = stats.choices.values()
    assert choice.startswith(f"{chosen}: ")
    assert f"memory_budget={budget:,}" in choice
    # what is recorded before the last two warm-up steps is not used: till then a change of mind does not show
    if chosen == "module" or share == 0 or (warmup == 3 and name != "sd3_skip_layer"):
        assert torch.equal(first, alone(name, chosen, config))


@functools.cache
def held_by_stack(name: str) -> int:
    pipe, arguments = build_randomized(name)
    with hicache.fast.apply(pipe, CONFIG, granularity="stack") as handle:
        trace(pipe, arguments)
        return handle.stats.history_bytes


def test_every_denoiser_chooses_for_itself():
    """Two of one kind share nothing but the scheduler; the budget is one denoiser's."""
    pipe, arguments = build_randomized("wan22")
    with hicache.fast.apply(pipe, CONFIG, granularity="module") as handle:
        expected = trace(pipe, arguments)
        each = {
            name: sum(c.history_bytes for label, c in handle.stats.contexts.items() if label[:-3] == name)
            for name in ("transformer", "transformer_2")
        }
    assert each["transformer"] == each["transformer_2"] > 0
    with hicache.fast.apply(pipe, CONFIG, memory_budget=each["transformer"]) as handle:
        assert torch.equal(trace(pipe, arguments), expected)
        choices = handle.stats.choices
    assert list(choices) == ["transformer", "transformer_2"]
    assert all(choice.startswith("module: ") for choice in choices.values())


def test_auto_without_an_adapter_is_the_stack():
    model, call = models.build("auraflow")
    run = [[((), call(t))] for t in torch.linspace(1, 0.1, 12)]
    scheduler = CountingScheduler()
    before = snapshot(model)
    with pytest.raises(ValueError, match="AuraFlowTransformer2DModel are not known") as error:
        hicache.fast.apply(model, CONFIG, granularity="module")
    assert "FluxTransformer2DModel" in str(error.value)
    assert snapshot(model) == before
    with hicache.fast.apply(model, CONFIG, scheduler=scheduler) as handle:
        ours = replay(model, run, scheduler)
    assert handle.stats.choices == {
        "transformer": "stack: no adapter knows the modules of AuraFlowTransformer2DModel"
    }
    assert torch.equal(ours, by_fast(model, run, CONFIG, "stack"))


def test_asking_for_modules_nobody_knows_keeps_the_cache_there_is():
    model, _ = models.build("auraflow")
    with hicache.fast.apply(model, CONFIG) as handle:
        with pytest.raises(ValueError, match="granularity='module'"):
            hicache.fast.apply(model, CONFIG, granularity="module")
        assert handle.active


def _layered_zero_cond_t() -> tuple[nn.Module, Run]:
    """The second layer drawn has the gates of a picture given."""
    original, run = recorded("qwen_layered")
    model = models.reconfigured(original, zero_cond_t=True, use_additional_t_cond=False)
    for calls in (run := copy.deepcopy(run)):
        for _, kwargs in calls:
            del kwargs["additional_t_cond"]
    return pipelines.randomize(model), run


def _token_replace() -> tuple[nn.Module, Run]:
    """Nothing but the frame given."""
    original, call = models.build("hunyuan_video")
    model = models.reconfigured(original, image_condition_type="token_replace")
    frame = models.noise(1, 4, 1, 4, 4)
    times = torch.linspace(1, 0.1, 12)
    return pipelines.randomize(model), [[((), {**call(t), "hidden_states": frame})] for t in times]


def _per_token(name: str, tokens: int) -> tuple[nn.Module, Run]:
    """No two neighbours have one timestep."""
    model, run = recorded(name)
    run = copy.deepcopy(run)
    for calls in run:
        for _, kwargs in calls:
            kwargs["timestep"] = kwargs["timestep"][:, None] * torch.linspace(1, 0.5, tokens)
    return copy.deepcopy(model), run


def _wan_per_token() -> tuple[nn.Module, Run]:
    latents = recorded("wan")[1][0][0][1]["hidden_states"]
    return _per_token("wan", latents[0, 0].numel() // 4)


def _ltx_per_token() -> tuple[nn.Module, Run]:
    return _per_token("ltx", recorded("ltx")[1][0][0][1]["hidden_states"].shape[1])


REFUSED: dict[str, tuple[Callable[[], tuple[nn.Module, Run]], str]] = {
    "qwen_layered_zero_cond_t": (_layered_zero_cond_t, "zero_cond_t"),
    "hunyuan_token_replace": (_token_replace, "token_replace"),
    "wan_per_token": (_wan_per_token, "a timestep for every token"),
    "ltx_per_token": (_ltx_per_token, "a timestep for every token"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_calls_whose_gates_are_not_one_a_picture(name: str):
    make, reason = REFUSED[name]
    model, run = make()
    scheduler = CountingScheduler()
    uncached = replay(model, run, scheduler)
    before = snapshot(model)
    with hicache.fast.apply(model, CONFIG, scheduler=scheduler, granularity="module") as handle:
        with pytest.raises(RuntimeError, match="granularity='module' cannot be had") as error:
            replay(model, run, scheduler)
    assert reason in str(error.value)
    assert type(model).__name__ in str(error.value)
    assert snapshot(model) == before
    assert torch.equal(replay(model, run, scheduler), uncached)

    with hicache.fast.apply(model, CONFIG, scheduler=scheduler) as handle:
        first, second = replay(model, run, scheduler), replay(model, run, scheduler)
        assert handle.stats.granularity == "stack"
        assert reason in handle.stats.choices["transformer"]
    assert torch.equal(first, second)
    assert torch.equal(first, by_fast(model, run, CONFIG, "stack"))
    assert snapshot(model) == before


# Blocks that are not what the adapter takes them for.


def _patch_block(model: Any) -> Callable[[], None]:
    """A block that adds something of its own to the hidden state."""
    block = model.transformer_blocks[1]
    original = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        text, image = original(*args, **kwargs)
        return text, image + 0.5 * torch.tanh(image)

    block.__dict__["forward"] = forward
    return lambda: block.__dict__.pop("forward")


def _patch_processor(model: Any) -> Callable[[], None]:
    """An attention whose output is of other tokens than the hidden state's."""
    attention = model.transformer_blocks[0].attn
    processor = attention.processor

    class Packed:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            image, text = processor(*args, **kwargs)
            return Nameless(image), text

    class Nameless:
        """Not a tensor, but multiplied like one."""

        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            self.shape = (1,)
            self.ndim = 1

        def __rmul__(self, gate: Tensor) -> Tensor:
            return gate * self.tensor

        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            plain = [arg.tensor if isinstance(arg, cls) else arg for arg in args]
            return function(*plain, **(kwargs or {}))

    attention.processor = Packed()
    return lambda: setattr(attention, "processor", processor)


def _patch_third(model: Any) -> Callable[[], None]:
    """An attention with a third output, as with an IP-Adapter, that no argument tells of."""
    attention = model.transformer_blocks[0].attn
    processor = attention.processor

    class Third:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            image, text = processor(*args, **kwargs)
            return image, text, image * 0.5

    attention.processor = Third()
    return lambda: setattr(attention, "processor", processor)


@pytest.mark.parametrize(
    "patch", [_patch_block, _patch_processor, _patch_third], ids=["block", "no tensor", "third output"]
)
@pytest.mark.parametrize("warmup", [1, 3])
@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_blocks_of_ones_own_are_found_out(patch: Callable[[Any], Callable[[], None]], warmup: int):
    config = HiCacheConfig(interval=3, order=2, warmup=warmup)
    pipe, arguments = build_randomized("flux_cfg")
    undo = patch(pipe.transformer)
    trace(pipe, arguments)  # its first run leaves an attribute of the pipeline's own
    before = snapshot(pipe.transformer)
    with hicache.fast.apply(pipe, config, granularity="stack"):
        expected = trace(pipe, arguments)
    with hicache.fast.apply(pipe, config) as handle:
        with pytest.warns(RuntimeWarning, match="its stack is cached instead") as caught:
            first = trace(pipe, arguments)
            second = trace(pipe, arguments)
        assert len(caught) == 1
        assert handle.stats.granularity == "stack"
        assert "FluxTransformer2DModel" in handle.stats.choices["transformer"]
    assert torch.equal(first, second)
    assert torch.equal(first, expected)
    with hicache.fast.apply(pipe, config, granularity="module"):
        with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match="granularity='module'"):
            trace(pipe, arguments)
    assert snapshot(pipe.transformer) == before
    undo()


@pytest.mark.parametrize(
    "patch", [_patch_block, _patch_processor, _patch_third], ids=["block", "no tensor", "third output"]
)
@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_blocks_put_in_place_between_runs_are_found_out(patch: Callable[[Any], Callable[[], None]]):
    pipe, arguments = build_randomized("flux")
    with hicache.fast.apply(pipe, CONFIG) as handle:
        trace(pipe, arguments)
        assert handle.stats.granularity == "module"
        undo = patch(pipe.transformer)
        with pytest.warns(RuntimeWarning, match="its stack is cached instead"):
            ours = trace(pipe, arguments)
        assert handle.stats.granularity == "stack"
    with hicache.fast.apply(pipe, CONFIG, granularity="stack"):
        assert torch.equal(trace(pipe, arguments), ours)
    undo()


# Weights elsewhere, and calls that broadcast.


@pytest.mark.few(5)
@every_family
def test_offloaded_weights(name: str):
    """Weights that are only there while their own module runs."""
    model, run = recorded(name)
    expected = by_fast(model, run, CONFIG)
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    assert relative_rms(by_fast(offloaded, run, CONFIG), expected) <= 1e-6


@pytest.mark.parametrize("name", ["flux", "flux2", "chroma", "qwen", "wan"])
def test_one_timestep_for_several_pictures(name: str):
    model, run = recorded_in(name, torch.float64)
    for _, kwargs in (call for calls in run for call in calls):
        for key in ("hidden_states", "encoder_hidden_states"):
            kwargs[key] = torch.cat([kwargs[key], kwargs[key] * 0.5])
        assert len(kwargs["timestep"]) == 1
    tolerance = 1e-6 if name in SINGLE_PRECISION else 1e-10
    assert relative_rms(by_fast(model, run, CONFIG), by_reference(model, run, CONFIG)) <= tolerance


@pytest.mark.parametrize("name", ["flux", "dit"])
def test_a_bare_transformer_counts_by_its_timesteps(name: str):
    model, run = recorded_in(name, torch.float64)
    expected = by_fast(model, run, CONFIG)
    with hicache.fast.apply(model, CONFIG, granularity="module") as handle:
        assert relative_rms(replay(model, run), expected) <= 1e-12
        assert handle.stats.skipped_steps > 0
