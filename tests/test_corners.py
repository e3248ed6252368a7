"""What other tests do not come to: clocks and memory of a device, odd blocks, options that are refused."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hicache.fast
import hicache_kernels
from hicache import Engine, HiCacheConfig, cli
from hicache.cuda_graphs.model_state import ModelState
from hicache.hooks.block_interface import BlockInterface
from hicache.reference.timer import Timer
from hicache.runtime.denoiser import Denoiser
from hicache.runtime.memory_room import MemoryRoom
from hicache.runtime.reading import reading
from hicache.stats import Stopwatch
from hicache_kernels.backends import native, triton
from tests.support import models, pipelines
from tests.support.comparisons import snapshot
from tests.support.graphs import FakeBackend, connect
from tests.support.models import noise
from tests.support.runs import trace

GPU = torch.device("cuda:1")


# A device's clock, its memory, and what it has not come to yet.


class Event:
    """An event of a GPU whose work takes two milliseconds between one and the next."""

    now = 0.0
    done = True

    def __init__(self, enable_timing: bool = False) -> None:
        self.waited = False

    def record(self, stream: Any = None) -> None:
        assert stream == f"current one of {GPU}"  # the transformer's device is not the current one
        Event.now += 2.0
        self.at = Event.now

    def synchronize(self) -> None:
        self.waited = True

    def query(self) -> bool:
        return Event.done

    def elapsed_time(self, later: Event) -> float:
        assert later.waited
        return later.at - self.at


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"current one of {device}")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    return


@pytest.mark.usefixtures("gpu")
def test_time_on_a_gpu_is_read_from_its_events():
    watch, timer = Stopwatch(), Timer()
    timer.start_run(0)
    for _ in range(3):
        with watch.measure(GPU), timer.measure(GPU):
            pass
    assert watch.read() == 3 * 6.0  # from its own first event to its second: the timer's two are between
    assert timer.milliseconds == 3 * 2.0
    watch.reset()
    timer.start_run(1)
    assert watch.read() == timer.milliseconds == 0.0


@pytest.mark.usefixtures("gpu")
def test_free_memory_is_the_device_s_and_what_torch_holds_unused():
    """Less what graphs work in, which torch counts as unused; those go before a history is made coarser."""

    class Graphs:
        memory = SimpleNamespace(scratch=250)

        def drop(self) -> None:
            self.memory = SimpleNamespace(scratch=0)

    graphs, told = Graphs(), list[str]()
    room = MemoryRoom(5000, graphs, told.append)
    assert room.why_not("it", 950, 950, GPU) is None
    assert graphs.memory.scratch == 250
    assert room.why_not("it", 1200, 1200, GPU) is None
    assert graphs.memory.scratch == 0
    assert not told
    assert room.why_not("it", 1201, 1201, GPU) == "it wants 1,201 bytes and 1,200 are free on cuda:1"
    assert told == ["is cached more coarsely: it wants 1,201 bytes and 1,200 are free on cuda:1"]
    assert room.why_not("it", 1201, 1201, torch.device("cpu")) is None
    assert room.why_not("it", 5001, 0, GPU) == "it, 5,001 bytes or more, is over memory_budget=5,000"


@pytest.mark.usefixtures("gpu")
def test_too_little_free_memory_is_the_stack_and_is_told(monkeypatch: pytest.MonkeyPatch):
    own = MemoryRoom.why_not
    monkeypatch.setattr(MemoryRoom, "why_not", lambda room, *given: own(room, *given[:-1], GPU))
    pipe, arguments = pipelines.build("flux")
    with hicache.fast.apply(pipe) as handle, pytest.warns(RuntimeWarning, match="is cached more coarsely: "):
        pipelines.draw(pipe, arguments)
    assert "and 1,200 are free on cuda:1" in handle.stats.choices["transformer"]


@pytest.mark.usefixtures("gpu")
def test_what_a_gpu_has_not_come_to_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    own = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: own(*a, **k))

    class OnGpu(Tensor):
        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return GPU

    flag = torch.tensor(True).as_subclass(OnGpu)
    answer = reading(flag)
    monkeypatch.setattr(Event, "done", False)
    assert answer() is None
    monkeypatch.setattr(Event, "done", True)
    assert answer() is True


# Models that graphs cannot be made of.


def test_graphs_want_weights_on_one_device():
    blocks = nn.ModuleList([nn.Linear(2, 2, device="meta")])
    model = nn.Module()
    model.blocks = blocks
    assert ModelState(nn.Module(), []).why_eager(FakeBackend()) == "the transformer has no weights"
    model.head = nn.Linear(2, 2)
    assert ModelState(model, [blocks]).why_eager(FakeBackend()) == "its weights are on cpu, meta"


def test_a_skipped_step_without_memory_for_its_graph_is_eager(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hicache.fast, "CudaBackend", FakeBackend)
    pipe, arguments = pipelines.build("flux")
    with connect(hicache.fast.apply(pipe, HiCacheConfig(interval=3), cuda_graphs="skipped")) as handle:
        FakeBackend.made[-1].fails = torch.OutOfMemoryError("no room")
        with pytest.warns(RuntimeWarning, match="a capture failed: OutOfMemoryError: no room"):
            pipelines.draw(pipe, arguments, 14)
        assert "no room" in handle.stats.graphs["transformer"].eager


def test_arguments_of_unknown_classes_are_not_captured(monkeypatch: pytest.MonkeyPatch):
    """They may hold tensors, which nobody would copy."""
    monkeypatch.setattr(hicache.fast, "CudaBackend", FakeBackend)
    model, call = models.build("flux")
    with connect(hicache.fast.apply(model, HiCacheConfig(interval=3))) as handle, torch.no_grad():
        for step in range(10):
            model(**{**call(1 - 0.05 * step), "joint_attention_kwargs": {"of": object()}})
        assert handle.stats.graphs["transformer"].captures == 0
        assert handle.stats.skipped_steps


# Blocks that take or return what nobody can tell.


class Block(nn.Module):
    def forward(self, hidden_states: Any, encoder_hidden_states: Any = None) -> Any:
        return hidden_states


def test_a_block_without_a_hidden_state():
    interface = BlockInterface("Own", Block())
    with pytest.raises(RuntimeError, match="expected Block to take a hidden state as 'hidden_states'"):
        interface.arguments(Block(), ("no tensor",), {})


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"sample": 1}, "Block returns dict, no tensor"),
        ((noise(1, 4, 8), noise(1, 4, 8)), "cannot tell what Block returns"),
        ((noise(1, 4, 8), noise(1, 9, 8)), "cannot tell what Block returns"),
    ],
    ids=["a dict", "two alike", "something more"],
)
def test_a_block_that_returns_what_cannot_be_told(output: Any, message: str):
    interface = BlockInterface("Own", Block())
    with pytest.raises(RuntimeError, match=message):
        interface.learn(noise(1, 4, 8), {"encoder_hidden_states": noise(1, 3, 8)}, output)


def test_a_block_that_returns_otherwise_than_the_first():
    interface = BlockInterface("Own", Block())
    hidden, text = noise(1, 4, 8), noise(1, 3, 8)
    interface.learn(hidden, {"encoder_hidden_states": text}, (text, hidden))
    assert interface.image((text, hidden)) is hidden
    assert interface.image((text, hidden, None)) is None
    assert interface.image((text, "no tensor")) is None
    interface.learn(hidden, {}, hidden)
    assert interface.returned(text, {}) is text


class Odd(nn.Module):
    """A transformer that does one thing otherwise."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.norm_out = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        hidden = hidden_states * timestep
        if self.how == "indexes its blocks":
            hidden = self.blocks._modules["0"](hidden)
        else:
            for block in self.blocks:
                hidden = block(hidden)
        if self.how == "pools before its head":
            hidden = hidden.mean(1, keepdim=True)
        return hidden if self.how == "leaves its head out" else self.norm_out(hidden)


