"""What several workers find is what one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.clusters import two_nodes
from tests.support.scripts import ROOT

pytest.importorskip("ray", reason="pip install 'hicache[cluster]'")

ASKED = (
    *("a red ring on blue", "a green square on yellow", "a white triangle on purple"),
    *("--mode", "hicache,reuse", "--interval", "3", "--steps", "8", "--repeats", "2", "--batch", "1"),
)


def command(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "hicache.cli", "compare", *ASKED, "--out", str(out), *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def found(out: Path, *options: str) -> list[dict[str, Any]]:
    """The full run's numbers and the variants'."""
    done = command(out, *options)
    assert done.returncode == 0, done.stderr
    numbers = json.loads(out.with_suffix(".json").read_text())
    assert "</html>" in out.read_text()
    return [numbers["full"], *numbers["variants"]]


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    """But for the seconds."""
    timed = ("seconds", "seconds_of_rounds", "speedup")
    return [{k: v for k, v in a.items() if k not in timed} for a in one] == [
        {k: v for k, v in b.items() if k not in timed} for b in other
    ]


@pytest.mark.slow
def test_two_workers_and_a_cluster_of_two_nodes_find_what_one_process_does(tmp_path: Path):
    alone = found(tmp_path / "alone.html")
    assert same(found(tmp_path / "two.html", "--workers", "2", "--threads", "1"), alone)
    with two_nodes() as address:
        cluster = found(tmp_path / "cluster.html", "--workers", "2", "--threads", "1", "--ray", address)
    assert same(cluster, alone)
    assert all(len(one["seconds_of_rounds"]) == 2 for one in cluster)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gpus", "5"), "this machine has no GPU that torch can use"),
        (("--workers", "0"), "--workers: expected an int >= 1, got 0"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (("--ray", "127.0.0.1:1"), "Ray cannot reach a cluster at 127.0.0.1:1"),
                (
                    ("--workers", "2", "--mode", "fitted", "--interval", "4"),
                    "expected rows that come with the model",
                ),
            ]
        ),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(options, message: str, tmp_path: Path):
    done = command(tmp_path / "page.html", *options)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
