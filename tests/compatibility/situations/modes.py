"""How torch runs the model: modes, compilation, attention."""

from __future__ import annotations

import functools
import socket
import subprocess
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, Final

import torch

from tests.compatibility.checks import (
    FRESH,
    Change,
    Drawn,
    Outcome,
    afterwards,
    apply,
    as_reference,
    between,
    draw,
    plain_run,
    require,
    same,
)
from tests.compatibility.registry import Theme
from tests.compatibility.subjects import BARE, FEW, MOST, Subject, build
from tests.support.comparisons import relative_rms
from tests.support.runs import blocks_of
from tests.support.scripts import run_script

THEME: Final = Theme("Modes of torch, compilation, attention")
Mode = Callable[[], AbstractContextManager[Any]]


def _run_under(mode: Mode, name: str) -> Outcome:
    """The whole run, the first one too, is under a mode; compared with a fresh run without it."""

    def event(subject: Subject, handle: Any) -> None:
        with mode():
            draw(subject, handle)

    return afterwards(event, name)


THEME.situation("`torch.inference_mode` before", "A run in it, then one without.", MOST)(
    functools.partial(_run_under, torch.inference_mode)
)
THEME.situation("autocast before", "A run under `torch.autocast` in bfloat16, then one without.", FEW)(
    functools.partial(_run_under, functools.partial(torch.autocast, "cpu", torch.bfloat16))
)


@THEME.situation("autocast", "A second run under it, as a first.", FEW)
def _autocast(name: str) -> Outcome:
    def one(subject: Subject, handle: Any) -> Drawn:
        with torch.autocast("cpu", torch.bfloat16):
            return draw(subject, handle)

    lived, alone = build(name), build(name)
    with apply(lived) as handle:
        one(lived, handle)
        drawn = one(lived, handle)
    with apply(alone) as handle:
        fresh = one(alone, handle)
    same(drawn, fresh)
    return Outcome(FRESH, fresh.granularity)


@THEME.situation("training mode", "`transformer.train()` between runs, drawn without gradients.", FEW)
def _training(name: str) -> Outcome:
    return between(lambda s: [part.train() for part in s.transformers], name)


def _checkpoint(subject: Subject) -> None:
    for part in subject.transformers:
        part.enable_gradient_checkpointing()


@THEME.situation("gradient checkpointing", "`enable_gradient_checkpointing()` between runs.", FEW)
def _checkpointing(name: str) -> Outcome:
    return between(_checkpoint, name)


@THEME.situation(
    "a call for gradients",
    "A transformer in training is called with gradients on: nothing is cached of that.",
    BARE,
)
def _gradients(name: str) -> Outcome:
    subject = build(name)
    subject.pipe.train()
    subject.notes["gradients"] = True
    plain = subject.draw()
    with apply(subject) as handle:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            drawn = subject.draw()
            drawn.square().mean().backward()
        require(torch.equal(drawn, plain), "off the uncached run")
        require(any(p.grad is not None for p in subject.pipe.parameters()), "no gradients")
        subject.notes["gradients"] = False
        require(handle.stats.skipped_steps == 0, "steps were skipped")
    said = [str(one.message) for one in caught if str(one.message).startswith("hicache")]
    require(len(said) == 1, f"warns {said}")
    return Outcome(f"uncached bits, warns: {said[0]}")


# Attention.


def _fused(subject: Subject) -> None:
    for part in subject.transformers:
        part.fuse_qkv_projections()


_FUSED: Final = (
    "flux",
    "flux2",
    "qwen",
    "wan",
    "wan22",
    "hunyuan",
    "cogvideox",
    "pixart",
    "sana",
    "auraflow",
)


@THEME.situation("fused projections", "`fuse_qkv_projections()`, before the cache.", _FUSED)
def _fuse(name: str) -> Outcome:
    return as_reference(_fused, name)


@THEME.situation(
    "fused projections between runs", "`fuse_qkv_projections()` after the first run.", _FUSED[:4]
)
def _fuse_between(name: str) -> Outcome:
    return between(_fused, name)


_BACKEND: Final = (
    "flux",
    "flux_kontext",
    "flux2",
    "chroma",
    "qwen",
    "qwen_edit",
    "wan",
    "wan22",
    "hunyuan",
    "ltx",
    "z_image",
)


@THEME.situation("an attention backend", '`set_attention_backend("_native_math")` between runs.', _BACKEND)
def _backend(name: str) -> Outcome:
    return between(lambda s: [part.set_attention_backend("_native_math") for part in s.transformers], name)


@THEME.situation("a hook of one's own", "A forward hook that changes what a block gives, between runs.", FEW)
def _hook(name: str) -> Outcome:
    def change(subject: Subject) -> None:
        part = blocks_of(subject.transformer)[0].get_submodule(_attention(subject))
        part.register_forward_hook(
            lambda module, args, output: (
                (output[0] * 0.9, *output[1:]) if isinstance(output, tuple) else output * 0.9
            )
        )

    return between(change, name)


def _attention(subject: Subject) -> str:
    names = [name for name, _ in blocks_of(subject.transformer)[0].named_children()]
    return next(name for name in names if "att" in name)


# Compilation, and processes.


def _compiled(make: Change, name: str) -> Outcome:
    """Close to the uncompiled run: the compiler computes in another order."""
    torch._dynamo.reset()
    subject = build(name)
    make(subject)
    with apply(subject) as handle:
        drawn = draw(subject, handle)
        again = draw(subject, handle)
    same(again, drawn)
    fresh, _ = plain_run(name)
    require(drawn.counts == fresh.counts, f"steps: {drawn.counts}, uncompiled {fresh.counts}")
    off = relative_rms(drawn.picture.double(), fresh.picture.double())
    require(off <= 1e-4, f"off the uncompiled run by {off:.1e}")
    torch._dynamo.reset()
    return Outcome("within 1e-4 of the uncompiled run", drawn.granularity)


def _in_place(subject: Subject) -> None:
    subject.transformer.compile(backend="aot_eager")


def _whole(subject: Subject) -> None:
    subject.pipe.transformer = torch.compile(subject.pipe.transformer, backend="aot_eager")


def _regional(subject: Subject) -> None:
    subject.transformer.compile_repeated_blocks(backend="aot_eager")


THEME.situation(
    "`torch.compile`", "The pipeline's transformer, `aot_eager`; two runs.", ("flux", "wan"), costly=True
)(functools.partial(_compiled, _whole))
THEME.situation("`transformer.compile()`", "In place, `aot_eager`; two runs.", ("sd3", "bria"), costly=True)(
    functools.partial(_compiled, _in_place)
)
THEME.situation(
    "`compile_repeated_blocks()`",
    "Block by block, `aot_eager`; two runs.",
    ("flux", "qwen", "wan"),
    costly=True,
)(functools.partial(_compiled, _regional))


@THEME.situation(
    "context parallelism",
    "diffusers' `enable_parallelism` over two processes, by stack and by module.",
    ("flux", "wan"),
    costly=True,
)
def _parallel(name: str) -> Outcome:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])

    def process(rank: str) -> subprocess.CompletedProcess[str]:
        return run_script("context_parallel.py", rank, "2", port, name)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(process, ("0", "1"))
    require(first.returncode == second.returncode == 0, first.stderr + second.stderr)
    lines = [line.split() for line in first.stdout.splitlines()]
    require([line[:2] for line in lines] == [[name, "stack"], [name, "module"]], first.stdout)
    for _, kind, off, blocks, expected in lines:
        require(float(off) <= 1e-5 and blocks == expected, f"{kind}: off one process by {off}")
    return Outcome("within 1e-5 of one process", "stack and module")
