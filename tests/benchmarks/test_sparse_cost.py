"""The counts of sparse full steps: against the models' weights and operations that torch counts; the page."""

from __future__ import annotations

import csv
from pathlib import Path

import diffusers
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import sparse_cost
from benchmarks.common import tables
from hicache.companions.sparse import SparseAttention
from hicache.companions.sparse.layer import Inputs, Layer, Phase, Sparsity, Tokens, Turn
from hicache_kernels.sparse_attention import kept_columns

ROOT = Path(__file__).parents[2]
TOKENS, WIDTH, HEADS = 384, 64, 2


def weights(block: nn.Module, left_out: tuple[str, ...]) -> int:
    linear = [(name, part) for name, part in block.named_modules() if isinstance(part, nn.Linear)]
    return sum(part.weight.numel() for name, part in linear if not name.startswith(left_out))


def test_projections_are_the_models():
    with torch.device("meta"):
        flux = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1)
        wan = diffusers.WanTransformer3DModel(num_layers=1)
    text = ("norm", "attn.add_", "attn.to_add_out", "ff_context")
    assert weights(flux.transformer_blocks[0], text) == sparse_cost.FLUX.weights
    assert weights(flux.single_transformer_blocks[0], ("norm",)) == sparse_cost.FLUX.weights
    assert weights(wan.blocks[0], ("attn2.to_k", "attn2.to_v")) == sparse_cost.WAN.weights


def test_operations_of_an_attention_are_those_that_run():
    model = sparse_cost.Model(1, WIDTH, HEADS, 0)
    settings = SparseAttention()
    layer = Layer(Sparsity(settings.keep, settings.group, settings.sample))
    kept, tokens = kept_columns(TOKENS, 0, settings.keep), Tokens(0, torch.arange(TOKENS))
    query = torch.randn(1, HEADS, TOKENS, WIDTH // HEADS)

    def dense():
        return torch.nn.functional.scaled_dot_product_attention(query, query, query)

    turns = [
        Turn(Phase.DENSE),
        Turn(Phase.CONSTANTS),
        Turn(Phase.RETAKE, 2),
        Turn(Phase.SPARSE, 2),
        Turn(Phase.RETAKE, 5),
    ]
    for turn in turns:
        # a fused attention's operations are not counted on a CPU
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
            layer.attend(turn, tokens, Inputs(query, query, query, None, dense))
        expected = model.attention(turn.phase, TOKENS, kept, retaken=turn.taken > 2)
        assert counted.get_total_flops() == expected, turn
    assert (
        layer.nbytes - 2 * TOKENS * WIDTH == 4 * HEADS * 2 * kept + 2 * TOKENS * WIDTH
    )  # the remainder in fp32


def test_the_page_has_the_table():
    table = tables.markdown(sparse_cost.HEADER, [sparse_cost.cells(row) for row in sparse_cost.rows()])
    assert table in (ROOT / "docs" / "companions.md").read_text(encoding="utf-8")
    with (ROOT / "benchmarks/results/sparse-cost.csv").open(encoding="utf-8") as file:
        saved = list(csv.reader(file))
    assert [row[0] for row in saved[1:]] == list(sparse_cost.DRAWN)
    assert [int(row[-1]) for row in saved[1:]] == [row[-1] for row in sparse_cost.rows()]
