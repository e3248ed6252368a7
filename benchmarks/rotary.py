"""What it brings that skipped steps do not compute rotary embeddings anew (hicache/hooks/recall.py).

``python -m benchmarks.rotary --csv benchmarks/results/rotary.csv``

Models of their true depth and a tiny width, so that what is timed is the host: operators dispatched by a
skipped step and its milliseconds (p20: others may use the machine), with the memo and without, in one run and
in turns. ``loop`` is the share of a whole loop of 50 steps, 9 of them full; in a model of true width full
steps take longer, and it is less.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import diffusers
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import hicache.demo
import hicache.fast
from benchmarks.common import command, tables
from benchmarks.common.machine import place
from hicache import HiCacheConfig, full_steps
from hicache.hooks import recall
from tests.support.schedulers import RecordedScheduler

STEPS = 12  # of a run that is timed: 3 full, 9 skipped
CONFIG = HiCacheConfig(interval=STEPS)
LOOP = 50
_WIDTH = {"num_attention_heads": 2, "attention_head_dim": 16}
_TEXT = 32  # tokens

# A transformer and the arguments of a call of it, all but the timestep; both anew at each call.
Build = Callable[[], tuple[nn.Module, dict[str, Any]]]


def flux() -> tuple[nn.Module, dict[str, Any]]:
    """FLUX.1: 19 + 38 blocks, 256 image tokens."""
    model = diffusers.FluxTransformer2DModel(
        **_WIDTH,
        in_channels=4,
        num_layers=19,
        num_single_layers=38,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    )
    ids = torch.zeros(16, 16, 3)
    ids[..., 1], ids[..., 2] = torch.arange(16)[:, None], torch.arange(16)
    return model, {
        "hidden_states": torch.randn(1, 256, 4),
        "encoder_hidden_states": torch.randn(1, _TEXT, 16),
        "pooled_projections": torch.randn(1, 16),
        "img_ids": ids.view(-1, 3),
        "txt_ids": torch.zeros(_TEXT, 3),
        "guidance": torch.tensor([3.5]),
    }


def wan() -> tuple[nn.Module, dict[str, Any]]:
    """Wan 2.1, 1.3B: 30 blocks, 5 latent frames of 8 by 8 tokens."""
    model = diffusers.WanTransformer3DModel(
        **_WIDTH,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=64,
        num_layers=30,
        rope_max_seq_len=64,
    )
    return model, {
        "hidden_states": torch.randn(1, 4, 5, 16, 16),
        "encoder_hidden_states": torch.randn(1, _TEXT, 16),
    }


def qwen_image() -> tuple[nn.Module, dict[str, Any]]:
    """Qwen-Image: 60 blocks, 256 image tokens. Its own code remembers what it computes on the host."""
    model = diffusers.QwenImageTransformer2DModel(
        **_WIDTH,
        in_channels=16,
        out_channels=4,
        num_layers=60,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    return model, {
        "hidden_states": torch.randn(1, 256, 16),
        "encoder_hidden_states": torch.randn(1, _TEXT, 16),
        "img_shapes": [[(1, 16, 16)]],
    }


def demo() -> tuple[nn.Module, dict[str, Any]]:
    """The bundled model as it is, with the arguments its pipeline gives."""
    diffusers.utils.logging.disable_progress_bar()
    pipe = hicache.demo.load()
    pipe.set_progress_bar_config(disable=True)
    seen: dict[str, Any] = {}
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    pipe("a red ring on blue", num_inference_steps=1, generator=torch.Generator().manual_seed(0))
    hook.remove()
    return pipe.transformer, {name: value for name, value in seen.items() if name != "timestep"}


MODELS: dict[str, Build] = {"FLUX.1": flux, "Wan": wan, "Qwen-Image": qwen_image, "demo": demo}


class Operators(TorchDispatchMode):
    """Counts operators: all that reach the dispatcher, and those of them that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.computing = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.all += 1
        self.computing += not function.is_view
        return function(*args, **(kwargs or {}))


