"""Every class of transformers that diffusers has: cached by module, by stack, or refused by apply().

No class finds out in its first run. One that these tables do not have, of a diffusers to come, fails by name.
"""

from __future__ import annotations

import importlib
import re
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import hicache.fast
from hicache import HiCacheConfig
from hicache.adapters import registry
from hicache.hooks.transformer import HookedTransformer
from tests.support import models, more_models, refused_models
from tests.support.comparisons import flat, snapshot
from tests.support.models import Arguments
from tests.support.pipelines import randomize
from tests.support.refused_models import REFUSED
from tests.support.runs import count_calls
from tests.support.schedulers import CountingScheduler

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
TIMES = torch.linspace(1, 0.1, 6)
CONFIG = HiCacheConfig(interval=2, order=1, warmup=2)
FULL_STEPS = [0, 1, 3, 5]  # of CONFIG in as many steps as TIMES

BY_MODULE = registry.known()
BY_STACK = sorted({model.kind for model in models.MODELS.values()} - {*BY_MODULE} | {*more_models.MODELS})

# models whose class is cached but that are built otherwise
REFUSED_CONFIGURATIONS = {
    "ConsisIDTransformer3DModel": (
        {"cross_attn_interval": 1},
        "adds a face to the hidden state after the last",
    ),
}
# and cached, built otherwise
CONFIGURATIONS: dict[str, tuple[str, Arguments]] = {
    "MotifVideoTransformer3DModel, with decoder layers": (
        "MotifVideoTransformer3DModel",
        {"num_decoder_layers": 2, "num_single_layers": 3},
    ),
    "LongCatAudioDiTTransformer, without the long skip": ("LongCatAudioDiTTransformer", {"long_skip": False}),
}
# parts of UNets, which the time reaches by other ways, and a pass over a reference picture
TIMELESS = (
    "DreamLiteTransformer2DModel",
    "Transformer2DModel",
    "TransformerTemporalModel",
    "WanAnimate2Transformer3DModel",
)
# flex attention on a CPU takes a while
SLOW = ("Kandinsky6SRTransformer3DModel",)


def _given(names: Any) -> Any:
    """Of a diffusers that has them."""
    return pytest.mark.parametrize(
        "name",
        [
            pytest.param(
                name,
                marks=[
                    pytest.mark.skipif(
                        not hasattr(diffusers, name.partition(",")[0]), reason=f"this diffusers has no {name}"
                    ),
                    *([pytest.mark.slow] if name in SLOW else []),
                ],
            )
            for name in names
        ],
    )


def classes() -> set[str]:
    """Transformers by their names, and what pipelines call their transformers."""
    sources = Path(diffusers.__file__).parent.glob("pipelines/**/*.py")
    annotated = re.compile(r"\btransformer(?:_\w+)?: \"?([A-Z]\w+)")
    named = {name for name in dir(diffusers) if re.search("Transformer|DiT", name)}
    found = named.union(*(annotated.findall(source.read_text()) for source in sources))
    kinds = {name: getattr(diffusers, name, None) for name in found - {"ModelMixin"}}
    return {
        name
        for name, kind in kinds.items()
        if isinstance(kind, type)
        and issubclass(kind, diffusers.ModelMixin)
        and not re.search("ControlNet|Vae$", name)
    }


def test_every_class_is_in_one_table():
    assert not {*BY_MODULE} & {*BY_STACK, *REFUSED}
    assert not {*BY_STACK} & {*REFUSED}
    assert classes() - {*BY_MODULE, *BY_STACK, *REFUSED} == set()


def test_the_page_lists_every_class():
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|$", PAGE.read_text(), re.MULTILINE)
    expected = {**dict.fromkeys(BY_MODULE, "module"), **dict.fromkeys(BY_STACK, "stack")}
    assert [row for row in rows if row[0] not in REFUSED] == sorted(expected.items())
    why = {name: message for name, message in rows if name in REFUSED}
    assert list(why) == sorted(REFUSED)
    for name, reason in why.items():
        assert reason.startswith(
            REFUSED[name][1].removeprefix("cannot be cached: ").removesuffix(f" in {name}")
        )


def run(model: Any, call: Any) -> Tensor:
    with torch.no_grad():
        return torch.stack([flat(model(**call(float(t)))) for t in TIMES])


