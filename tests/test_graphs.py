"""CUDA graphs without a GPU: keys, copies, clones, eviction and invalidation against a faked capture.

In the warm-up a waiting update is done apart where steps are replayed: its rounding may differ, hence
:func:`close`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hicache.fast
import hicache_kernels
from hicache import HiCacheConfig, compat
from hicache.cuda_graphs import model_state
from hicache.cuda_graphs.block_graphs import BlockGraphs
from hicache.cuda_graphs.call_graph import CallArguments
from hicache.cuda_graphs.graph_memory import GraphMemory
from hicache.engine import Sum
from hicache.hooks.transformer import HookedTransformer
from hicache.stats import GraphStats
from hicache.step_plan import FullStep, RunningCall, SkippedStep
from hicache.token_view import TokenView
from tests.support import models, pipelines
from tests.support.comparisons import close
from tests.support.graphs import CONFIG, PIPELINES, STEPS, FakeBackend, connect, other_prompt
from tests.support.schedulers import CountingScheduler

MEMORY = torch.zeros(3 * 3 * 8).untyped_storage()


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeBackend.made.clear()
    monkeypatch.setattr(hicache.fast, "CudaBackend", FakeBackend)


def apply(pipe: Any, config: HiCacheConfig = CONFIG, **more: Any) -> hicache.fast.Handle:
    return connect(hicache.fast.apply(pipe, config, **more))


def draw(pipe: Any, arguments: dict[str, Any], steps: int = STEPS) -> Tensor:
    with torch.no_grad():
        return pipelines.draw(pipe, arguments, steps)


def eager(pipe: Any, arguments: dict[str, Any], steps: int = STEPS, **more: Any) -> Tensor:
    with hicache.fast.apply(pipe, CONFIG, cuda_graphs=False, **more):
        return draw(pipe, arguments, steps)


@pytest.mark.few(8)
@pytest.mark.parametrize("granularity", ["module", "stack"])
@pytest.mark.parametrize("name", PIPELINES)
def test_replays_equal_eager(name, granularity):
    """Over runs with other prompts and step counts."""
    pipe, arguments = pipelines.build(name)
    expected = [eager(pipe, given, steps, granularity=granularity) for given, steps in runs(arguments)]
    with apply(pipe, granularity=granularity) as handle:
        drawn = [draw(pipe, given, steps) for given, steps in runs(arguments)]
        [stats] = handle.stats.graphs.values()
    contexts = len(handle.stats.contexts)
    assert stats.eager is None
    # a full step, a skipped one, and one with the waiting update, whatever the distance and the gap
    assert stats.captures == 3 * contexts
    assert stats.replays > 12 * contexts
    for ours, theirs in zip(drawn, expected, strict=True):
        assert close(ours, theirs)
    if name != "dit":  # whose prompt is a class
        assert not torch.equal(drawn[0], drawn[1])


def runs(arguments: dict[str, Any]) -> list[tuple[dict[str, Any], int]]:
    return [(arguments, STEPS), (other_prompt(arguments), STEPS), (arguments, STEPS - 3)]


@pytest.mark.parametrize("granularity", ["module", "stack"])
def test_a_waiting_update_is_part_of_the_graph(granularity, monkeypatch):
    """Once all differences exist, none is launched apart: the history is read once an interval less."""
    apart, fused = [], []
    update, gated_sum = hicache_kernels.update_, hicache_kernels.gated_sum
    monkeypatch.setattr(hicache_kernels, "update_", lambda *a, **k: apart.append(1) or update(*a, **k))

    def count(*args: Any, inv_gap: Tensor | None = None, **more: Any) -> Tensor:
        fused.extend([] if inv_gap is None else [1])
        return gated_sum(*args, inv_gap=inv_gap, **more)

    monkeypatch.setattr(hicache_kernels, "gated_sum", count)
    pipe, arguments = pipelines.build("flux")
    with apply(pipe, granularity=granularity):
        draw(pipe, arguments)
        # in the warm-up, while differences come to exist
        assert len(apart) == 3
        assert len(fused) >= 3
        fused.clear()
        draw(pipe, arguments)
    assert len(apart) == 6
    assert len(fused) == 3  # at steps 6, 9 and 12


def test_a_skipped_step_looks_at_no_block(monkeypatch):
    """Whether weights have moved is asked of those that a replayed graph reads."""
    pipe, arguments = pipelines.build("flux")
    expected = eager(pipe, arguments)
    asked: list[int] = []
    read = model_state._Part.read
    monkeypatch.setattr(model_state._Part, "read", lambda part: asked.append(len(part.weights)) or read(part))
    with apply(pipe) as handle:
        draw(pipe, arguments)
        asked.clear()
        assert close(draw(pipe, arguments), expected)
        replays = handle.stats.contexts["transformer[0]"]
        weights = len(list(pipe.transformer.parameters()))
        of_blocks = sum(
            1
            for blocks in (pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks)
            for _ in blocks.parameters()
        )
    full, skipped = replays.full_steps, replays.skipped_steps
    assert sum(asked) == full * weights + skipped * (weights - of_blocks)


def test_a_block_that_moves_in_the_middle_of_a_run_is_captured_anew():
    pipe, arguments = pipelines.build("flux")

    def move(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 6:  # step 7 is skipped, step 8 full
            weight = pipe.transformer.transformer_blocks[0].ff.net[2].weight
            weight.data = weight.data * 1.5
        return tensors

    def reset() -> None:
        weight = pipe.transformer.transformer_blocks[0].ff.net[2].weight
        weight.data = weight.data / 1.5

    changed = {**arguments, "callback_on_step_end": move}
    expected = eager(pipe, changed)
    reset()
    with apply(pipe):
        draw(pipe, arguments)
        draw(pipe, arguments)
        assert close(draw(pipe, changed), expected)


def test_outputs_are_the_callers():
    """What one call returned outlives the next replay: guidance subtracts two of them."""
    pipe, arguments = pipelines.build("flux_cfg")
    kept: list[tuple[Tensor, Tensor]] = []
    with apply(pipe) as handle:
        draw(pipe, arguments)

        def keep(module: Any, args: Any, output: Any) -> None:
            kept.append((output[0], output[0].clone()))

        hook = pipe.transformer.register_forward_hook(keep)
        draw(pipe, arguments)
        hook.remove()
        assert handle.stats.graphs["transformer"].replays
    assert kept
    for output, at_once in kept:
        assert torch.equal(output, at_once)


def test_other_resolutions_have_graphs_of_their_own():
    pipe, arguments = pipelines.build("flux")
    larger = {**arguments, "height": 96}
    expected = eager(pipe, larger)
    with apply(pipe) as handle:
        draw(pipe, arguments)
        first = handle.stats.graphs["transformer"].captures
        assert close(draw(pipe, larger), expected)
        assert handle.stats.graphs["transformer"].captures == 2 * first


def test_the_least_recently_used_graph_goes():
    pipe, arguments = pipelines.build("flux")
    with apply(pipe) as handle:
        graphs = handle._denoisers[0].graphs
        draw(pipe, arguments)
        held = list(graphs.captures.graphs)
        graphs.captures.limit = len(held)
        draw(pipe, {**arguments, "height": 96})
        assert len(graphs.captures.graphs) == len(held)
        assert not set(held) & set(graphs.captures.graphs)


def test_more_forms_in_turn_than_graphs_are_kept_run_eagerly():
    """They would be captured again at every step."""
    pipe, arguments = pipelines.build("flux")
    expected = eager(pipe, arguments)
    with apply(pipe) as handle:
        handle._denoisers[0].graphs.captures.limit = 1  # of two: a full step's and a skipped one's
        with pytest.warns(RuntimeWarning, match="a run has calls of more than 1 forms"):
            assert close(draw(pipe, arguments), expected)
        stats = handle.stats.graphs["transformer"]
        assert stats.captures > 1
        assert stats.nbytes == 0


def test_release_frees_graphs_and_the_next_run_captures_anew():
    pipe, arguments = pipelines.build("flux")
    expected = eager(pipe, arguments)
    with apply(pipe) as handle:
        graphs = handle._denoisers[0].graphs
        draw(pipe, arguments)
        before = handle.stats.graphs["transformer"].captures
        assert graphs.captures.graphs
        handle.release()
        assert not graphs.captures.graphs
        assert handle.stats.history_bytes == 0
        assert close(draw(pipe, arguments), expected)
        assert handle.stats.graphs["transformer"].captures == 2 * before


def test_graphs_of_blocks_over_the_limit_leave_their_pool():
    """A pool whose graphs are gone is not captured into again."""
    fake, call = FakeBackend(), RunningCall()
    fake.call = call
    blocks = BlockGraphs(call, fake, GraphMemory(GraphStats()), limit=1)
    block, before = torch.nn.Linear(2, 2), fake.drops
    for width in range(1, 6):
        blocks.begin()
        blocks.run(block, (torch.zeros(width, 2),), {})
    assert fake.drops == before + 1


def test_blocks_that_record_other_tokens_are_captured_anew():
    """Into the same memory, of the same block, given the same form of arguments."""
    fake, call, stats = FakeBackend(), RunningCall(), GraphStats()
    fake.call = call
    blocks = BlockGraphs(call, fake, GraphMemory(stats), limit=4)
    block, hidden, slot = torch.nn.Linear(2, 2), torch.zeros(1, 4, 2), torch.zeros(1, 2, 2)
    captures = []
    for drawn in (range(2), range(2, 4)):
        call.plan = FullStep((slot,), view=TokenView.of(hidden, drawn, None))
        for _ in range(2):
            blocks.begin()
            blocks.run(block, (hidden,), {})
        captures.append(stats.captures)
    assert captures == [1, 2]


def recaptured(pipe: Any, arguments: dict[str, Any], change: Callable[[Any], Any]) -> tuple[int, Tensor]:
    """Captures that a change between two runs costs, and what the second run draws."""
    with apply(pipe) as handle:
        draw(pipe, arguments)
        before = handle.stats.graphs["transformer"].captures
        draw(pipe, arguments)
        assert handle.stats.graphs["transformer"].captures == before
        change(pipe.transformer)
        drawn = draw(pipe, arguments)
        return handle.stats.graphs["transformer"].captures - before, drawn


def move_weights(transformer: Any) -> None:
    for parameter in transformer.parameters():
        parameter.data = parameter.data.clone() * 1.01


def replace_module(transformer: Any) -> None:
    block = transformer.transformer_blocks[1]
    block.ff = copy.deepcopy(block.ff)
    with torch.no_grad():
        block.ff.net[2].weight.mul_(1.5)


def replace_block(transformer: Any) -> None:
    transformer.transformer_blocks[0] = copy.deepcopy(transformer.transformer_blocks[0])
    with torch.no_grad():
        transformer.transformer_blocks[0].ff.net[2].weight.mul_(1.5)


def replace_processor(transformer: Any) -> None:
    attention = transformer.transformer_blocks[0].attn
    attention.processor = copy.copy(attention.processor)


def set_processor(transformer: Any) -> None:
    """As an IP-Adapter's scale: a number of Python, which a graph has in it."""
    transformer.transformer_blocks[0].attn.processor.scale = [0.5]


