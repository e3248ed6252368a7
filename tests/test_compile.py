"""torch.compile with the cache: one graph of full steps, one of skipped, nothing broken, equal results."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import hicache.demo
import hicache.fast
from hicache import HiCacheConfig
from hicache.hooks.dynamo import CompilePause, OpenSizes
from hicache.runtime.context import BegunCall
from tests.support import pipelines

CONFIG = HiCacheConfig(interval=3, order=2, warmup=3)
STEPS = 12
# the transformer compiled as a whole before or after the cache comes to it, or in place
ORDERS = ["before", "after", "in place"]
REGIONAL = {"flux": 3, "wan": 2}  # graphs of all kinds of blocks and of what else is between them


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def demo() -> tuple[Any, Callable[[Any], Tensor]]:
    pipe = hicache.demo.load()
    pipe.set_progress_bar_config(disable=True)

    def draw(pipe: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        drawn = pipe(["a red ring on blue"], STEPS, generator=generator, output_type="latent")
        return torch.as_tensor(drawn.images)

    return pipe, draw


def build(name: str) -> tuple[Any, Callable[[Any], Tensor]]:
    if name == "bundled":
        return demo()
    pipe, arguments = pipelines.build(name)
    return pipe, lambda pipe: pipelines.draw(pipe, arguments, STEPS)


def _cases(quick: Collection[tuple[str, ...]], every: Iterable[tuple[str, ...]]) -> list[Any]:
    """Every case in both granularities; all but those that are quick enough by default are slow."""
    cases = [(*case, granularity) for case in every for granularity in ("module", "stack")]
    cases += [case for case in quick if case not in cases]
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.slow) for case in cases]


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("name", "order", "granularity"),
    _cases(
        [
            ("flux", "before", "module"),
            ("flux", "before", "low-rank"),
            ("flux", "before", "stack"),
            ("sd3", "before", "module"),
            ("wan", "after", "stack"),
            ("dit", "in place", "module"),
            ("bundled", "after", "module"),
        ],
        [
            *(("flux", order) for order in ORDERS),
            ("sd3", "before"),
            ("wan", "after"),
            ("dit", "in place"),
            ("bundled", "before"),
            ("bundled", "after"),
        ],
    ),
)
def test_two_graphs_for_all_steps_and_runs(name, granularity, order):
    pipe, draw = build(name)
    with hicache.fast.apply(pipe, CONFIG, granularity=granularity):
        expected = draw(pipe)
    counter = CompileCounterWithBackend("aot_eager")

    def compile_it() -> None:
        if order == "in place":
            pipe.transformer.compile(backend=counter, fullgraph=True)
        else:
            pipe.transformer = torch.compile(pipe.transformer, backend=counter, fullgraph=True)

    if order != "after":
        compile_it()
    with hicache.fast.apply(pipe, CONFIG, granularity=granularity) as handle:
        if order == "after":
            compile_it()
        first = draw(pipe)
        assert counter.frame_count == 2
        second = draw(pipe)
        assert counter.frame_count == 2
        assert (handle.stats.full_steps, handle.stats.skipped_steps) == (6, 6)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)


@pytest.mark.parametrize(
    ("name", "granularity"), _cases([("flux", "stack"), ("wan", "module")], [("flux",), ("wan",)])
)
def test_blocks_compiled_one_by_one(name, granularity):
    pipe, draw = build(name)
    with hicache.fast.apply(pipe, CONFIG, granularity=granularity):
        expected = draw(pipe)
    counter = CompileCounterWithBackend("aot_eager")
    pipe.transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
    with hicache.fast.apply(pipe, CONFIG, granularity=granularity):
        first = draw(pipe)
        graphs = counter.frame_count
        assert 0 < graphs <= REGIONAL[name]
        assert torch.equal(first, expected)
        assert torch.equal(draw(pipe), expected)
        assert counter.frame_count == graphs


@pytest.mark.parametrize(
    ("name", "granularity", "dynamic"),
    [
        ("flux", "module", None),
        *(
            pytest.param(name, granularity, dynamic, marks=pytest.mark.slow)
            for name, granularity, dynamic in [
                ("flux", "stack", None),
                ("flux", "module", True),
                ("hunyuan", "module", None),
                ("wan", "module", None),
            ]
        ),
    ],
)
def test_heights_and_applies_make_one_graph_more_than_without_the_cache(name, granularity, dynamic):
    """However many of both: sizes that differ are open in one graph of full steps, and in the skipped one."""
    pipe, arguments = pipelines.build(name)
    sizes = [32, 48, 64, 80] if name == "wan" else [64, 80, 96, 112]

    def graphs(cached: bool) -> list[int]:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        pipe.transformer.compile(backend=counter, fullgraph=True, dynamic=dynamic)
        found = []
        for height in sizes:
            given = {**arguments, "height": height, "width": sizes[0]}
            if cached:
                with hicache.fast.apply(pipe, CONFIG, granularity=granularity):
                    pipelines.draw(pipe, given, 6)
            else:
                pipelines.draw(pipe, given, 2)
            found.append(counter.frame_count)
        return found

    plain = graphs(cached=False)
    assert plain[-1] <= 2
    ours = graphs(cached=True)
    assert ours[-1] <= plain[-1] + 1
    assert ours[-1] == ours[1]


def test_two_contexts_share_the_graphs():
    """Separate calls for classifier-free guidance: other prompts, other histories, the same code."""
    pipe, draw = build("flux_cfg")
    with hicache.fast.apply(pipe, CONFIG):
        expected = draw(pipe)
    counter = CompileCounterWithBackend("aot_eager")
    pipe.transformer = torch.compile(pipe.transformer, backend=counter, fullgraph=True)
    with hicache.fast.apply(pipe, CONFIG):
        assert torch.equal(draw(pipe), expected)
        assert counter.frame_count == 2
        assert torch.equal(draw(pipe), expected)
        assert counter.frame_count == 2


def test_uncached_after_removal():
    pipe, draw = build("sd3")
    plain = draw(pipe)
    counter = CompileCounterWithBackend("aot_eager")
    pipe.transformer = torch.compile(pipe.transformer, backend=counter, fullgraph=True)
    with hicache.fast.apply(pipe, CONFIG):
        assert not torch.equal(draw(pipe), plain)
    assert torch.equal(draw(pipe), plain)


def test_pauses_of_several_transformers_overlap():
    """In threads, or after an interrupt: compilation is on again once all have resumed, and not before."""

    def stance() -> str:
        return torch._dynamo.eval_frame._stance.stance

    one, other = CompilePause(), CompilePause()
    one.hold()
    other.hold()
    one.let_go()
    one.let_go()
    assert stance() == "force_eager"
    other.let_go()
    assert stance() == "default"


@pytest.mark.few(1)
@pytest.mark.parametrize("compiled", [False, True], ids=["regional", "whole"])
@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt,
        *(pytest.param(error, marks=pytest.mark.slow) for error in (SystemExit, ZeroDivisionError)),
    ],
)
def test_nothing_is_left_of_a_call_that_is_broken_off(error, compiled):
    """At once, not with the next call: torch.compile on, the lists the model's own, no arguments held."""
    pipe, draw = build("flux")
    with hicache.fast.apply(pipe, CONFIG):
        expected = draw(pipe)
    model = pipe.transformer
    if compiled:
        pipe.transformer = torch.compile(model, backend="eager")
    else:
        model.compile_repeated_blocks(backend="eager")
    for step in (0, 1, 4):  # learned from, full, skipped
        steps = 0

        @torch.compiler.disable
        def break_off(*_: Any, step: int = step) -> None:
            nonlocal steps
            steps += 1
            if steps == step + 1:
                raise error

        with hicache.fast.apply(pipe, CONFIG):
            hook = model.norm_out.register_forward_pre_hook(break_off)
            with pytest.raises(error):
                draw(pipe)
            hook.remove()
            assert torch._dynamo.eval_frame._stance.stance == "default"
            assert [type(block).__name__ for block in model.transformer_blocks] == [
                "FluxTransformerBlock"
            ] * 2
            held = [gc_object for gc_object in gc.get_objects() if type(gc_object) is BegunCall]
            assert not held
            assert torch.equal(draw(pipe), expected)
        assert [type(block).__name__ for block in model.transformer_blocks] == ["FluxTransformerBlock"] * 2


def test_what_is_held_open_while_a_skipped_step_is_compiled_is_let_go():
    from torch.fx.experimental import _config

    sizes = OpenSizes()
    assert _config.use_duck_shape
    sizes.hold()
    assert not _config.use_duck_shape
    sizes.let_go()
    assert _config.use_duck_shape


def test_an_exception_in_a_call_learned_from_leaves_compilation_on():
    pipe, draw = build("flux")
    counter = CompileCounterWithBackend("aot_eager")
    pipe.transformer.compile(backend=counter, fullgraph=True)
    with hicache.fast.apply(pipe, CONFIG):
        broken = pipe.transformer.norm_out.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            draw(pipe)
        broken.remove()
        draw(pipe)
    assert counter.frame_count == 2
