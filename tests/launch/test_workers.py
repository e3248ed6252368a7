"""The same pictures whoever draws them, and none lost or made twice whoever is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hicache.demo.prompts import random_prompts
from hicache.launch.cluster import Shift
from hicache.launch.prompts import Prompt
from hicache.launch.tasks import Picture, Task
from tests.support.clusters import two_nodes
from tests.support.scripts import ROOT

ray = pytest.importorskip("ray", reason="pip install 'hicache[cluster]'")

STEPS = ("--steps", "6", "--interval", "3", "--warmup", "1", "--threads", "1")
KILLS = 5


def start(prompts: Path, out: Path, *options: str, mark: str = "") -> subprocess.Popen[str]:
    """The launcher in a process of its own, and its workers with a mark in their environments."""
    command = [sys.executable, "-m", "hicache.cli", "generate", "--prompts", str(prompts), "--out", str(out)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "HICACHE_TEST_MARK": mark,
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    return subprocess.Popen(
        [*command, *STEPS, *options],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def draw(prompts: Path, out: Path, *options: str) -> dict[int, str]:
    """All pictures: their digests by number."""
    process = start(prompts, out, *options)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    return digests(out)


def lines(out: Path) -> list[dict[str, Any]]:
    path = out / "done.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def digests(out: Path) -> dict[int, str]:
    return {line["index"]: line["sha256"] for line in lines(out) if line["error"] is None}


def workers_of(mark: str) -> list[int]:
    """Processes of Ray that draw, with a mark in their environments."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            draws = b"ray::_Remote" in (folder / "cmdline").read_bytes()
            if draws and f"HICACHE_TEST_MARK={mark}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it is gone, or somebody else's
            continue
    return found


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(random_prompts(64, 3)) + "\n")
    return path


@pytest.fixture
def cluster() -> Iterator[str]:
    with two_nodes() as address:
        yield address


def test_two_workers_draw_what_one_process_does(prompts: Path, tmp_path: Path):
    alone = draw(prompts, tmp_path / "one", "--limit", "6")
    assert len(set(alone.values())) == 6
    assert draw(prompts, tmp_path / "two", "--limit", "6", "--workers", "2") == alone


@pytest.mark.slow
def test_a_cluster_draws_what_one_process_does(prompts: Path, tmp_path: Path, cluster: str):
    alone = draw(prompts, tmp_path / "one")
    assert len(set(alone.values())) == 64
    assert draw(prompts, tmp_path / "two", "--workers", "2") == alone
    assert draw(prompts, tmp_path / "cluster", "--workers", "2", "--ray", cluster) == alone


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="workers are found by /proc")
def test_the_others_go_on_when_a_worker_is_lost(prompts: Path, tmp_path: Path):
    """And Ray starts it again: the launcher ends well by itself, twice robbed of a worker."""
    out, mark = tmp_path / "out", uuid.uuid4().hex
    process = start(prompts, out, "--workers", "2", mark=mark)
    deadline = time.monotonic() + 300
    for wanted in (4, 20):
        while len(digests(out)) < wanted:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(workers_of(mark)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert [line["error"] for line in lines(out)] == [None] * 64
    assert sorted(digests(out)) == list(range(64))


def task(index: int) -> Task:
    return Task((Picture(index, index, Prompt(index, "a prompt")),), frozenset({index}))


def test_who_has_what_when_a_worker_is_lost():
    """Its tasks go to the others, it gets none until it is back, and what kills three workers has failed."""
    shift, tasks = Shift(2), map(task, range(9))
    for expected in (0, 1, 0, 1):
        worker, one = shift.idle(), shift.next(tasks)
        assert worker == expected
        shift.give(f"answer {one.pictures[0].index}", worker, one)
    assert shift.idle() is None  # everybody has one to draw and one that waits
    for loss in range(3):
        worker, first = shift.take("answer 0")
        behind = [answer for answer, (whose, _) in shift.running.items() if whose == worker]
        assert shift.lose(worker, first)
        failed = list(shift.given_up(first, RuntimeError("it died")))
        shift.give("back", worker, None)
        for answer in behind:
            _, other = shift.take(answer)
            assert not shift.lose(worker, other)  # no news, and not charged
            assert not list(shift.given_up(other, RuntimeError("it died")))
        assert [made.error for _, made in failed] == ["3 workers were lost drawing it: it died"] * (loss == 2)
        assert shift.idle() != worker
        shift.take("back")
        shift.away.discard(worker)
        assert shift.idle() == worker
        if loss < 2:
            shift.again.remove(first)
            shift.give("answer 0", worker, first)
    assert [one.pictures[0].index for one in shift.again] == [2]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="workers are found by /proc")
def test_what_is_killed_is_made_up_for(prompts: Path, tmp_path: Path):
    """Workers and drivers in turn, at random moments; then it is started again."""
    alone, out, chance = draw(prompts, tmp_path / "one"), tmp_path / "killed", random.Random(14)
    for number in range(KILLS):
        mark = uuid.uuid4().hex
        process = start(prompts, out, "--workers", "2", mark=mark)
        wanted = len(digests(out)) + chance.randrange(1, 8)
        deadline = time.monotonic() + 200
        while process.poll() is None and len(digests(out)) < wanted and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(chance.random() * 0.3)
        assert process.poll() is None, process.communicate()
        victims = workers_of(mark) if number % 2 else [process.pid]
        os.kill(chance.choice(victims), signal.SIGKILL)
        if number % 2:  # it goes on with what is left; enough of that was seen
            before = len(digests(out))
            while process.poll() is None and len(digests(out)) < min(64, before + 4):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
    assert draw(prompts, out, "--workers", "2") == alone
    assert not [line["error"] for line in lines(out) if line["error"]]
    assert Counter(line["index"] for line in lines(out) if line["error"] is None) == dict.fromkeys(
        range(64), 1
    )
    assert sorted(path.name for path in out.glob("*.png")) == [f"{index:06d}.png" for index in range(64)]
    assert not list(out.glob("*.part"))
