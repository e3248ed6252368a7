"""What a call holds at once is counted, on a device with numbers as on one without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hicache.adapters import registry
from hicache.compat import pytree
from hicache.cuda_graphs.arena import Arena
from hicache.cuda_graphs.live_bytes import LiveBytes, nbytes
from hicache.dry_run import Recorded, dry_run
from hicache.planned_memory import latent_shape
from tests.support import pipelines
from tests.support.cuda.runtime import cut_to_size
from tests.support.pipelines import FAMILIES


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_memory_counts_until_nothing_of_it_is_left(device: str):
    with LiveBytes(device) as memory:
        whole = torch.empty(1000, 1000, device=device)
        view = whole.view(-1)
        del whole
        assert memory.live == memory.peak == 4_000_256  # in blocks of 512 bytes
        other = view + 1
        del view
        other.add_(1)
        first, second = other.split(500_000)
        del other, first
        assert (memory.live, memory.peak) == (4_000_256, 8_000_512)
        del second
        assert memory.live == 0
        assert memory.reserved == memory.reserved_since_mark == 20 << 20
        memory.mark()
        torch.empty(3, device=device)
        assert (memory.reserved, memory.reserved_since_mark) == (22 << 20, 2 << 20)


SIZES = [
    # a segment of 20 MB serves tensors of more than 1 MB, until it is full
    ([3 << 20] * 6, 20 << 20),
    ([3 << 20] * 7, 40 << 20),
    ([9 << 20] * 2, 20 << 20),
    # one of 10 MB or more has its own
    ([10 << 20, 11 << 20, (13 << 20) + 1], (10 + 12 + 14) << 20),
    # small ones are in segments of their own
    ([1 << 20] * 3, 4 << 20),
    ([512] * 4096, 2 << 20),
]


@pytest.mark.parametrize(("sizes", "reserved"), SIZES)
def test_segments(sizes: list[int], reserved: int):
    arena = Arena()
    blocks = [arena.take(size) for size in sizes]
    assert arena.reserved == reserved
    for stride in (1, -1, 5):
        for block in (
            blocks[::stride] if stride < 2 else [b for i in range(stride) for b in blocks[i::stride]]
        ):
            arena.give_back(block)
        blocks = [arena.take(size) for size in sizes]
        assert arena.reserved == reserved  # all of it was joined again


def test_free_memory_in_pieces_is_no_place_for_a_large_tensor():
    arena = Arena()
    blocks = [arena.take(2 << 20) for _ in range(10)]
    for block in blocks[::2]:
        arena.give_back(block)
    arena.take(4 << 20)
    assert arena.reserved == 40 << 20
    arena.take(2 << 20)
    assert arena.reserved == 40 << 20


def test_other_devices_do_not_count():
    with LiveBytes("meta") as memory:
        torch.empty(8) + torch.empty(8)
    assert memory.peak == 0


def called(name: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A pipeline, its arguments, and those of its transformer's first call."""
    pipe, arguments = pipelines.build(name)
    seen: list[dict[str, Any]] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        seen.append({**dict(zip(("hidden_states",), args, strict=False)), **kwargs})

    remove = pipe.transformer.register_forward_pre_hook(look, with_kwargs=True).remove
    pipelines.draw(pipe, arguments, 1)
    remove()
    return pipe, arguments, seen[0]


def form(value: Any) -> Any:
    return pytree.tree_map(lambda leaf: (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf, value)


def latents(pipe: Any, arguments: dict[str, Any]) -> tuple[int, int, int]:
    pixels = pipe.transformer.config.get("sample_size", 0) * 8  # what DiT draws
    size = arguments.get("num_frames", 1), arguments.get("height", pixels), arguments.get("width", pixels)
    return latent_shape(pipe, registry.find(pipe.transformer).compression, size)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_example_is_what_the_pipeline_gives(name: str):
    """Of shapes and dtypes, and with nothing left out that has numbers."""
    pipe, arguments, given = called(name)
    text = given["encoder_hidden_states"].shape[1] if "encoder_hidden_states" in given else 1
    like, batch = torch.empty((), device="meta"), len(given["hidden_states"])
    example = registry.find(pipe.transformer).example(latents(pipe, arguments), batch, text, like)
    assert {name: form(value) for name, value in example.items()} == {
        name: form(given.get(name)) for name in example
    }
    assert not [name for name in given if name not in example and isinstance(given[name], Tensor)]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_without_numbers_takes_what_one_with_numbers_does(name: str, monkeypatch: pytest.MonkeyPatch):
    """But for kernels that are one operation on one device, and several on the other."""
    cut_to_size(monkeypatch)
    pipe, arguments, given = called(name)
    adapter = registry.find(pipe.transformer)
    size = latents(pipe, arguments)
    hidden = (len(given["hidden_states"]), adapter.tokens(size), adapter.channels)
    text = given["encoder_hidden_states"].shape[1] if "encoder_hidden_states" in given else 1
    recorded = Recorded("stack", adapter.num_features({}), hidden, 3)
    told = dry_run(pipe.transformer, size, text, torch.float32, recorded)
    with torch.no_grad(), LiveBytes("cpu") as memory:
        output = pipe.transformer(**{**given, "return_dict": False})
    assert told.full.held == nbytes(output[0])
    assert 0.8 * memory.reserved <= told.full.peak <= 1.25 * memory.reserved
    assert told.skipped.peak <= told.full.peak
    assert bool(told.unsafe) == (name == "chroma")


@pytest.mark.parametrize("granularity", ["module", "low-rank", "stack"])
def test_blocks_alike_stand_for_each_other(granularity: str, monkeypatch: pytest.MonkeyPatch):
    """A deep model takes what a shallow one does, but for what its blocks give when captured alone."""
    cut_to_size(monkeypatch)
    told = []
    for depth in (2, 5):
        pipe, _ = pipelines.build("flux", doubles=depth, singles=depth)
        recorded = Recorded(granularity, 3 * depth, (1, 16, 32), 3, 1)
        told.append(dry_run(pipe.transformer, (1, 8, 8), 6, torch.float32, recorded))
    shallow, deep = told
    assert shallow.full.peak == deep.full.peak
    assert deep.blocks.held == 5 * (shallow.blocks.held // 2)


def test_what_features_are_added_up_in_is_counted():
    pipe, _ = pipelines.build("wan")
    told = {}
    for granularity in ("module", "stack"):
        hidden = (1, 12, registry.find(pipe.transformer).channels)
        recorded = Recorded(granularity, 3, hidden, 3)
        told[granularity] = dry_run(pipe.transformer, (3, 4, 4), 6, torch.float32, recorded)
    assert told["module"].sums >= 512
    assert told["stack"].sums == 0
    assert told["module"].full.held == told["stack"].full.held + told["module"].sums
