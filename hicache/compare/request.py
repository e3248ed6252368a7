"""What a user asks ``hicache compare`` for: read from a command line, checked, and written as one again."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from hicache.checks import check_whole
from hicache.compare.variants import check_modes
from hicache.config import HiCacheConfig
from hicache.fitting.command import lines
from hicache.fitting.pictures import Pictures
from hicache.launch.workers import Staff
from hicache.pipeline import GRANULARITIES, check_choice
from hicache_kernels import BACKENDS

#: Options with commas.
SEVERAL: Final = ("mode", "interval", "metrics")
#: Arguments of pipelines that have options, by the options' names.
CALL: Final = {"guidance": "guidance_scale", "width": "width", "height": "height"}


@dataclass(frozen=True)
class Request:
    """What is to be compared. Fields are called as the options are.

    Args:
        prompt: of the pictures; each has the next seed.
        model: folder or name of a diffusers pipeline; None is the bundled model.
        out: the page; the numbers are written beside it, as ``.json``.
        mode: of :func:`hicache.compare.variants.known_modes`; None takes the usual ones.
        interval: N, one or more.
        steps: denoising steps.
        order: O of all variants; so are sigma and warmup.
        seed: of the first picture.
        batch: pictures drawn together.
        repeats: how often each variant is timed.
        granularity: what is cached; None is ``"stack"`` for the bundled model, else ``"auto"``.
        backend: of the kernels.
        metrics: keys; None takes all that can be measured.
        gpus: which GPUs compare, as :class:`hicache.launch.workers.Staff` takes them; so are workers, ray
            and threads.
        call: other arguments of the pipeline.

    Raises:
        TypeError, ValueError: a field that cannot be; the message names the option.
    """

    prompt: tuple[str, ...]
    model: str | None = None
    out: Path = Path("compare.html")
    mode: tuple[str, ...] | None = None
    interval: tuple[int, ...] = (5, 7, 10)
    steps: int = 50
    order: int = HiCacheConfig.order
    sigma: float = HiCacheConfig.sigma
    warmup: int = HiCacheConfig.warmup
    seed: int = 0
    batch: int = 8
    repeats: int = 3
    granularity: str | None = None
    backend: str = "auto"
    metrics: tuple[str, ...] | None = None
    gpus: str | None = None
    workers: int | None = None
    ray: str | None = None
    threads: int | None = None
    call: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("expected at least one prompt, got none")
        for name in ("steps", "batch", "repeats"):
            check_whole(f"--{name}", getattr(self, name))
        for name in ("workers", "threads"):
            if getattr(self, name) is not None:
                check_whole(f"--{name}", getattr(self, name))
        check_whole("--seed", self.seed, 0, 2**63 - len(self.prompt))
        for option, name in CALL.items():
            value = self.call.get(name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"--{option}: expected a finite number, got {value}")
        if self.out.suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"--out: expected the name of a page such as compare.html, got {self.out}")
        if not self.out.parent.is_dir():
            raise ValueError(f"--out: expected a file in an existing folder, got {self.out}")
        if self.granularity is not None:
            check_choice("granularity", self.granularity, GRANULARITIES)
        check_modes(self.mode or ())
        for interval in self.interval:
            check_whole("--interval", interval)
        check_choice("backend", self.backend, ("auto", *BACKENDS))
        _ = self.base  # which checks its numbers

    @property
    def base(self) -> HiCacheConfig:
        """Settings that all variants share."""
        return HiCacheConfig(order=self.order, sigma=self.sigma, warmup=self.warmup)

    @property
    def cached(self) -> str:
        """What is cached."""
        return self.granularity or ("stack" if self.model is None else "auto")

    @property
    def staff(self) -> Staff | None:
        """Who compares; None where nothing is said of that."""
        asked = {name: getattr(self, name) for name in ("gpus", "workers", "ray", "threads")}
        return None if all(value is None for value in asked.values()) else Staff(**asked)

    @property
    def pictures(self) -> Pictures:
        """What is drawn."""
        seeds = tuple(self.seed + index for index in range(len(self.prompt)))
        return Pictures(self.prompt, seeds, {"num_inference_steps": self.steps, **self.call}, self.batch)

    @property
    def numbers(self) -> Path:
        """The JSON file."""
        return self.out.with_suffix(".json")

    def command(self) -> str:
        """The command line that asks for the same."""
        words: list[str] = []
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in ("prompt", "call", "out") or value == item.default:
                continue
            words += [f"--{item.name}", _joined(value)]
        for option, name in CALL.items():
            if name in self.call:
                words += [f"--{option}", str(self.call[name])]
        words += ["--out", self.out.name]
        dashed = any(prompt.startswith("-") for prompt in self.prompt)  # would be taken for options
        asked = [*words, "--", *self.prompt] if dashed else [*self.prompt, *words]
        return shlex.join(["hicache", "compare", *asked])


def read(options: SimpleNamespace, usual: tuple[str, ...]) -> Request:
    """What options ask for; those that are None are left at their defaults.

    Args:
        options: of the command line, by their names; None where one was left out.
        usual: prompts for the bundled model, where there are none.

    Raises:
        TypeError, ValueError: an option that cannot be.
    """
    if options.prompt and options.prompts:
        raise ValueError("expected prompts or --prompts, got both")
    prompt = lines("--prompts", options.prompts) if options.prompts else options.prompt or ()
    given = {item.name: getattr(options, item.name, None) for item in fields(Request)}
    several = {name: _parts(text) for name in SEVERAL if (text := given[name]) is not None}
    given |= several
    if "interval" in several:
        given["interval"] = tuple(map(_whole, several["interval"]))
    given["prompt"] = tuple(prompt) or (usual if options.model is None else ())
    found = {name: getattr(options, option) for option, name in CALL.items()}
    given["call"] = {name: value for name, value in found.items() if value is not None}
    return Request(**{name: value for name, value in given.items() if value is not None})


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"--interval: expected whole numbers with commas, got {text!r}") from error


def _joined(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
