"""The sum of what constant gates weigh, added up block by block or left over: how far both are off.

``python -m benchmarks.telescope --csv benchmarks/results/telescope.csv``

Gates of Wan, LTX, PixArt and Sana are a table of the block plus a vector that all blocks share, and three
sums are kept: S1 of attentions, S2 of MLPs, and S0 of everything that a constant weighs. S0 is either

- ``added``: a table times an output, block by block, in fp32;
- ``left``: what S1 and S2, in fp32, leave of the residual: h_L - h_0 - g1 S1 - g2 S2;
- ``left of kept``: the same with S1 and S2 as they are kept, rounded to the model's dtype.

Each model is run in full at every step, in float64 and in low precision, with equal inputs on a straight path
from noise to data. Skipped steps are forecast from each kind of S0, through the output head, and by
``reference``: hicache.reference, the paper in eager torch. Errors are relative RMS of the hidden state after
the blocks, and of the model's output, over all skipped steps:

- ``rounding``: against the same forecast in float64, which is the algorithm without rounding;
- ``own``: against the low-precision model's own full step;
- ``exact``: against the float64 model's own full step.

``model`` is what the low-precision model itself is off float64. Weights are ``random`` as diffusers draws
them, ``strong`` with tables of 0.5, or ``outliers``, where also the first eight channels have tables 30 times
that. Steps are ``far``, 22 over all timesteps, or ``near``, over a hundredth of them: features hardly change,
and rounding is most of what is left.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final
from unittest import mock

import diffusers
import torch
from torch import Tensor, nn

import hicache.reference
from benchmarks.common import command, tables
from hicache import HiCacheConfig
from hicache.adapters import registry
from hicache.adapters.base import ModuleAdapter
from hicache.engine import Engine
from hicache.hooks.block_interface import BlockInterface
from tests.support import models
from tests.support.schedulers import CountingScheduler

CONFIG: Final = HiCacheConfig(interval=5, order=2, warmup=3)
STEPS: Final = 22
# blocks as in Wan 2.1 14B, LTX-Video, PixArt-α and Sana 1.6B; heads of 32 channels
DEPTHS: Final = {"wan": 40, "ltx": 28, "pixart": 28, "sana": 20}
_HEADS: Final = {"num_attention_heads": 4, "attention_head_dim": 32}
_WIDER: Final[Mapping[str, dict[str, Any]]] = {
    "wan": {"ffn_dim": 512, "freq_dim": 64},
    "ltx": {"cross_attention_dim": 128},
    "pixart": {"cross_attention_dim": 128},
    "sana": {"num_cross_attention_heads": 4, "cross_attention_head_dim": 32, "cross_attention_dim": 128},
}
WEIGHTS: Final = ("random", "strong", "outliers")
SPANS: Final = {"far": 1.0, "near": 0.01}
KINDS: Final = ("added", "left", "left of kept")
SIDES: Final = (*KINDS, "reference")
AGAINST: Final = ("rounding", "own", "exact")
DTYPES: Final = {"bf16": torch.bfloat16, "fp32": torch.float32}


def model_of(name: str, weights: str) -> models.Built:
    """A model of true depth, in fp32, and what gives the arguments of its call; the same in every call."""
    model, call = models.build(name, num_layers=DEPTHS[name], **_HEADS, **_WIDER[name])
    if weights == "random":
        return model, call
    adapter = registry.find(model)
    assert adapter is not None
    with torch.no_grad():
        for block in adapter.module.get_submodule("blocks" if name == "wan" else "transformer_blocks"):
            block.scale_shift_table.copy_(0.5 * torch.randn_like(block.scale_shift_table))
            if weights == "outliers":
                block.scale_shift_table.view(6, -1)[2::3, :8] *= 30
    return model, call


@dataclass(frozen=True)
class Ran:
    """A full step."""

    base: Tensor  # h_0
    left: Tensor  # h_L
    sums: tuple[Tensor, ...]  # S0 added up, S1, S2
    gates: Tensor  # [3, batch, channels]
    output: Tensor

    def features(self, kind: str) -> list[Tensor]:
        """What is kept of it, in the model's dtype."""
        kept = [total.to(self.base.dtype) for total in self.sums]
        if kind != "added":
            shared = self.sums if kind == "left" else kept
            rest = self.left.to(self.sums[0].dtype) - self.base
            for total, gate in zip(shared[1:], self.gates[1:, :, None], strict=True):
                rest -= total * gate.to(rest.dtype)
            kept[0] = rest.to(self.base.dtype)
        return kept


