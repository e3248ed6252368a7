"""Finds the denoisers and the scheduler of a pipeline and checks arguments, before anything is changed.

What :mod:`hicache.fast` and :mod:`hicache.reference` have in common, with :mod:`hicache.handle`: nothing here
hooks, counts or computes.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import nn

from hicache import compat
from hicache.checks import is_number, is_whole
from hicache.config import HiCacheConfig
from hicache_kernels import backend_status

GRANULARITIES: Final = ("auto", "module", "low-rank", "stack", "output")
# Of one denoiser's histories. Holds FLUX.1's modules at 1024² and order 2 (5.7 GB), not a video model's.
# Fixed, and not a share of the card's memory: the same call draws the same picture on every card.
MEMORY_BUDGET: Final = 8_000_000_000
# Who caches -> under which name a cached transformer has the handle.
HANDLE_ATTRIBUTES: Final = {
    "hicache.fast": "_hicache_handle",
    "hicache.reference": "_hicache_reference_handle",
}
# What a pipeline without a table of components may call its parts.
_COMPONENTS: Final = ("transformer", "transformer_2", "unet", "controlnet")
_SCHEDULER_METHODS: Final = ("set_timesteps", "step")


def find_denoisers(pipe: Any, unets: bool = False) -> dict[str, nn.Module]:
    """The denoisers of a pipeline by the pipeline's names for them, each once, without compiled wrappers.

    Args:
        pipe: a ``DiffusionPipeline``, any object with ``transformer``, or a denoiser itself, which is called
            ``"transformer"``, or ``"unet"`` where it is one.
        unets: whether U-Nets are among those wanted. They have no stack of blocks.

    Raises:
        ValueError: there is none; the message names the parts there are.
    """
    if isinstance(pipe, nn.Module):
        module = compat.original_module(pipe)
        return {"unet" if unets and is_unet("", module) else "transformer": module}
    modules = {name: compat.original_module(part) for name, part in _modules(pipe).items()}
    others = [name for name, part in modules.items() if is_unet(name, part)]
    found: dict[str, nn.Module] = {}
    for name, part in modules.items():
        if ("transformer" in name or (unets and name in others)) and part not in found.values():
            found[name] = part
    if not found:
        present = ", ".join(f"{name} ({type(part).__name__})" for name, part in modules.items())
        raise ValueError(
            f"hicache: nothing to hook in {type(pipe).__name__}: expected a component named 'transformer'"
            f"{' or a U-Net' if unets else ''}, got {present or 'no modules'}"
            + (f"; hicache.fast.apply(pipe, granularity='output') caches {others[0]}" if others else "")
        )
    return found


def is_unet(name: str, module: nn.Module) -> bool:
    """Whether a part of a pipeline, by its name there or its class, is a U-Net that denoises."""
    return "unet" in name or "UNet" in type(module).__name__


def find_controlnets(pipe: Any) -> dict[str, nn.Module]:
    """The ControlNets that a pipeline calls before its transformer, by its names for them.

    Args:
        pipe: as for :func:`find_denoisers`.
    """
    if isinstance(pipe, nn.Module):
        return {}
    return {name: part for name, part in _modules(pipe).items() if "controlnet" in name}


def _modules(pipe: Any) -> dict[str, nn.Module]:
    """The modules among the parts of a pipeline, by its names for them."""
    components = getattr(pipe, "components", None)
    if not isinstance(components, Mapping):
        components = {name: getattr(pipe, name, None) for name in _COMPONENTS}
    return {name: part for name, part in components.items() if isinstance(part, nn.Module)}


def find_scheduler(pipe: Any, scheduler: Any) -> Callable[[], Any] | None:
    """A function that gives the scheduler in use, so that one put in place later is found.

    Args:
        pipe: as for :func:`find_denoisers`.
        scheduler: the one to use, whatever the pipeline has; None for ``pipe.scheduler``.

    Returns:
        The function; None for a bare transformer without a scheduler.

    Raises:
        TypeError: the scheduler cannot be watched, see :func:`check_scheduler`.
    """
    if scheduler is not None:
        check_scheduler(scheduler)
        return lambda: scheduler
    if isinstance(pipe, nn.Module):
        return None
    last = getattr(pipe, "scheduler", None)
    check_scheduler(last)
    try:
        held = weakref.ref(pipe)  # a transformer that outlives its pipeline does not keep all of that
    except TypeError:
        return lambda: pipe.scheduler

    def current() -> Any:
        nonlocal last
        owner = held()
        if owner is not None:
            last = owner.scheduler
        return last

    return current


class PartsCheck:
    """Notices transformers and ControlNets that were put into a pipeline after it was cached.

    Args:
        pipe: the pipeline, which is not kept alive, or a transformer.
        modules: those that are cached, by name.
    """

    def __init__(self, pipe: Any, modules: Mapping[str, nn.Module]) -> None:
        try:
            self._pipe: Callable[[], Any] = weakref.ref(pipe)
        except TypeError:  # of a class without weak references
            self._pipe = lambda: pipe
        self._modules = dict(modules)

    def warn(self) -> None:
        """Warn of those that are not cached, once each."""
        pipe = self._pipe()
        if pipe is None or isinstance(pipe, nn.Module):
            return
        for name in self._modules:
            held = getattr(pipe, name, None)
            if not isinstance(held, nn.Module):
                continue
            module = compat.original_module(held)
            if module is not self._modules[name] and not _is_cached(module):
                self._modules[name] = module
                warnings.warn(
                    f"hicache: {type(pipe).__name__}.{name} is another {type(module).__name__} than the one "
                    "that was cached: it runs uncached; call apply() again",
                    RuntimeWarning,
                    stacklevel=4,
                )


def check_scheduler(scheduler: Any) -> None:
    """Check that the steps of a scheduler can be counted, by watching the methods of the instance.

    Raises:
        TypeError: it is a class, it has no ``set_timesteps`` or no ``step``, or ``__slots__``.
    """
    if isinstance(scheduler, type):
        raise TypeError(f"hicache: expected a scheduler, got the class {scheduler.__name__}: make one of it")
    missing = [name for name in _SCHEDULER_METHODS if not callable(getattr(scheduler, name, None))]
    if missing:
        raise TypeError(
            "hicache: expected a scheduler with set_timesteps() and step(), got "
            f"{type(scheduler).__name__} without {' and '.join(missing)}"
        )
    if not hasattr(scheduler, "__dict__"):
        raise TypeError(
            "hicache: expected a scheduler whose methods can be watched, got "
            f"{type(scheduler).__name__} with __slots__"
        )


def _is_cached(module: nn.Module) -> bool:
    return any(attribute in module.__dict__ for attribute in HANDLE_ATTRIBUTES.values())


def check_one_cache(module: nn.Module, wanted: str) -> None:
    """Check that a transformer is not cached in another way already: their hooks would meet.

    Args:
        module: the transformer.
        wanted: who is about to cache it, of :data:`HANDLE_ATTRIBUTES`.

    Raises:
        ValueError: it is cached by another, or by diffusers.
    """
    name = type(module).__name__
    for other, attribute in HANDLE_ATTRIBUTES.items():
        if other != wanted and attribute in module.__dict__:
            raise ValueError(
                f"{' and '.join(HANDLE_ATTRIBUTES)} cannot both cache one {name}: remove() the handle of "
                f"{other} before {wanted}.apply()"
            )
    found = compat.diffusers_cache(module)
    if found is not None:
        raise ValueError(
            f"hicache: diffusers caches this {name} already ({found}), and {wanted} cannot cache it too: "
            "call its disable_cache() first"
        )


def refuse_other_caches(module: nn.Module, owner: str) -> Callable[[], None]:
    """Make diffusers' ``enable_cache`` of a cached transformer an error; returns what undoes it."""
    if not hasattr(module, "enable_cache"):
        return lambda: None
    name = type(module).__name__

    def enable_cache(*args: Any, **kwargs: Any) -> None:
        raise ValueError(
            f"hicache: {owner} caches this {name}, and diffusers' enable_cache() cannot cache it too: "
            "remove() the handle first"
        )

    module.__dict__["enable_cache"] = enable_cache
    return lambda: module.__dict__.pop("enable_cache", None)