def hooked(model: Any) -> dict[str, Any]:
    """A snapshot without what models write on themselves: some keep frequencies from call to call."""
    state = snapshot(model)
    del state[".state_dict"]
    return {
        path: (kind, names, {key: entry for key, entry in dicts.items() if "hooks" in key}, forward)
        for path, (kind, names, members, dicts, forward) in state.items()
    }


@pytest.mark.few(16)
@_given([*more_models.MODELS, *CONFIGURATIONS])
def test_cached_by_stack(name: str):
    """Exact when full, no block when skipped, and a step that is repeated is that step."""
    model, call = more_models.build(*CONFIGURATIONS.get(name, (name,)))
    randomize(model)
    uncached = run(model, call)
    assert uncached.isfinite().all()
    assert name in TIMELESS or not torch.equal(uncached[0], uncached[1])
    before = hooked(model)
    with hicache.fast.apply(model, HiCacheConfig(interval=1)) as handle:
        assert torch.equal(run(model, call), uncached)
        assert handle.stats.granularity == "stack"
    assert hooked(model) == before

    blocks = [block for blocks in HookedTransformer(model).lists for block in blocks]
    calls: Counter[int] = Counter()
    count_calls(blocks, calls)
    with hicache.fast.apply(model, CONFIG) as handle, torch.no_grad():
        for step, t in enumerate(TIMES):
            calls.clear()
            output = flat(model(**call(float(t))))
            full = step in FULL_STEPS
            assert calls == Counter(range(len(blocks)) if full else ()), step
            assert torch.equal(output, uncached[step]) == full, step
        assert (handle.stats.full_steps, handle.stats.skipped_steps) == (4, 2)

    scheduler = CountingScheduler()
    reuse = HiCacheConfig(interval=2, order=0, warmup=1, basis="reuse")
    with hicache.fast.apply(model, reuse, scheduler=scheduler) as handle, torch.no_grad():
        scheduler.set_timesteps(2)
        full = flat(model(**call(0.7)))
        scheduler.step()
        skipped = flat(model(**call(0.7)))
        assert (handle.stats.full_steps, handle.stats.skipped_steps) == (1, 1)
    assert (skipped - full).abs().max() <= 4e-7 * full.abs().max()


@_given(REFUSED)
def test_refused_before_anything_is_changed(name: str):
    refuse(refused_models.build(name), REFUSED[name][1])


@_given(REFUSED_CONFIGURATIONS)
def test_refused_as_it_is_built(name: str):
    changes, message = REFUSED_CONFIGURATIONS[name]
    refuse(more_models.MODELS[name].built(**changes), f"cannot be cached: it {message}")


def refuse(model: Any, message: str) -> None:
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as raised:
        hicache.fast.apply(model)
    assert type(model).__name__ in str(raised.value)
    assert snapshot(model) == before


def test_whatever_index_of_a_side_list_is_asked_for_adds_nothing():
    """Subclasses are known with their class; nothing but a running skipped step has stand-ins."""

    class Mine(diffusers.WanAnimateTransformer3DModel):
        pass

    model, call = more_models.build("WanAnimateTransformer3DModel")
    own = model.face_adapter[0]
    model.__class__ = Mine
    with hicache.fast.apply(model, CONFIG) as handle:
        run(model, call)
        assert handle.stats.skipped_steps == 2
        assert model.face_adapter[0] is own
        assert list(model.face_adapter) == [own, model.face_adapter[1]]
    assert type(model.face_adapter) is torch.nn.ModuleList


@pytest.mark.skipif(not hasattr(diffusers, "QwenImage21Transformer2DModel"), reason="of an older diffusers")
def test_keys_and_values_that_are_kept_are_of_another_form():
    """The call that writes them has all tokens, those that read them the picture's."""

    module = importlib.import_module("diffusers.models.transformers.transformer_qwenimage21")
    model, call = more_models.build("QwenImage21Transformer2DModel")
    kept = module.QwenImage21KVCache(len(model.transformer_blocks))
    scheduler = CountingScheduler()
    with hicache.fast.apply(model, CONFIG, scheduler=scheduler) as handle, torch.no_grad():
        scheduler.set_timesteps(len(TIMES))
        for step, t in enumerate(TIMES):
            mode = "cached" if step else "extract"
            assert flat(model(**call(float(t)), kv_cache=kept, kv_cache_mode=mode)).isfinite().all()
            scheduler.step()
        assert (handle.stats.full_steps, handle.stats.skipped_steps) == (3, 2)  # of those that read
