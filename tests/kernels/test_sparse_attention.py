"""Column-sparse attention: torch against dense softmax in float64, Triton's kernels against torch."""

from __future__ import annotations

import pytest
import torch

from hicache_kernels import sparse_attention as sparse
from hicache_kernels.backends import triton as ops_in_triton
from hicache_kernels.sparse_attention import reference
from tests.support.scripts import passed_interpreted

INTERPRETED = ops_in_triton.interpreted()
BACKENDS = ["torch", *(["triton"] if INTERPRETED else [])]
backends = pytest.mark.parametrize("backend", BACKENDS)
# batch, heads, tokens, width, group, kept: whole tiles; no multiple of anything; fewer tokens than a group
SHAPES = [(1, 2, 128, 32, 64, 64), (2, 3, 139, 20, 48, 37), (1, 1, 40, 16, 192, 24), (1, 2, 200, 64, 96, 130)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


def skip_what_the_interpreter_cannot(backend, dtype):
    """It multiplies the bits of bf16 as whole numbers: that dtype is compiled (test_sparse_ptx.py) alone."""
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no dot of bf16")


def tensors(shape, dtype=torch.float32, seed=0):
    """Query, key, value as projections leave them, and an earlier query and key close to them."""
    batch, heads, tokens, width = shape[:4]
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(batch, tokens, heads, width, generator=generator) for _ in range(5)]
    query, key, value = (tensor.to(dtype).transpose(1, 2) for tensor in made[:3])
    old = [
        (now + 0.1 * change).to(dtype).transpose(1, 2) for now, change in zip(made, made[3:], strict=False)
    ]
    return query, key, value, *old


def scores(query, key):
    return query.double() @ key.double().transpose(-1, -2) / query.shape[-1] ** 0.5


