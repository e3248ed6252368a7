"""How often the host waits for the device, by kind of step: ``python -m benchmarks.waits``.

Whole runs of small pipelines on the emulated GPU of :mod:`benchmarks.capture_safety`. A wait is an operation
that gives the host a number of the device's, or copies between the two without ``non_blocking``, or a
synchronisation by name; it is of whoever called torch. With ``--against COMMIT`` earlier ones of hicache are
counted beside this one, with the same torch, diffusers and pipelines. Counted, not timed: every machine gives
the same table. CUDA graphs are off: a capture synchronises, and a replay launches what was counted here.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import hicache.fast
from benchmarks.capture_safety.emulated_gpu import EmulatedGpu, EmulatedTensor, move, to_gpu
from benchmarks.common import command, tables
from hicache import HiCacheConfig
from hicache.schedule import full_steps
from tests.support import pipelines

MODELS: Final = {
    "FLUX.1": "flux",
    "FLUX.1, true guidance": "flux_cfg",
    "SD3": "sd3",
    "Qwen-Image": "qwen",
    "Wan": "wan",
    "Wan 2.2 TI2V, a picture given": "wan_ti2v_picture",
    "HunyuanVideo": "hunyuan",
}
GRANULARITIES: Final = ("stack", "module", "low-rank")
CONFIG: Final = HiCacheConfig(interval=4, order=2, warmup=3)
STEPS: Final = 12
RUNS: Final = 2
FULL: Final = tuple(full_steps(CONFIG, STEPS))
SKIPPED: Final = tuple(step for step in range(STEPS) if step not in FULL)
# kind of step → its steps, and whether what comes before the run's first block counts to it: None for either
KINDS: Final = {
    "start of the run": (FULL[:1], True),
    "first full step": (FULL[:1], False),
    "later full steps": (FULL[1:], None),
    "first skipped step": (SKIPPED[:1], None),
    "later skipped steps": (SKIPPED[1:], None),
}

# torch's own list of what cannot be traced without numbers is that of what reads them
_TAGS: Final = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_CHECKED: Final = ("_linalg_eigh",)  # torch looks at what the solver says of itself
_MASKS: Final = (torch.bool, torch.uint8)
_BY_NAME: Final = ("torch.cuda.synchronize", "torch.cuda.Event.synchronize", "torch.cuda.Stream.synchronize")
_ROOT: Final = Path(__file__).parents[1]


class Wait(NamedTuple):
    """One wait."""

    what: str  # torch's name for the operation
    module: str  # that called torch
    function: str
    begun: bool  # whether a block has run in this run

    @property
    def own(self) -> bool:
        """Whether it is hicache's."""
        return self.module.split(".")[0] in ("hicache", "hicache_kernels")


class Waits(TorchDispatchMode):
    """Notes waits in ``found`` while it is entered, within an emulated GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Wait] = []
        self.begun = False

    def __enter__(self) -> Waits:
        with ExitStack() as stack:
            for name in _BY_NAME:
                note = functools.partial(self._note, name)
                stack.enter_context(mock.patch(name, lambda *args, note=note: note(), create=True))
            super().__enter__()
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._undo.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _waits(func, args, kwargs):
            self._note(func.overloadpacket.__name__)
        return func(*args, **kwargs)

    def _note(self, what: str) -> None:
        frame = sys._getframe(1)
        aside = ("torch", "functools", __name__, EmulatedGpu.__module__)
        while frame.f_back is not None and _named(frame).startswith(aside):
            frame = frame.f_back
        self.found.append(Wait(what, _named(frame), frame.f_code.co_name, self.begun))

    def watch(self, block: nn.Module) -> None:
        """Take note when a block runs."""
        block.register_forward_pre_hook(lambda *args: setattr(self, "begun", True))


def _named(frame: Any) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _waits(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operation makes the host wait for the device."""
    there = [
        isinstance(leaf, EmulatedTensor)
        for leaf in pytree.tree_leaves((args, kwargs))
        if isinstance(leaf, Tensor)
    ]
    name = func.overloadpacket.__name__
    if name == "copy_":
        blocks = not (kwargs.get("non_blocking") or args[2:3] == (True,))
        return blocks and there[0] != there[1]
    if name == "_to_copy":
        target = kwargs.get("device")
        moves = target is not None and (torch.device(target).type == "cpu") == there[0]
        return moves and not kwargs.get("non_blocking")
    if name == "index":  # by a mask: a search. By numbers of the host: a copy of those
        found = [index for index in args[1] if index is not None]
        return there[0] and any(
            index.dtype in _MASKS or not isinstance(index, EmulatedTensor) for index in found
        )
    return any(there) and (name in _CHECKED or any(tag in func.tags for tag in _TAGS))


