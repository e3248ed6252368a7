"""What the native backend does once a process: the choice of an instruction set, threads, and forks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hicache_kernels import backend_status

ROOT = Path(__file__).parents[2]
MISSING = backend_status("cpu")["native"]
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"native: {MISSING}")


def run_script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """One of ``scripts/`` in a process of its own."""
    return subprocess.run(
        [sys.executable, str(Path(__file__).parent / "scripts" / name), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# what the processor must have for a build to be taken (csrc/cpu.cpp)
NEEDS = {"baseline": set(), "avx2": {"avx2", "f16c"}, "avx512": {"avx512f", "avx512bw"}}


def cpu_flags() -> set[str]:
    """What the processor has, as Linux tells it."""
    told = Path("/proc/cpuinfo")
    found = re.search(r"^flags\s*:(.*)$", told.read_text(), re.M) if told.exists() else None
    return set(found[1].split()) if found else set()


@pytest.mark.parametrize(
    "isa", [pytest.param(one, marks=[pytest.mark.slow] * (one == "avx2")) for one in NEEDS]
)
def test_every_instruction_set_gives_the_same_bits(isa):
    if missing := NEEDS[isa] - cpu_flags():
        pytest.skip(f"this processor has no {', '.join(sorted(missing))}: {isa} cannot run here")
    done = run_script("instruction_set.py", HICACHE_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr
    baseline = run_script("instruction_set.py", HICACHE_CPU_ISA="baseline")
    assert done.stdout.split() == [isa, baseline.stdout.split()[1]]


@pytest.mark.few(1)
@pytest.mark.parametrize("isa", NEEDS)
def test_past_the_cache_every_tactic_gives_the_reference_s_bits(isa):
    if missing := NEEDS[isa] - cpu_flags():
        pytest.skip(f"this processor has no {', '.join(sorted(missing))}: {isa} cannot run here")
    done = run_script("past_the_cache.py", HICACHE_CPU_ISA=isa, HICACHE_CPU_LAST_LEVEL="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [isa]


def test_in_the_cache_nothing_is_tried():
    code = (
        "import torch; from hicache_kernels import gated_sum; from hicache_kernels.backends import native; "
    )
    code += "gated_sum(torch.ones(2, 8), torch.ones(1, 1, 16), None, torch.ones(1)); print(native.tactics())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]"]


def test_unknown_instruction_set_is_an_error():
    done = run_script("instruction_set.py", HICACHE_CPU_ISA="sse9")
    assert done.returncode != 0
    assert "expected baseline, avx2 or avx512, got 'sse9'" in done.stderr


def test_threads_follow_torch_and_survive_a_fork():
    done = run_script("threads.py")
    assert done.returncode == 0, done.stderr


def test_only_the_threads_that_are_needed_wake():
    done = run_script("woken_threads.py")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 1


def test_where_no_thread_is_to_be_had_the_caller_does_the_work():
    done = run_script("no_more_threads.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["computed"]


@pytest.mark.slow
def test_a_fork_while_other_threads_compute_never_hangs_the_child():
    done = run_script("fork_while_computing.py", "300", "20")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0"]
