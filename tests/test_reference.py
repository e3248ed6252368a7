"""hicache.reference: equal to the paper's formulas by other means, on every model it knows; whole after."""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import hicache.fast
import hicache.reference
from hicache import HiCacheConfig, register_basis, unregister_basis
from hicache.reference.blocks import MODELS
from hicache.reference.history import History
from tests.support import models, pipelines
from tests.support.comparisons import cast, flat, relative_max, snapshot
from tests.support.pipelines import denoisers
from tests.support.runs import block_lists
from tests.support.schedulers import CountingScheduler

pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),  # Mochi's rope
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # Chroma's
]

STEPS = 12
FULL = (0, 1, 2, 6, 10)  # of STEPS with warmup=3 and interval=4
SIGMA = 0.6
REUSE_NEXT = HiCacheConfig(interval=2, order=0, warmup=1, basis="reuse")
EVERY_THIRD = HiCacheConfig(interval=3)


def config(basis: str = "hermite", **more: Any) -> HiCacheConfig:
    return HiCacheConfig(interval=4, order=2, sigma=SIGMA, warmup=3, basis=basis, **more)


# Every model: a float64 transformer and its calls in twelve steps, all that its blocks cache written by hand.

Case = tuple[nn.Module, list[dict[str, Any]]]
DOUBLES = r"transformer_blocks\.\d+\.(attn|ff|ff_context)"
FUSED = r"single_transformer_blocks\.\d+\.proj_out"
CROSS = r"transformer_blocks\.\d+\.(attn1|attn2|ff)"
FEATURES = {
    "flux": f"{DOUBLES}|{FUSED}",
    "flux_controlnet": f"{DOUBLES}|{FUSED}",
    "flux_ip_adapter": f"{DOUBLES}|{FUSED}",
    "flux2": rf"{DOUBLES}|single_transformer_blocks\.\d+\.attn",
    "chroma": f"{DOUBLES}|{FUSED}",
    "auraflow": rf"joint_{DOUBLES}|single_{DOUBLES}",
    "hidream": r"(double|single)_stream_blocks\.\d+\.block\.(attn1|ff_i|ff_t)",
    "hunyuan_video": f"{DOUBLES}|{FUSED}",
    "hunyuan_video_i2v": f"{DOUBLES}|{FUSED}",
    "hunyuan_video15": DOUBLES,
    "sd3": r"transformer_blocks\.\d+\.(attn|attn2|ff|ff_context)",
    "cogvideox": r"transformer_blocks\.\d+\.(attn1|ff)",
    "cogview4": r"transformer_blocks\.\d+\.(attn1|ff)",
    "sana": CROSS,
    "z_image": r"layers\.\d+\.(attention_norm2|ffn_norm2)",
    "lumina2": r"layers\.\d+\.(norm2|ffn_norm2)",
    "qwen": r"transformer_blocks\.\d+\.(attn|img_mlp|txt_mlp)",
    "qwen_edit": r"transformer_blocks\.\d+\.(attn|img_mlp|txt_mlp)",
    "qwen_edit_plus": r"transformer_blocks\.\d+\.(attn|img_mlp|txt_mlp)",
    "wan": r"blocks\.\d+\.(attn1|attn2|ffn)",
    "ltx": CROSS,
    "dit": CROSS,
    "pixart": CROSS,
}
# cast to float32 within, whatever the model's dtype
SINGLE_PRECISION = ("wan", "lumina2")


def times() -> list[float]:
    return torch.linspace(1, 0.1, STEPS).tolist()


def bare(name: str) -> Case:
    model, call = models.build(name)
    return model, [call(t) for t in times()]


