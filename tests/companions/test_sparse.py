"""Sparse full steps. A test's number is that of what it was specified as; 9, Triton, is in tests/kernels."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import hicache.fast
import hicache.reference
from hicache import HiCacheConfig
from hicache.cli import main
from hicache.companion import FullCall
from hicache.companions.sparse import SparseAttention, attach, square_order
from hicache.companions.sparse.layer import Inputs, Layer, Phase, Sparsity, Tokens, Turn
from hicache.companions.sparse.order import grid_positions
from hicache.cuda_graphs import capture_safety
from hicache.cuda_graphs.capture import CudaBackend
from hicache.cuda_graphs.scope import Scope
from hicache.demo.prompts import PROMPTS
from hicache.stats import GraphStats
from hicache_kernels import sparse_attention as kernels
from tests.support import pipelines
from tests.support.comparisons import close, relative_rms, snapshot
from tests.support.cuda.runtime import Runtime
from tests.support.models import noise
from tests.support.pipelines import draw

EVERY = HiCacheConfig(interval=1)
SPARSE = SparseAttention(keep=0.15, group=48, refresh=3, dense_layers=1)
# 256 tokens of a picture, twice a step; 192 of a video
SIZES = {"flux_cfg": {"height": 256, "width": 256}, "wan": {"height": 128, "width": 128}}
both_models = pytest.mark.parametrize("name", SIZES)


def built(name, dtype=torch.float32):
    pipe, arguments = (
        pipelines.build_randomized(name) if dtype is torch.float32 else pipelines.in_float64(name)
    )
    return pipe, {**arguments, **SIZES[name]}


def plain_order(tokens, text=0):
    return Tokens(text, torch.arange(tokens))


def inputs(query, key, value):
    return Inputs(query, key, value, None, lambda: F.scaled_dot_product_attention(query, key, value))


def walk(steps, size=0.3, tokens=256, width=32, seed=0):
    """Query, key and value of so many steps, each a little further on."""
    generator = torch.Generator().manual_seed(seed)
    now = [2 * torch.randn(1, 2, tokens, width, generator=generator) for _ in range(3)]
    for _ in range(steps):
        yield now
        now = [tensor + size * torch.randn(tensor.shape, generator=generator) for tensor in now]


def retaken(sparsity, first, second, tokens):
    """A layer after its warm-up, whose last two steps had these inputs."""
    layer = Layer(sparsity)
    layer.attend(Turn(Phase.CONSTANTS), tokens, inputs(*first))
    layer.attend(Turn(Phase.RETAKE, 1), tokens, inputs(*second))
    return layer


# 1 – 5, 10: one attention.


def test_1_all_columns_are_dense():
    query, key, value = next(walk(1))
    columns = torch.arange(256).expand(1, 2, 6, 256).int()
    found = kernels.sparse_attention(query, key, value, columns, 48)
    assert (found - F.scaled_dot_product_attention(query, key, value)).abs().max() < 1e-6


@both_models
def test_1_keep_of_one_is_dense_bit_for_bit(name):
    pipe, arguments = built(name)
    plain = draw(pipe, arguments, 6)
    with hicache.fast.apply(pipe, EVERY, sparse=SparseAttention(keep=1.0, dense_layers=0)) as handle:
        assert torch.equal(draw(pipe, arguments, 6), plain)
        assert handle.stats.companions["transformer"].startswith("sparse attention: ")


@pytest.mark.parametrize("text", [0, 7])
def test_2_unchanged_inputs_give_the_dense_result(text):
    given = next(walk(1))
    order = torch.randperm(256 - text, generator=torch.Generator().manual_seed(1)) + text
    tokens = Tokens(text, torch.cat([torch.arange(text), order]))
    layer = retaken(Sparsity(0.15, 48, 1), given, given, tokens)
    found = layer.attend(Turn(Phase.SPARSE, 1), tokens, inputs(*given))
    assert layer.columns.shape == (1, 2, 6, 64)
    assert (found - F.scaled_dot_product_attention(*given)).abs().max() < 1e-6


def test_3_columns_are_chosen_with_constants_of_the_step_before():
    first, second = walk(2, size=1.0)
    layer = retaken(Sparsity(0.15, 48, 1), first, second, plain_order(256))
    old, new = ((q.double() @ k.double().transpose(2, 3)) / 32**0.5 for q, k, _ in (first, second))
    weights = F.pad((new - old.logsumexp(-1, keepdim=True)).exp(), (0, 0, 0, 32))
    sums = weights.unflatten(2, (6, 48)).sum(3)
    expected = sums.topk(64).indices.sort().values
    assert torch.equal(layer.columns.long(), expected)
    assert layer.constants is None  # of no more use


def test_4_the_order_goes_by_squares_and_back():
    order = square_order(grid_positions(2, 16, 24))
    tokens = torch.arange(2 * 16 * 24)
    assert torch.equal(order.sort().values, tokens)
    assert torch.equal(tokens[order][order.argsort()], tokens)
    positions = grid_positions(2, 16, 24)[order]
    squares = positions.unflatten(0, (-1, 64))
    assert (squares.amax(1) - squares.amin(1)).tolist() == [[0, 7, 7]] * 12
    parts = positions.unflatten(0, (-1, 16))
    assert (parts.amax(1) - parts.amin(1)).tolist() == [[0, 3, 3]] * 48
    # sides that are no multiples, and a dtype that positions come in
    odd = square_order(grid_positions(1, 13, 9).to(torch.bfloat16))
    assert torch.equal(odd.sort().values, torch.arange(117))


def test_4_dense_attention_is_the_same_in_any_order():
    query, key, value = next(walk(1))
    order = square_order(grid_positions(1, 16, 16))
    ordered = F.scaled_dot_product_attention(query[:, :, order], key, value)
    usual = F.scaled_dot_product_attention(query, key, value)
    assert (ordered[:, :, order.argsort()] - usual).abs().max() < 1e-6


def test_5_nothing_that_is_kept_is_given_away():
    """What a step gives may be changed in place, and what is kept does not change with it."""
    first, second, third = walk(3)
    tokens = plain_order(256)
    layers = [retaken(Sparsity(0.15, 48, 1), first, second, tokens) for _ in range(2)]
    results = []
    for layer, spoil in zip(layers, (False, True), strict=True):
        for _ in range(3):
            results.append(layer.attend(Turn(Phase.SPARSE, 1), tokens, inputs(*third)))
            kept = {layer.remainder.untyped_storage().data_ptr(), layer.columns.untyped_storage().data_ptr()}
            assert results[-1].untyped_storage().data_ptr() not in kept
            if spoil:
                results.pop().fill_(torch.nan)
        out = layer.attend(Turn(Phase.RETAKE, 3), tokens, inputs(*third))
        assert out.untyped_storage().data_ptr() != layer.remainder.untyped_storage().data_ptr()
    assert torch.equal(results[0], results[2])
    assert torch.equal(layers[0].remainder, layers[1].remainder)


def test_what_is_kept_has_no_gradient():
    """A dense result may have one, as without sparse steps; nothing that is kept holds on to its graph."""
    first, second = walk(2)
    first[0].requires_grad_()
    second[0].requires_grad_()
    layer, tokens = Layer(Sparsity(0.15, 48, 4)), plain_order(256)
    assert layer.attend(Turn(Phase.CONSTANTS), tokens, inputs(*first)).requires_grad
    assert not layer.constants.requires_grad
    assert layer.attend(Turn(Phase.RETAKE, 1), tokens, inputs(*second)).requires_grad
    assert not layer.remainder.requires_grad
    assert not layer.attend(Turn(Phase.SPARSE, 1), tokens, inputs(*second)).requires_grad


def test_10_errors_grow_with_staleness_and_fall_with_what_is_kept():
    tokens, errors = plain_order(256), {}
    for keep in (0.2, 0.4, 0.7):
        first, second, *later = walk(8, size=0.1)
        layer = retaken(Sparsity(keep, 48, 4), first, second, tokens)
        errors[keep] = [
            relative_rms(
                layer.attend(Turn(Phase.SPARSE, 1), tokens, inputs(*given)),
                F.scaled_dot_product_attention(*given),
            )
            for given in later
        ]
        assert errors[keep] == sorted(errors[keep])
    for one, more in ((0.2, 0.4), (0.4, 0.7)):
        assert all(few > many for few, many in zip(errors[one], errors[more], strict=True))


def test_an_attention_that_was_left_out_of_a_retake_is_dense():
    first, second, third = walk(3)
    tokens = plain_order(256)
    layer = retaken(Sparsity(0.15, 48, 1), first, second, tokens)
    stale = layer.attend(Turn(Phase.SPARSE, 4), tokens, inputs(*third))
    assert torch.equal(stale, F.scaled_dot_product_attention(*third))


def test_what_each_full_step_does():
    phases = [Turn.at(ordinal, warmup=3, refresh=3) for ordinal in range(9)]
    assert [turn.phase.name for turn in phases] == [
        "DENSE", "CONSTANTS", "RETAKE", "SPARSE", "SPARSE", "RETAKE", "SPARSE", "SPARSE", "RETAKE",
    ]  # fmt: skip
    assert [turn.taken for turn in phases] == [-1, -1, 2, 2, 2, 5, 5, 5, 8]
    assert [Turn.at(ordinal, 1, 2).phase.name for ordinal in range(4)] == [
        "CONSTANTS", "RETAKE", "SPARSE", "RETAKE",
    ]  # fmt: skip


# 6 – 8: pipelines.


@both_models
def test_6_interval_1_without_sparsity_is_the_original(name):
    pipe, arguments = built(name)
    plain = draw(pipe, arguments, 6)
    for apply in (hicache.fast.apply, hicache.reference.apply):
        with apply(pipe, EVERY):
            assert torch.equal(draw(pipe, arguments, 6), plain)


@both_models
def test_6_interval_1_with_sparsity_is_sparsity_alone(name):
    pipe, arguments = built(name)
    plain = draw(pipe, arguments, 9)
    with attach(pipe, SPARSE) as attached:
        alone = draw(pipe, arguments, 9)
        assert "4 of 9 full steps" in str(attached)
    assert relative_rms(alone, plain) > 1e-4  # or nothing was sparse
    for apply in (hicache.fast.apply, hicache.reference.apply):
        with apply(pipe, EVERY, sparse=SPARSE) as handle:
            for _ in range(2):  # the second run begins anew
                assert torch.equal(draw(pipe, arguments, 9), alone)
            assert "4 of 9 full steps" in handle.stats.companions["transformer"]
    assert torch.equal(draw(pipe, arguments, 9), plain)


@both_models
@pytest.mark.parametrize("granularity", ["module", "stack", "output"])
def test_6_granularities_record_what_sparse_steps_give(name, granularity):
    pipe, arguments = built(name)
    with attach(pipe, SPARSE):
        alone = draw(pipe, arguments, 6)
    with hicache.fast.apply(pipe, EVERY, granularity=granularity, sparse=SPARSE):
        assert torch.equal(draw(pipe, arguments, 6), alone)


@both_models
def test_fast_is_the_reference_with_sparse_steps(name):
    pipe, arguments = built(name, torch.float64)
    config, drawn = HiCacheConfig(interval=3, warmup=3), []
    for apply, more in ((hicache.fast.apply, {"granularity": "module"}), (hicache.reference.apply, {})):
        with apply(pipe, config, sparse=SPARSE, **more) as handle:
            drawn.append(draw(pipe, arguments, 16))
            stats = handle.stats
        assert stats.skipped_steps > 0
        assert f"of {stats.full_steps} full steps" in stats.companions["transformer"]
        assert not stats.companions["transformer"].startswith("sparse attention: 0 of")
    with hicache.fast.apply(pipe, config, granularity="module"):
        assert relative_rms(draw(pipe, arguments, 16), drawn[0]) > 1e-5
    assert relative_rms(*drawn) < 1e-6  # constants and sums are in float32


@both_models
def test_7_every_layer_of_every_context_is_at_the_same_step(name):
    pipe, arguments = built(name)
    with hicache.fast.apply(pipe, EVERY, sparse=SPARSE) as handle:
        draw(pipe, arguments, 10)
        [denoiser] = handle._denoisers
        [companion] = denoiser.companions.members
        states = list(companion._contexts.values())
        assert len(states) == 2
        sparse = len(companion._undo)
        for state in states:
            assert len(state.turns) == 10
            assert sorted(state.layers) == list(range(1, 1 + sparse))
            assert {layer.taken for layer in state.layers.values()} == {8}  # 2, 5, 8


def test_text_is_always_attended_to():
    pipe, arguments = built("flux_cfg")
    with hicache.fast.apply(pipe, EVERY, sparse=SPARSE) as handle:
        draw(pipe, arguments, 4)
        [denoiser] = handle._denoisers
        for state in denoiser.companions.members[0]._contexts.values():
            assert state.tokens.text == 6
            for layer in state.layers.values():
                assert (layer.columns[..., :6] == torch.arange(6)).all()


def test_8_two_contexts_in_turn_are_two_runs():
    model = pipelines.build_randomized("flux_cfg")[0].transformer
    calls = [
        [
            {
                "hidden_states": noise(1, 256, model.config.in_channels) * (1 + which + 0.1 * step),
                "encoder_hidden_states": noise(1, 6, model.config.joint_attention_dim) * (1 - which),
                "pooled_projections": noise(1, model.config.pooled_projection_dim),
                "timestep": torch.tensor([1 - step / 8]),
                "img_ids": grid_positions(1, 16, 16).float(),
                "txt_ids": torch.zeros(6, 3),
                "guidance": torch.tensor([3.5]),
            }
            for step in range(8)
        ]
        for which in range(2)
    ]
    runs = []
    for order in ([[0], [1]], [[0, 1]]):
        found = {0: [], 1: []}
        for together in order:
            with attach(model, SPARSE), torch.no_grad():
                for step in range(8):
                    for which in together:
                        found[which].append(model(**calls[which][step]).sample)
        runs.append(found)
    for which in range(2):
        assert all(torch.equal(a, b) for a, b in zip(runs[0][which], runs[1][which], strict=True))


# What it leaves behind, holds and refuses.


@both_models
def test_all_is_as_it_was_afterwards(name):
    pipe, arguments = built(name)
    draw(pipe, arguments, 2)
    before = snapshot(pipe.transformer)
    processors = [id(part.processor) for part in pipe.transformer.modules() if hasattr(part, "processor")]
    for apply in (
        attach,
        *(lambda p, s, a=a: a(p, EVERY, sparse=s) for a in (hicache.fast.apply, hicache.reference.apply)),
    ):
        handle = apply(pipe, SPARSE)
        draw(pipe, arguments, 4)
        handle.remove()
        assert snapshot(pipe.transformer) == before
        after = [id(part.processor) for part in pipe.transformer.modules() if hasattr(part, "processor")]
        assert after == processors


def test_what_is_held_is_counted_and_released():
    pipe, arguments = built("flux_cfg")
    with hicache.fast.apply(pipe, EVERY, sparse=SPARSE) as handle:
        draw(pipe, arguments, 5)
        heads, width = pipe.transformer.config.num_attention_heads, pipe.transformer.config.attention_head_dim
        # two contexts of three sparse attentions: a remainder and columns each
        remainder, columns, order = 262 * heads * width * 4, 6 * heads * 64 * 4, 2 * 262 * 8
        wanted = 2 * (3 * (remainder + columns) + order)
        stats = handle.stats
        assert f"{wanted:,} bytes" in stats.companions["transformer"]
        assert stats.kept_bytes >= wanted
        assert f"sparse attention: 2 of 5 full steps, {wanted:,} bytes" in str(stats)
        handle.release()
        assert "0 of 0 full steps, 0 bytes" in handle.stats.companions["transformer"]
        draw(pipe, arguments, 5)
        assert f"{wanted:,} bytes" in handle.stats.companions["transformer"]
    with hicache.reference.apply(pipe, EVERY, sparse=SPARSE) as handle:
        draw(pipe, arguments, 5)
        assert handle.stats.kept_bytes == wanted


def test_a_step_that_is_not_finite_is_forgotten():
    """Remainders would carry it on: the context's warm-up begins anew."""
    pipe, arguments = built("flux_cfg")
    with hicache.fast.apply(pipe, EVERY, sparse=SPARSE) as handle:
        norm, state = pipe.transformer.transformer_blocks[0].norm1, {"calls": 0}

        def spoil(module, args, output):
            state["calls"] += 1
            return tuple(part * torch.nan for part in output) if state["calls"] == 5 else None  # step 2

        hook = norm.register_forward_hook(spoil)
        with pytest.warns(RuntimeWarning, match="not finite"):
            draw(pipe, arguments, 6)
        hook.remove()
        [denoiser] = handle._denoisers
        turns = [len(state.turns) for state in denoiser.companions.members[0]._contexts.values()]
        assert min(turns) < 6
        assert torch.isfinite(draw(pipe, arguments, 6)).all()


