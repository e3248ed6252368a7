"""History bytes of well-known models at their true sizes: ``python -m benchmarks.memory``.

Transformers are built on the meta device, without weights; :func:`hicache.fast.plan` does the rest, and
tests/test_plan.py holds it against what runs allocate. Prints a Markdown table and writes a CSV.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch

import hicache.fast
from benchmarks.common import command, tables
from benchmarks.pipelines.models import HD, PICTURE, SD35_LARGE, SD35_MEDIUM
from hicache import HiCacheConfig

# name → (class, what differs from its defaults, what is drawn)
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "FLUX.1-dev, 1024²": ("FluxTransformer2DModel", {"guidance_embeds": True}, PICTURE),
    "Qwen-Image, 1024²": ("QwenImageTransformer2DModel", {}, PICTURE),
    "SD3.5-medium, 1024²": ("SD3Transformer2DModel", SD35_MEDIUM, PICTURE),
    "SD3.5-large, 1024²": ("SD3Transformer2DModel", SD35_LARGE, PICTURE),
    "HunyuanVideo, 720p × 129": ("HunyuanVideoTransformer3DModel", {}, {**HD, "num_frames": 129}),
    "Wan-14B, 720p × 81": ("WanTransformer3DModel", {}, {**HD, "num_frames": 81}),
}


HEADER = ("model", "calls", "features", "module bytes", "rank 1 bytes", "stack bytes", "output bytes", "auto")


def rows(order: int) -> list[tuple[str, int, int, int, int | None, int, int, str]]:
    """Return a row of :data:`HEADER` for every model: ``"auto"`` is the granularity that it takes.

    With gates of low rank, that is the highest rank that fits: a run takes the one that its gates need.
    """
    found = []
    for name, (model, changes, drawn) in MODELS.items():
        with torch.device("meta"):
            transformer = getattr(diffusers, model)(**changes)
        plan = hicache.fast.plan(transformer, HiCacheConfig(order=order), dtype=torch.bfloat16, **drawn)
        [one] = plan.denoisers.values()
        at_rank_1 = one.low_rank_bytes[0] if one.low_rank_bytes else None
        taken = f"{one.granularity}, rank {one.rank}" if one.rank else one.granularity
        found.append(
            (
                name,
                one.contexts,
                one.num_features,
                one.module_bytes,
                at_rank_1,
                one.stack_bytes,
                one.output_bytes,
                taken,
            )
        )
    return found


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--order", type=int, default=2, choices=range(5))
    options = parser.parse_args()
    found = rows(options.order)
    header = [
        "model, bf16",
        "calls a step",
        "features",
        "module",
        "rank 1",
        "stack",
        "output",
        "`auto` takes",
    ]
    cells = [
        (
            name,
            calls,
            features,
            f"{module / 1e9:.2f} GB",
            "" if at_rank_1 is None else f"{at_rank_1 / 1e9:.2f} GB",
            f"{stack / 1e6:.0f} MB",
            f"{output / 1e6:.1f} MB",
            taken,
        )
        for name, calls, features, module, at_rank_1, stack, output, taken in found
    ]
    print(tables.markdown(header, cells))
    tables.save_csv(options.csv, HEADER, found)


if __name__ == "__main__":
    main()
