"""CUDA graphs on a GPU: replay equals eager, bit for bit, for every tiny pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import hicache.fast
from hicache.cuda_graphs.capture import CudaBackend
from tests.support import gpu, pipelines
from tests.support.graphs import CONFIG, PIPELINES, STEPS, other_prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = False


def runs(arguments: dict[str, Any]) -> list[tuple[dict[str, Any], int]]:
    other = {**other_prompt(arguments), **({"height": 96} if arguments.get("height") == 64 else {})}
    return [(arguments, STEPS), (other, STEPS), (arguments, STEPS - 3), (other, STEPS)]


@pytest.mark.parametrize(
    ("name", "granularity"),
    [
        *((name, granularity) for granularity in ("module", "stack") for name in PIPELINES),
        # what Qwen-Image does before its blocks cannot be captured, and by output there are no blocks
        *((name, "output") for name in PIPELINES if name != "qwen"),
        *(
            (name, "low-rank")
            for name in ("flux", "flux_cfg", "flux_kontext", "qwen", "sd3", "hunyuan", "dit")
        ),
    ],
)
def test_replay_is_eager_bit_for_bit(name, granularity):
    """Runs with other prompts, resolutions and step counts."""
    pipe, arguments = gpu.build(name)
    with torch.no_grad():
        with hicache.fast.apply(pipe, CONFIG, granularity=granularity, cuda_graphs=True) as handle:
            drawn = [pipelines.draw(pipe, given, steps) for given, steps in runs(arguments)]
            [stats] = handle.stats.graphs.values()
        assert stats.eager is None
        assert stats.captures > 0
        assert stats.replays > stats.captures
        with hicache.fast.apply(pipe, CONFIG, granularity=granularity, cuda_graphs=True) as handle:
            # the same fixed form of every step, replaying nothing
            for denoiser in handle._denoisers:
                denoiser.graphs.run = lambda forward, args, kwargs: forward(*args, **kwargs)
            for ours, (given, steps) in zip(drawn, runs(arguments), strict=True):
                assert torch.equal(ours, pipelines.draw(pipe, given, steps))


@pytest.mark.parametrize("choice", ["full", "skipped"])
@pytest.mark.parametrize("granularity", ["module", "stack"])
def test_full_steps_or_skipped_ones_alone(granularity, choice):
    pipe, arguments = gpu.build("flux")
    with hicache.fast.apply(pipe, CONFIG, granularity=granularity, cuda_graphs=False):
        expected = gpu.draw(pipe, arguments)
    with hicache.fast.apply(pipe, CONFIG, granularity=granularity, cuda_graphs=choice) as handle:
        for _ in range(3):
            torch.testing.assert_close(gpu.draw(pipe, arguments), expected)
        stats = handle.stats.graphs["transformer"]
        assert stats.captures > 0
        torch.cuda.empty_cache()
        before, held = torch.cuda.memory_reserved(), stats.pool_nbytes
        assert held > 0
        handle.release()
        torch.cuda.empty_cache()
        assert before - torch.cuda.memory_reserved() >= held
        assert handle.stats.graphs["transformer"].pool_nbytes == 0


def test_a_call_that_cannot_be_captured_has_its_blocks_captured():
    pipe, arguments = gpu.build("flux")
    with torch.no_grad():
        with hicache.fast.apply(pipe, CONFIG, cuda_graphs=False):
            expected = pipelines.draw(pipe, arguments)
        embedder = pipe.transformer.x_embedder
        sync = embedder.register_forward_hook(lambda module, args, output: print(output.sum().item()))
        with hicache.fast.apply(pipe, CONFIG) as handle:
            drawn = pipelines.draw(pipe, arguments)
            stats = handle.stats.graphs["transformer"]
        sync.remove()
    assert stats.eager is None
    assert "only its blocks are captured: sync by _local_scalar_dense" in stats.partly
    assert stats.replays > stats.captures > 0
    torch.testing.assert_close(drawn, expected)


def test_a_capture_that_fails_is_survived():
    """The device, the stream and the memory pool are as they were: the next capture works."""
    backend = CudaBackend()
    assert backend.unavailable(torch.device("cuda", torch.cuda.current_device())) is None
    given = torch.ones(1 << 20, device="cuda")
    stream = torch.cuda.current_stream()

    def fails() -> torch.Tensor:
        doubled = given * 2
        if doubled.sum().item() > 0:  # the host cannot wait for a graph
            doubled += 1
        return doubled

    backend.warm(fails)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="captur"):
            backend.capture(fails)
        assert torch.cuda.current_stream() == stream
        torch.cuda.empty_cache()
        assert torch.ones(1 << 20, device="cuda").sum().item() == 1 << 20
    captured = backend.capture(lambda: given * 3)
    given.fill_(2)
    captured.replay()
    assert (captured.output == 6).all()
    assert captured.free > 0
