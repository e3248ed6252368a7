"""``hicache.reference.apply(pipe)``: HiCache as the paper has it, eagerly, module by module.

Every attention and MLP output is cached before its gate, of the image and the text stream, for every
context; on skipped steps every block still runs, with forecasts in place of its attention and MLP and with
the gates of the current timestep. It is what :mod:`hicache.fast` is compared with, for parity and for speed,
and shares with it only how a pipeline's parts are found and given back (:mod:`hicache.pipeline`,
:mod:`hicache.handle`), the settings' own numbers (config, schedule, basis) and, with ``clusters``, which
tokens are drawn: it hooks, counts steps, tells contexts apart, computes and measures by itself. A ControlNet
runs at full steps only, and each of its residuals is cached as a feature is.

>>> import hicache.reference                                        # doctest: +SKIP
>>> with hicache.reference.apply(pipe) as handle:                   # doctest: +SKIP
...     image = pipe("a red ring on blue").images[0]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from hicache import compat
from hicache.companion import companions
from hicache.config import HiCacheConfig
from hicache.handle import BaseHandle
from hicache.pipeline import (
    check_config,
    check_one_cache,
    find_controlnets,
    find_denoisers,
    find_scheduler,
)
from hicache.reference.blocks import cached_parts
from hicache.reference.controlnet import ControlNet
from hicache.reference.denoiser import Denoiser
from hicache.reference.run_settings import RunSettings
from hicache.reference.steps import Steps, count_steps
from hicache.reference.timer import Timer
from hicache.stats import ControlNetStats, Stats

if TYPE_CHECKING:
    from hicache.companion import CompanionSettings
    from hicache.companions.clusca.settings import ClusCa
    from hicache.reference.clusters import ClusteredModel

__all__ = ["Handle", "apply"]


class Handle(BaseHandle[Denoiser]):
    """A cached pipeline: leave the ``with`` block or call :meth:`remove` to get it back as it was."""

    owner = "hicache.reference"

    def __init__(
        self,
        denoisers: list[Denoiser],
        controlnets: dict[str, ControlNet],
        settings: RunSettings,
        steps: Steps,
        timer: Timer,
    ) -> None:
        super().__init__(denoisers, steps, [*controlnets.values()])
        self._controlnets = controlnets
        self._settings = settings
        self._timer = timer

    def _read_stats(self) -> Stats:
        contexts = {
            context.label: context.stats
            for denoiser in self._denoisers
            for context in denoiser.contexts.values()
        }
        return Stats(
            config=self._settings.config,
            granularity="module",
            backend="reference",
            contexts=contexts,
            places=tuple(sorted(self._settings.places)),
            sigmas={
                context.label: told
                for denoiser in self._denoisers
                for context in denoiser.contexts.values()
                if (told := context.rows.told)
            },
            history_bytes=sum(context.history_bytes for context in contexts.values())
            + sum(controlnet.nbytes for controlnet in self._controlnets.values()),
            kept_bytes=sum(d.companions.nbytes for d in self._denoisers),
            cache_ms=self._timer.milliseconds,
            companions={d.name: said for d in self._denoisers if (said := d.companions.describe())},
            controlnets={
                name: ControlNetStats(controlnet.calls, controlnet.runs)
                for name, controlnet in self._controlnets.items()
            },
        )


def apply(
    pipe: Any,
    config: HiCacheConfig | None = None,
    *,
    scheduler: Any = None,
    clusters: ClusCa | None = None,
    sparse: CompanionSettings | None = None,
) -> Handle:
    """Cache a diffusers pipeline, or a bare transformer, as the paper has it: slow, and to the letter.

    Applying again replaces the settings.

    Args:
        pipe: a ``DiffusionPipeline``, any object with ``transformer`` and ``scheduler``, or a transformer
            module.
        config: the cache's settings; the defaults of :class:`~hicache.HiCacheConfig` when None.
        scheduler: what counts the steps, where it is not ``pipe.scheduler``. A bare transformer without one
            counts by its ``timestep`` argument.
        clusters: compute MLPs of double blocks for a few tokens at skipped steps
            (:class:`hicache.companions.clusca.ClusCa`); None: compute nothing.
        sparse: as for :func:`hicache.fast.apply`.

    Returns:
        Handle: its ``remove()`` restores everything.

    Raises:
        TypeError: bad arguments.
        ValueError: a model that is not in the table of :mod:`hicache.reference.blocks`, a compiled one, one
            that :mod:`hicache.fast` caches at the moment, or with ``clusters`` one whose double blocks are
            not known. The pipeline is left as it was.
    """
    config = check_config(config)
    modules = find_denoisers(pipe)
    for name, module in modules.items():
        check_one_cache(module, Handle.owner)
        _check_module(pipe if isinstance(pipe, nn.Module) else getattr(pipe, name), module)
    clustered = _clustered(clusters, modules)
    source = find_scheduler(pipe, scheduler)
    beside = companions(modules, sparse=sparse)
    # everything that can fail has been checked: from here on the pipeline is changed
    Handle.remove_from(modules.values())
    steps, timer = count_steps(source), Timer()
    settings = RunSettings(config, steps)
    controlnets = {
        name: ControlNet(module, settings, steps, timer) for name, module in find_controlnets(pipe).items()
    }
    denoisers = [
        Denoiser(
            name, module, settings, steps, timer, [*controlnets.values()], beside[name], clustered.get(name)
        )
        for name, module in modules.items()
    ]
    handle = Handle(denoisers, controlnets, settings, steps, timer)
    handle.install()
    return handle


def _clustered(clusters: ClusCa | None, modules: Mapping[str, nn.Module]) -> dict[str, ClusteredModel]:
    """MLPs of which skipped steps compute a few tokens, by denoiser; what they are is imported here."""
    if clusters is None:
        return {}
    from hicache.companions.clusca.settings import ClusCa
    from hicache.reference.clusters import ClusteredModel

    if not isinstance(clusters, ClusCa):
        raise TypeError(f"hicache.reference: expected clusters to be a ClusCa or None, got {clusters!r}")
    if not clusters.clusters:
        return {}
    return {name: ClusteredModel(clusters, module) for name, module in modules.items()}


def _check_module(held: Any, module: nn.Module) -> None:
    name = type(module).__name__
    if held is not module or compat.is_compiled(module):
        raise ValueError(f"hicache.reference: expected {name} to run eagerly, got it compiled")
    cached_parts(module)  # refuses models it does not know