class Cached:
    """A model cached with or without the memo, and its own loop.

    Args:
        build: makes the model and its arguments; the same of the same seed.
        granularity: what is cached.
        memo: whether rotary embeddings are remembered.
    """

    def __init__(self, build: Build, granularity: str, memo: bool) -> None:
        torch.manual_seed(0)
        model, self._arguments = build()
        self._model = model.eval()
        # as pipelines do: gates and embeddings of coming steps can be computed ahead
        self._scheduler = RecordedScheduler(torch.linspace(1, 0.05, STEPS))
        with nullcontext() if memo else mock.patch.object(recall, "ROTARY", ()):
            self.handle = hicache.fast.apply(
                self._model, CONFIG, scheduler=self._scheduler, granularity=granularity, cuda_graphs=False
            )

    def run(self, around: Callable[[int], Any]) -> list[Tensor]:
        """One run; ``around`` gives the context manager each call is made in. The outputs of all steps."""
        self._scheduler.set_timesteps(STEPS)
        outputs = []
        for step, timestep in enumerate(self._scheduler.timesteps):
            arguments = {**self._arguments, "timestep": timestep.expand(1), "return_dict": False}
            with torch.no_grad(), around(step):
                output = self._model(**arguments)[0]
            self._scheduler.step()
            outputs.append(output)
        return outputs


def measure(build: Build, granularity: str, rounds: int) -> dict[str, Any]:
    """One row of the table: a model by one granularity.

    Raises:
        RuntimeError: the memo changes a number.
    """
    with ExitStack() as stack:
        sides = {memo: Cached(build, granularity, memo) for memo in (True, False)}
        for side in sides.values():
            stack.callback(side.handle.remove)
        outputs = [side.run(lambda step: nullcontext()) for side in sides.values()]
        if not all(torch.equal(one, other) for one, other in zip(*outputs, strict=True)):
            raise RuntimeError("benchmarks.rotary: the memo changes what is drawn")

        full = set(full_steps(CONFIG, STEPS))
        counted: dict[bool, Operators] = {}
        for memo, side in sides.items():
            counters = [Operators() for _ in range(STEPS)]
            side.run(counters.__getitem__)
            counted[memo] = counters[-1]  # a skipped step that is not the first of them

        seconds: dict[bool, list[list[float]]] = {True: [], False: []}
        for turn in range(rounds):
            for memo in (True, False) if turn % 2 else (False, True):
                seconds[memo].append(_seconds(sides[memo]))
    # the first skipped step has an update of the differences to do
    skipped = {
        memo: _p20(t for times in runs for t in times[max(full) + 2 :]) for memo, runs in seconds.items()
    }
    full_step = _p20(t for runs in seconds.values() for times in runs for t in times[: len(full)])
    num_full = len(full_steps(HiCacheConfig(), LOOP))
    loop = num_full * full_step + (LOOP - num_full) * skipped[False]
    saved = skipped[False] - skipped[True]
    return {
        "operators": counted[True].all,
        "operators without memo": counted[False].all,
        "computing": counted[True].computing,
        "computing without memo": counted[False].computing,
        "skipped ms": round(skipped[True] * 1e3, 3),
        "skipped ms without memo": round(skipped[False] * 1e3, 3),
        "full ms": round(full_step * 1e3, 3),
        "share of a skipped step": round(saved / skipped[False], 3),
        "share of the loop": round((LOOP - num_full) * saved / loop, 4),
    }


def _p20(values: Iterable[float]) -> float:
    return statistics.quantiles(values, n=5)[0]


def _seconds(side: Cached) -> list[float]:
    taken: list[float] = []

    @contextmanager
    def timed(step: int) -> Iterator[None]:
        began = time.perf_counter()
        yield
        taken.append(time.perf_counter() - began)

    side.run(timed)
    return taken


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="runs of each side, in turns")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'':<18} {'operators':>12} {'no views':>10} {'skipped step, ms':>18} {'saved':>7} {'loop':>7}")
    rows: list[dict[str, Any]] = []
    for name, build in MODELS.items():
        for granularity in ("module", "stack"):
            row = measure(build, granularity, options.rounds)
            rows.append({"model": name, "granularity": granularity, **row, **place("cpu")._asdict()})
            print(
                f"{name:<11} {granularity:<6} "
                f"{row['operators']:>5} of {row['operators without memo']:>3} "
                f"{row['computing']:>3} of {row['computing without memo']:>3} "
                f"{row['skipped ms']:>9.3f} of {row['skipped ms without memo']:.3f} "
                f"{row['share of a skipped step']:>7.1%} {row['share of the loop']:>7.1%}",
                flush=True,
            )
    tables.save_csv(options.csv, list(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    main()
