"""What a full step reads and writes to record a few sums of its modules' outputs, in bytes."""

from __future__ import annotations

import pytest
import torch

from benchmarks import recording
from tests.support.operations import Traffic


@pytest.mark.parametrize("name", ["wan", "ltx", "pixart", "sana"])
def test_an_output_is_added_to_a_sum_in_one_pass(name: str):
    """In bf16 10 bytes: two of the output, eight of the sum in fp32. Two outputs of three are in two sums."""
    assert recording.bytes_a_block(name) <= 5 * 10 + 0.1


def test_shared_gates_without_tables_take_one_pass_an_output():
    assert recording.bytes_a_block("flux2") <= 10.1


def test_traffic_counts_each_tensor_that_is_read_and_each_that_is_written():
    low, high, row = torch.zeros(4, 8).bfloat16(), torch.zeros(4, 8), torch.zeros(8)
    expected = {
        "sum": (lambda: high.add_(low), 32 * (4 + 2 + 4)),
        "weighed": (lambda: high.addcmul_(low, row), 32 * (4 + 2 + 4) + 8 * 4),
        "expanded": (lambda: high.mul(row.expand(4, 8)), 32 * (4 + 4) + 8 * 4),
        "copy": (lambda: high.copy_(low), 32 * (2 + 4)),
        "cast": (lambda: low.float(), 32 * (2 + 4)),
        "out": (lambda: torch.sub(high, low, out=high), 32 * (4 + 2 + 4)),
        "several": (lambda: torch.stack([high, high]), 32 * (8 + 8)),
        "view": (lambda: high.view(8, 4)[1:].t(), 0),
        "empty": (lambda: torch.empty_like(high), 0),
    }
    for label, (operation, nbytes) in expected.items():
        with Traffic() as traffic:
            operation()
        assert traffic.nbytes == nbytes, label