def piped(name: str) -> Case:
    """The first call of every step of a pipeline."""
    pipe, arguments = pipelines.build(name)
    calls: list[dict[str, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append({**kwargs, **({"hidden_states": args[0]} if args else {})}),
        with_kwargs=True,
    )
    pipelines.draw(pipe, arguments, STEPS)
    hook.remove()
    calls = copy.deepcopy(calls[:: len(calls) // STEPS])
    return pipe.transformer, [{**call, "return_dict": False} for call in calls]


def flux_controlnet() -> Case:
    """Residuals that change from step to step: those of the step are added, whether it is full or not."""
    model, calls = bare("flux")
    residual = models.noise(1, models.TOKENS, models.WIDTH)
    return model, [
        {
            **call,
            "controlnet_block_samples": [residual * step, residual],
            "controlnet_single_block_samples": [residual, residual * step],
        }
        for step, call in enumerate(calls)
    ]


def flux_ip_adapter() -> Case:
    """The attention of doubles gives a third output, of the image prompt."""
    model, calls = bare("flux")
    for block in model.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(models.WIDTH, 8))
    kwargs = {"ip_hidden_states": [models.noise(1, 1, 4, 8)]}
    return model, [{**call, "joint_attention_kwargs": kwargs} for call in calls]


def hunyuan_video_i2v() -> Case:
    """Blocks of other classes, that treat the first frame's tokens apart."""
    original, calls = bare("hunyuan_video")
    return models.reconfigured(original, image_condition_type="token_replace"), calls


def build(name: str) -> Case:
    own = {
        "flux_controlnet": flux_controlnet,
        "flux_ip_adapter": flux_ip_adapter,
        "hunyuan_video_i2v": hunyuan_video_i2v,
    }
    if name in own:
        model, calls = own[name]()
    else:
        model, calls = bare(name) if name in models.BARE else piped(name)
    return model.double(), cast(calls, torch.float64)


every_model = pytest.mark.parametrize("name", FEATURES)


def run(model: nn.Module, calls: list[dict[str, Any]], scheduler: Any = None) -> Tensor:
    """Every call's output, [calls, numbers]."""
    outputs = []
    scheduler = scheduler or CountingScheduler()
    scheduler.set_timesteps(len(calls))
    for call in calls:
        with torch.no_grad():
            outputs.append(flat(model(**copy.deepcopy(call))))
        scheduler.step()
    return torch.stack(outputs)


def cached(model: nn.Module, calls: list[dict[str, Any]], settings: HiCacheConfig) -> Tensor:
    scheduler = CountingScheduler()
    with hicache.reference.apply(model, settings, scheduler=scheduler):
        return run(model, calls, scheduler)


def named_blocks(model: nn.Module) -> dict[str, nn.Module]:
    return {
        f"{name}.{index}": block
        for name, blocks in block_lists(model).items()
        for index, block in enumerate(blocks)
    }


# The paper by other means.


def forecast(features: dict[int, Tensor], step: int, basis: str) -> Tensor:
    """Differences and forecast for FULL and order 2, written out."""
    slope = {2: features[2] - features[1]}
    curve = {2: torch.zeros_like(features[2])}  # after the warm-up there is no second difference yet
    for last, before in ((6, 2), (10, 6)):
        if last in features:
            slope[last] = (features[last] - features[before]) / 4
            curve[last] = (slope[last] - slope[before]) / 4
    last = max(features)
    x = step - last
    one, two = {
        "hermite": (SIGMA * 2 * SIGMA * x, SIGMA**2 * (4 * (SIGMA * x) ** 2 - 2) / 2),
        "taylor": (x, x**2 / 2),
        "scaled_taylor": (SIGMA**2 * x, SIGMA**4 * x**2 / 2),
        "reuse": (0, 0),
    }[basis]
    return features[last] + one * slope[last] + two * curve[last]


class Oracle:
    """Plain forward hooks: they note what submodules give in full steps, and replace it in the others.

    Args:
        contexts: calls of the model in one step.
    """

    def __init__(self, model: nn.Module, pattern: str, basis: str, contexts: int = 1) -> None:
        self.basis = basis
        self.contexts = contexts
        self.calls = -1
        self.features: dict[Any, dict[int, Any]] = defaultdict(dict)
        self.hooks = [model.register_forward_pre_hook(self.start)]
        for path, module in model.named_modules():
            if re.fullmatch(pattern, path):
                self.hooks.append(module.register_forward_hook(self.replace))

    def start(self, *_: Any) -> None:
        self.calls += 1
        self.step, self.context = divmod(self.calls, self.contexts)
        self.order: Counter[nn.Module] = Counter()

    def replace(self, module: nn.Module, args: Any, output: Any) -> Any:
        elements = (output,) if isinstance(output, Tensor) else output
        self.order[module] += 1
        features = [
            self.features[self.context, module, self.order[module], position]
            for position in range(len(elements))
        ]
        if self.step in FULL:
            for feature, element in zip(features, elements, strict=True):
                feature[self.step] = element.clone()
            return None
        forecasts = [forecast(feature, self.step, self.basis) for feature in features]
        return forecasts[0] if isinstance(output, Tensor) else tuple(forecasts)

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def test_the_table_is_tested_to_the_last_block():
    seen = {(type(model).__name__, block) for model, block in _models_and_blocks()}
    assert seen == {(model, block) for model, blocks in MODELS.items() for block in blocks}


def _models_and_blocks() -> Iterator[tuple[nn.Module, str]]:
    for name in FEATURES:
        model, _ = build(name)
        for block in named_blocks(model).values():
            yield model, type(getattr(block, "block", block)).__name__


@pytest.mark.few(9)
@every_model
def test_equals_the_formulas_written_out(name: str):
    model, calls = build(name)
    for basis in ("hermite", "taylor", "scaled_taylor", "reuse"):
        oracle = Oracle(model, FEATURES[name], basis)
        expected = run(model, calls)
        oracle.remove()
        ours = cached(model, calls, config(basis))
        tolerance = 1e-5 if name in SINGLE_PRECISION else 1e-11
        assert relative_max(ours, expected) <= tolerance, basis
    # else the bases could not be told apart
    uncached = run(model, calls)
    assert relative_max(expected, uncached) > 100 * tolerance


@pytest.mark.few(9)
@every_model
def test_nothing_skipped_is_nothing_changed_and_remove_restores_all(name: str):
    model, calls = build(name)
    uncached = run(model, calls)
    before = snapshot(model)
    scheduler = CountingScheduler()
    handle = hicache.reference.apply(model, HiCacheConfig(interval=1), scheduler=scheduler)
    assert torch.equal(run(model, calls, scheduler), uncached)
    assert (handle.stats.full_steps, handle.stats.skipped_steps) == (STEPS, 0)
    handle.remove()
    assert snapshot(model) == before
    cached(model, calls, config())
    assert snapshot(model) == before
    assert torch.equal(run(model, calls), uncached)


@pytest.mark.few(9)
@every_model
def test_a_step_repeated_is_exact(name: str):
    """The same call again, all features reused: not one number may differ."""
    model, calls = build(name)
    full, skipped = cached(model, [calls[4]] * 2, REUSE_NEXT)
    assert torch.equal(full, skipped)


def _computing(counter: FlopCounterMode, blocks: dict[str, nn.Module]) -> set[str]:
    """The innermost modules of blocks that multiply matrices, but for those that make gates."""
    flops = {
        path.split(".", 1)[1]: sum(counts.values())
        for path, counts in counter.get_flop_counts().items()
        if "." in path
    }
    leaves = {
        path for path in flops if flops[path] and not any(other.startswith(f"{path}.") for other in flops)
    }
    inside = {path for path in leaves if path.startswith(tuple(f"{block}." for block in blocks))}
    return {path for path in inside if not re.search(r"\.(norm\w*|\w+_mod|adaLN_modulation)\.", path)}


@pytest.mark.few(9)
@every_model
def test_skipped_steps_call_blocks_but_compute_only_gates(name: str):
    """Calls of blocks are counted at every step, operations where counting them may tell a difference."""
    model, calls = build(name)
    blocks = named_blocks(model)
    called: Counter[str] = Counter()
    for path, block in blocks.items():
        block.register_forward_hook(lambda *_, path=path: called.update([path]))
    scheduler = CountingScheduler()
    with hicache.reference.apply(model, config(), scheduler=scheduler) as handle:
        scheduler.set_timesteps(STEPS)
        for step, call in enumerate(calls):
            called.clear()
            counter = FlopCounterMode(display=False)
            counted = step in (2, 3, 5, 6, 7)  # full and skipped ones, first and last of a kind among them
            with torch.no_grad(), counter if counted else contextlib.nullcontext():
                model(**copy.deepcopy(call))
            scheduler.step()
            assert called == Counter(list(blocks))
            if counted and step in FULL:
                computing = _computing(counter, blocks)
                assert all(any(path.startswith(f"{block}.") for path in computing) for block in blocks)
            elif counted:
                assert not _computing(counter, blocks)
    assert (handle.stats.full_steps, handle.stats.skipped_steps) == (len(FULL), STEPS - len(FULL))


# Contexts, runs, pipelines.


@pytest.mark.parametrize("name", ["flux_cfg", "qwen", "qwen_edit", "wan"])
def test_calls_of_one_step_do_not_mix(name: str):
    pipe, arguments = pipelines.build(name)
    plain = pipelines.draw(pipe, arguments, STEPS)
    oracle = Oracle(pipe.transformer, FEATURES[name.removesuffix("_cfg")], "hermite", contexts=2)
    expected = pipelines.draw(pipe, arguments, STEPS)
    oracle.remove()
    with hicache.reference.apply(pipe, config()) as handle:
        ours = pipelines.draw(pipe, arguments, STEPS)
        assert list(handle.stats.contexts) == ["transformer[0]", "transformer[1]"]
        assert {(c.full_steps, c.skipped_steps) for c in handle.stats.contexts.values()} == {(5, 7)}
    assert relative_max(ours, expected) < 1e-5 < 1e-4 < relative_max(ours, plain)


@pytest.mark.few(5)
@pytest.mark.parametrize("name", pipelines.CORE)
def test_every_pipeline(name: str):
    pipe, arguments = pipelines.build(name)
    plain = pipelines.draw(pipe, arguments)
    parts = denoisers(pipe).values()
    before, scheduler = [snapshot(part) for part in parts], set(vars(pipe.scheduler))
    with hicache.reference.apply(pipe, HiCacheConfig(interval=1)):
        assert torch.equal(pipelines.draw(pipe, arguments), plain)
    with hicache.reference.apply(pipe, EVERY_THIRD) as handle:
        first, stats = pipelines.draw(pipe, arguments), handle.stats
        second = pipelines.draw(pipe, arguments)
        assert stats.skipped_steps > 0
        assert handle.stats.contexts == stats.contexts
    assert torch.equal(first, second)
    assert torch.isfinite(first).all()
    assert not torch.equal(first, plain)
    assert [snapshot(part) for part in parts] == before
    assert set(vars(pipe.scheduler)) == scheduler
    assert torch.equal(pipelines.draw(pipe, arguments), plain)


def test_second_denoiser_warms_up_when_it_starts():
    pipe, arguments = pipelines.build("wan22")
    with hicache.reference.apply(pipe, EVERY_THIRD) as handle:
        pipelines.draw(pipe, arguments)
        contexts = handle.stats.contexts
    assert list(contexts) == [f"{n}[{i}]" for n in ("transformer", "transformer_2") for i in (0, 1)]
    assert {(c.full_steps, c.skipped_steps) for c in contexts.values()} == {(4, 2)}


def test_forecasts_are_closer_than_reuse():
    pipe, arguments = pipelines.build("flux")
    plain = pipelines.draw(pipe, arguments, 20)
    errors = {}
    for basis in ("reuse", "hermite"):
        with hicache.reference.apply(pipe, HiCacheConfig(interval=4, order=1, basis=basis)):
            errors[basis] = (pipelines.draw(pipe, arguments, 20) - plain).norm()
    assert 0 < errors["hermite"] < 0.8 * errors["reuse"]


def test_last_step_full():
    model, calls = build("flux")
    uncached = run(model, calls)
    ours = cached(model, calls, config(last_step_full=True))
    assert [step for step in range(STEPS) if torch.equal(ours[step], uncached[step])] == [*FULL, STEPS - 1]


def test_last_step_full_of_a_denoiser_that_starts_late():
    pipe, arguments = pipelines.build("wan22")
    with hicache.reference.apply(pipe, config(last_step_full=True)) as handle:
        pipelines.draw(pipe, arguments, STEPS)
        contexts = handle.stats.contexts
    assert (contexts["transformer[0]"].full_steps, contexts["transformer[0]"].skipped_steps) == (3, 3)
    assert (contexts["transformer_2[0]"].full_steps, contexts["transformer_2[0]"].skipped_steps) == (4, 2)


def test_bytes_and_history_dtype():
    """FLUX: per double two outputs of 32 tokens (both streams), per single one; three differences of each."""
    elements = (2 * 2 * 32 + 2 * 32) * models.WIDTH * 3
    for dtype, history, size in ((torch.bfloat16, None, 2), (torch.bfloat16, torch.float32, 4)):
        model, calls = bare("flux")
        scheduler = CountingScheduler()
        model.to(dtype)
        calls = [{k: v.to(dtype) if v is not False else v for k, v in call.items()} for call in calls]
        with hicache.reference.apply(model, config(history_dtype=history), scheduler=scheduler) as handle:
            assert run(model, calls, scheduler).isfinite().all()
            assert handle.stats.contexts["transformer[0]"].history_bytes == elements * size
            assert handle.stats.history_bytes == elements * size
            handle.release()
            assert handle.stats.history_bytes == 0
        assert (handle.stats.granularity, handle.stats.backend) == ("module", "reference")
        assert handle.stats.cache_ms > 0


def test_an_own_loop_is_counted_by_its_timesteps():
    model, calls = build("flux")
    expected = cached(model, calls, config())
    with hicache.reference.apply(model, config()) as handle:
        assert torch.equal(run(model, calls), expected)
        handle.restart()
        assert torch.equal(run(model, calls), expected)


GOLDEN = json.loads((Path(__file__).parent / "golden" / "forecast_cases.json").read_text())["cases"]


@pytest.mark.parametrize("index", range(len(GOLDEN)))
def test_history_on_golden_values(index: int):
    case = GOLDEN[index]
    names = ("interval", "warmup", "order", "sigma", "basis")
    history = History(HiCacheConfig(**{name: case[name] for name in names}))
    for step, value in enumerate(case["series"]):
        if case["full"][step]:
            history.record(step, torch.tensor(value, dtype=torch.float64))
            ours, golden = history.differences, case["differences"][step]
        else:
            ours, golden = [history.forecast(step)], [case["forecast"][step]]
        assert [x.item() for x in ours] == pytest.approx(golden, rel=1e-12, abs=1e-12)


def test_a_basis_is_given_the_gaps_newest_first():
    seen = []

    @register_basis("noting")
    def noting(gaps: Any, distance: float, terms: int, sigma: float) -> list[float]:
        seen.append((list(gaps), distance, terms, sigma))
        return [1.0] + [0.0] * (terms - 1)

    try:
        history = History(HiCacheConfig(order=2, warmup=2, sigma=SIGMA, basis="noting"))
        for step in (0, 1, 4, 11):
            history.record(step, torch.ones(1))
            history.forecast(step + 3)
    finally:
        unregister_basis("noting")
    assert seen == [([], 3, 1, SIGMA), ([1], 3, 2, SIGMA), ([3, 1], 3, 3, SIGMA), ([7, 3], 3, 3, SIGMA)]


def test_features_of_another_shape_start_anew():
    history = History(config())
    for step in (2, 3):
        history.record(step, torch.ones(2))
    assert len(history.differences) == 2
    history.record(4, torch.ones(3))
    assert len(history.differences) == 1
    assert torch.equal(history.forecast(6), torch.ones(3))


# Nothing left behind.


def failing(error: type[BaseException], at: int) -> Callable[..., None]:
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == at:
            raise error

    return fail


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [2, 5, 7], ids=["warm-up", "skipped", "full"])
@pytest.mark.parametrize("counted", [True, False], ids=["scheduler", "timestep"])
def test_an_aborted_run_leaves_nothing(error: type[BaseException], at: int, counted: bool):
    model, calls = build("flux")
    expected, other = cached(model, calls, config()), [{**c, "guidance": c["guidance"] * 2} for c in calls]
    scheduler = CountingScheduler()
    before = snapshot(model)
    with hicache.reference.apply(model, config(), scheduler=scheduler if counted else None) as handle:
        between_calls = snapshot(model.transformer_blocks)
        hook = model.single_transformer_blocks[1].register_forward_pre_hook(failing(error, at))
        with pytest.raises(error):
            run(model, other, scheduler)
        hook.remove()
        if error is MemoryError:  # after an interrupt, the next call or remove() tidies up
            assert snapshot(model.transformer_blocks) == between_calls
        assert torch.equal(run(model, calls, scheduler), expected)
        assert (handle.stats.full_steps, handle.stats.skipped_steps) == (5, 7)
    assert snapshot(model) == before


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("counted", [True, False], ids=["scheduler", "timestep"])
def test_a_loop_that_goes_on_after_an_error_warms_up_again(error: type[BaseException], counted: bool):
    model, calls = build("flux")
    rest = calls[5:] if counted else calls[4:]  # a scheduler counts calls of one step, timesteps forget them
    settings = HiCacheConfig(interval=4, warmup=2)
    expected = cached(model, rest, settings)
    scheduler = CountingScheduler()
    with hicache.reference.apply(model, settings, scheduler=scheduler if counted else None):
        hook = model.single_transformer_blocks[1].register_forward_pre_hook(failing(error, 5))
        with pytest.raises(error):
            run(model, calls, scheduler)
        hook.remove()
        outputs = []
        for call in rest:
            scheduler.step()
            with torch.no_grad():
                outputs.append(flat(model(**call)))
        assert torch.equal(torch.stack(outputs), expected)


def test_removed_after_an_interrupt_restores_all():
    model, calls = build("flux")
    before = snapshot(model)
    handle = hicache.reference.apply(model, config())
    hook = model.single_transformer_blocks[1].register_forward_pre_hook(failing(KeyboardInterrupt, 5))
    with pytest.raises(KeyboardInterrupt):
        run(model, calls)
    hook.remove()
    handle.remove()
    assert snapshot(model) == before


def test_between_calls_only_the_model_is_hooked():
    model, calls = build("flux")
    before = snapshot(model)
    scheduler = CountingScheduler()
    with hicache.reference.apply(model, config(), scheduler=scheduler):
        run(model, calls, scheduler)
        during = snapshot(model)
    del before[""], during[""]
    assert during == before


def test_a_forward_put_in_place_before_is_called_and_kept():
    model, calls = build("flux")
    expected = cached(model, calls, config())
    attention, count = model.transformer_blocks[0].attn, Counter()
    original = attention.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        count.update(["calls"])
        return original(*args, **kwargs)

    attention.forward = forward
    assert torch.equal(cached(model, calls, config()), expected)
    assert count["calls"] == len(FULL)
    assert attention.forward is forward


def test_submodules_put_in_place_after_apply_are_cached():
    """As adapters do it: the model's own module inside another."""

    class Adapted(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + 0.1 * x.mean(-1, keepdim=True)

    model, calls = build("flux")
    block = model.single_transformer_blocks[0]
    scheduler = CountingScheduler()
    with hicache.reference.apply(model, config(), scheduler=scheduler):
        unadapted = run(model, calls, scheduler)
        block.proj_out = Adapted(block.proj_out)
        ours = run(model, calls, scheduler)
    expected = cached(model, calls, config())
    assert torch.equal(ours, expected)
    assert not torch.equal(ours, unadapted)


def test_blocks_are_free_to_work_in_place():
    model, calls = build("flux")

    def spoil(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.mul_(0.5)

    hooks = [block.ff.register_forward_hook(spoil) for block in model.transformer_blocks]
    full, skipped = cached(model, [calls[4]] * 2, REUSE_NEXT)
    assert torch.equal(full, skipped)
    for hook in hooks:
        hook.remove()


def test_group_offloading_comes_and_goes():
    pipe, arguments = pipelines.build("flux")
    with hicache.reference.apply(pipe, EVERY_THIRD):
        expected = pipelines.draw(pipe, arguments)
        pipelines.offload_groups(pipe)
        assert torch.equal(pipelines.draw(pipe, arguments), expected)


def test_applying_again_replaces():
    pipe, arguments = pipelines.build("wan22")
    pipelines.draw(pipe, arguments, 2)  # diffusers itself leaves attributes behind
    before = [snapshot(pipe.transformer), snapshot(pipe.transformer_2)]
    old = hicache.reference.apply(pipe, HiCacheConfig(interval=1))
    new = hicache.reference.apply(pipe, EVERY_THIRD)
    assert not old.active
    old.remove()
    pipelines.draw(pipe, arguments)
    assert new.stats.skipped_steps > 0
    new.remove()
    assert [snapshot(pipe.transformer), snapshot(pipe.transformer_2)] == before
    with pytest.raises(RuntimeError, match="was removed"), new:
        pass


def test_training_is_left_alone():
    model, calls = build("flux")
    with hicache.reference.apply(model, config()) as handle:
        model.train()
        with pytest.warns(RuntimeWarning, match="called for its gradients: it runs uncached"):
            flat(model(**calls[0])).sum().backward()
        assert not handle.stats.contexts
        assert all(parameter.grad is not None for parameter in model.x_embedder.parameters())


# Errors.


@pytest.mark.parametrize("order", [("fast", "reference"), ("reference", "fast")], ids=" then ".join)
def test_not_together_with_the_fast_path(order: tuple[str, str]):
    pipe, arguments = pipelines.build("flux")
    plain = pipelines.draw(pipe, arguments)
    first, second = ({"fast": hicache.fast, "reference": hicache.reference}[name] for name in order)
    with first.apply(pipe, EVERY_THIRD):
        with pytest.raises((ValueError, RuntimeError), match=r"hicache\.fast.*hicache\.reference"):
            with second.apply(pipe, EVERY_THIRD):
                pipelines.draw(pipe, arguments)
        assert not torch.equal(pipelines.draw(pipe, arguments), plain)  # the first goes on
    assert torch.equal(pipelines.draw(pipe, arguments), plain)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: models.build("mochi")[0],
            r"unknown model MochiTransformer3DModel.*MochiTransformerBlock.*Flux",
        ),
        (lambda: nn.Linear(2, 2), "unknown model Linear, with blocks none; known models: .*Wan"),
        (
            lambda: with_block(nn.Identity()),
            "unknown block Identity in FluxTransformer2DModel.transformer_bl",
        ),
        (lambda: with_block(without("ff")), "expected FluxTransformerBlock .* to have a submodule 'ff', got"),
        (
            lambda: torch.compile(models.flux_transformer()),
            "FluxTransformer2DModel to run eagerly, got it comp",
        ),
        (lambda: compiled_in_place(), "FluxTransformer2DModel to run eagerly, got it compiled"),
    ],
    ids=["mochi", "no transformer", "other block", "other submodules", "compiled", "compiled in place"],
)
def test_what_is_not_known_is_refused(make: Callable[[], nn.Module], message: str):
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        hicache.reference.apply(model)
    assert snapshot(model) == before