def run(how: str, steps: int = 8) -> hicache.fast.Handle:
    model = Odd(how).eval()
    handle = hicache.fast.apply(model, HiCacheConfig(interval=3))
    with handle, torch.no_grad():
        for step in range(steps):
            model(noise(1, 4, 8), torch.tensor(1 - 0.05 * step))
    return handle


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("indexes its blocks", "runs without iterating over its blocks"),
        ("leaves its head out", "ran without its blocks or its head being seen"),
    ],
)
def test_models_that_cannot_be_skipped(how: str, message: str):
    with pytest.raises(RuntimeError, match=message):
        run(how)


def test_a_head_with_another_number_of_tokens_runs_uncached():
    with pytest.warns(RuntimeWarning, match=r"hidden state \(1, 1, 8\) that is not of the shape"):
        handle = run("pools before its head")
    assert handle.stats.skipped_steps == 0


# Options that are refused.


def test_a_backend_that_runs_on_no_device_here():
    if triton.unavailable(torch.device("cpu")) is None or torch.cuda.is_available():
        pytest.skip("Triton runs here")
    pipe, _ = pipelines.build("flux")
    with pytest.raises(ValueError, match="backend 'triton' cannot run: "):
        hicache.fast.apply(pipe, backend="triton")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--repeats", "0"], "--repeats: expected at least 1, got 0"),
        (["--out", "picture.unknown"], "--out: expected the name of a picture"),
        (["--out", "no-such-folder/picture.png"], "--out: expected a file in an existing folder"),
    ],
)
def test_options_of_the_command_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["demo", *options]) != 0
    assert message in capsys.readouterr().err


