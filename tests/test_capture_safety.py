"""What a CUDA graph cannot capture: what is found, and that none of it is ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hicache.engine
import hicache.fast
from benchmarks.capture_safety.emulated_gpu import DEVICE, EmulatedGpu, EmulatedTensor, move, to_gpu
from benchmarks.capture_safety.models import MODELS, builders
from benchmarks.capture_safety.page import page
from benchmarks.capture_safety.survey import CONFIG, FULL, SKIPPED, STEPS, Survey, survey
from hicache.cuda_graphs.capture_safety import (
    AFTER,
    BEFORE,
    COPY,
    INSIDE,
    SHAPE,
    SYNC,
    UnsafeOp,
    UnsafeOps,
    unsafe_ops,
)
from tests.support import models
from tests.support.schedulers import CountingScheduler

PAGE = Path(__file__).parents[1] / "docs" / "capture-safety.md"
# by themselves, from the first call on
CLEAN = (
    "FLUX.1",
    "FLUX.1 Kontext",
    "FLUX.2",
    "SD3, SD3.5",
    "HunyuanVideo",
    "Wan 2.1, 2.2",
    "Wan VACE",
    "LTX",
    "CogVideoX",
    "PixArt",
    "DiT",
    "Sana",
    "AuraFlow",
    "Bria",
)
CLEAN_AFTER_A_CALL = ("Qwen-Image", "Z-Image")
BLOCKED_INSIDE = ("CogView4", "HiDream", "Mochi")
# What a model's own code runs differs from one diffusers to the next; that the cache adds nothing does not.
of_the_page = pytest.mark.skipif(
    f"Made with diffusers {diffusers.__version__} " not in PAGE.read_text(),
    reason=f"docs/capture-safety.md is of another diffusers than {diffusers.__version__}",
)


class Surveys(dict[str, Survey]):
    """Made as they are asked for."""

    def __missing__(self, title: str) -> Survey:
        self[title] = survey(builders()[title])
        return self[title]


@pytest.fixture(scope="module")
def surveys() -> Surveys:
    return Surveys()


@pytest.fixture(scope="module")
def all_surveys(surveys: Surveys) -> dict[str, Survey]:
    return {title: surveys[title] for title in builders()}


# The page.


@pytest.mark.slow
@of_the_page
def test_the_page_is_what_the_models_do(all_surveys: dict[str, Survey]):
    def body(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.startswith("Made with")]

    expected = body(page(all_surveys))
    assert body(PAGE.read_text()) == expected, (
        "python -m benchmarks.capture_safety --write docs/capture-safety.md"
    )


def test_every_model_of_the_zoo_is_on_it():
    assert set(MODELS.values()) == {*models.BARE, *models.IN_PIPELINES}


@pytest.mark.few(8)
@pytest.mark.parametrize("title", MODELS)
def test_the_cache_adds_nothing(surveys: Surveys, title: str):
    """Recording, gates and sums; whichever functions of the model offend, they do so without the cache."""
    found = surveys[title]
    own = {*found.own.first, *found.own.later}
    assert "stack" in found.cached
    for full, skipped in found.cached.values():
        assert {*full.first, *full.later, *skipped.first, *skipped.later} <= own
        assert not {*full.later, *skipped.later} - {*found.own.later}
        assert not [op for op in skipped.later if op.place == INSIDE]


@pytest.mark.few(4)
@pytest.mark.parametrize("title", CLEAN)
def test_clean_families(surveys: Surveys, title: str):
    found = surveys[title]
    assert found.own.verdict == "clean"
    assert {part.verdict for parts in found.cached.values() for part in parts} == {"clean"}


@pytest.mark.slow
def test_models_are_cached_by_module_where_they_can_be(all_surveys: dict[str, Survey]):
    by_stack = {title for title, found in all_surveys.items() if found.finest == "stack"}
    assert by_stack == {
        "HunyuanVideo 1.5",
        "Wan VACE",
        "CogView4",
        "HiDream",
        "Z-Image",
        "Lumina2",
        "Mochi",
        "AuraFlow",
        "Kandinsky 5",
        "Bria",
    }


@pytest.mark.slow
@of_the_page
def test_other_families(all_surveys: dict[str, Survey]):
    for title in CLEAN_AFTER_A_CALL:
        assert all_surveys[title].own.verdict == "clean after a first call"
    for title in MODELS.keys() - {*CLEAN, *CLEAN_AFTER_A_CALL}:
        places = {op.place for op in all_surveys[title].own.later}
        assert (INSIDE in places) == (title in BLOCKED_INSIDE), title
        if title not in BLOCKED_INSIDE:
            assert places == {BEFORE}, title


@pytest.mark.parametrize("place", ["forecast", "record"])
def test_an_unsafe_op_of_the_cache_would_show(monkeypatch: pytest.MonkeyPatch, place: str):
    if place == "forecast":
        own = hicache.engine.Sum.__call__

        def offending(self: Any, base: Tensor, gates: Tensor | None) -> Tensor:
            assert float(self.coeffs[0]) == 1
            return own(self, base, gates)

        monkeypatch.setattr(hicache.engine.Sum, "__call__", offending)
    else:
        write = hicache.hooks.module_outputs._OutputHook._write

        def offending_write(self: Any, part: Any, slot: Tensor, output: Any) -> bool:
            slot.copy_(torch.zeros(slot.shape))
            return write(self, part, slot, output)

        monkeypatch.setattr(hicache.hooks.module_outputs._OutputHook, "_write", offending_write)
    full, skipped = survey(builders()["FLUX.1"]).cached["module"]
    found = [(op.kind, op.function, op.place) for op in (*full.later, *skipped.later)]
    if place == "forecast":
        assert found == [(SYNC, "Sum.offending", BEFORE)]
    else:
        assert found == [(COPY, "_OutputHook.offending_write", INSIDE)]


# What is found in single operations.

Operation = Callable[[Tensor], Any]


def _assign(index: Any, value: Any) -> Operation:
    def assign(x: Tensor) -> None:
        place = index(x)
        x[place] = value(x) if callable(value) else value

    return assign


UNSAFE: dict[str, tuple[Operation, list[str]]] = {
    "item": (lambda x: x.sum().item(), [SYNC]),
    "bool": (lambda x: bool((x > 0).any()), [SYNC]),
    "float": (lambda x: float(x[0, 0]), [SYNC]),
    "equal": (lambda x: torch.equal(x, x + 1), [SYNC]),
    "allclose": (lambda x: torch.allclose(x, x), [SYNC]),
    "arange up to": (lambda x: torch.arange(x[0, 0].abs().int(), device=x.device), [SYNC]),
    "tolist": (lambda x: x.tolist(), [COPY]),
    "cpu": (lambda x: x.cpu(), [COPY]),
    "to the host": (lambda x: x.to("cpu", torch.float64), [COPY]),
    "to the device": (lambda x: torch.ones(3).to(x.device), [COPY]),
    "tensor": (lambda x: torch.tensor([1.0, 2.0], device=x.device), [COPY]),
    "as_tensor": (lambda x: torch.as_tensor([1.0, 2.0], device=x.device), [COPY]),
    "new_tensor": (lambda x: x.new_tensor([1.0, 2.0]), [COPY]),
    "copy_": (lambda x: x.copy_(torch.zeros(2, 3)), [COPY]),
    "copy_ of a number": (lambda x: x.copy_(torch.zeros(())), [COPY]),
    "nonzero": (lambda x: x.nonzero(), [SHAPE]),
    "where": (lambda x: torch.where(x > 0), [SHAPE]),
    "unique": (lambda x: x.unique(), [SHAPE]),
    "masked_select": (lambda x: x.masked_select(x > 0), [SHAPE]),
    "mask": (lambda x: x[x > 0], [SHAPE]),
    "mask, assigned": (_assign(lambda x: x > 0, lambda x: x[0, :1]), [SHAPE]),
    "indices of the host": (lambda x: x[torch.tensor([0, 1])], [COPY]),
    "list, assigned": (_assign(lambda x: [0, 1], 1.0), [COPY]),
    "list of a column": (lambda x: x[:, [0, 1]], [COPY]),
    "numpy array": (lambda x: x[np.array([0, 1])], [COPY]),
    "list": (lambda x: x[[0, 1]], [COPY]),
    "repeat_interleave": (lambda x: x.repeat_interleave(torch.ones_like(x[0]).long(), 1), [SHAPE]),
}
HARMLESS: dict[str, Operation] = {
    "factories": lambda x: [torch.zeros(3, device=x.device), torch.arange(4, device=x.device), x.new_ones(2)],
    "full": lambda x: torch.full((2,), 3.0, device=x.device),
    "dtype": lambda x: x.to(torch.float64),
    "copy_": lambda x: x.copy_(torch.zeros_like(x)),
    "slices": lambda x: x[None, 1:, ..., 0],
    "indices": lambda x: x[torch.arange(2, device=x.device)],
    "a number under a mask": _assign(lambda x: x > 0, 0.0),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.0),
    "where of three": lambda x: torch.where(x > 0, x, 0.0),
    "repeat_interleave": lambda x: x.repeat_interleave(torch.ones_like(x[0]).long(), 1, output_size=3),
    "repeat_interleave by a number": lambda x: x.repeat_interleave(2, 1),
    "the host's own": lambda x: [torch.ones(3).nonzero(), torch.ones(3).sum().item(), torch.ones(3)[[0]]],
    "attention": lambda x: nn.functional.scaled_dot_product_attention(x, x, x),
}


def _found(operation: Operation) -> list[UnsafeOp]:
    with EmulatedGpu():
        return unsafe_ops(lambda: operation(EmulatedTensor(torch.randn(2, 3))))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_copies_are_seen_whatever_the_mode(mode: Any):
    """In inference mode an operation made of others reaches nobody but whoever takes it apart."""
    with mode():
        found = unsafe_ops(lambda: torch.zeros(3).to("meta"))
    assert [(op.kind, op.op) for op in found] == [(COPY, "_to_copy")]


@pytest.mark.parametrize("name", UNSAFE)
def test_found(name: str):
    operation, kinds = UNSAFE[name]
    found = _found(operation)
    assert [op.kind for op in found][:1] == kinds
    assert {op.file for op in found} == {"test_capture_safety.py"}


@pytest.mark.parametrize("name", HARMLESS)
def test_not_found(name: str):
    assert _found(HARMLESS[name]) == []


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_operation_with_a_kernel_of_its_own_is_not_taken_apart(mode: Any):
    """As RMSNorm's on a GPU: made of others it rounds otherwise, and the first picture is another."""
    with torch.library._scoped_library("hicache_test", "FRAGMENT") as library:
        library.define("tenth(Tensor x) -> Tensor")
        library.impl("tenth", lambda x: x / 10, "CompositeImplicitAutograd")
        library.impl("tenth", lambda x: x * 0.1, "CPU")
        given = torch.rand(1000)
        with mode():
            found: list[Tensor] = []
            assert unsafe_ops(lambda: found.append(torch.ops.hicache_test.tenth(given))) == []
            assert torch.equal(found[0], given * 0.1)
            assert not torch.equal(found[0], given / 10)


