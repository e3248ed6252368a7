"""Times the skipped steps of one tree of hicache and prints them as JSON; run in a process of its own.

``python benchmarks/host_time/probe.py TREE``

It imports nothing but hicache of that tree, torch and diffusers, and knows the names that trees since the
first with CUDA graphs have: the same measurement runs on all of them.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

DEPTH = (19, 38)  # FLUX.1's doubles and singles
STEPS, INTERVAL, WARMUP = 50, 7, 3
RUNS = 3  # that count, after two: the second run captures what the first has warmed up
CASES = {
    f"{granularity}, {name}": (granularity, graphs)
    for granularity in ("module", "stack")
    for name, graphs in (("eager", False), ("graphs", True))
}


class NothingReplayed:
    """A capture backend whose replay launches nothing: what is left is what the host does around it."""

    def unavailable(self, device: torch.device) -> str | None:
        """It runs anywhere."""
        return None

    def warm(self, function: Callable[[], Any]) -> Any:
        """Run it."""
        return function()

    def drop(self) -> None:
        """There is nothing to free."""

    def capture(self, function: Callable[[], Any]) -> Any:
        """Run it once, for its output."""
        output = function()
        module = sys.modules.get("hicache.cuda_graphs.capture")
        if module is None:  # before graphs had bytes that count
            return (lambda: None), output
        return module.Captured(lambda: None, output, 0, 1)


def sum_of_nothing(
    base: Tensor, orders: Tensor, gates: Tensor | None, coeffs: Tensor, inv_gap: Any, filled: int, out: Tensor
) -> None:
    """In the place of the kernel: one small copy, as a launch is one call of a driver."""
    out.copy_(base)


def transformer(doubles: int, singles: int) -> nn.Module:
    """FLUX.1 of the least width."""
    model: nn.Module = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=doubles,
        num_single_layers=singles,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    return model.eval()


class Recalled(nn.Module):
    """Gives rotary embeddings of the first call, as every tree does on skipped steps."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.known: Any = None

    def forward(self, ids: Tensor) -> Any:
        """Those of the first ``ids``."""
        if self.known is None:
            self.known = self.module(ids)
        return self.known


def bare() -> Any:
    """The model without its blocks: what is before and after them runs at every step, cached or not."""
    model: Any = transformer(1, 1)
    model.transformer_blocks, model.single_transformer_blocks = nn.ModuleList(), nn.ModuleList()
    model.pos_embed = Recalled(model.pos_embed)
    return model


class Timed(nn.Module):
    """Mixed into the cached transformer's class: times its calls, and one of the bare model after each.

    The bare model is called before, too: what it has in the processor's caches then serves both alike.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model, found = self.__dict__["timed"]
        model(*args, **kwargs)
        start = time.thread_time_ns()
        output = super().__call__(*args, **kwargs)
        done = time.thread_time_ns()
        again = time.thread_time_ns()
        model(*args, **kwargs)
        found.append((done - start, time.thread_time_ns() - again))
        return output


def is_full(step: int) -> bool:
    """Whether the transformer runs at this step."""
    return step < WARMUP or (step - WARMUP + 1) % INTERVAL == 0


def measure(granularity: str, graphs: bool) -> list[tuple[int, int]]:
    """Nanoseconds of this thread in skipped calls, each with those of the bare model's call after it."""
    import hicache.fast
    import hicache_kernels

    vars(hicache_kernels.BACKENDS["reference"])["gated_sum"] = sum_of_nothing
    vars(hicache.fast)["CudaBackend"] = NothingReplayed
    torch.manual_seed(0)
    pipe: Any = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=transformer(*DEPTH),
        **dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    )
    pipe.set_progress_bar_config(disable=True)
    hicache.fast.apply(
        pipe,
        hicache.HiCacheConfig(interval=INTERVAL, warmup=WARMUP),
        granularity=granularity,
        cuda_graphs="auto" if graphs else False,
        backend="reference",
    )
    found: list[tuple[int, int]] = []
    cls: Any = type(pipe.transformer)
    pipe.transformer.__class__ = type(cls)(cls.__name__, (Timed, cls), {"__module__": cls.__module__})
    pipe.transformer.__dict__["timed"] = bare(), found
    prompt = {"prompt_embeds": torch.randn(1, 6, 32), "pooled_prompt_embeds": torch.randn(1, 32)}
    for _ in range(2 + RUNS):
        pipe(**prompt, height=64, width=64, num_inference_steps=STEPS, output_type="latent")
    skipped = [pair for step, pair in enumerate(found) if not is_full(step % STEPS)]
    stats = pipe.transformer.__dict__["_hicache_handle"].stats
    counted = next(iter(stats.contexts.values())).skipped_steps
    replays = sum(graphs.replays for graphs in stats.graphs.values())
    if len(found) != (2 + RUNS) * STEPS or counted * (2 + RUNS) != len(skipped) or bool(replays) != graphs:
        raise SystemExit(f"{granularity}, graphs {graphs}: not what was to be timed: {stats}")
    return skipped[2 * counted :]


def main() -> None:
    """Time every case of the tree that is the first argument."""
    tree = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(tree))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import hicache

    if not Path(hicache.__file__).resolve().is_relative_to(tree):
        raise SystemExit(f"expected hicache of {tree}, got {hicache.__file__}")
    print(json.dumps({case: measure(*how) for case, how in CASES.items()}))


if __name__ == "__main__":
    main()
