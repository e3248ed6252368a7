"""``hicache.fast.apply(pipe)``: cache any diffusers pipeline, or a bare transformer, in one line.

>>> import hicache.fast                                        # doctest: +SKIP
>>> with hicache.fast.apply(pipe) as handle:                   # doctest: +SKIP
...     image = pipe("a red ring on blue").images[0]
>>> print(handle.stats)                                        # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final

import torch
from torch import nn

from hicache.capture import CudaBackend
from hicache.config import HiCacheConfig
from hicache.denoiser import Denoiser, Policy, Session
from hicache.graphs import Graphs
from hicache.models import registry
from hicache.models.generic import StackAdapter
from hicache.plan import DenoiserPlan, Plan, make_plan
from hicache.stats import ContextStats, Stats
from hicache.tracker import SchedulerClock, TimestepClock
from hicache_kernels import BACKENDS, backend_status

__all__ = ["ContextStats", "DenoiserPlan", "Handle", "Plan", "Stats", "apply", "plan"]

GRANULARITIES: Final = ("auto", "module", "stack")
# Of one denoiser's histories. Holds FLUX.1's modules at 1024² and order 2 (5.7 GB), not a video model's.
# Fixed, and not a share of the card's memory: the same call draws the same picture on every card.
MEMORY_BUDGET: Final = 8_000_000_000
ATTRIBUTE: Final = "_hicache_handle"
REFERENCE_ATTRIBUTE: Final = "_hicache_reference_handle"  # where hicache.reference leaves its handle


class Handle:
    """A cached pipeline: leave the ``with`` block or call :meth:`remove` to get it back as it was."""

    _attribute = ATTRIBUTE  # where the transformers have it

    def __init__(self, session: Session, denoisers: list[Any]) -> None:
        self._session = session
        self._denoisers = denoisers
        self._final: Stats | None = None

    def restart(self) -> None:
        """Start a new run at the next call.

        A pipeline does this by itself. In a loop of your own without a scheduler, a run that goes on in the
        direction the last one's timesteps ran (that one stopped early, this one starts later) looks like the
        same run: call this before it.
        """
        self._session.clock.restart()

    @property
    def active(self) -> bool:
        """Whether the pipeline is cached."""
        return bool(self._denoisers)

    @property
    def stats(self) -> Stats:
        """Full and skipped steps by context, bytes held and cache milliseconds of the current or last run.

        After :meth:`remove`, as they stood then.
        """
        if self._final is not None:
            return self._final
        contexts = {
            context.label: ContextStats(context.full_steps, context.skipped_steps, context.engine.nbytes)
            for denoiser in self._denoisers
            for context in denoiser.contexts.values()
        }
        held = sum(denoiser.nbytes for denoiser in self._denoisers)
        session = self._session
        return Stats(
            session.config,
            " and ".join(sorted({denoiser.granularity.name for denoiser in self._denoisers})),
            session.backend,
            contexts,
            held,
            session.watch.read(),
            {denoiser.name: denoiser.choice for denoiser in self._denoisers},
            {
                denoiser.name: dataclasses.replace(denoiser.graphs.stats)
                for denoiser in self._denoisers
                if denoiser.graphs is not None
            },
        )

    def release(self) -> None:
        """Free the memory of all histories. The pipeline stays cached: its next run allocates anew."""
        for denoiser in self._denoisers:
            denoiser.release()

    def remove(self) -> None:
        """Leave the pipeline exactly as :func:`apply` found it. Calling it again does nothing."""
        if self._final is not None:
            return
        self._final = self.stats
        for denoiser in self._denoisers:
            denoiser.remove()
            denoiser.release()
            denoiser.module.__dict__.pop(self._attribute, None)
        self._denoisers.clear()
        self._session.clock.detach()

    def __enter__(self) -> Handle:
        if not self.active:
            raise RuntimeError("hicache: this handle was removed; call apply() for a new one")
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        # its hooks reach into the pipeline, and a copy's would still reach into the original
        raise TypeError("hicache: a cached pipeline cannot be copied or pickled; call remove() first")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def apply(
    pipe: Any,
    config: HiCacheConfig | None = None,
    *,
    speedup: float | None = None,
    scheduler: Any = None,
    granularity: str = "auto",
    memory_budget: int = MEMORY_BUDGET,
    cuda_graphs: bool | str = "auto",
    backend: str = "auto",
) -> Handle:
    """Cache a diffusers pipeline, or a bare transformer driven by a loop of your own.

    Every denoiser of the pipeline is hooked (``transformer``, ``transformer_2``, …), every call of it inside
    a step has its own history (classifier-free guidance), and every run starts fresh. Applying again replaces
    the settings.

    Args:
        pipe: a ``DiffusionPipeline``, any object with ``transformer`` and ``scheduler``, or a transformer
            module.
        config: the cache's settings; the defaults of :class:`HiCacheConfig` when None.
        speedup: bound to reach, steps / full steps, >= 1: picks the interval from each run's own step count,
            in place of the config's. A pipeline that changes denoisers in a run warms up with each of them,
            and stays below.
        scheduler: what counts the steps, where it is not ``pipe.scheduler``. A bare transformer without one
            counts by its ``timestep`` argument.
        granularity: what is cached: ``"module"``, every attention and MLP before its gate, as in the paper;
            ``"stack"``, the residual of all blocks together; ``"auto"``, modules where they are known and
            their history fits ``memory_budget``, else the stack. ``Handle.stats.choices`` says which.
        memory_budget: bytes a denoiser's histories may take for ``"auto"`` to choose modules.
        cuda_graphs: capture full and skipped steps and replay them: ``"auto"`` where it can be done (never
            off a GPU, under offload, with gradients or inside torch.compile; ``Handle.stats.graphs`` says why
            not), ``True`` the same but with a warning where it cannot, ``False`` never. The environment
            variable ``HICACHE_CUDA_GRAPHS=0`` switches them off.
        backend: of :mod:`hicache_kernels`: ``"auto"`` or a name; a name never falls back silently.

    Returns:
        Handle: its ``remove()`` restores everything.

    Raises:
        TypeError, ValueError: bad arguments, or a pipeline with nothing to hook. The pipeline is left as it
            was.
    """
    config = _check_config(config)
    _check_choice("granularity", granularity, GRANULARITIES)
    _check_choice("backend", backend, ("auto", *BACKENDS))
    _check_budget(memory_budget)
    if cuda_graphs != "auto" and not isinstance(cuda_graphs, bool):
        raise ValueError(f"hicache: expected cuda_graphs to be True, False or 'auto', got {cuda_graphs!r}")
    modules = _denoisers(pipe)
    for module in modules.values():
        _check_backend(backend, module)
        if REFERENCE_ATTRIBUTE in module.__dict__:
            raise ValueError(
                f"hicache.fast.apply: {type(module).__name__} is cached by hicache.reference; remove() that "
                "first"
            )
    clock_source = _scheduler_source(pipe, scheduler)
    _check_speedup(speedup, clock_source is not None)
    adapters = {name: StackAdapter(module) for name, module in modules.items()}
    families = {name: registry.find(module) for name, module in modules.items()}
    for name, family in families.items():
        if family is None and granularity == "module":
            raise ValueError(
                f"hicache: granularity='module': the modules of {type(modules[name]).__name__} are not "
                f"known; known are {', '.join(registry.known())}; use granularity='stack' or 'auto'"
            )

    for module in modules.values():
        previous = module.__dict__.get(ATTRIBUTE)
        if previous is not None:
            previous.remove()
    # everything that can fail has been checked: from here on the pipeline is changed
    clock = TimestepClock() if clock_source is None else SchedulerClock(clock_source)
    session = Session(clock, config, speedup, backend)
    policy = Policy(granularity, memory_budget)
    denoisers = []
    for name, module in modules.items():
        graphs = None
        if cuda_graphs is not False:
            graphs = Graphs(module, adapters[name].call, CudaBackend(), wanted=cuda_graphs is True)
        denoisers.append(Denoiser(name, module, adapters[name], families[name], policy, session, graphs))
    handle = Handle(session, denoisers)
    try:
        for denoiser in denoisers:
            denoiser.module.__dict__[ATTRIBUTE] = handle
            denoiser.install()
    except BaseException:
        handle.remove()
        raise
    return handle


def plan(
    pipe: Any,
    config: HiCacheConfig | None = None,
    *,
    height: int,
    width: int,
    num_frames: int = 1,
    batch: int = 1,
    guided: bool = True,
    calls: int | None = None,
    more_tokens: int = 0,
    granularity: str = "auto",
    memory_budget: int = MEMORY_BUDGET,
    dtype: torch.dtype | None = None,
) -> Plan:
    """How much memory caching a pipeline takes and what it launches, without running anything.

    The transformer may be on the meta device.

    Args:
        pipe: as for :func:`apply`; of a model whose modules are known.
        config: as for :func:`apply`.
        height: of the picture, in pixels.
        width: of the picture, in pixels.
        num_frames: of the video; 1 for pictures.
        batch: pictures drawn at once.
        guided: with classifier-free guidance, as the family's pipeline does it: two calls a step, or one of
            twice the batch. Nothing for models with distilled guidance.
        calls: of the transformer in a step, where it is not as many: 2 for FLUX.1 with true guidance.
        more_tokens: image tokens besides the picture's own: those of pictures given to an editing model.
        granularity: as for :func:`apply`.
        memory_budget: as for :func:`apply`.
        dtype: of the features; the transformer's own when None.

    Returns:
        Plan: by transformer, the granularity that would be chosen and the bytes of both; ``print()`` it.

    Raises:
        TypeError, ValueError: bad arguments, or a model whose modules are not known.
    """
    config = _check_config(config)
    _check_choice("granularity", granularity, GRANULARITIES)
    _check_budget(memory_budget)
    for name, value, least in (
        ("height", height, 1),
        ("width", width, 1),
        ("num_frames", num_frames, 1),
        ("batch", batch, 1),
        ("calls", 1 if calls is None else calls, 1),
        ("more_tokens", more_tokens, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"hicache: expected {name} to be an int >= {least}, got {value!r}")
    size = num_frames, height, width
    return make_plan(
        pipe,
        _denoisers(pipe),
        config,
        granularity,
        memory_budget,
        size,
        batch,
        guided,
        calls,
        more_tokens,
        dtype,
    )


def _check_config(config: HiCacheConfig | None) -> HiCacheConfig:
    if config is None:
        return HiCacheConfig()
    if not isinstance(config, HiCacheConfig):
        raise TypeError(f"hicache: expected config to be a HiCacheConfig or None, got {config!r}")
    return config


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"hicache: unknown {name} {value!r}; expected one of {', '.join(known)}")


def _check_budget(memory_budget: int) -> None:
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, int):
        raise TypeError(f"hicache: expected memory_budget to be a number of bytes, got {memory_budget!r}")
    if memory_budget < 0:
        raise ValueError(f"hicache: expected memory_budget >= 0 bytes, got {memory_budget}")


def _check_backend(backend: str, module: nn.Module) -> None:
    if backend == "auto":
        return
    # where the weights are, or where offloading will take them
    devices = {parameter.device.type for parameter in module.parameters()} | {"cpu"}
    if torch.cuda.is_available():
        devices.add("cuda")
    reasons = {device: backend_status(device)[backend] for device in sorted(devices - {"meta"})}
    if None not in reasons.values():
        why = "; ".join(str(reason) for reason in reasons.values())
        raise ValueError(f"hicache: backend {backend!r} cannot run: {why}")


def _check_speedup(speedup: float | None, counted: bool) -> None:
    if speedup is None:
        return
    if isinstance(speedup, bool) or not isinstance(speedup, (int, float)):
        raise TypeError(f"hicache: expected speedup to be a number >= 1 or None, got {speedup!r}")
    if not (math.isfinite(speedup) and speedup >= 1):
        raise ValueError(f"hicache: expected a finite speedup >= 1, got {speedup!r}")
    if not counted:
        raise ValueError(
            "hicache: speedup= needs the number of steps: pass scheduler=, or config= with an interval"
        )


def _denoisers(pipe: Any) -> dict[str, nn.Module]:
    if isinstance(pipe, nn.Module):
        return {"transformer": _unwrap(pipe)}
    components = getattr(pipe, "components", None)
    if not isinstance(components, Mapping):
        components = {name: getattr(pipe, name, None) for name in ("transformer", "transformer_2", "unet")}
    modules = {name: part for name, part in components.items() if isinstance(part, nn.Module)}
    found: dict[str, nn.Module] = {}
    for name, part in modules.items():
        if "transformer" in name and _unwrap(part) not in found.values():
            found[name] = _unwrap(part)
    if not found:
        present = ", ".join(f"{name} ({type(part).__name__})" for name, part in modules.items())
        raise ValueError(
            f"hicache: nothing to hook in {type(pipe).__name__}: expected a component named 'transformer', "
            f"got {present or 'no modules'}"
        )
    return found


def _unwrap(module: nn.Module) -> nn.Module:
    """A compiled module's original: hooks belong on it."""
    original = getattr(module, "_orig_mod", module)
    assert isinstance(original, nn.Module)
    return original


def _scheduler_source(pipe: Any, scheduler: Any) -> Any:
    """A function that gives the scheduler in use, or None when there is none."""
    if scheduler is not None:
        SchedulerClock.check(scheduler)
        return lambda: scheduler
    if isinstance(pipe, nn.Module):
        return None
    SchedulerClock.check(getattr(pipe, "scheduler", None))
    return lambda: pipe.scheduler
