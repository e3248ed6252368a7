"""What a skipped step costs: tensor operations, launches and host syncs, counted."""

from __future__ import annotations

from collections import Counter

import pytest

from hicache.runtime import finite
from tests.support import pipelines
from tests.support.skipped_steps import SYNCS, operations, skipped


@pytest.mark.few(1)
@pytest.mark.parametrize("granularity", ["module", "low-rank", "stack"])
def test_flux_at_its_true_depth(granularity):
    """At most 28 operations whatever the depth, one of them the cache's kernel, and no host sync."""
    deep = skipped(operations(*pipelines.build("flux", doubles=19, singles=38), granularity))
    shallow = skipped(operations(*pipelines.build("flux", doubles=1, singles=1), granularity))
    for seen, other in zip(deep, shallow, strict=True):
        assert seen == other
        assert seen.total() <= 28
        kernels = {name: count for name, count in seen.items() if name.startswith("hicache.")}
        assert sum(kernels.values()) == 1, kernels
        assert not [name for name in seen if name.split(".")[1] in SYNCS]


@pytest.mark.parametrize("name", ["flux", "qwen", "sd3", "hunyuan", "dit", "cogvideox"])
def test_gates_of_low_rank_take_no_more_than_modules(name):
    """At a skipped step, and of what reads the device at none."""
    module = skipped(operations(*pipelines.build(name), "module"))
    low_rank = skipped(operations(*pipelines.build(name), "low-rank"))
    for ours, theirs in zip(low_rank, module, strict=True):
        assert ours.total() <= theirs.total()
        assert not [operation for operation in ours if operation.split(".")[1] in SYNCS]


@pytest.mark.parametrize("granularity", ["module", "stack"])
def test_given_pictures_cost_a_cut_and_a_join(granularity):
    """Of the hidden state, beside what a step without them does."""
    plain = skipped(operations(*pipelines.build("flux"), granularity))
    for seen, other in zip(
        skipped(operations(*pipelines.build("flux_kontext"), granularity)), plain, strict=True
    ):
        assert seen - other == Counter({"aten.slice.Tensor": 2, "aten.cat.default": 1})
        assert not other - seen


@pytest.mark.parametrize(
    "name",
    [
        *("qwen", "sd3", "hunyuan", "dit", "wan", "ltx", "pixart"),
        *("flux2_edit", "hunyuan_picture", "wan_ti2v_picture", "ltx_pictures"),
    ],
)
def test_no_sync_and_one_kernel_a_call(name, monkeypatch):
    # what is asked of tokens' positions and timesteps is not waited for, where the device is not the host
    monkeypatch.setattr(finite, "reading", lambda flag: lambda: None)
    pipe, arguments = pipelines.build(name)
    calls = operations(pipe, arguments, "module")
    contexts = len(calls) // 12
    for index, seen in enumerate(calls):
        if index // contexts not in (0, 1, 2, 6, 10):
            assert sum(n for op, n in seen.items() if op.startswith("hicache.")) == 1
            own = [op for op in seen if op.split(".")[1] in SYNCS]
            assert not own, own
