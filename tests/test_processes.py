"""Tokens or weights spread over processes: each keeps a history, and steps are skipped as without."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from hicache import weights
from tests.support.scripts import run_script

# What a script may be off by: sums over tokens are made in another order where those are spread.
SCRIPTS = {"context_parallel.py": 1e-5, "sharded.py": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "name"),
    [
        *(("context_parallel.py", name) for name in ("flux", "wan", "qwen", "flux_kontext", "qwen_edit")),
        *(("sharded.py", name) for name in ("flux", "wan", "qwen")),
    ],
)
def test_two_processes_draw_what_one_does(script: str, name: str):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda rank: run_script(script, rank, "2", port, name), ("0", "1"))
    assert first.returncode == 0, first.stderr
    assert second.returncode == 0, second.stderr
    lines = [line.split() for line in first.stdout.splitlines()]
    assert [line[:2] for line in lines] == [[name, "stack"], [name, "module"]]
    for _, _, off, blocks, expected in lines:
        assert float(off) <= SCRIPTS[script]
        assert blocks == expected


class Wrapper(torch.Tensor):
    """A tensor around two others and something that is none, as quantised and sharded weights are."""

    @staticmethod
    def __new__(cls, numbers: torch.Tensor, scale: torch.Tensor) -> Wrapper:
        made = torch.Tensor._make_wrapper_subclass(cls, numbers.shape)
        made.numbers, made.scale, made.mesh = numbers, scale, "two processes"
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers", "scale", "mesh"], None


def test_parts_of_a_weight():
    numbers, scale = torch.ones(2), torch.ones(1)
    plain = torch.ones(3)
    assert [part is plain for part in weights.weight_parts(plain)] == [True]
    parts = list(weights.weight_parts(Wrapper(numbers, scale)))
    assert [a is b for a, b in zip(parts, (numbers, scale), strict=True)] == [True, True]


def test_weights_of_one_process_are_not_sharded():
    assert not weights.is_sharded(nn.Linear(2, 2))