def check_config(config: HiCacheConfig | None) -> HiCacheConfig:
    """The settings given, or the defaults for None.

    Raises:
        TypeError: neither settings nor None.
    """
    if config is None:
        return HiCacheConfig()
    if not isinstance(config, HiCacheConfig):
        raise TypeError(f"hicache: expected config to be a HiCacheConfig or None, got {config!r}")
    return config


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Check that an option is one of those known.

    Raises:
        ValueError: it is not; the message names the option and those known.
    """
    if value not in known:
        raise ValueError(f"hicache: unknown {name} {value!r}; expected one of {', '.join(known)}")


def granularity_of(granularity: str, by_feature: bool) -> str:
    """What is cached with a basis: where that has rows by feature, modules.

    Args:
        granularity: asked for.
        by_feature: see :class:`hicache.Basis`.

    Raises:
        ValueError: it is not known, or cannot be had with rows by feature; the message says why.
    """
    check_choice("granularity", granularity, GRANULARITIES)
    if not by_feature:
        return granularity
    if granularity not in ("auto", "module"):
        features = {
            "stack": "the residual of all layers is one feature",
            "low-rank": "features are weighed sums of all layers",
            "output": "what the model returns is the only feature",
        }[granularity]
        raise ValueError(
            f"hicache: granularity={granularity!r}: {features}, and the basis has a row for every layer; use "
            "granularity='module'"
        )
    return "module"


def check_budget(memory_budget: int) -> None:
    """Check a number of bytes.

    Raises:
        TypeError: not an int.
        ValueError: below zero.
    """
    if not is_whole(memory_budget):
        raise TypeError(f"hicache: expected memory_budget to be a number of bytes, got {memory_budget!r}")
    if memory_budget < 0:
        raise ValueError(f"hicache: expected memory_budget >= 0 bytes, got {memory_budget}")


def check_tolerance(gate_tolerance: float) -> None:
    """Check a relative error.

    Raises:
        TypeError: not a number.
        ValueError: not in [0, 1).
    """
    if not is_number(gate_tolerance):
        raise TypeError(f"hicache: expected gate_tolerance to be a number, got {gate_tolerance!r}")
    if not 0 <= gate_tolerance < 1:
        raise ValueError(f"hicache: expected 0 <= gate_tolerance < 1, got {gate_tolerance!r}")


def check_backend(backend: str, module: nn.Module) -> None:
    """Check that a backend of :mod:`hicache_kernels` runs where the transformer is or may be taken.

    Args:
        backend: a name, or ``"auto"``, which always finds one. It is asked for all the same: what Triton
            compiles to be able to launch is compiled here, and not inside of a run.
        module: the transformer.

    Raises:
        ValueError: it runs on none of the devices in question; the message says why.
    """
    # where the weights are, or where offloading will take them
    devices = {parameter.device.type for parameter in module.parameters()} | {"cpu"}
    if torch.cuda.is_available():
        devices.add("cuda")
    statuses = [backend_status(device) for device in sorted(devices - {"meta"}, reverse=True)]
    if backend == "auto":
        return
    reasons = [status[backend] for status in statuses]
    if None not in reasons:
        why = "; ".join(dict.fromkeys(map(str, reasons)))
        raise ValueError(f"hicache: backend {backend!r} cannot run: {why}")


def check_speedup(speedup: float | None, counted: bool) -> None:
    """Check the bound to reach.

    Args:
        speedup: steps / full steps, >= 1; None for none.
        counted: whether a scheduler says how many steps a run has.

    Raises:
        TypeError: not a number.
        ValueError: not finite, below 1, or nothing says how many steps a run has.
    """
    if speedup is None:
        return
    if not is_number(speedup):
        raise TypeError(f"hicache: expected speedup to be a number >= 1 or None, got {speedup!r}")
    if not (math.isfinite(speedup) and speedup >= 1):
        raise ValueError(f"hicache: expected a finite speedup >= 1, got {speedup!r}")
    if not counted:
        raise ValueError(
            "hicache: speedup= needs the number of steps: pass scheduler=, or config= with an interval"
        )
