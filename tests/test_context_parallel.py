"""Tokens spread over processes: each keeps the history of its own, and steps are skipped as without."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.scripts import run_script


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "wan", "qwen", "flux_kontext", "qwen_edit"])
def test_two_processes_draw_what_one_does(name: str):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(
            lambda rank: run_script("context_parallel.py", rank, "2", port, name), ("0", "1")
        )
    assert first.returncode == 0, first.stderr
    assert second.returncode == 0, second.stderr
    lines = [line.split() for line in first.stdout.splitlines()]
    assert [line[:2] for line in lines] == [[name, "stack"], [name, "module"]]
    for _, _, off, blocks, expected in lines:
        assert float(off) < 1e-5
        assert blocks == expected