def test_another_size_is_another_context():
    pipe, arguments = built("flux_cfg")
    wide = {**arguments, "width": 384}
    with attach(pipe, SPARSE):
        expected = draw(pipe, wide, 6)
    with hicache.fast.apply(pipe, EVERY, sparse=SPARSE):
        draw(pipe, arguments, 6)
        assert torch.equal(draw(pipe, wide, 6), expected)


def test_other_models_are_refused():
    pipe, _ = pipelines.build("sd3")
    for apply in (hicache.fast.apply, hicache.reference.apply):
        with pytest.raises(
            ValueError, match="know FluxTransformer2DModel and WanTransformer3DModel, and got SD3T"
        ):
            apply(pipe, EVERY, sparse=SPARSE)
        assert "_hicache_handle" not in pipe.transformer.__dict__
    with pytest.raises(ValueError, match="got SD3T"):
        attach(pipe)
    pipe, _ = built("flux_cfg")
    with pytest.raises(TypeError, match=r"expected sparse= to be settings of a companion or None, got 0\.15"):
        hicache.fast.apply(pipe, EVERY, sparse=0.15)


def test_an_ip_adapter_is_refused():
    pipe, arguments = pipelines.build("flux_ip_adapter")
    with pytest.raises(ValueError, match=r"expect FluxAttnProcessor in .*, got FluxIPAdapterAttnProcessor"):
        hicache.fast.apply(pipe, EVERY, sparse=SPARSE)
    assert draw(pipe, arguments, 2) is not None
    # or it is loaded later
    plain, plain_arguments = built("flux_cfg")
    with hicache.fast.apply(plain, EVERY, sparse=SPARSE):
        draw(plain, plain_arguments, 2)
        plain.transformer.single_transformer_blocks[0].attn.set_processor(
            pipe.transformer.transformer_blocks[0].attn.processor
        )
        with pytest.raises(ValueError, match="got FluxIPAdapterAttnProcessor"):
            draw(plain, plain_arguments, 2)