def random_columns(shape, seed=1):
    batch, heads, tokens, _, group, kept = shape
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(batch, heads, -(-tokens // group), tokens, generator=generator).argsort(-1)
    return order[..., :kept].sort(-1).values.int()


def by_hand(query, key, value, columns, group):
    """Sparse attention as a masked softmax in float64."""
    groups = torch.arange(query.shape[2]) // group
    mask = torch.zeros(*columns.shape[:3], query.shape[2], dtype=torch.bool)
    mask = mask.scatter(-1, columns.long(), True)[:, :, groups]  # [B, H, N, N]
    weights = scores(query, key).masked_fill(~mask, -torch.inf).softmax(-1)
    return weights @ value.double()


@backends
@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_attention_is_softmax_over_a_groups_columns(backend, shape, dtype):
    skip_what_the_interpreter_cannot(backend, dtype)
    query, key, value, *_ = tensors(shape, dtype)
    columns, group = random_columns(shape), shape[4]
    found = sparse.sparse_attention(query, key, value, columns, group, backend=backend)
    error = (found.double() - by_hand(query, key, value, columns, group)).abs().max()
    assert found.dtype == dtype
    assert error < {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]


@backends
@shapes
def test_attention_on_a_base(backend, shape):
    query, key, value, base, _ = tensors(shape)
    columns, group = random_columns(shape), shape[4]
    alone = by_hand(query, key, value, columns, group)
    for subtract, expected in ((False, base + alone), (True, base - alone)):
        before = base.clone()
        found = sparse.sparse_attention(
            query, key, value, columns, group, base=base, subtract=subtract, backend=backend
        )
        assert (found.double() - expected).abs().max() < 1e-5
        assert torch.equal(base, before)
        assert found.data_ptr() != base.data_ptr()


@backends
@shapes
def test_constants_are_the_rows_logarithms(backend, shape):
    query, key, *_ = tensors(shape)
    found = sparse.row_constants(query, key, backend=backend)
    assert (found - scores(query, key).logsumexp(-1)).abs().max() < 1e-5


@backends
@shapes
def test_3_column_sums_are_softmax_sums_with_old_constants(backend, shape):
    query, key, _, old_query, old_key = tensors(shape)
    tokens, group = shape[2], shape[4]
    constants = sparse.row_constants(old_query, old_key, backend=backend)
    weights = (scores(query, key) - scores(old_query, old_key).logsumexp(-1, keepdim=True)).exp()
    padded = torch.nn.functional.pad(weights, (0, 0, 0, -tokens % group))
    expected = padded.unflatten(2, (-1, group)).sum(3)
    found = sparse.column_sums(query, key, constants, group, backend=backend)
    assert found.shape == expected.shape
    assert ((found - expected).abs() / expected.clamp(min=1)).max() < 1e-5


@backends
@pytest.mark.parametrize("shape", SHAPES[:2], ids=lambda s: "x".join(map(str, s)))
def test_some_rows_tell_of_a_group(backend, shape):
    """Constants and sums of every fourth row are those rows' own."""
    query, key, *_ = tensors(shape)
    some, group = query[:, :, ::4], shape[4] // 4
    constants = sparse.row_constants(some, key, backend=backend)
    assert (constants - scores(some, key).logsumexp(-1)).abs().max() < 1e-5
    padded = torch.nn.functional.pad(scores(some, key).softmax(-1), (0, 0, 0, -some.shape[2] % group))
    expected = padded.unflatten(2, (-1, group)).sum(3)
    found = sparse.column_sums(some, key, constants, group, backend=backend)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-5
    columns = sparse.choose_columns(some, key, constants, group, 32, backend=backend)
    assert columns.shape == (*shape[:2], -(-shape[2] // shape[4]), 32)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scale_strides_and_heads_apart(backend, dtype):
    """Any layout that query, key and value come in, and a scale of one's own."""
    skip_what_the_interpreter_cannot(backend, dtype)
    shape = SHAPES[1]
    query, key, value, *_ = tensors(shape, dtype)
    columns, group = random_columns(shape), shape[4]
    usual = sparse.sparse_attention(query, key, value, columns, group, backend=backend)
    headed = [tensor.contiguous() for tensor in (query, key, value)]  # one head after the other
    assert torch.equal(usual, sparse.sparse_attention(*headed, columns, group, backend=backend))
    constants = sparse.row_constants(query, key, scale=0.5, backend=backend)
    expected = (scores(query, key) * query.shape[-1] ** 0.5 * 0.5).logsumexp(-1)
    assert (constants - expected).abs().max() < 1e-4
    assert torch.equal(constants, sparse.row_constants(headed[0], key, scale=0.5, backend=backend))


@backends
def test_columns_are_chosen_alike_whatever_heads_are_done_at_once(backend, monkeypatch):
    shape = SHAPES[1]
    query, key, *_ = tensors(shape)
    constants = sparse.row_constants(query, key, backend=backend)
    usual = sparse.choose_columns(query, key, constants, 48, 64, 7, backend=backend)
    monkeypatch.setattr(sparse, "SUMS_NBYTES", 1)
    assert torch.equal(usual, sparse.choose_columns(query, key, constants, 48, 64, 7, backend=backend))
    assert torch.equal(usual[..., :7], torch.arange(7).expand(*usual.shape[:3], 7).int())
    assert (usual.diff(dim=-1) > 0).all()


def test_of_equal_columns_the_first_are_taken():
    sums = torch.tensor([1.0, 2.0, 2.0, 0.5, 2.0, 2.0, 3.0])
    assert sparse.top_columns(sums, 3, 0).tolist() == [1, 2, 6]
    assert sparse.top_columns(sums, 3, 1).tolist() == [0, 1, 6]
    assert sparse.top_columns(torch.zeros(9), 4, 0).tolist() == [0, 1, 2, 3]
    assert sparse.top_columns(sums, 7, 7).tolist() == list(range(7))


@pytest.mark.parametrize(
    ("tokens", "text", "keep", "kept"),
    [(4608, 512, 0.15, 1152), (4096, 0, 0.15, 640), (100, 0, 0.5, 64), (100, 60, 0.5, 100), (64, 0, 1.0, 64)],
)
def test_columns_come_in_whole_tiles_beside_the_text(tokens, text, keep, kept):
    assert sparse.kept_columns(tokens, text, keep) == kept


def test_torch_in_chunks(monkeypatch):
    """Memory for intermediate tensors is bounded, and results do not depend on it."""
    shape = SHAPES[3]
    query, key, value, *_ = tensors(shape)
    columns = random_columns(shape)
    constants = sparse.row_constants(query, key)
    usual = sparse.sparse_attention(query, key, value, columns, 96)
    monkeypatch.setattr(reference, "CHUNK", 1000)
    assert torch.allclose(usual, sparse.sparse_attention(query, key, value, columns, 96), atol=1e-6)
    assert torch.allclose(constants, sparse.row_constants(query, key), atol=1e-6)


def test_bad_arguments_are_named():
    query, key, value, *_ = tensors(SHAPES[0])
    columns, constants = random_columns(SHAPES[0]), torch.zeros(1, 2, 128)
    with pytest.raises(
        ValueError, match=r"of one shape, dtype and device, got \(1, 2, 128, 32\) .*, \(1, 1, 128"
    ):
        sparse.row_constants(query, key[:, :1])
    with pytest.raises(ValueError, match=r"expected constants to be \(1, 2, 128\) torch.float32, got"):
        sparse.column_sums(query, key, constants.double(), 64)
    with pytest.raises(ValueError, match=r"expected columns to be \(1, 2, 2, 64\) torch.int32, got"):
        sparse.sparse_attention(query, key, value, columns.long(), 64)
    with pytest.raises(ValueError, match="expected base with subtract=True"):
        sparse.sparse_attention(query, key, value, columns, 64, subtract=True)
    with pytest.raises(ValueError, match=r"expected 9 \(the text's\) to 128 \(all\) columns, got 8"):
        sparse.choose_columns(query, key, constants, 64, 8, 9)
    with pytest.raises(ValueError, match="expected group >= 1 rows, got 0"):
        sparse.column_sums(query, key, constants, 0)
    with pytest.raises(ValueError, match="unknown backend 'cuda'; expected one of auto, triton, torch"):
        sparse.row_constants(query, key, backend="cuda")


def test_triton_without_a_gpu_says_why():
    query, key, *_ = tensors(SHAPES[0])
    if INTERPRETED:
        with pytest.raises(RuntimeError, match=r"it takes torch\.float32, .*, not torch\.float64"):
            sparse.row_constants(query.double(), key.double(), backend="triton")
        return
    with pytest.raises(RuntimeError, match=r"backend 'triton' cannot run: (it runs on CUDA|triton is not)"):
        sparse.row_constants(query, key, backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_9_on_a_card(shape, dtype):
    """Against torch on the CPU, from the same numbers."""
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    query, key, value, base, _ = tensors(shape, dtype)
    columns, group = random_columns(shape), shape[4]
    there = [tensor.cuda() for tensor in (query, key, value)]
    more = {"backend": "triton"}
    found = sparse.sparse_attention(*there, columns.cuda(), group, base=base.cuda(), subtract=True, **more)
    expected = sparse.sparse_attention(query, key, value, columns, group, base=base, subtract=True)
    assert (found.cpu().double() - expected.double()).abs().max() < tolerance
    constants = sparse.row_constants(query, key)
    assert (sparse.row_constants(*there[:2], **more).cpu() - constants).abs().max() < 1e-3
    sums = sparse.column_sums(*there[:2], constants.cuda(), group, **more).cpu()
    assert (sums - sparse.column_sums(query, key, constants, group)).abs().max() < 1e-2


def test_9_triton_in_its_interpreter():
    """These tests again, in a process where Triton's kernels run on the CPU."""
    if INTERPRETED:
        pytest.skip("this is that process")
    pytest.importorskip("triton", reason="triton is not installed")
    assert passed_interpreted(__file__) >= 20
