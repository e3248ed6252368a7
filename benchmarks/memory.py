"""History bytes of well-known models at their true sizes: ``python -m benchmarks.memory``.

Transformers are built on the meta device, without weights; :func:`hicache.fast.plan` does the rest, and
tests/test_plan.py holds it against what runs allocate. Prints a Markdown table and writes a CSV.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import diffusers
import torch

import hicache.fast
from hicache import HiCacheConfig

PICTURE = {"height": 1024, "width": 1024}
HD = {"height": 720, "width": 1280}
SD35_MEDIUM = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
SD35_LARGE = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
# name → (class, what differs from its defaults, what is drawn)
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "FLUX.1-dev, 1024²": ("FluxTransformer2DModel", {"guidance_embeds": True}, PICTURE),
    "Qwen-Image, 1024²": ("QwenImageTransformer2DModel", {}, PICTURE),
    "SD3.5-medium, 1024²": ("SD3Transformer2DModel", SD35_MEDIUM, PICTURE),
    "SD3.5-large, 1024²": ("SD3Transformer2DModel", SD35_LARGE, PICTURE),
    "HunyuanVideo, 720p × 129": ("HunyuanVideoTransformer3DModel", {}, {**HD, "num_frames": 129}),
    "Wan-14B, 720p × 81": ("WanTransformer3DModel", {}, {**HD, "num_frames": 81}),
}


def rows(order: int) -> list[tuple[str, int, int, int, int, str]]:
    """Name, calls a step, terms, bytes by module and by stack, and what ``"auto"`` takes."""
    found = []
    for name, (model, changes, drawn) in MODELS.items():
        with torch.device("meta"):
            transformer = getattr(diffusers, model)(**changes)
        plan = hicache.fast.plan(transformer, HiCacheConfig(order=order), dtype=torch.bfloat16, **drawn)
        [one] = plan.denoisers.values()
        found.append((name, one.contexts, one.terms, one.module_bytes, one.stack_bytes, one.granularity))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--order", type=int, default=2, choices=range(5))
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    options = parser.parse_args()
    found = rows(options.order)
    print("| model, bf16 | calls a step | terms | module | stack | `auto` takes |")
    print("|---|---|---|---|---|---|")
    for name, calls, terms, module, stack, granularity in found:
        print(
            f"| {name} | {calls} | {terms} | {module / 1e9:.2f} GB | {stack / 1e6:.0f} MB | {granularity} |"
        )
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["model", "calls", "terms", "module bytes", "stack bytes", "auto"])
            writer.writerows(found)


if __name__ == "__main__":
    main()