def test_context_parallel_and_compiled_models_are_refused():
    pipe, _ = built("flux_cfg")
    processor = pipe.transformer.transformer_blocks[1].attn.processor
    processor._parallel_config = object()
    with pytest.raises(ValueError, match="FluxTransformer2DModel runs in context parallel"):
        hicache.fast.apply(pipe, EVERY, sparse=SPARSE)
    del processor._parallel_config
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    with pytest.raises(
        ValueError, match="FluxTransformer2DModel to run eagerly, got it or a part of it compiled"
    ):
        hicache.fast.apply(pipe, EVERY, sparse=SPARSE)


def test_compiled_later_is_refused():
    pipe, arguments = built("flux_cfg")
    with hicache.fast.apply(pipe, EVERY, sparse=SPARSE):
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
        with pytest.raises(ValueError, match="to run eagerly"):
            draw(pipe, arguments, 2)


def test_masks_and_other_attention_backends_are_refused():
    pipe, arguments = built("flux_cfg")
    with hicache.fast.apply(pipe, EVERY, sparse=SPARSE):
        mask = torch.ones(1, 1, 262, 262, dtype=torch.bool)
        with pytest.raises(ValueError, match="without a mask: got attn_mask"):
            draw(pipe, {**arguments, "joint_attention_kwargs": {"attention_mask": mask}}, 2)
        # one that asks for several attentions, or for none of torch
        attention = pipe.transformer.single_transformer_blocks[1].attn
        forward = type(attention).forward

        def twice(*args, **kwargs):
            forward(attention, *args, **kwargs)
            return forward(attention, *args, **kwargs)

        attention.forward = twice
        with pytest.raises(
            ValueError, match=r"for one scaled_dot_product_attention, got 2: leave diffusers'"
        ):
            draw(pipe, arguments, 2)
        del attention.forward
        assert torch.isfinite(draw(pipe, arguments, 2)).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.0}, r"expected 0 < keep <= 1, got 0\.0"),
        ({"keep": "most"}, "expected keep to be a number, got 'most'"),
        ({"group": 0}, "group: expected an int >= 1, got 0"),
        ({"refresh": 0}, "refresh: expected an int >= 1, got 0"),
        ({"group": 50}, "expected group to be a multiple of sample=4, got 50"),
        ({"dense_layers": -1}, "dense_layers: expected an int >= 0, got -1"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        SparseAttention(**settings)


def test_sparse_alone_and_a_cache_do_not_mix():
    pipe, arguments = built("flux_cfg")
    plain = draw(pipe, arguments, 3)
    with hicache.fast.apply(pipe, EVERY), pytest.raises(ValueError, match="pass sparse= to its apply"):
        attach(pipe)
    with attach(pipe), pytest.raises(ValueError, match="are sparse already: remove"):
        hicache.fast.apply(pipe, EVERY, sparse=SPARSE)
    assert torch.equal(draw(pipe, arguments, 3), plain)


def test_settings_and_copies_of_a_model():
    """A copy of a hooked model is plain: nothing of it reaches into the other."""
    pipe, _ = built("flux_cfg")
    companion = SPARSE.beside(pipe.transformer)
    companion.begin(
        FullCall(companion, 0, 3, {"img_ids": torch.zeros(16, 3), "encoder_hidden_states": noise(1, 6, 8)})
    )
    assert companion.running
    companion.end()
    assert not companion.running
    assert copy.deepcopy(SPARSE) == SPARSE


def test_skipped_steps_are_captured_and_full_ones_are_not(monkeypatch):
    """By the code that captures on a GPU, over a strict mock of torch.cuda: replays are operators alone."""

    class Backend(CudaBackend):
        def unavailable(self, device):
            return super().unavailable(torch.device("cuda", 1))

    config = HiCacheConfig(interval=3, warmup=3)
    pipe, arguments = built("flux_cfg")
    with hicache.fast.apply(pipe, config, sparse=SPARSE):
        eager = draw(pipe, arguments, 16)
    monkeypatch.setattr(hicache.fast, "CudaBackend", Backend)
    monkeypatch.setattr(capture_safety, "_on_host", lambda device: False)
    with (
        Runtime(tensors=1).installed(),
        hicache.fast.apply(pipe, config, sparse=SPARSE, cuda_graphs="full") as handle,
        torch.no_grad(),
    ):
        assert close(draw(pipe, arguments, 16), eager)
        [graphs] = handle.stats.graphs.values()
    assert graphs.captures
    assert graphs.replays
    assert graphs.partly == (
        "only skipped steps are captured: attention does something else at every kind of full step"
    )


def test_nothing_is_captured_where_the_rest_is_not_run():
    stats = GraphStats()
    Scope(stats, "of a reason", full_only=True)
    assert stats.eager == (
        "nothing of the model runs at skipped steps, and full steps are not captured: of a reason"
    )


def test_generate_has_it_as_a_mode(tmp_path, shapes_pipe):
    arguments = ["generate", PROMPTS[0], "--steps", "12", "--interval", "2", "--gpus", "cpu"]
    assert main([*arguments, "--mode", "sparse", "--out", str(tmp_path / "sparse")]) == 0
    with hicache.fast.apply(shapes_pipe, HiCacheConfig(interval=2), sparse=SparseAttention()) as handle:
        by_hand = shapes_pipe(PROMPTS[0], 12, generator=torch.Generator().manual_seed(0)).images[0]
        assert not handle.stats.companions["transformer"].startswith("sparse attention: 0 of")
    with Image.open(tmp_path / "sparse" / "000000.png") as picture:
        assert picture.tobytes() == by_hand.tobytes()
    [line] = (tmp_path / "sparse" / "done.jsonl").read_text().splitlines()
    assert json.loads(line)["skipped_steps"] > 0
    assert '"keep": 0.15' in (tmp_path / "sparse" / "run.json").read_text()
    code = (
        "import sys; from hicache.launch.settings import Settings; s = Settings(steps=9); s.plain()\n"
        "assert 'hicache.companions.sparse' not in sys.modules; Settings(mode='sparse').plain()\n"
        "assert 'hicache.companions.sparse' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_of_it_is_imported_by_hicache():
    code = (
        "import sys, hicache.fast, hicache.reference\n"
        "assert not [m for m in sys.modules if m.startswith(('hicache.companions', "
        "'hicache_kernels.sparse_attention'))]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
