"""Caching on a GPU: what no other machine can show of a pipeline in use."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hicache.fast
from hicache import HiCacheConfig, InputChange
from hicache_kernels import BACKENDS, backend_status
from tests.support import gpu, pipelines
from tests.support.gpu import near
from tests.support.graphs import CONFIG, STEPS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ROOT = Path(__file__).parents[1]
GRANULARITIES = ["module", "low-rank", "stack", "output"]
FAMILIES = ["flux", "flux_cfg", "sd3", "qwen", "hunyuan", "dit", "wan", "ltx", "pixart"]
COLLAPSED = ("wan", "ltx", "pixart")  # few sums as they are: nothing for low rank to save
each_way = pytest.mark.parametrize("granularity", GRANULARITIES)


def cases(names: list[str]) -> Any:
    """Every pipeline by every granularity that it is cached by."""
    found = [(n, g) for n in names for g in GRANULARITIES if not (g == "low-rank" and n in COLLAPSED)]
    return pytest.mark.parametrize(("name", "granularity"), found)


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def cached(pipe: Any, arguments: dict[str, Any], config: HiCacheConfig = CONFIG, **more: Any) -> Tensor:
    """What a cached pipeline draws."""
    with hicache.fast.apply(pipe, config, **more):
        return gpu.draw(pipe, arguments)


@cases(FAMILIES)
def test_a_cache_that_skips_nothing_changes_nothing(name: str, granularity: str):
    pipe, arguments = gpu.build(name)
    expected = gpu.draw(pipe, arguments)
    assert torch.equal(cached(pipe, arguments, HiCacheConfig(interval=1), granularity=granularity), expected)


@each_way
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_backends_draw_what_the_reference_draws(backend: str, granularity: str):
    if reason := backend_status("cuda")[backend]:
        pytest.skip(f"{backend}: {reason}")
    pipe, arguments = gpu.build("flux")
    expected = cached(pipe, arguments, granularity=granularity, backend="reference")
    near(cached(pipe, arguments, granularity=granularity, backend=backend), expected)


@pytest.mark.parametrize("graphs", [False, "auto"], ids=["eager", "graphs"])
@cases(["flux", "sd3", "wan"])
def test_no_later_step_waits(name: str, granularity: str, graphs: bool | str):
    """torch itself tells where the host waits for the device."""
    pipe, arguments = gpu.build(name)

    def from_the_fourth_step_on(
        pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        torch.cuda.set_sync_debug_mode("warn" if 3 <= step < STEPS - 2 else "default")
        return {}

    with hicache.fast.apply(pipe, CONFIG, granularity=granularity, cuda_graphs=graphs) as handle:
        for _ in range(3):
            gpu.draw(pipe, arguments, STEPS)
        with warnings.catch_warnings(record=True) as told, torch.no_grad():
            warnings.simplefilter("always")
            try:
                pipelines.draw(pipe, arguments, STEPS, callback_on_step_end=from_the_fourth_step_on)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert handle.stats.skipped_steps > 4
    waits = [f"{one.filename}:{one.lineno}" for one in told if "synchronizing" in str(one.message)]
    assert not [place for place in waits if Path(place).is_relative_to(ROOT / "hicache")]
    assert not [place for place in waits if Path(place).is_relative_to(ROOT / "hicache_kernels")]


@pytest.mark.parametrize("graphs", [False, "auto"], ids=["eager", "graphs"])
@pytest.mark.parametrize("granularity", ["module", "stack", "output"])
def test_full_steps_decided_in_the_run(granularity: str, graphs: bool | str):
    pipe, arguments = gpu.build("flux")
    config = HiCacheConfig(schedule=InputChange(6))
    with hicache.fast.apply(pipe, config, granularity=granularity, cuda_graphs=graphs) as handle:
        drawn = [gpu.draw(pipe, arguments) for _ in range(3)]
        places = handle.stats.places
        assert handle.stats.full_steps == 6
    given = HiCacheConfig(schedule=hicache.Steps(*places))
    near(drawn[-1], cached(pipe, arguments, given, granularity=granularity, cuda_graphs=False))


@pytest.mark.parametrize("how", ["models", "groups", "groups and a stream"])
@pytest.mark.parametrize("granularity", ["module", "stack", "output"])
def test_offloaded_weights(granularity: str, how: str):
    """The first run and the second draw what is drawn with all weights on the device."""
    pipe, arguments = gpu.build("flux")
    expected = cached(pipe, arguments, granularity=granularity)
    pipe.to("cpu")
    if how == "models":
        pipe.enable_model_cpu_offload()
    else:
        pipe.transformer.enable_group_offload(
            onload_device=torch.device("cuda"),
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream="stream" in how,
        )
    with hicache.fast.apply(pipe, CONFIG, granularity=granularity) as handle:
        for _ in range(2):
            near(gpu.draw(pipe, arguments), expected)
        assert handle.stats.skipped_steps == 6


@pytest.mark.parametrize("graphs", [False, "auto"], ids=["eager", "graphs"])
@pytest.mark.parametrize("granularity", ["module", "stack"])
@pytest.mark.parametrize("what", ["blocks", "transformer"])
def test_compiled(what: str, granularity: str, graphs: bool | str):
    pipe, arguments = gpu.build("flux")
    expected = cached(pipe, arguments, granularity=granularity)
    if what == "blocks":
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    else:
        pipe.transformer.compile(fullgraph=True)
    with hicache.fast.apply(pipe, CONFIG, granularity=granularity, cuda_graphs=graphs) as handle:
        for _ in range(3):
            near(gpu.draw(pipe, arguments), expected)
        assert handle.stats.skipped_steps == 6
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["flux_controlnet", "sd3_controlnet"])
@pytest.mark.parametrize("granularity", ["module", "stack"])
def test_a_controlnet_beside_graphs(name: str, granularity: str):
    pipe, arguments = gpu.build(name)

    def draw() -> Tensor:
        torch.manual_seed(0)  # the control picture is encoded at random
        return gpu.draw(pipe, arguments)

    with hicache.fast.apply(pipe, CONFIG, granularity=granularity, cuda_graphs=False):
        expected = draw()
    with hicache.fast.apply(pipe, CONFIG, granularity=granularity):
        for _ in range(3):
            near(draw(), expected)


@pytest.mark.parametrize("graphs", [False, "auto"], ids=["eager", "graphs"])
@each_way
def test_two_runs_at_a_time(granularity: str, graphs: bool | str):
    """Two pipelines of one transformer, in threads with streams of their own."""
    pipe, arguments = gpu.build("flux")
    other = type(pipe)(**{**pipe.components, "scheduler": type(pipe.scheduler)(**pipe.scheduler.config)})
    other.set_progress_bar_config(disable=True)
    asked = [arguments, {**arguments, "prompt_embeds": arguments["prompt_embeds"] * 1.5}]
    drawn: dict[int, list[Tensor]] = {0: [], 1: []}
    with hicache.fast.apply(pipe, CONFIG, granularity=granularity, cuda_graphs=graphs):
        expected = [gpu.draw(pipe, given) for given in asked]

        def serve(number: int) -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(4):
                    drawn[number].append(gpu.draw([pipe, other][number], asked[number]))
                torch.cuda.current_stream().synchronize()

        threads = [threading.Thread(target=serve, args=(number,)) for number in drawn]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, pictures in drawn.items():
        assert len(pictures) == 4
        for picture in pictures:
            near(picture, expected[number])


@pytest.mark.parametrize("granularity", ["module", "stack"])
def test_without_a_c_compiler(granularity: str, tmp_path: Path):
    """Triton cannot launch: the native kernels draw the picture, or without them the reference."""
    nothing = tmp_path / "bin"
    nothing.mkdir()
    inherited = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/scripts/draw_on_gpu.py"), granularity, str(tmp_path / "drawn.pt")],
        env={**inherited, "PATH": str(nothing), "TRITON_CACHE_DIR": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "not triton: Triton builds its launcher with a C compiler, and there is none" in done.stdout
    pipe, arguments = gpu.build("flux")
    near(torch.load(tmp_path / "drawn.pt"), cached(pipe, arguments, granularity=granularity))
