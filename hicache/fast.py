"""``hicache.fast.apply(pipe)``: cache any diffusers pipeline, or a bare transformer, in one line.

>>> import hicache.fast                                        # doctest: +SKIP
>>> with hicache.fast.apply(pipe) as handle:                   # doctest: +SKIP
...     image = pipe("a red ring on blue").images[0]
>>> print(handle.stats)                                        # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from hicache.adapters import registry
from hicache.adapters.layers import check_layers
from hicache.calibration.matching import PipelineFacts
from hicache.checks import check_whole
from hicache.companion import companions
from hicache.config import HiCacheConfig
from hicache.cuda_graphs.capture import CudaBackend
from hicache.cuda_graphs.runner import CHOICES, GraphRunner
from hicache.handle import BaseHandle
from hicache.hooks.hooked import HookedModule
from hicache.hooks.output import HookedOutput
from hicache.hooks.transformer import HookedTransformer
from hicache.offers import granularity_for, offers_for
from hicache.pipeline import (
    MEMORY_BUDGET,
    PartsCheck,
    check_backend,
    check_budget,
    check_choice,
    check_config,
    check_one_cache,
    check_speedup,
    check_tolerance,
    find_controlnets,
    find_denoisers,
    find_scheduler,
)
from hicache.plan import plan
from hicache.planned import DenoiserPlan, Plan
from hicache.runtime.budget import Policy
from hicache.runtime.context import MAX_CONTEXTS
from hicache.runtime.controlnet import ControlNet
from hicache.runtime.corrector import Correctors, by_module, correctors_of
from hicache.runtime.denoiser import Denoiser
from hicache.runtime.gate_rank import GATE_TOLERANCE
from hicache.runtime.session import Session
from hicache.runtime.sessions import Sessions
from hicache.stats import ContextStats, Stats
from hicache_kernels import BACKENDS

if TYPE_CHECKING:  # nobody who does not use them imports them
    from hicache.companion import CompanionSettings
    from hicache.companions.clusca import ClusCa

__all__ = ["ContextStats", "DenoiserPlan", "Handle", "Plan", "Stats", "apply", "plan"]


class Handle(BaseHandle[Denoiser]):
    """A cached pipeline: leave the ``with`` block or call :meth:`remove` to get it back as it was."""

    owner = "hicache.fast"

    def __init__(
        self, sessions: Sessions, denoisers: list[Denoiser], controlnets: Mapping[str, nn.Module]
    ) -> None:
        self._controlnets = [ControlNet(*found, denoisers, sessions) for found in controlnets.items()]
        super().__init__(denoisers, sessions, self._controlnets)
        self._sessions = sessions

    def _read_stats(self) -> Stats:
        session, denoisers = self._sessions.latest, self._denoisers
        tracks = {denoiser.name: denoiser.tracks.of(session) for denoiser in denoisers}
        return Stats(
            config=session.config,
            granularity=" and ".join(sorted({track.choice.recorder.name for track in tracks.values()})),
            backend=session.backend,
            places=tuple(sorted(session.places)),
            sigmas={
                context.label: told
                for track in tracks.values()
                for context in track.contexts.current
                if (told := context.engine.numbers.told)
            },
            contexts={
                context.label: ContextStats(context.full_steps, context.skipped_steps, context.engine.nbytes)
                for track in tracks.values()
                if not track.counter.outdated
                for context in track.contexts.current
            },
            history_bytes=sum(denoiser.tracks.nbytes for denoiser in denoisers),
            gates_bytes=sum(denoiser.tracks.gates_nbytes for denoiser in denoisers),
            kept_bytes=sum(denoiser.tracks.kept_nbytes for denoiser in denoisers),
            cache_ms=session.watch.read(),
            choices={name: track.choice.describe() for name, track in tracks.items()},
            backends={
                name: taken
                for name, track in tracks.items()
                for context in track.contexts.current
                if (taken := context.engine.backend_taken) is not None
            },
            low_rank={name: found for name, track in tracks.items() if (found := track.choice.gates())},
            companions={d.name: said for d in denoisers if (said := d.companions.describe())},
            graphs={
                denoiser.name: dataclasses.replace(denoiser.graphs.stats)
                for denoiser in denoisers
                if denoiser.graphs is not None
            },
            controlnets={
                controlnet.name: dataclasses.replace(controlnet.stats(session))
                for controlnet in self._controlnets
            },
        )


def apply(
    pipe: Any,
    config: HiCacheConfig | None = None,
    *,
    speedup: float | None = None,
    scheduler: Any = None,
    granularity: str = "auto",
    memory_budget: int = MEMORY_BUDGET,
    gate_tolerance: float = GATE_TOLERANCE,
    max_contexts: int = MAX_CONTEXTS,
    cuda_graphs: bool | str = "auto",
    backend: str = "auto",
    clusters: ClusCa | None = None,
    sparse: CompanionSettings | None = None,
) -> Handle:
    """Cache a diffusers pipeline, or a bare transformer driven by a loop of your own.

    Every denoiser of the pipeline is hooked (``transformer``, ``transformer_2``, …), every call of it inside
    a step has its own history (classifier-free guidance), and every run starts fresh. A ControlNet that the
    pipeline has runs at full steps only. Applying again replaces the settings.

    Args:
        pipe: a ``DiffusionPipeline``, any object with ``transformer`` and ``scheduler``, or a transformer
            module.
        config: the cache's settings. None: in the runs they hold for, the calibrations that come with the
            model (``hicache.output.json`` and ``hicache.json`` in the folder that the pipeline was loaded
            from, in this order; the bundled model has both), else the defaults of :class:`HiCacheConfig`.
        speedup: bound to reach, steps / full steps, >= 1: picks the interval from each run's own step count,
            in place of the config's. A pipeline that changes denoisers in a run warms up with each of them,
            and stays below.
        scheduler: what counts the steps, where it is not ``pipe.scheduler``. A bare transformer without one
            counts by its ``timestep`` argument.
        granularity: what is cached: ``"module"``, every attention and MLP before its gate, as in the paper;
            ``"stack"``, the residual of all blocks together; ``"low-rank"``, a few weighed sums of modules
            that take the present's gates where the stack's forecast would miss them (docs/algorithm.md,
            "Gates of low rank"); ``"auto"``, in every run what its calibration was fitted by where there is
            one, else the first of module, low-rank and stack that is known for the model and fits
            ``memory_budget``. ``Handle.stats.choices`` says which. ``"output"``, what the denoiser returns:
            nothing of it runs at a skipped step, and any denoiser can be cached, U-Nets too.
        memory_budget: bytes that caching may take of a denoiser's memory. Histories come first: for
            ``"auto"`` to choose modules or low rank, theirs must fit (of low rank with the gates of the run).
            CUDA graphs get what histories, gates and the rest leave of it, and never make a history coarser;
            where a granularity was asked for, the history is held in any case.
        gate_tolerance: what gates of low rank may be off by, relative to all gates of a run's skipped steps:
            the least rank that keeps to it is taken.
        max_contexts: calls of a denoiser in a step that have histories of their own: guidance takes two, a
            tiled picture as many as it has tiles. Further calls run uncached, with a warning.
        cuda_graphs: capture steps and replay them: ``"auto"`` where it can be done (never off a GPU, under
            offload, with gradients or inside torch.compile; ``Handle.stats.graphs`` says why not), ``True``
            the same but with a warning where it cannot, ``False`` never. Full steps are captured where their
            graphs fit ``memory_budget`` and leave as much free as they take, skipped steps where theirs fit
            the budget; ``"full"`` captures both in any case, ``"skipped"`` skipped steps alone. The
            environment variable ``HICACHE_CUDA_GRAPHS=0`` switches graphs off.
        backend: of :mod:`hicache_kernels`: ``"auto"`` or a name; a name never falls back silently.
        clusters: compute MLPs of double blocks for a few tokens at skipped steps
            (:class:`hicache.companions.clusca.ClusCa`, docs/companions.md), by module; None: compute nothing.
        sparse: a :class:`hicache.companions.sparse.SparseAttention`: full steps after the warm-up attend to
            few columns, on FLUX and Wan, and run eagerly.

    Returns:
        Handle: its ``remove()`` restores everything.

    Raises:
        TypeError, ValueError: bad arguments, or a pipeline with nothing to hook. The pipeline is left as it
            was.
    """
    if clusters is not None:
        granularity = by_module(granularity, "clusters")
    offers = offers_for(pipe, granularity) if config is None else []
    config = check_config(config)
    granularity = granularity_for(pipe, granularity, config, bool(offers))
    check_choice("backend", backend, ("auto", *BACKENDS))
    check_budget(memory_budget)
    check_tolerance(gate_tolerance)
    check_whole("hicache: max_contexts", max_contexts)
    if not isinstance(cuda_graphs, bool):
        check_choice("cuda_graphs", cuda_graphs, CHOICES)
    whole = granularity == "output"
    modules, controlnets = find_denoisers(pipe, unets=whole), find_controlnets(pipe)
    for module in modules.values():
        check_backend(backend, module)
        check_one_cache(module, Handle.owner)
    source = find_scheduler(pipe, scheduler)
    check_speedup(speedup, counted=source is not None)
    may_leave_out = any(offer.fitted_by == "output" for offer in offers)
    hooked: dict[str, HookedModule] = {
        name: HookedOutput(module) if whole else HookedTransformer(module, may_leave_out)
        for name, module in modules.items()
    }
    adapters = {name: registry.find(module) for name, module in modules.items()}
    for name, adapter in adapters.items():
        if adapter is None and granularity in ("module", "low-rank"):
            raise ValueError(
                f"hicache: granularity={granularity!r}: the modules of {type(modules[name]).__name__} are "
                f"not known; known are {', '.join(registry.known())}; use granularity='stack' or 'auto'"
            )
        check_layers(adapter, config.by_feature)

    beside = companions(modules, sparse=sparse)

    correctors: dict[str, Correctors | None] = {}
    for name, adapter in adapters.items() if clusters is not None else ():
        assert adapter is not None
        correctors[name] = correctors_of(clusters, "clusters", adapter, hooked[name].call)

    # everything that can fail has been checked: from here on the pipeline is changed
    Handle.remove_from(modules.values())
    facts = PipelineFacts(pipe, modules)
    decided: dict[Any, tuple[int, ...]] = {}
    sessions = Sessions(
        source,
        callers=scheduler is None,
        make=lambda clock: Session(clock, config, speedup, backend, facts, granularity, offers, decided),
        on_run=PartsCheck(pipe, {**modules, **controlnets}).warn,
    )
    policy = Policy(granularity, memory_budget, float(gate_tolerance), max_contexts)
    denoisers = []
    for name, transformer in hooked.items():
        graphs = None
        if cuda_graphs is not False:
            eager = beside[name].eager
            graphs = GraphRunner(transformer, CudaBackend(), cuda_graphs, why_not_full=eager)
        more = graphs, beside[name], correctors.get(name)
        denoisers.append(Denoiser(name, transformer, adapters[name], policy, sessions, *more))
    handle = Handle(sessions, denoisers, controlnets)
    handle.install()
    return handle