@contextmanager
def emulated(done: Callable[[], bool] = lambda: True) -> Iterator[Waits]:
    """A GPU, as :class:`EmulatedGpu`, and the waits for it.

    Args:
        done: whether the device has come to what it is asked whether it has.
    """
    gates = next(
        name for name in ("hicache.adapters.gates", "hicache.models.gates") if _is_there(name)
    )  # the latter: before the packages were split
    # weights of a GPU that is not there are no plain parameters, yet are to be read as those
    plain = mock.patch(f"{gates}._plain", return_value=True)
    with EmulatedGpu(done), torch.no_grad(), plain, Waits() as waits:
        yield waits


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def build(name: str, waits: Waits) -> tuple[Any, dict[str, Any]]:
    """A pipeline of the tests on the emulated GPU, its blocks watched, and its arguments."""
    pipe, arguments = pipelines.build(name)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            move(part)
    for denoiser in pipelines.denoisers(pipe).values():
        for blocks in denoiser.children():
            for block in blocks if isinstance(blocks, nn.ModuleList) else ():
                waits.watch(block)
    return pipe, to_gpu(arguments)


def of_a_run(waits: Waits, pipe: Any, arguments: dict[str, Any]) -> list[list[Wait]]:
    """Run a pipeline; the waits of every step, the first one's with what comes before it."""
    steps: list[list[Wait]] = []
    waits.found.clear()
    waits.begun = False

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(list(waits.found))
        waits.found.clear()
        return {}

    pipelines.draw(pipe, arguments, STEPS, callback_on_step_end=callback)
    return steps


def count(name: str, granularity: str | None) -> list[list[list[Wait]]] | None:
    """The waits of every step of the first runs of a pipeline.

    Args:
        name: in :mod:`tests.support.pipelines`.
        granularity: of its cache; None: it has none.

    Returns:
        None: it cannot be cached so.
    """
    with emulated() as waits, warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")  # diffusers' of its own deprecations
        pipe, arguments = build(name, waits)
        if granularity is not None:
            try:
                stack.enter_context(hicache.fast.apply(pipe, CONFIG, granularity=granularity))
            except ValueError:  # not known yet
                return None
        try:
            return [of_a_run(waits, pipe, arguments) for _ in range(RUNS)]
        except RuntimeError as error:
            if "cannot be had" not in str(error):
                raise
            return None


def of_kind(steps: list[list[Wait]], kind: str) -> list[list[Wait]]:
    """The waits of the steps of one of :data:`KINDS`, step by step."""
    which, before = KINDS[kind]
    return [[wait for wait in steps[step] if before in (None, not wait.begun)] for step in which]


HEADER: Final = (
    "code", "model", "granularity", "run", "steps", "waits of hicache a step", "others a step",
)  # fmt: skip
Row = tuple[str, str, str, int, str, float, float]


def rows(code: str) -> list[Row]:
    """A row of :data:`HEADER` for every model, granularity, run and kind of step, by the hicache imported."""
    made: list[Row] = []
    for model, name in MODELS.items():
        for granularity in GRANULARITIES:
            for run, steps in enumerate(count(name, granularity) or (), start=1):
                for kind in KINDS:
                    found = [[wait.own for wait in step] for step in of_kind(steps, kind)]
                    own, others = sum(map(sum, found)), sum(own.count(False) for own in found)
                    made.append((code, model, granularity, run, kind, own / len(found), others / len(found)))
    return made


def _rows_of(commit: str) -> list[Row]:
    """:func:`rows` by the hicache of a commit, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        git = ["git", "-C", str(_ROOT)]
        archive = [*git, "archive", commit, "hicache", "hicache_kernels"]
        packed = subprocess.run(archive, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], check=True, input=packed)
        code = f"import json; from benchmarks import waits; print(json.dumps(waits.rows({commit!r})))"
        path = os.pathsep.join((folder, str(_ROOT)))
        done = subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path},
        )
    return [tuple(row) for row in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--against", nargs="+", default=(), metavar="COMMIT", help="count earlier ones too")
    options = parser.parse_args()
    found = rows("this tree") + [row for commit in options.against for row in _rows_of(commit)]
    print(tables.markdown(HEADER, [[*row[:-2], *(f"{number:.3g}" for number in row[-2:])] for row in found]))
    tables.save_csv(options.csv, HEADER, found)


if __name__ == "__main__":
    main()
