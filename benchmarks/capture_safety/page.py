"""The page about all models: verdicts, and what stands in the way."""

from __future__ import annotations

from typing import Final

import diffusers
import torch

from benchmarks.capture_safety.survey import Survey, unique
from benchmarks.common.tables import markdown

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
between calls (coefficients, gates of coming steps) is not captured, and not in here.

Made by `python -m benchmarks.capture_safety --write docs/capture-safety.md`; a test makes it again. Every
model, small, runs on an emulated GPU, and every operation of torch's is looked at: not seen are
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


def page(surveys: dict[str, Survey]) -> str:
    """Write the page from surveys by name."""
    verdicts, details = [], []
    for title, found in surveys.items():
        full, skipped = found.cached[found.finest]
        verdicts.append((title, found.own.verdict, full.verdict, skipped.verdict, found.finest))
        kinds = {"its own": found.own, "full": full, "skipped": skipped}
        for op in unique([op for kind in kinds.values() for op in (*kind.first, *kind.later)]):
            seen = [
                name + ("" if op in kind.later else " (first)")
                for name, kind in kinds.items()
                if op in (*kind.first, *kind.later)
            ]
            what, where = f"{op.kind}, `{op.op}`", f"`{op.function}` in {op.file}"
            details.append((title, what, where, op.place, ", ".join(seen)))
    return PAGE.format(
        versions=versions(),
        verdicts=markdown(["model", "its own step", "full step", "skipped step", "cached by"], verdicts),
        details=markdown(["model", "what", "where", "place", "in"], details),
    )


def versions() -> str:
    """Say what it was made with."""
    return f"Made with diffusers {diffusers.__version__} and torch {torch.__version__.split('+')[0]}."