class Watched:
    """A model whose full steps are taken apart, and whose head runs on any hidden state.

    Args:
        model: of a family whose gates are tables and shared vectors.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        adapter = registry.find(model)
        assert adapter is not None
        self._adapter: ModuleAdapter = adapter
        self._list = "blocks" if hasattr(model, "blocks") else "transformer_blocks"

    def run(self, arguments: Mapping[str, Any]) -> Ran:
        """One full step."""
        seen: dict[str, Tensor] = {}
        sums: dict[int, Tensor] = {}

        def enter(block: nn.Module, args: Any, kwargs: Any) -> None:
            hidden, given = BlockInterface(type(self.model).__name__, block).arguments(block, args, kwargs)
            seen["base"], seen["gates"] = hidden.clone(), self._adapter.gates(given, hidden)

        def leave(head: nn.Module, args: Any) -> None:
            seen["left"] = args[0].to(seen["base"].dtype)  # Wan casts it

        first = getattr(self.model, self._list)[0]
        undo = [
            first.register_forward_pre_hook(enter, with_kwargs=True),
            self.model.norm_out.register_forward_pre_hook(leave),
        ]
        for recorded in self._adapter.outputs():

            def add(module: nn.Module, args: Any, output: Any, recorded: Any = recorded) -> None:
                value = recorded.read(output, seen["base"].shape)
                value = value.to(torch.promote_types(value.dtype, torch.float32))
                for feature, factor in recorded.features:
                    weighed = value if factor is None else value * factor().to(value.dtype)
                    sums[feature] = sums[feature] + weighed if feature in sums else weighed

            undo.append(recorded.module.register_forward_hook(add))
        output = self.model(**arguments)[0]
        for hook in undo:
            hook.remove()
        return Ran(seen["base"], seen["left"], tuple(sums[i] for i in range(3)), seen["gates"], output)

    def head(self, arguments: Mapping[str, Any], hidden: Tensor) -> Tensor:
        """What the model makes of a hidden state after its blocks."""
        hook = self.model.norm_out.register_forward_pre_hook(
            lambda head, args: (hidden.to(args[0].dtype), *args[1:])
        )
        blocks = getattr(self.model, self._list)
        setattr(self.model, self._list, nn.ModuleList())
        try:
            output: Tensor = self.model(**arguments)[0]
            return output
        finally:
            setattr(self.model, self._list, blocks)
            hook.remove()


class Error:
    """Relative RMS over several pairs of tensors."""

    def __init__(self) -> None:
        self._off = self._norm = 0.0

    def add(self, one: Tensor, other: Tensor) -> None:
        """Take in a pair, of which ``other`` is right."""
        self._off += float((one.double() - other.double()).square().sum())
        self._norm += float(other.double().square().sum())

    @property
    def value(self) -> float:
        """Over all pairs so far."""
        return math.sqrt(self._off / self._norm)


@contextmanager
def double_throughout() -> Iterator[None]:
    """Wan's blocks compute in ``.float()``, also those of a float64 model: not here."""
    single: Callable[[Tensor], Tensor] = Tensor.float
    keep = lambda tensor: tensor if tensor.dtype == torch.float64 else single(tensor)  # noqa: E731
    with mock.patch.object(Tensor, "float", keep):
        yield


