"""Every transformer of the zoo, without a pipeline: exact when full, exact when skipped, whole after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from zoo import UNSKIPPABLE, ZOO, Built

import hicache.fast
from hicache import HiCacheConfig
from hicache.hooks.block_lists import BLOCK_LISTS

pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),  # Mochi's rope
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # Chroma's
]

TIMES = torch.linspace(1, 0.1, 12)
CONFIG = HiCacheConfig(interval=3, order=2, warmup=3)
FULL_STEPS = [0, 1, 2, 5, 8, 11]  # of CONFIG in as many steps as TIMES

zoo = pytest.mark.parametrize("build", ZOO.values(), ids=ZOO)


class Steps:
    """A scheduler that only counts."""

    def set_timesteps(self, steps: int) -> None:
        self.timesteps = range(steps)

    def step(self) -> None:
        pass


def flat(output: Any) -> Tensor:
    """All numbers of a model's output, in one row."""
    return output.flatten() if isinstance(output, Tensor) else torch.cat([flat(part) for part in output])


def draw(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return flat(model(**arguments))


def run(model: nn.Module, call: Callable[[Any], dict[str, Any]]) -> Tensor:
    """Every step's output, [steps, numbers]."""
    return torch.stack([draw(model, call(t)) for t in TIMES])


def double(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, dict):
        return {key: double(part) for key, part in value.items()}
    return [double(part) for part in value] if isinstance(value, list) else value


def state(model: nn.Module) -> dict[str, Any]:
    """What a cache could leave behind: classes, attributes and hooks of submodules, names of parameters."""
    modules = {
        name: (
            type(module),
            tuple(module.__dict__),
            {key: tuple(value) for key, value in vars(module).items() if "_hooks" in key and value},
        )
        for name, module in model.named_modules()
    }
    return {**modules, "state_dict": list(model.state_dict())}


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    found = {name: getattr(model, name, None) for name in BLOCK_LISTS}
    return {name: blocks for name, blocks in found.items() if isinstance(blocks, nn.ModuleList)}


def count(blocks: Iterable[nn.Module], calls: Counter[int]) -> None:
    """From now on, count the calls of every block under its index."""
    for index, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, index=index: calls.update([index]))


@zoo
def test_nothing_skipped_is_nothing_changed(build: Callable[[], Built]):
    model, call = build()
    uncached = run(model, call)
    before = state(model)

    handle = hicache.fast.apply(model, HiCacheConfig(interval=1))
    cached = run(model, call)
    handle.remove()

    assert uncached.isfinite().all()
    assert not torch.equal(uncached[0], uncached[1])  # else the time does not reach the model
    assert torch.equal(cached, uncached)
    assert handle.stats.full_steps == len(TIMES)
    assert handle.stats.skipped_steps == 0
    assert state(model) == before
    assert torch.equal(run(model, call), uncached)


@zoo
def test_skipping_runs_no_block_and_leaves_no_trace(build: Callable[[], Built]):
    model, call = build()
    lists = block_lists(model)
    assert lists
    assert all(len(blocks) >= 2 for blocks in lists.values())
    uncached = run(model, call)
    calls: Counter[int] = Counter()
    blocks = [block for block_list in lists.values() for block in block_list]
    count(blocks, calls)
    before = state(model)

    with hicache.fast.apply(model, CONFIG) as handle:
        for step, t in enumerate(TIMES):
            calls.clear()
            output = draw(model, call(t))
            full = step in FULL_STEPS
            assert calls == Counter(range(len(blocks)) if full else ()), step
            assert output.isfinite().all()
            assert torch.equal(output, uncached[step]) == full, step
        assert (handle.stats.full_steps, handle.stats.skipped_steps) == (6, 6)
        assert list(handle.stats.contexts) == ["transformer[0]"]

    assert state(model) == before
    assert torch.equal(run(model, call), uncached)


@zoo
@pytest.mark.parametrize(
    ("prepare", "tolerance"), [(lambda x: x, 1e-5), (double, 1e-10)], ids=["float32", "float64"]
)
def test_a_step_repeated_is_exact(
    build: Callable[[], Built], prepare: Callable[[Any], Any], tolerance: float
):
    """Reusing a step's residual for the same inputs is that step: whatever is mixed up or lost would show."""
    model, call = build()
    model.to(prepare(torch.zeros(())).dtype)
    arguments = prepare(call(0.7))
    calls: Counter[int] = Counter()
    count((block for blocks in block_lists(model).values() for block in blocks), calls)
    scheduler = Steps()

    config = HiCacheConfig(interval=2, order=0, warmup=1, basis="reuse")
    with hicache.fast.apply(model, config, scheduler=scheduler) as handle:
        scheduler.set_timesteps(2)
        full = draw(model, arguments)
        scheduler.step()
        calls.clear()
        skipped = draw(model, arguments)
        assert (handle.stats.full_steps, handle.stats.skipped_steps) == (1, 1)

    assert not calls
    assert (skipped - full).abs().max() <= tolerance * full.abs().max()
    assert vars(scheduler) == {"timesteps": range(2)}


@pytest.mark.parametrize("build", UNSKIPPABLE.values(), ids=UNSKIPPABLE)
def test_models_that_cannot_be_skipped_refuse(build: Callable[[], Built]):
    model, call = build()
    uncached = run(model, call)
    before = state(model)

    handle = hicache.fast.apply(model, CONFIG)
    outputs: list[Tensor] = []
    with pytest.raises(RuntimeError, match=type(model).__name__):
        outputs.extend(draw(model, call(t)) for t in TIMES)
    handle.remove()

    assert len(outputs) <= CONFIG.warmup  # not one skipped step came through
    assert all(torch.equal(output, expected) for output, expected in zip(outputs, uncached, strict=False))
    assert state(model) == before
    assert torch.equal(run(model, call), uncached)


@pytest.mark.parametrize(
    "runs", [([0.0] * 12, [1.0] * 12), ([0.0] * 6 + [1.0] * 6,)], ids=["in the next run", "in the same run"]
)
def test_hints_that_begin_late_are_noticed(runs: tuple[list[float], ...]):
    """Skipped steps that happened to be exact do not vouch for later ones; refusing earlier is fine too."""
    model, call = UNSKIPPABLE["wan_vace"]()
    scheduler = Steps()
    with (
        hicache.fast.apply(model, CONFIG, scheduler=scheduler),
        pytest.raises(RuntimeError, match="WanVACETransformer3DModel"),
    ):
        for scales in runs:
            scheduler.set_timesteps(len(TIMES))
            for t, scale in zip(TIMES, scales, strict=True):
                draw(model, {**call(t), "control_hidden_states_scale": torch.full((2,), scale)})
                scheduler.step()


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(2, 2),
        diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(4, 8),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=2,
            cross_attention_dim=8,
            attention_head_dim=2,
        ),
    ],
    ids=["linear", "unet"],
)
def test_models_without_blocks_are_refused_at_once(model: nn.Module):
    before = state(model)
    with pytest.raises(ValueError, match=rf"nothing to hook in {type(model).__name__}"):
        hicache.fast.apply(model, CONFIG)
    assert state(model) == before