def exchange_hooks(transformer: Any) -> None:
    layer = transformer.transformer_blocks[1].ff
    layer._forward_hooks.clear()
    layer.register_forward_hook(lambda module, args, output: output * 0.5)


@pytest.mark.parametrize(
    "change",
    [move_weights, replace_module, replace_block, replace_processor, set_processor, exchange_hooks],
)
def test_changed_models_are_captured_anew(change):
    pipe, arguments = pipelines.build("flux")
    if change is exchange_hooks:
        pipe.transformer.transformer_blocks[1].ff.register_forward_hook(lambda module, args, output: output)
    captures, drawn = recaptured(pipe, arguments, change)
    assert captures == 3
    assert close(drawn, eager(pipe, arguments))


class Quantised(Tensor):
    """A weight whose numbers are in another tensor, as those of torchao."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Quantised:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        bare = [arg.inner if isinstance(arg, cls) else arg for arg in args]
        output = function(*bare, **(kwargs or {}))
        return cls(output) if function is torch.ops.aten.detach.default else output


def test_quantised_weights_that_move_are_captured_anew():
    pipe, arguments = pipelines.build("flux")
    layer = pipe.transformer.x_embedder
    layer.weight = torch.nn.Parameter(Quantised(layer.weight.detach()), requires_grad=False)

    def move(transformer: Any) -> None:
        layer.weight = torch.nn.Parameter(Quantised(layer.weight.inner * 1.1), requires_grad=False)

    captures, drawn = recaptured(pipe, arguments, move)
    assert captures == 3
    assert close(drawn, eager(pipe, arguments))


def test_lora_scales_are_noticed_in_a_run():
    """A layer with peft's attributes: another scale is another graph."""
    pipe, arguments = pipelines.build("flux")
    layer = pipe.transformer.x_embedder
    layer.scaling = {"style": 1.0}
    original = type(layer).forward

    class Scaled(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return original(self, x) * self.scaling["style"]

    layer.__class__ = Scaled
    captures, drawn = recaptured(pipe, arguments, lambda transformer: layer.scaling.update(style=0.5))
    assert captures == 3
    assert close(drawn, eager(pipe, arguments))


def test_weights_changed_in_place_need_no_capture():
    pipe, arguments = pipelines.build("flux")

    def scale(transformer: Any) -> None:
        with torch.no_grad():
            transformer.x_embedder.weight.mul_(1.1)

    captures, drawn = recaptured(pipe, arguments, scale)
    assert captures == 0
    assert close(drawn, eager(pipe, arguments))


def test_a_smaller_history_in_the_same_place_is_another_form():
    """Memory freed for the stack: its address may come again, and a graph of modules must not be replayed."""
    transformer = HookedTransformer(Own())
    keys = []
    for num_features in (3, 1):
        orders = torch.empty(0).set_(MEMORY, 0, (3, num_features, 8))
        transformer.call.plan = SkippedStep(Sum(orders, torch.zeros(3), None, 0, "reference"))
        keys.append(CallArguments.of(transformer.call, (), {}).key)
    assert keys[0] != keys[1]


@dataclasses.dataclass
class Output:
    """Nothing that torch's trees know."""

    sample: Tensor


class Own(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
        self.norm_out = torch.nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Output:
        hidden_states = hidden_states * timestep
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return Output(self.norm_out(hidden_states))


@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_outputs_that_cannot_be_cloned_are_not_captured():
    torch.manual_seed(0)
    model, hidden = Own().eval(), models.noise(1, 4, 8)
    with apply(model) as handle, torch.no_grad(), pytest.warns(RuntimeWarning, match="got Output"):
        outputs = [model(hidden, torch.tensor(1 - 0.05 * step)).sample for step in range(STEPS)]
        assert handle.stats.graphs["transformer"].replays == 0
    assert len({output.data_ptr() for output in outputs}) == STEPS
    with hicache.fast.apply(model, CONFIG, cuda_graphs=False), torch.no_grad():
        for step, output in enumerate(outputs):
            assert close(output, model(hidden, torch.tensor(1 - 0.05 * step)).sample)


# What a graph is given.


class Added(torch.nn.Module):
    """Adds a prompt and something else to its hidden state; writes to the prompt where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
        self.norm_out = torch.nn.Linear(8, 8)
        self.writes = False

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, more: Tensor
    ) -> tuple[Tensor]:
        if self.writes:
            encoder_hidden_states.mul_(0.5)
        hidden_states = hidden_states * timestep + encoder_hidden_states + more
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return (self.norm_out(hidden_states),)


@dataclasses.dataclass
class Given:
    """What is given in all steps of two runs, in the same memory."""

    hidden: Tensor
    prompt: Tensor
    more: Tensor


def added(before: Callable[[int, Given], Any], writes: bool, **more: Any) -> tuple[Tensor, list[int]]:
    """The outputs of two runs, and how many tensors each replay copied.

    Args:
        before: called before each step.
        writes: whether the model writes to the prompt.
        more: arguments of ``apply``.
    """
    torch.manual_seed(0)
    model, scheduler = Added().eval(), CountingScheduler()
    given = Given(*(models.noise(1, 4, 8) for _ in range(3)))
    model.writes = writes
    copied: list[int] = []
    own = compat.copy_all

    def copy_all(into: Any, tensors: Any) -> None:
        copied.append(len(into))
        own(into, tensors)

    outputs = []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(compat, "copy_all", copy_all)
        with connect(hicache.fast.apply(model, CONFIG, scheduler=scheduler, **more)):
            for _ in range(2):
                scheduler.set_timesteps(STEPS)
                for step in scheduler.timesteps:
                    before(step, given)
                    prompt = given.prompt.clone() if writes else given.prompt
                    call = {"encoder_hidden_states": prompt, "more": given.more}
                    outputs.append(model(given.hidden, torch.full((1,), 1 - 0.05 * step), **call)[0])
                    scheduler.step()
    return torch.stack(outputs), copied


def _written_by_the_next_run(step: int, given: Given) -> None:
    if step == 0:
        for tensor in (given.hidden, given.prompt, given.more):
            tensor.data.add_(1)


def _set(step: int, given: Given) -> None:
    given.prompt.data = given.prompt.data * 0.9


BEFORE: dict[str, Callable[[int, Given], Any]] = {
    "the same": lambda step, given: None,
    "the prompt written to": lambda step, given: given.prompt.add_(1) if step in (9, 10, 11) else None,
    "the prompt's numbers exchanged": _set,
    "the hidden state written to, uncounted": lambda step, given: given.hidden.data.mul_(0.9),
    "something else written to, uncounted": lambda step, given: given.more.data.mul_(0.9),
    "all written to by the next run, uncounted": _written_by_the_next_run,
}


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("before", BEFORE)
def test_a_replay_has_the_numbers_of_its_call(before: str, writes: bool):
    expected, _ = added(BEFORE[before], writes, cuda_graphs=False)
    drawn, copied = added(BEFORE[before], writes)
    assert writes or len(copied) > STEPS / 2
    assert close(drawn, expected)


def test_a_prompt_that_is_there_is_not_copied_again():
    """Where each step has the same."""
    _, copied = added(BEFORE["the same"], False)
    assert min(copied) == 3  # at a full step: the hidden state, the timestep, and what may be another
    # at a skipped one coefficients, too, and perhaps a gap; the prompt at most once a graph and run
    assert sum(count > 5 for count in copied) <= 3


@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_a_failed_capture_leaves_the_run_right_and_is_told():
    pipe, arguments = pipelines.build("flux")
    expected = eager(pipe, arguments)
    with apply(pipe) as handle:
        FakeBackend.made[-1].fails = RuntimeError(
            "operation not permitted when stream is capturing\nand more"
        )
        with pytest.warns(
            RuntimeWarning, match="runs without CUDA graphs, as a capture failed: RuntimeError"
        ):
            drawn = draw(pipe, arguments)
        assert close(drawn, expected)
        assert close(draw(pipe, arguments), expected)
        stats = handle.stats.graphs["transformer"]
        assert (stats.captures, stats.replays) == (0, 0)
        assert (
            stats.eager == "a capture failed: RuntimeError: operation not permitted when stream is capturing"
        )
        assert "without graphs: a capture failed" in str(handle.stats)
    assert FakeBackend.made[-1].captures == 2  # the call, a block; neither is tried again


@pytest.mark.few(4)
@pytest.mark.parametrize("granularity", ["module", "stack"])
@pytest.mark.parametrize("name", ["flux", "flux_cfg", "sd3", "wan", "qwen"])
def test_blocks_alone_where_what_is_before_them_cannot_be_captured(name, granularity):
    pipe, arguments = pipelines.build(name)
    expected = [eager(pipe, given, steps, granularity=granularity) for given, steps in runs(arguments)]
    with apply(pipe, granularity=granularity) as handle:
        FakeBackend.made[-1].fails_whole = RuntimeError("a copy to the device in the embedding")
        drawn = [draw(pipe, given, steps) for given, steps in runs(arguments)]
        stats = handle.stats
    [graphs] = stats.graphs.values()
    assert graphs.eager is None
    assert (
        graphs.partly == "only its blocks are captured: RuntimeError: a copy to the device in the embedding"
    )
    assert "only its blocks are captured" in str(stats)
    lists = (
        getattr(pipe.transformer, key, ())
        for key in ("transformer_blocks", "single_transformer_blocks", "blocks")
    )
    blocks = sum(map(len, lists)) * len(stats.contexts)
    assert graphs.captures % blocks == 0
    assert graphs.replays >= 5 * blocks
    for ours, theirs in zip(drawn, expected, strict=True):
        assert close(ours, theirs)


def test_blocks_alone_of_a_model_without_a_head():
    """What leaves the last block is recorded outside of that one's graph."""
    model, call = models.build("kandinsky5")
    pipelines.randomize(model)
    scheduler = CountingScheduler()

    def run() -> Tensor:
        with torch.no_grad():
            scheduler.set_timesteps(STEPS)
            said = []
            for t in torch.linspace(1, 0.1, STEPS):
                said.append(model(**call(t))[0])
                scheduler.step()
            return torch.stack(said)

    with hicache.fast.apply(model, CONFIG, scheduler=scheduler, cuda_graphs=False):
        expected = run()
    with apply(model, scheduler=scheduler) as handle:
        FakeBackend.made[-1].fails_whole = RuntimeError("a copy to the device in the embedding")
        assert close(run(), expected)
        [graphs] = handle.stats.graphs.values()
        assert graphs.eager is None
        assert graphs.replays >= len(model.visual_transformer_blocks)


@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_a_block_that_cannot_be_captured_leaves_the_run_right():
    pipe, arguments = pipelines.build("flux")
    expected = eager(pipe, arguments)
    with apply(pipe) as handle:
        fake = FakeBackend.made[-1]
        fake.fails_whole = RuntimeError("a copy in the embedding")
        capture = fake.capture

        def third_fails(function: Callable[[], Any]) -> Any:
            if fake.captures == 3:
                raise ValueError("a sync in a block")
            return capture(function)

        fake.capture = third_fails
        with pytest.warns(
            RuntimeWarning, match=r"a sync in a block \(of a block; of the whole call: RuntimeError"
        ):
            assert close(draw(pipe, arguments), expected)
        assert close(draw(pipe, arguments), expected)
        graphs = handle.stats.graphs["transformer"]
        assert graphs.partly is None
        assert "a sync in a block" in graphs.eager


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_kill_switches(how, monkeypatch):
    pipe, arguments = pipelines.build("flux")
    if how == "environment":
        monkeypatch.setenv("HICACHE_CUDA_GRAPHS", "0")
    with apply(pipe, **({"cuda_graphs": False} if how == "argument" else {})) as handle:
        draw(pipe, arguments)
        stats = handle.stats.graphs
    assert not any(fake.captures for fake in FakeBackend.made)
    if how == "environment":
        assert stats["transformer"].eager == "HICACHE_CUDA_GRAPHS=0"
    else:
        assert stats == {}


def test_never_with_gradients_in_training_or_under_offload():
    pipe, arguments = pipelines.build("flux")
    with apply(pipe) as handle:
        with torch.enable_grad():
            latents = torch.zeros(1, 16, 4)
            pipe.scheduler.set_timesteps(6)
            for t in pipe.scheduler.timesteps:
                pipe.transformer(**models.flux_call(latents, t.expand(1) / 1000))
                pipe.scheduler.step(latents, t, latents)
        assert handle.stats.graphs["transformer"].captures == 0
    pipe.transformer.x_embedder._hf_hook = object()
    with apply(pipe) as handle:
        draw(pipe, arguments)
        assert handle.stats.graphs["transformer"].eager == "Linear is offloaded or hooked"
    assert not any(fake.captures for fake in FakeBackend.made)


def test_compiled_as_a_whole_and_graphs_are_not_both_to_be_had():
    pipe, arguments = pipelines.build("flux", doubles=1, singles=1)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with apply(pipe) as handle:
        draw(pipe, arguments)
        assert handle.stats.graphs["transformer"].eager == "the transformer is compiled as a whole"
    with apply(pipe, cuda_graphs=True):
        with pytest.raises(
            RuntimeError, match=r"cuda_graphs=True, but .* compiled as a whole.*reduce-overhead"
        ):
            draw(pipe, arguments)
    torch._dynamo.reset()


def test_asked_for_and_not_to_be_had_is_told_once(monkeypatch):
    monkeypatch.setattr(FakeBackend, "unavailable", lambda self, device: "the transformer is on cpu")
    pipe, arguments = pipelines.build("flux")
    with apply(pipe, cuda_graphs=True), pytest.warns(RuntimeWarning, match="on cpu") as told:
        draw(pipe, arguments)
        draw(pipe, arguments)
    assert len(told) == 1


def test_an_exception_in_a_replayed_run_leaves_nothing():
    pipe, arguments = pipelines.build("flux")
    plain = draw(pipe, arguments)
    cls, keys = type(pipe.transformer), set(pipe.transformer.__dict__)
    expected = eager(pipe, arguments)
    with apply(pipe):
        draw(pipe, arguments)
        step, calls = pipe.scheduler.step, []

        def broken(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 7:
                raise KeyError("stop")
            return step(*args, **kwargs)

        pipe.scheduler.step = broken
        with pytest.raises(KeyError):
            draw(pipe, arguments)
        del pipe.scheduler.__dict__["step"]
        pipe.scheduler.step = step
        assert close(draw(pipe, arguments), expected)
    assert type(pipe.transformer) is cls
    assert set(pipe.transformer.__dict__) == keys
    assert torch.equal(draw(pipe, arguments), plain)


@pytest.mark.parametrize("choice", ["auto", "full", "skipped"])
def test_full_steps_whose_graphs_leave_no_room_run_eagerly(choice, monkeypatch):
    """As much as a graph takes has to be left; "full" captures all the same, "skipped" never."""
    pipe, arguments = pipelines.build("flux")
    expected = eager(pipe, arguments)
    monkeypatch.setattr(FakeBackend, "room", (1000, 999))
    with apply(pipe, cuda_graphs=choice) as handle:
        assert close(draw(pipe, arguments), expected)
        assert close(draw(pipe, arguments), expected)
        stats = handle.stats.graphs["transformer"]
        kinds = {key[0].__name__ for key in handle._denoisers[0].graphs.captures.graphs}
    assert kinds == {"FullStep", "SkippedStep"} if choice == "full" else {"SkippedStep"}
    partly = {
        "auto": "that of a full step takes 1,000 bytes, and 999 are left",
        "full": None,
        "skipped": "asked for",
    }[choice]
    assert stats.partly == (partly and f"only skipped steps are captured: {partly}")
    assert stats.eager is None
    assert stats.pool_nbytes == 1000 * (3 if choice == "full" else 2)
    assert FakeBackend.made[-1].captures == 3 if choice != "skipped" else 2


def test_a_full_step_without_memory_for_its_graph_runs_eagerly():
    pipe, arguments = pipelines.build("flux")
    expected = eager(pipe, arguments)
    with apply(pipe) as handle:
        FakeBackend.made[-1].fails_whole = torch.OutOfMemoryError("CUDA out of memory")
        assert close(draw(pipe, arguments), expected)
        assert close(draw(pipe, arguments), expected)
        stats = handle.stats.graphs["transformer"]
    assert stats.partly == "only skipped steps are captured: OutOfMemoryError: CUDA out of memory"
    assert stats.captures == 2


def test_released_graphs_take_no_memory():
    pipe, arguments = pipelines.build("flux")
    with apply(pipe) as handle:
        draw(pipe, arguments)
        stats = handle.stats.graphs["transformer"]
        assert stats.pool_nbytes == 3 * FakeBackend.room[0]
        assert stats.nbytes > stats.input_nbytes > 0
        assert f"{stats.nbytes:,} bytes" in str(handle.stats)
        handle.release()
        assert handle.stats.graphs["transformer"].nbytes == 0


@pytest.mark.parametrize("value", ["yes", None, 1])
def test_bad_argument(value):
    pipe, _ = pipelines.build("flux")
    with pytest.raises(ValueError, match=r"unknown cuda_graphs .*; expected one of auto, full, skipped"):
        hicache.fast.apply(pipe, cuda_graphs=value)
