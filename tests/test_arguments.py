"""Arguments that are nearly right: taken where they mean something, else refused with what was expected."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import hicache
import hicache.fast
from hicache import HiCacheConfig
from tests.support import pipelines


def test_the_class_of_a_scheduler_is_refused_and_the_old_handle_stays():
    pipe, arguments = pipelines.build("flux")
    with hicache.fast.apply(pipe, HiCacheConfig(interval=3)) as handle:
        with pytest.raises(TypeError, match="expected a scheduler, got the class FlowMatchEuler"):
            hicache.fast.apply(pipe, scheduler=diffusers.FlowMatchEulerDiscreteScheduler)
        pipelines.draw(pipe, arguments)
        assert handle.stats.skipped_steps > 0


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_cached_pipeline_or_transformer_is_not_copied(make: Callable[[Any], Any]):
    pipe, _ = pipelines.build("flux")
    with hicache.fast.apply(pipe):
        with pytest.raises(TypeError, match=r"cannot be copied or pickled; call remove\(\) first"):
            make(pipe.transformer)
        if make is not copy.copy:
            with pytest.raises(TypeError, match=r"cannot be copied or pickled; call remove\(\) first"):
                make(pipe)
    assert make(pipe) is not None
    assert make(pipe.transformer) is not None


def test_a_kept_transformer_does_not_keep_its_pipeline():
    pipe, _ = pipelines.build("flux")
    transformer, held = pipe.transformer, weakref.ref(pipe)
    handle = hicache.fast.apply(pipe)
    del pipe
    gc.collect()
    assert held() is None
    assert handle.active
    handle.remove()
    assert type(transformer) is diffusers.FluxTransformer2DModel


@pytest.mark.parametrize("dtype", ["bf16", torch.int8, np.float32])
def test_a_plan_of_something_that_is_no_dtype(dtype: Any):
    pipe, _ = pipelines.build("flux")
    with pytest.raises(TypeError, match="expected dtype to be a floating dtype"):
        hicache.fast.plan(pipe, height=64, width=64, dtype=dtype)


def test_numbers_of_numpy_are_numbers():
    config = HiCacheConfig(interval=np.int64(5), order=np.int32(1), warmup=np.uint8(2), sigma=np.float32(0.5))
    assert config == HiCacheConfig(interval=5, order=1, warmup=2, sigma=0.5)
    assert repr(config) == repr(HiCacheConfig(interval=5, order=1, warmup=2, sigma=0.5))
    with pytest.raises(TypeError, match="interval: expected an int >= 1, got"):
        HiCacheConfig(interval=np.float64(5))
    with pytest.raises(TypeError, match="interval: expected an int >= 1, got"):
        HiCacheConfig(interval=np.bool_(True))
    pipe, _ = pipelines.build("flux")
    plan = hicache.fast.plan(pipe, height=np.int64(64), width=np.int32(64), batch=np.int64(1))
    assert plan.history_bytes == hicache.fast.plan(pipe, height=64, width=64).history_bytes
    hicache.fast.apply(pipe, speedup=np.float32(3), memory_budget=np.int64(10**9)).remove()


def test_a_basis_without_a_name():
    with pytest.raises(TypeError, match=r'expected a name, @register_basis\("mine"\), got <function'):

        @hicache.register_basis
        def nameless(gaps: Any, distance: float, num_coeffs: int, sigma: float) -> list[float]:
            return [1.0] * num_coeffs
