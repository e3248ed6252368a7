"""What of each model's call a CUDA graph cannot capture: ``python -m benchmarks.capture_safety``.

Every model runs with random weights on a GPU that is not there (:mod:`benchmarks.pretend`), by itself and
cached, and :mod:`hicache.cuda_graphs.capture_safety` looks on. Prints the page, or writes it with ``--write``.
"""

from __future__ import annotations

import argparse
import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest import mock

import diffusers
import torch
from torch import nn

import hicache.fast
from benchmarks.pretend import PretendGpu, move, to_gpu
from hicache import HiCacheConfig
from hicache.adapters import registry
from hicache.cuda_graphs.capture_safety import UnsafeOp, UnsafeOps
from hicache.hooks.transformer import HookedTransformer
from tests.support import models
from tests.support.schedulers import CountingScheduler

# a model, and what gives the arguments of its call at a time in (0, 1]
Build = Callable[[], tuple[nn.Module, Callable[[float], dict[str, Any]]]]

TESTS: Final = Path(__file__).parent.parent / "tests"
# as in the table → in tests.support.models
MODELS: Final = {
    "FLUX.1": "flux",
    "FLUX.1 Kontext": "kontext",
    "FLUX.2": "flux2",
    "Qwen-Image": "qwen_image",
    "Qwen-Image, masked": "qwen_image_mask",
    "Qwen-Image-Edit, `zero_cond_t`": "qwen_image_edit",
    "SD3, SD3.5": "sd3",
    "HunyuanVideo": "hunyuan_video",
    "HunyuanVideo 1.5": "hunyuan_video15",
    "Wan 2.1, 2.2": "wan",
    "LTX": "ltx",
    "CogVideoX": "cogvideox",
    "CogView4": "cogview4",
    "PixArt": "pixart",
    "DiT": "dit",
    "Sana": "sana",
    "HiDream": "hidream",
    "Chroma": "chroma",
    "Z-Image": "z_image",
    "Lumina2": "lumina2",
    "Mochi": "mochi",
    "AuraFlow": "auraflow",
}
CONFIG: Final = HiCacheConfig(interval=3, warmup=3)
STEPS: Final = 8
# of CONFIG in as many steps; left out are the call learned from, 0, and the skipped one that is checked, 3
FULL: Final = (1, 2, 5)
SKIPPED: Final = (4, 6, 7)

PAGE: Final = """\
# What a CUDA graph can capture

A graph replays kernels at fixed addresses, so a call can be captured only if it copies nothing between host
and device, reads no number from the device, and has no shape that depends on one. Here is what of each
model's call cannot be: by itself, and cached. The cache adds nothing: whatever stands in the way is in the
model's own code, and skipped steps are free of what is inside the blocks.

- *clean*: the whole call can be captured;
- *clean after a first call*: it keeps what it copied, and can be captured from the second call on;
- *before the blocks*: what comes before the first block must run eagerly, the rest can be captured;
- *inside the blocks*, *after the first block* (between blocks, or in the head): there as well.

A *copy* is one between host and device, a *sync* a number that is read from the device, a *shape* one that
depends on such a number. Full steps are those after the call that the cache learns from. What the cache does
between calls (coefficients, gates foreseen) is not captured, and not in here.

Made by `python -m benchmarks.capture_safety --write docs/capture-safety.md`; a test makes it again. Every
model, small, runs on a GPU that is not there, and every operation of torch's is looked at: not seen are
launches and waits that bypass them, and what a library does inside one. One kind of input was tried of each
model, text with no padding unless the name says so. The same of any call, on whatever device:

```python
from hicache.cuda_graphs.capture_safety import unsafe_ops

print(*unsafe_ops(lambda: transformer(**inputs), transformer.blocks), sep="\\n")
```

{versions}

## Verdicts

{verdicts}

## What stands in the way

{details}
"""


@dataclass(frozen=True)
class Found:
    """UnsafeOps of calls of one kind: of the first one, and of those after it; each function's once."""

    first: tuple[UnsafeOp, ...]
    later: tuple[UnsafeOp, ...]

    @property
    def verdict(self) -> str:
        """As in the table."""
        if not self.later:
            return "clean after a first call" if self.first else "clean"
        places: dict[str, list[str]] = {}
        for offence in self.later:
            kinds = places.setdefault(offence.place, [])
            if offence.kind not in kinds:
                kinds.append(offence.kind)
        return "; ".join(f"{', '.join(kinds)} {place}" for place, kinds in places.items())