def with_block(block: nn.Module) -> nn.Module:
    model = models.flux_transformer()
    model.transformer_blocks.append(block)
    return model


def without(name: str) -> nn.Module:
    block = models.flux_transformer().transformer_blocks[0]
    delattr(block, name)
    return block


def compiled_in_place() -> nn.Module:
    model = models.flux_transformer()
    model.transformer_blocks[0].compile()
    return model


def test_a_subclass_is_known_by_its_base():
    class Mine(type(models.flux_transformer())):
        pass

    model, calls = build("flux")
    expected = cached(model, calls, config())
    model.__class__ = Mine
    assert torch.equal(cached(model, calls, config()), expected)


def test_a_submodule_called_more_often_than_recorded_is_an_error():
    model, calls = build("flux")
    block = model.transformer_blocks[0]
    with hicache.reference.apply(model, config()):
        run(model, calls[:4])
        block.register_forward_pre_hook(
            lambda *_: (block.ff(models.noise(1, models.TOKENS, models.WIDTH)), None)[1]
        )
        with pytest.raises(RuntimeError, match=r"transformer_blocks\.0\.ff was called 2 times in a skipped"):
            run(model, calls[4:5])


def test_arguments_are_checked_before_anything_is_changed():
    pipe, _ = pipelines.build("flux")
    before = snapshot(pipe.transformer)
    with pytest.raises(TypeError, match="expected config to be a HiCacheConfig"):
        hicache.reference.apply(pipe, {"interval": 3})
    with pytest.raises(TypeError, match="expected a scheduler with set_timesteps"):
        hicache.reference.apply(pipe, scheduler=object())
    assert snapshot(pipe.transformer) == before


def test_a_cached_pipeline_is_not_copied():
    pipe, _ = pipelines.build("flux")
    with hicache.reference.apply(pipe), pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.deepcopy(pipe.transformer)
