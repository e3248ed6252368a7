"""The tensor operations of skipped steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import hicache.fast
from hicache import HiCacheConfig
from tests.support import pipelines
from tests.support.operations import Operations

# what waits for a device: its answer is needed on the host
SYNCS = ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select", "unique")


def operations(pipe: Any, arguments: dict[str, Any], granularity: str, **more: Any) -> list[Counter[str]]:
    """Of every call of the transformer in a run of twelve steps, seven of them skipped.

    Args:
        pipe: is cached for that run.
        arguments: it is called with.
        granularity: of the cache.
        more: other arguments of :func:`hicache.fast.apply`.
    """
    config = HiCacheConfig(interval=4)
    with (
        hicache.fast.apply(pipe, config, granularity=granularity, **more),
        counted(pipe.transformer) as calls,
    ):
        pipelines.draw(pipe, arguments, 12)
    return calls


@contextmanager
def counted(denoiser: Any) -> Iterator[list[Counter[str]]]:
    """The tensor operations of every call of a denoiser that is made in this block."""
    calls: list[Counter[str]] = []
    original = type(denoiser).__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with Operations() as mode:
            output = original(self, *args, **kwargs)
        calls.append(mode.seen)
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(denoiser), "__call__", call)
        yield calls


def skipped(calls: list[Counter[str]]) -> list[Counter[str]]:
    """Of the calls of skipped steps."""
    contexts = len(calls) // 12
    steps = [seen for index, seen in enumerate(calls) if index // contexts not in (0, 1, 2, 6, 10)]
    assert len(steps) == 7 * contexts
    return steps