def test_places():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor) -> None:
            x.cpu()
            for block in self.blocks:
                block(x)
            x.nonzero()

    class Block(nn.Module):
        def forward(self, x: Tensor) -> None:
            x.sum().item()

    model = Model()
    hooks = [(len(b._forward_pre_hooks), len(b._forward_hooks)) for b in model.blocks]
    with EmulatedGpu():
        found = unsafe_ops(lambda: model(EmulatedTensor(torch.ones(2))), model.blocks)
    assert [(o.kind, o.function, o.place) for o in found] == [
        (COPY, "Model.forward", BEFORE),
        (SYNC, "Block.forward", INSIDE),
        (SYNC, "Block.forward", INSIDE),
        (SHAPE, "Model.forward", AFTER),
    ]
    assert found[1] == found[2] != found[0]
    assert [(len(b._forward_pre_hooks), len(b._forward_hooks)) for b in model.blocks] == hooks


def test_a_block_that_raises_is_left():
    class Block(nn.Module):
        def forward(self, x: Tensor) -> None:
            raise ZeroDivisionError

    block = Block()
    with EmulatedGpu(), UnsafeOps([block]) as mode:
        with pytest.raises(ZeroDivisionError):
            block(torch.ones(1))
        EmulatedTensor(torch.ones(1)).cpu()
    assert [op.place for op in mode.found] == [AFTER]


