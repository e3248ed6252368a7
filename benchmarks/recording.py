"""Bytes that recording reads and writes at a full step, in models that keep a few sums of modules' outputs.

``python -m benchmarks.recording --against 3d7e2b6 --csv benchmarks/results/recording.csv``

Counted, not timed: of every torch operation the tensors it reads and those it writes, in a full step with the
cache less one without. In bf16, a number of the hidden state and a block: what a deeper model moves more.
``--against`` counts another commit beside this tree.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final

import diffusers
import torch
from torch import Tensor, nn

import hicache.fast
from benchmarks.common import command, tables
from benchmarks.common.packages import run_at
from hicache import HiCacheConfig
from hicache.adapters import registry
from tests.support import models
from tests.support.operations import Traffic
from tests.support.schedulers import CountingScheduler

FAMILIES: Final = ("wan", "ltx", "pixart", "sana", "flux2")
DEPTHS: Final = (4, 8)
SAMPLES: Final = 16
CONFIG: Final = HiCacheConfig(warmup=3)
STEPS: Final = 2  # both full


def bytes_a_block(name: str) -> float:
    """Bytes a number of the hidden state that one more block adds to what recording moves."""
    few, many = DEPTHS
    return (recording_bytes(name, many) - recording_bytes(name, few)) / (many - few)


def recording_bytes(name: str, blocks: int) -> float:
    """Bytes a number of the hidden state that a full step with the cache moves more than one without.

    Args:
        name: of :data:`FAMILIES`.
        blocks: of the model.
    """
    depth = {"num_layers": 1, "num_single_layers": blocks - 1} if name == "flux2" else {"num_layers": blocks}
    model, call = models.build(name, **depth)
    arguments = {key: _many(value, keep=key == "timestep") for key, value in call(0.5).items()}
    scheduler = CountingScheduler()
    plain, numbers = _full_step(model.to(torch.bfloat16), arguments, scheduler)
    with hicache.fast.apply(
        model, CONFIG, scheduler=scheduler, granularity="module", backend="reference"
    ) as handle:
        cached, _ = _full_step(model, arguments, scheduler)
        assert handle.stats.full_steps == STEPS
    return (cached - plain) / numbers


def _many(value: Any, keep: bool) -> Any:
    """An argument of a call of many samples, so that what all of them share counts little; in bf16."""
    if not isinstance(value, Tensor):
        return value
    many = value.repeat(SAMPLES, *[1] * (value.ndim - 1)) if len(value) == 1 else value
    return many if keep or not value.is_floating_point() else many.bfloat16()


def _full_step(model: nn.Module, arguments: dict[str, Any], scheduler: CountingScheduler) -> tuple[int, int]:
    """Bytes that the second step moves (the first is learned from), and numbers in the hidden state."""
    adapter = registry.find(model)
    assert adapter is not None
    shapes: list[torch.Size] = []
    hook = adapter.outputs()[0].module.register_forward_hook(
        lambda module, args, output: shapes.append(_first(output).shape)
    )
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        model(**arguments)
        scheduler.step()
        hook.remove()
        with Traffic() as traffic:
            model(**arguments)
        scheduler.step()
    return traffic.nbytes, math.prod(shapes[0])


def _first(output: Any) -> Tensor:
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, Tensor)
    return found


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--against", metavar="COMMIT", help="count this one, too")
    parser.add_argument("--json", action="store_true", help="print the numbers alone")
    options = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    counted = {name: bytes_a_block(name) for name in FAMILIES}
    if options.json:
        print(json.dumps([str(Path(hicache.__file__).parent), counted]))
        return
    sides = {"this tree": counted}
    if options.against:
        where, sides[options.against] = json.loads(run_at(options.against, "benchmarks.recording", "--json"))
        assert Path(where) != Path(hicache.__file__).parent
    header = ["bytes a number a block", *sides]
    rows = [[name, *(round(found[name], 1) for found in sides.values())] for name in FAMILIES]
    print(tables.markdown(header, rows))
    tables.save_csv(options.csv, header, rows)


if __name__ == "__main__":
    main()
