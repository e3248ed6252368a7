"""Companions, wrapped functions and fitted rows on a GPU: backends and graphs draw what plain steps draw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hicache
import hicache.demo
import hicache.fast
from hicache import AnalyticHermite, HiCacheConfig, Steps
from hicache.companions.clusca import ClusCa
from hicache.companions.clusca.settings import LABELS, VARIANTS
from hicache.companions.sparse import SparseAttention
from hicache.fitting.trajectory import Search
from hicache_kernels import backend_status, sparse_attention
from tests.support import gpu, pipelines
from tests.support.fitted import entry_of, file_of
from tests.support.gpu import near
from tests.support.graphs import CONFIG, other_prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
STEPS = 12
PROMPTS = ["a red ring on blue", "a green cross on white"]
SPARSE = SparseAttention(keep=0.15, group=48, refresh=3, dense_layers=1)
LARGE = {"flux_cfg": {"height": 256, "width": 256}, "wan": {"height": 128, "width": 128}}
CLUSTERS = {
    f"{variant}, {labels}": ClusCa(clusters=4, rho=0.1, variant=variant, labels=labels)
    for variant in VARIANTS
    for labels in LABELS
}


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def drawn(pipe: Any, arguments: dict[str, Any], config: HiCacheConfig = CONFIG, **more: Any) -> list[Tensor]:
    """Of two prompts, in turns."""
    other = {**arguments, "class_labels": [3]} if "class_labels" in arguments else other_prompt(arguments)
    with hicache.fast.apply(pipe, config, **more) as handle:
        pictures = [gpu.draw(pipe, given) for given in (arguments, other, arguments, other)]
        assert handle.stats.skipped_steps > 0
        if more.get("cuda_graphs", True):
            [stats] = handle.stats.graphs.values()
            assert stats.eager is None
            assert stats.replays > 0
    return pictures


def graphs_and_backends(
    pipe: Any, arguments: dict[str, Any], config: HiCacheConfig = CONFIG, **more: Any
) -> None:
    """Every backend, with graphs and without, draws what the reference does without."""
    expected = drawn(pipe, arguments, config, backend="reference", cuda_graphs=False, **more)
    assert not torch.allclose(*expected[:2])
    there = [name for name, reason in backend_status("cuda").items() if reason is None]
    assert len(there) > 1
    for backend in there:
        for graphs in (False, "auto"):
            pictures = drawn(pipe, arguments, config, backend=backend, cuda_graphs=graphs, **more)
            for ours, theirs in zip(pictures, expected, strict=True):
                near(ours, theirs)


@pytest.mark.parametrize("clusters", CLUSTERS.values(), ids=[*CLUSTERS])
@pytest.mark.parametrize("name", ["flux", "sd3", "qwen", "dit"])
def test_clusters(name: str, clusters: ClusCa):
    graphs_and_backends(*gpu.build(name), clusters=clusters)


@pytest.mark.parametrize("key", ["layer", "feature"])
@pytest.mark.parametrize("name", ["flux", "flux_cfg", "sd3"])
def test_analytic_sigma(name: str, key: str):
    config = HiCacheConfig(interval=4, order=2, warmup=3, basis=AnalyticHermite(alpha=0.2, key=key))
    graphs_and_backends(*gpu.build(name), config=config)


def sparsely_drawn(name: str, **more: Any) -> list[Tensor]:
    pipe, arguments = pipelines.build_randomized(name)
    given = gpu.to_gpu({**arguments, **LARGE[name]})
    config = HiCacheConfig(interval=3, warmup=3)
    with hicache.fast.apply(pipe.to("cuda"), config, sparse=SPARSE, **more) as handle:
        pictures = [gpu.draw(pipe, given, 16) for _ in range(3)]
        assert handle.stats.companions["transformer"].startswith("sparse attention: ")
    return pictures


@pytest.mark.parametrize("name", LARGE)
def test_sparse_full_steps(name: str, monkeypatch: pytest.MonkeyPatch):
    """By Triton and under graphs as by torch without."""
    with monkeypatch.context() as patch:
        patch.setattr(sparse_attention, "_pick", lambda *_: sparse_attention.reference)
        expected = sparsely_drawn(name, cuda_graphs=False)
    for graphs in (False, "auto"):
        for ours, theirs in zip(sparsely_drawn(name, cuda_graphs=graphs), expected, strict=True):
            assert (ours - theirs).norm() / theirs.norm() < 1e-3


@pytest.fixture(scope="module")
def shapes() -> Any:
    """The bundled model, on the GPU."""
    pipe = hicache.demo.load().to("cuda")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(pipe: Any, steps: int = 50) -> Tensor:
    noise = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    return pipe(PROMPTS, steps, generator=noise, output_type="latent").images


@pytest.mark.parametrize("granularity", ["output", "stack", "module"])
@pytest.mark.parametrize("graphs", [False, "auto"], ids=["eager", "graphs"])
def test_the_bundled_model_draws_what_it_draws_on_a_cpu(shapes: Any, granularity: str, graphs: bool | str):
    on_cpu = hicache.demo.load()
    on_cpu.set_progress_bar_config(disable=True)
    with hicache.fast.apply(on_cpu, speedup=5.0, granularity=granularity):
        expected = pictures(on_cpu)
    with hicache.fast.apply(shapes, speedup=5.0, granularity=granularity, cuda_graphs=graphs) as handle:
        for _ in range(3):
            found = pictures(shapes).cpu()
            assert (found - expected).norm() / expected.norm() < 1e-2
        assert handle.stats.skipped_steps > handle.stats.full_steps


def test_what_is_cached_changes_from_run_to_run(shapes: Any, monkeypatch: pytest.MonkeyPatch):
    config = HiCacheConfig(interval=4)
    monkeypatch.setattr(
        "hicache.offers.shipped", lambda *_: [file_of(shapes, entry_of(0.02, config, STEPS), "output")]
    )
    given = [STEPS, STEPS, STEPS - 1, STEPS - 1, STEPS, STEPS - 1, STEPS]
    with hicache.fast.apply(shapes, cuda_graphs=False):
        expected = [pictures(shapes, steps) for steps in given]
    with hicache.fast.apply(shapes) as handle:
        kinds = []
        for steps, picture in zip(given, expected, strict=True):
            near(pictures(shapes, steps), picture)
            kinds.append(handle.stats.granularity)
        [stats] = handle.stats.graphs.values()
        assert stats.replays > 0
    assert kinds == ["output" if steps == STEPS else "module" for steps in given]


@pytest.mark.parametrize("method", ["trajectory", "heads", "closed-form"])
@pytest.mark.parametrize("granularity", ["output", "stack", "module"])
def test_rows_are_fitted_there(shapes: Any, granularity: str, method: str):
    """And draw better there."""
    found = hicache.calibrate(
        shapes,
        PROMPTS * 4,
        configs=[HiCacheConfig(schedule=Steps(0, 1, 2, 6, 10, 15), warmup=1)],
        num_inference_steps=20,
        granularity=granularity,
        method=method,
        held_out_pictures=8,
        search=Search(iterations=20, batch=4),
    )
    [entry] = found.entries
    assert entry.scores["fitted mean dB"] > entry.scores["prior mean dB"]
    with hicache.fast.apply(shapes, HiCacheConfig.of(found)) as handle:
        pictures(shapes, 20)
        assert (handle.stats.granularity, handle.stats.config.fallbacks) == (granularity, [])


def test_a_wrapped_function_of_ones_own_sampler():
    mix = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).cuda() / 8

    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x @ mix) * t

    def sample(function: Any, steps: int = STEPS) -> Tensor:
        x = torch.randn(1, 256, 64, generator=torch.Generator().manual_seed(1)).cuda()
        for step in range(steps):
            x = x - function(x, torch.tensor(1 - step / steps, device="cuda")) / steps
        return x

    plain = sample(network)
    with hicache.wrap(network, STEPS, config=HiCacheConfig(interval=1)) as wrapped:
        assert torch.equal(sample(wrapped), plain)
    with hicache.wrap(network, STEPS, config=HiCacheConfig(interval=3)) as wrapped:
        again = [sample(wrapped) for _ in range(3)]
    assert torch.equal(again[0], again[1])
    assert 0 < (again[0] - plain).norm() / plain.norm() < 0.1


def test_the_upscaler_by_tiles():
    """Two tiles of a picture, each with a history of its own."""
    small = torch.rand(1, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for device in ("cpu", "cuda"):
        pipe = hicache.demo.load_upscaler(torch_dtype=torch.float32).to(device)
        pipe.set_progress_bar_config(disable=True)
        noise = [torch.Generator().manual_seed(1)]
        with hicache.fast.apply(pipe, HiCacheConfig(interval=4)) as handle:
            found.append(torch.tensor(pipe(small, STEPS, generator=noise, output_type="np").images))
            assert handle.stats.skipped_steps > 0
    assert (found[1] - found[0]).norm() / found[0].norm() < 1e-2