# The GPU that is not there.


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # Chroma's
@pytest.mark.parametrize("name", ["flux", "chroma", "hidream", "lumina2", "wan"])
def test_it_computes_what_the_host_does(name: str):
    """Cached as well: the very steps the page is about."""

    def run(prepare: Callable[[Any], Any], model: nn.Module) -> list[Tensor]:
        scheduler = CountingScheduler()
        said = []
        handle = hicache.fast.apply(model, CONFIG, scheduler=scheduler, granularity="stack")
        with torch.no_grad(), handle:
            scheduler.set_timesteps(STEPS)
            for t in torch.linspace(1, 0.1, STEPS):
                output = model(**prepare(call(float(t))))[0]
                said.append(torch.stack(list(output)))
                scheduler.step()
            assert handle.stats.full_steps == len(FULL) + 1
            assert handle.stats.skipped_steps == len(SKIPPED) + 1
        return said

    model, call = models.build(name)
    expected = run(lambda arguments: arguments, model)
    with EmulatedGpu():
        move(model)
        given = run(to_gpu, model)
        assert {output.device for output in given} == {DEVICE}
        there = [output.cpu() for output in given]
    for one, other in zip(there, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_without_it_its_tensors_are_of_no_use():
    with pytest.raises(RuntimeError, match="expected EmulatedGpu to be entered"):
        EmulatedTensor(torch.ones(2)) + 1