def test_info_names_the_devices_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(hicache_kernels, "backend_status", lambda device: {"reference": None, "native": "no"})
    monkeypatch.setattr(hicache_kernels, "auto_backend", lambda device: f"what {device} has")
    assert cli.main(["info"]) == 0
    told = capsys.readouterr().out
    assert "a card" in told
    assert "not usable: no" in told
    assert "what cuda:0 has" in told


def test_stats_say_which_backend_was_taken_and_why(monkeypatch: pytest.MonkeyPatch):
    pipe, arguments = pipelines.build("flux")
    with hicache.fast.apply(pipe) as handle:
        assert handle.stats.backends == {}  # nothing has run
        pipe(**arguments)
        taken = str(hicache_kernels.auto_backend("cpu"))
        assert handle.stats.backends == {"transformer": taken}
        assert f"transformer: backend {taken}" in str(handle.stats)
    engine = Engine(HiCacheConfig())
    assert engine.backend_taken is None
    engine.record(0, [torch.ones(4)])
    monkeypatch.setattr(native, "unavailable", lambda device: "no")
    assert engine.backend_taken == "reference (not native: no)"


def test_what_the_native_backend_is_not_compiled_for():
    if native.unavailable(torch.device("cpu")) is not None:
        pytest.skip("the native extension is not built")
    assert native.unsupported((torch.int8,), 3).endswith("not torch.int8")
    assert "not compiled to add a" in native.unsupported((torch.bfloat16, torch.float16), 3)
    assert "orders, not 99" in native.unsupported((torch.float32,), 99)


# Handles.


def test_a_pipeline_that_cannot_be_hooked_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch):
    """The second transformer fails: nothing stays on the first."""
    pipe, _ = pipelines.build("wan22")
    before = snapshot(pipe.transformer), snapshot(pipe.transformer_2)
    own = Denoiser.install

    def install(self: Denoiser) -> None:
        if self.name == "transformer_2":
            raise OSError("no room")
        own(self)

    monkeypatch.setattr(Denoiser, "install", install)
    with pytest.raises(OSError, match="no room"):
        hicache.fast.apply(pipe)
    assert (snapshot(pipe.transformer), snapshot(pipe.transformer_2)) == before


def test_what_is_known_of_a_controlnet_is_released_too():
    pipe, arguments = pipelines.build_randomized("sd3_controlnet")
    with hicache.fast.apply(pipe, HiCacheConfig(interval=3)) as handle:
        first = trace(pipe, arguments)
        handle.release()
        assert handle.stats.history_bytes == 0
        assert torch.equal(trace(pipe, arguments), first)
    assert 0 < handle.stats.controlnets["controlnet"].runs < 9


def test_a_base_of_whole_numbers_is_refused():
    orders = torch.zeros(2, 1, 32)
    with pytest.raises(ValueError, match=r"expected a floating-point base, got torch\.int32"):
        hicache_kernels.gated_sum(torch.zeros(1, 4, 8, dtype=torch.int32), orders, None, torch.ones(2))
    with pytest.raises(ValueError, match=r"gated_sum: .*out"):
        hicache_kernels.gated_sum(torch.zeros(1, 4, 8), orders, None, torch.ones(2), out=torch.zeros(1, 4, 9))
