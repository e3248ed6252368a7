"""Bytes that caching well-known models takes at their true sizes: ``python -m benchmarks.memory``.

Transformers are built on the meta device, without weights; :func:`hicache.fast.plan` does the rest, and
tests/test_plan.py holds it against what runs allocate. What CUDA graphs take is an estimate, made without a
GPU (:mod:`hicache.dry_run`). Prints two Markdown tables and writes a CSV.
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


HEADER = (
    "model",
    "calls",
    "features",
    "module bytes",
    "rank 1 bytes",
    "stack bytes",
    "output bytes",
    "auto",
    "gates bytes",
    "kept bytes",
    "sums bytes",
    "full-step graphs bytes, estimated",
    "skipped-step graphs bytes, estimated",
    "captured",
    "all bytes, estimated",
)
Row = tuple[str, int, int, int, int | None, int, int, str, int, int, int, int, int, str, int]


def rows(order: int) -> list[Row]:
    """Return a row of :data:`HEADER` for every model: ``"auto"`` is the granularity that it takes.

    With gates of low rank, that is the highest rank that fits: a run takes the one that its gates need. What
    comes after is of a run of 50 steps of that granularity: gates, what else is kept for the run, what a full
    step adds features up in, CUDA graphs of full and skipped steps and of skipped steps alone, which of them
    fit beside the history, and all that is held then.
    """
    found: list[Row] = []
    for name, (model, changes, drawn) in MODELS.items():
        with torch.device("meta"):
            transformer = getattr(diffusers, model)(**changes)
        plan = hicache.fast.plan(transformer, HiCacheConfig(order=order), dtype=torch.bfloat16, **drawn)
        [one] = plan.denoisers.values()
        at_rank_1 = one.low_rank_bytes[0] if one.low_rank_bytes else None
        taken = f"{one.granularity}, rank {one.rank}" if one.rank else one.granularity
        assert one.graphs is not None, one.not_estimated
        assert one.kept_bytes is not None
        assert one.sums_bytes is not None
        history = (one.contexts, one.num_features, one.module_bytes, at_rank_1)
        coarse = (one.stack_bytes, one.output_bytes, taken)
        beside = (one.gates_bytes, one.kept_bytes, one.sums_bytes)
        graphs = (one.graphs.full_nbytes, one.graphs.skipped_nbytes, one.graphs.captured)
        found.append((name, *history, *coarse, *beside, *graphs, one.nbytes))
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
        for name, calls, features, module, at_rank_1, stack, output, taken, *_ in found
    ]
    print(tables.markdown(header, cells))
    header = ["so cached", "gates", "kept", "sums", "graphs", "of skipped steps", "captured", "all"]
    beside = [
        (
            name,
            *(f"{nbytes / 1e6:.0f} MB" for nbytes in (gates, kept, sums, full, skipped)),
            captured,
            f"{total / 1e9:.2f} GB",
        )
        for name, *_, gates, kept, sums, full, skipped, captured, total in found
    ]
    print(tables.markdown(header, beside))
    tables.save_csv(options.csv, HEADER, found)


if __name__ == "__main__":
    main()