@dataclass(frozen=True)
class Survey:
    """What was found in one model's calls."""

    own: Found
    cached: dict[str, tuple[Found, Found]]  # granularity → full steps, skipped steps

    @property
    def finest(self) -> str:
        """The finest granularity it can be cached at."""
        return "module" if "module" in self.cached else "stack"


def builders() -> dict[str, Build]:
    """Small models with random weights, by their names in the table."""
    return {title: functools.partial(models.build, name) for title, name in MODELS.items()}


def survey(build: Build) -> Survey:
    """Run a model by itself and cached, at every granularity it knows; see what cannot be captured."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' of its own deprecations
        return _survey(*build())


def _survey(model: nn.Module, call: Callable[[float], dict[str, Any]]) -> Survey:
    blocks = [block for block_list in HookedTransformer(model).lists for block in block_list]
    calls: list[list[UnsafeOp]] = []
    forward = model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        with UnsafeOps(blocks) as mode:
            output = forward(*args, **kwargs)
        calls.append(mode.found)
        return output

    def run(scheduler: CountingScheduler) -> list[list[UnsafeOp]]:
        calls.clear()
        scheduler.set_timesteps(STEPS)
        for t in torch.linspace(1, 0.1, STEPS):
            model(**to_gpu(call(float(t))))
            scheduler.step()
        return list(calls)

    cached = {}
    # weights of a GPU that is not there are no plain parameters, yet are to be read as those
    plain = mock.patch("hicache.adapters.gates._plain", return_value=True)
    with PretendGpu(), torch.no_grad(), plain:
        move(model)
        # what graphs would capture: the model's own forward, within all that is hooked around it
        model.forward = watched
        own = _of(run(CountingScheduler()), range(STEPS))
        for granularity in ("module", "stack"):
            if granularity == "module" and registry.find(model) is None:
                continue
            scheduler = CountingScheduler()
            try:
                with hicache.fast.apply(model, CONFIG, scheduler=scheduler, granularity=granularity):
                    found = run(scheduler)
            except RuntimeError as error:
                if "cannot be had" not in str(error):
                    raise
                continue
            cached[granularity] = _of(found, FULL), _of(found, SKIPPED)
    return Survey(own, cached)


def _of(calls: Sequence[Sequence[UnsafeOp]], steps: Sequence[int]) -> Found:
    first, *others = (calls[step] for step in steps)
    return Found(_unique(first), _unique([offence for found in others for offence in found]))


def _unique(found: Sequence[UnsafeOp]) -> tuple[UnsafeOp, ...]:
    return tuple(dict.fromkeys(found))


def page(surveys: dict[str, Survey]) -> str:
    """The page, of surveys by name."""
    verdicts = ["| model | its own step | full step | skipped step | cached by |", "|---|---|---|---|---|"]
    details = ["| model | what | where | place | in |", "|---|---|---|---|---|"]
    for title, found in surveys.items():
        full, skipped = found.cached[found.finest]
        cells = title, found.own.verdict, full.verdict, skipped.verdict, found.finest
        verdicts.append(f"| {' | '.join(cells)} |")
        kinds = {"its own": found.own, "full": full, "skipped": skipped}
        for offence in _unique([o for kind in kinds.values() for o in (*kind.first, *kind.later)]):
            seen = [
                name + ("" if offence in kind.later else " (first)")
                for name, kind in kinds.items()
                if offence in (*kind.first, *kind.later)
            ]
            what = f"{offence.kind}, `{offence.op}`"
            where = f"`{offence.function}` in {offence.file}"
            details.append(f"| {title} | {what} | {where} | {offence.place} | {', '.join(seen)} |")
    return PAGE.format(versions=versions(), verdicts="\n".join(verdicts), details="\n".join(details))


def versions() -> str:
    """What it was made with."""
    return f"Made with diffusers {diffusers.__version__} and torch {torch.__version__.split('+')[0]}."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, help="write the page here instead of printing it")
    options = parser.parse_args()
    made = page({title: survey(build) for title, build in builders().items()})
    if options.write is None:
        print(made)
    else:
        options.write.write_text(made)


if __name__ == "__main__":
    main()