class Forecasts:
    """The skipped steps of a low-precision model, forecast in every way.

    Args:
        model: the model.
        call: gives the arguments of its call.
        span: of :data:`SPANS`.
    """

    def __init__(self, model: nn.Module, call: models.Call, span: str) -> None:
        self._dtype = next(model.parameters()).dtype
        self._low, self._exact = Watched(model), Watched(copy.deepcopy(model).double())
        self._call, self._span = call, SPANS[span]
        self._engines = {kind: Engine(CONFIG, "reference") for kind in KINDS}
        self._truth = Engine(CONFIG, "reference")
        self.errors: dict[tuple[str, str, str], Error] = defaultdict(Error)

    def run(self) -> None:
        """All steps: fills :attr:`errors`, by what is compared, how it was made and against what."""
        referred = self._by_reference()
        for step in range(STEPS):
            given, given64 = self._arguments(step, self._dtype), self._arguments(step, torch.float64)
            ran = self._low.run(given)
            with double_throughout():
                ran64 = self._exact.run(given64)
            if self._truth.is_full(step):
                for kind, engine in self._engines.items():
                    engine.record(step, ran.features(kind))
                self._truth.record(step, list(ran64.sums))
                continue
            with double_throughout():
                aim = self._truth.gated_sum(step, ran64.base, ran64.gates)
                right = {"rounding": (aim, self._exact.head(given64, aim))}
            right |= {"own": (ran.left, ran.output), "exact": (ran64.left, ran64.output)}
            made = {"reference": referred[step], "model": right["own"]}
            for kind, engine in self._engines.items():
                hidden = engine.gated_sum(step, ran.base, ran.gates)
                made[kind] = hidden, self._low.head(given, hidden)
            for kind, pair in made.items():
                for against, others in right.items():
                    for what, one, other in zip(("hidden", "output"), pair, others, strict=True):
                        self.errors[what, kind, against].add(one, other)

    def _arguments(self, step: int, dtype: torch.dtype) -> dict[str, Any]:
        """A call of a step; numbers as bf16 has them, in any dtype."""
        t = 1 - self._span * step / STEPS
        given = self._call(t)
        noise = given["hidden_states"]
        given["hidden_states"] = t * noise + (1 - t) * noise.roll(1, -1).cumsum(-1)
        return {
            name: value.bfloat16().to(dtype)
            if isinstance(value, Tensor) and value.is_floating_point() and name != "timestep"
            else value
            for name, value in given.items()
        }

    def _by_reference(self) -> list[tuple[Tensor, Tensor]]:
        """The hidden state after the blocks and the output of all steps, as hicache.reference makes them."""
        found: list[tuple[Tensor, Tensor]] = []
        scheduler, model, left = CountingScheduler(), self._low.model, []
        hook = model.norm_out.register_forward_pre_hook(lambda head, args: left.append(args[0]))
        with hicache.reference.apply(model, CONFIG, scheduler=scheduler):
            scheduler.set_timesteps(STEPS)
            for step in range(STEPS):
                output = model(**self._arguments(step, self._dtype))[0]
                found.append((left.pop(), output))
                scheduler.step()
        hook.remove()
        return found


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=DEPTHS, default=list(DEPTHS))
    options = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    columns = [(against, kind) for against in AGAINST for kind in SIDES]
    header = ["model", "blocks", "weights", "steps", "dtype", "of", "model: exact"]
    header += [f"{kind}: {against}" for against, kind in columns]
    rows: list[list[Any]] = []
    for name, weights, span, dtype in itertools.product(options.models, WEIGHTS, SPANS, DTYPES):
        model, call = model_of(name, weights)
        forecasts = Forecasts(model.to(DTYPES[dtype]), call, span)
        with torch.no_grad():
            forecasts.run()
        for what in ("hidden", "output"):
            keys = [("exact", "model"), *columns]
            values = [forecasts.errors[what, kind, against].value for against, kind in keys]
            rows.append([name, DEPTHS[name], weights, span, dtype, what, *values])
            print(name, weights, span, dtype, what, *(f"{value:.2g}" for value in values), flush=True)
    tables.save_csv(options.csv, header, rows)


if __name__ == "__main__":
    main()
