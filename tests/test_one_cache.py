"""A transformer is cached in one way at a time: diffusers' own caches and this one refuse each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import apply_first_block_cache

import hicache.fast
import hicache.reference
from tests.support import pipelines
from tests.support.comparisons import snapshot

PAB = PyramidAttentionBroadcastConfig(
    spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
)
CACHES = pytest.mark.parametrize("cache", [FirstBlockCacheConfig(threshold=0.1), PAB], ids=["fbc", "pab"])
BOTH = pytest.mark.parametrize("ours", [hicache.fast, hicache.reference], ids=["fast", "reference"])


@BOTH
@CACHES
def test_diffusers_first(ours: Any, cache: Any):
    pipe, arguments = pipelines.build("flux")
    pipe.transformer.enable_cache(cache)
    before = snapshot(pipe.transformer)
    with pytest.raises(ValueError, match=rf"{type(cache).__name__}.*disable_cache\(\) first"):
        ours.apply(pipe)
    assert snapshot(pipe.transformer) == before
    pipe.transformer.disable_cache()
    with ours.apply(pipe):
        pipelines.draw(pipe, arguments)


@BOTH
@CACHES
def test_diffusers_second(ours: Any, cache: Any):
    pipe, arguments = pipelines.build("flux")
    plain = pipelines.draw(pipe, arguments)
    with ours.apply(pipe) as handle:
        with pytest.raises(ValueError, match=rf"{ours.__name__} caches this FluxTransformer.*remove\(\)"):
            pipe.transformer.enable_cache(cache)
        assert not pipe.transformer.is_cache_enabled
        pipelines.draw(pipe, arguments)
        assert handle.stats.skipped_steps > 0
        with pytest.raises(ValueError, match="caches this FluxTransformer"):
            torch.compile(pipe.transformer).enable_cache(cache)
    assert torch.equal(pipelines.draw(pipe, arguments), plain)
    pipe.transformer.enable_cache(cache)
    assert pipe.transformer.is_cache_enabled


def test_put_in_place_by_its_function():
    """Nothing is told of that: the next run notices."""
    pipe, arguments = pipelines.build("flux")
    with hicache.fast.apply(pipe):
        pipelines.draw(pipe, arguments)
        apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.1))
        for _ in range(2):
            with pytest.raises(ValueError, match="diffusers caches this FluxTransformer2DModel already"):
                pipelines.draw(pipe, arguments)


def test_removing_an_earlier_cache_leaves_the_refusal_of_a_later_one():
    """The later one took over one of the earlier one's two denoisers."""
    pipe, _ = pipelines.build("wan22")
    earlier = hicache.fast.apply(pipe)
    with hicache.fast.apply(pipe.transformer_2):
        earlier.remove()
        with pytest.raises(ValueError, match="enable_cache"):
            pipe.transformer_2.enable_cache(FirstBlockCacheConfig(threshold=0.1))
