"""Everything that changes a picture, and nothing else: what a folder of pictures is made with."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import hicache
from hicache.basis import Basis, known_bases
from hicache.checks import check_positive, check_whole
from hicache.config import HISTORY_DTYPES, HiCacheConfig
from hicache.launch.backends import VIDEO, Backend
from hicache.pipeline import GRANULARITIES, check_choice, check_speedup
from hicache.schedule import Schedule, Steps, full_steps

ORIGINAL: Final = "original"
#: Modes by the names people know them by → the basis; None: what comes with the model, else the defaults.
#: Every other basis is a mode by its own name, and the path of a calibration is one.
MODES: Final[dict[str, str | None]] = {
    "hicache": "hermite",
    "scaled-taylor": "scaled_taylor",
    "taylor": "taylor",
    "reuse": "reuse",
    "fitted": None,
    "clusca": "taylor",
    "hi-clusca": "hermite",
    "sparse": "hermite",
}
#: Modes with something beside the cache → the argument of :func:`hicache.fast.apply` that it is, the module
#: of its settings, and their class.
COMPANIONS: Final[dict[str, tuple[str, str, str]]] = {
    "clusca": ("clusters", "hicache.companions.clusca", "ClusCa"),
    "hi-clusca": ("clusters", "hicache.companions.clusca", "ClusCa"),
    "sparse": ("sparse", "hicache.companions.sparse", "SparseAttention"),
}
#: Those whose skipped steps compute MLPs for a few tokens: by module alone.
CLUSTERED: Final = tuple(mode for mode, (option, *_) in COMPANIONS.items() if option == "clusters")
#: Modes whose basis is a class, with its defaults → its name in :mod:`hicache`, imported when asked for.
CLASSES: Final = {"hicache-analytic": "AnalyticHermite"}
DTYPES: Final = ("auto", "bf16", "fp16", "fp32")
FORMATS: Final = ("png", "jpg")
#: Of the cache: of no meaning to ``original``.
_CACHE: Final = (
    "interval",
    "order",
    "sigma",
    "warmup",
    "speedup",
    "schedule",
    "history_dtype",
    "granularity",
    "last_step_full",
)
_PAPERS: Final = ("interval", "order", "sigma", "warmup")


@dataclass(frozen=True)
class Settings:
    """What changes a picture. None is the family's own or the paper's, until :meth:`resolved`.

    Args:
        model: a folder or a name.
        backend: of :data:`hicache.launch.backends.BACKENDS`, or ``"auto"``.
        mode: ``"original"``, of :data:`MODES` or :data:`CLASSES`, another basis, or the path of a
            calibration.
        interval: of :class:`HiCacheConfig`, as ``order``, ``sigma``, ``warmup`` and ``last_step_full``.
        speedup: the bound to reach, in place of the interval.
        schedule: places of the full steps such as ``"0,1,2,9"``, or a name or a path as the config takes it.
        history_dtype: such as ``"float32"``.
        granularity: of :func:`hicache.fast.apply`.
        steps: of denoising.
        width: pixels.
        height: pixels.
        frames: of a video.
        fps: of its file.
        guidance: the scale.
        negative: the negative prompt.
        seed: of the first picture; every next one has the next.
        images_per_prompt: of each prompt.
        image: paths of pictures that are given with every prompt.
        dtype: of :data:`DTYPES`; ``auto`` is what the weights are stored in, on a CPU float32 for float16.
        lora: paths or names, each with a weight after a colon if it is not 1.
        compile: by torch.
        format: of :data:`FORMATS`.
        more: other arguments of the pipeline.

    Raises:
        TypeError, ValueError: a setting of the wrong type or out of range, which the message names.
    """

    model: str | None = None
    backend: str = "auto"
    mode: str = "hicache"
    interval: int | None = None
    order: int | None = None
    sigma: float | None = None
    warmup: int | None = None
    speedup: float | None = None
    schedule: str | None = None
    last_step_full: bool = False
    history_dtype: str | None = None
    granularity: str = "auto"
    steps: int | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    fps: int | None = None
    guidance: float | None = None
    negative: str | None = None
    seed: int = 0
    images_per_prompt: int = 1
    image: tuple[str, ...] = ()
    dtype: str = "auto"
    lora: tuple[str, ...] = ()
    compile: bool = False
    format: str = "png"
    more: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "width", "height", "frames", "fps", "images_per_prompt"):
            if getattr(self, name) is not None:
                check_whole(f"--{name.replace('_', '-')}", getattr(self, name))
        check_whole("--seed", self.seed, 0, 2**63 - 1)
        if self.guidance is not None:
            check_positive("--guidance", self.guidance, zero=True)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("format", self.format, FORMATS)
        clustered = self.mode in CLUSTERED
        check_choice("granularity", self.granularity, ("auto", "module") if clustered else GRANULARITIES)
        check_speedup(self.speedup, counted=True)
        if self.mode == "fitted" and self._given(_PAPERS):
            names = ", ".join(f"--{name}" for name in self._given(_PAPERS))
            raise ValueError(f"--mode fitted takes what comes with the model: leave out {names}")
        self.config()

    def _given(self, names: tuple[str, ...]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def config(self) -> HiCacheConfig | None:
        """The cache's settings; None for the original, and for what comes with the model.

        Raises:
            TypeError, ValueError: one of them is wrong.
        """
        known = {**MODES, **{basis: basis for basis in known_bases()}}
        if self.mode == ORIGINAL or (self.mode in known and known[self.mode] is None):
            return None
        if self.mode not in {**known, **CLASSES} and not self.mode.endswith(".json"):
            raise ValueError(
                f"--mode: expected one of {', '.join((ORIGINAL, *known, *CLASSES))}, or the path of a "
                f"calibration, got {self.mode!r}"
            )
        try:
            return HiCacheConfig(
                **self._given(_PAPERS),
                basis=self._basis(known.get(self.mode, self.mode)),
                schedule=_schedule(self.schedule),
                last_step_full=self.last_step_full,
                history_dtype=_history_dtype(self.history_dtype),
            )
        except OSError as error:
            raise ValueError(f"cannot read {error.filename}: {error.strerror}") from error

    def companions(self) -> dict[str, Any]:
        """What takes part in full steps beside the cache: arguments of :func:`hicache.fast.apply`.

        Imported here, so that nobody imports it who does not ask for it.
        """
        if self.mode not in COMPANIONS:
            return {}
        option, module, kind = COMPANIONS[self.mode]
        return {option: getattr(importlib.import_module(module), kind)()}

    def _basis(self, name: str | None) -> str | Basis:
        """The basis of a mode."""
        if name not in CLASSES:
            return name or "hermite"
        # its σ of forecasts before it has measured one
        made: Basis = getattr(hicache, CLASSES[name])(**self._given(("sigma",)))
        return made

    def resolved(self, model: str, backend: Backend) -> Settings:
        """With the family's settings where none are given: nothing but the pipeline's own is left open.

        Raises:
            ValueError: what the family has no use for.
        """
        for name in () if backend.kind == VIDEO else ("frames", "fps"):
            if getattr(self, name) is not None:
                raise ValueError(f"--{name}: {backend.name} draws pictures, not videos")
        width, height = backend.size or (None, None)
        video = backend.kind == VIDEO
        first: dict[str, Any] = {
            "steps": backend.steps,
            "width": width,
            "height": height,
            "frames": backend.frames,
            "fps": backend.fps if video else None,
            "guidance": backend.guidance,
            "negative": backend.negative,
            "dtype": backend.dtype,
        }
        chosen = {name: value for name, value in first.items() if getattr(self, name) in (None, "auto")}
        if self.mode in CLUSTERED:
            chosen["granularity"] = "module"
        unused: dict[str, Any] = (
            {f.name: f.default for f in fields(self) if f.name in _CACHE} if self.mode == ORIGINAL else {}
        )
        return replace(self, model=model, backend=backend.name, **chosen, **unused)

    def plain(self) -> dict[str, Any]:
        """For JSON: the settings, and the cache's in full, rows of a calibration included."""
        config = self.config()
        data = {**asdict(self), "more": dict(self.more)}
        data["config"] = None if config is None else json.loads(config.to_json())
        data |= {option: asdict(settings) for option, settings in self.companions().items()}
        data["image"] = [_contents(path) for path in self.image]
        return json.loads(json.dumps(data))  # type: ignore[no-any-return]  # tuples as a file has them

    @cached_property
    def tag(self) -> str:
        """A name for people, and four digits of everything."""
        text = json.dumps(self.plain(), sort_keys=True)
        parts = [Path(self.mode).stem, *self._cache_part(), f"{self.steps}st"]
        if self.width and self.height:
            parts.append(f"{self.width}x{self.height}")
        return "_".join(parts) + "-" + hashlib.sha256(text.encode()).hexdigest()[:4]

    def _cache_part(self) -> list[str]:
        config = self.config()
        if config is None or self.speedup is not None:
            return [] if self.speedup is None else [f"x{self.speedup:g}"]
        return [f"N{config.interval}", f"O{config.order}", f"s{config.sigma:g}"]

    @property
    def suffix(self) -> str:
        """Of the files."""
        return ".mp4" if self.fps is not None else f".{self.format}"

    def full_steps(self, steps: int | None = None) -> int | None:
        """Full steps of a run; None where the run decides."""
        config, steps = self.config(), steps or self.steps or 0
        if self.mode == ORIGINAL:
            return steps
        if config is None or self.speedup is not None:
            return None
        return len(full_steps(config, steps))


def _schedule(text: str | None) -> str | Schedule | None:
    """Places such as ``"0,1,2,9"`` as a schedule; names and paths as they are."""
    if text is None or not text.replace(",", "").replace(" ", "").isdigit():
        return text
    return Steps(*(int(place) for place in text.split(",")))


def _history_dtype(name: str | None) -> Any:
    known = {str(dtype).removeprefix("torch."): dtype for dtype in HISTORY_DTYPES}
    if name is not None and name not in known:
        raise ValueError(f"--history-dtype: expected one of {', '.join(known)}, got {name!r}")
    return None if name is None else known[name]


def _contents(path: str) -> list[str]:
    """A path, and what tells the file from another one there.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return [path, hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]]
    except OSError as error:
        raise ValueError(f"--image: cannot read {path}: {error.strerror}") from error
