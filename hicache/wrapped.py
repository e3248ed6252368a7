"""``hicache.wrap(denoiser, steps)``: cache what a function of a sampler of your own returns.

>>> import hicache                                             # doctest: +SKIP
>>> with hicache.wrap(network, 20, calls=2, last_calls=1) as cached:    # Heun   # doctest: +SKIP
...     picture = sampler(lambda x, sigma: c_skip(sigma) * x + c_out(sigma) * cached(c_in(sigma) * x, sigma))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hicache import fast
from hicache.checks import check_whole
from hicache.config import HiCacheConfig
from hicache.runtime.context import MAX_CONTEXTS
from hicache.stats import Stats

if TYPE_CHECKING:
    from typing_extensions import Self


class _Calls:
    """Tells steps by the number of calls, in the form of a scheduler."""

    def __init__(self, steps: int, calls: int, last_calls: int, sigmas: Sequence[float] | None) -> None:
        self.timesteps = torch.arange(steps)
        self.step_index = 0  # that it has one says that it serves one run at a time
        if sigmas is not None:
            self.sigmas = torch.tensor(sigmas, dtype=torch.float64)
        self._calls, self._last_calls = calls, last_calls
        self._made = 0  # calls of the step

    def set_timesteps(self) -> None:
        """A run begins."""
        self.step_index = self._made = 0

    def step(self) -> None:
        """A step ends."""
        self.step_index += 1
        self._made = 0

    def begin(self) -> None:
        """A call begins."""
        if self.step_index in (0, len(self.timesteps)) and not self._made:
            self.set_timesteps()

    def end(self) -> None:
        """A call has ended."""
        last = self.step_index == len(self.timesteps) - 1
        self._made += 1
        if self._made == (self._last_calls if last else self._calls):
            self.step()


class _Module(nn.Module):
    """A function as a module, which is what is watched."""

    def __init__(self, denoiser: Callable[..., Any]) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.training = getattr(denoiser, "training", False)

    def forward(self, x: Any, sigma: Any = None, *args: Any, **kwargs: Any) -> Any:
        return self.denoiser(x, sigma, *args, **kwargs)


class Wrapped:
    """A cached function: call it in place of the other; leave its ``with`` block or :meth:`remove` to end it.

    Made by :func:`wrap`.
    """

    def __init__(self, calls: _Calls, module: _Module, handle: fast.Handle) -> None:
        self._calls, self._module, self._handle = calls, module, handle

    def __call__(self, x: Any, sigma: Any = None, *args: Any, **kwargs: Any) -> Any:
        """What the denoiser returns, or at a skipped step what it is forecast to return."""
        self._calls.begin()
        output = self._module(x, sigma, *args, **kwargs)
        self._calls.end()
        return output

    def restart(self) -> None:
        """Start a new run at the next call, where the last one ended before its last call."""
        self._calls.set_timesteps()

    @property
    def stats(self) -> Stats:
        """See :class:`hicache.fast.Handle`."""
        return self._handle.stats

    def release(self) -> None:
        """Free the memory of histories; the next run allocates anew."""
        self._handle.release()

    def remove(self) -> None:
        """From here on every call runs the denoiser."""
        self._handle.remove()

    def __enter__(self) -> Self:
        self._handle.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def wrap(
    denoiser: Callable[..., Any],
    steps: int,
    *,
    calls: int = 1,
    last_calls: int | None = None,
    sigmas: Sequence[float] | None = None,
    config: HiCacheConfig | None = None,
    speedup: float | None = None,
    backend: str = "auto",
) -> Wrapped:
    """Cache a function of a sampler of your own by what it returns, as ``granularity="output"`` does.

    Steps are told by counting: a run is ``steps`` steps of ``calls`` calls, the last of ``last_calls``. The
    n-th call of every step has a history of its own. So Heun's predictor and corrector have one each, and so
    has each tile; a skipped step skips all of them. Wrap what the network returns, and scale it outside, as
    EDM does: those factors change by orders of magnitude within a run.

    Args:
        denoiser: called as ``denoiser(x, sigma, …)``; returns a floating tensor, or some. A module or any
            function. It is not changed.
        steps: of a run.
        calls: of a step: 2 for Heun, with tiles as many times more.
        last_calls: of the last step: 1 for Heun, with tiles as many; None: as of the others.
        sigmas: noise level of every step, for the schedules and bases that read them.
        config: the cache's settings; None: the defaults of :class:`HiCacheConfig`.
        speedup: as for :func:`hicache.fast.apply`.
        backend: of :mod:`hicache_kernels`.

    Raises:
        TypeError: the denoiser cannot be called, or a number is none.
        ValueError: a number out of range, or not as many noise levels as steps.
    """
    if not callable(denoiser):
        raise TypeError(f"hicache.wrap: expected a function or a module, got {denoiser!r}")
    check_whole("hicache.wrap: steps", steps)
    check_whole("hicache.wrap: calls", calls)
    last_calls = calls if last_calls is None else last_calls
    check_whole("hicache.wrap: last_calls", last_calls, 1, calls)
    if sigmas is not None and len(sigmas) != steps:
        raise ValueError(f"hicache.wrap: expected {steps} sigmas, one a step, got {len(sigmas)}")
    counted, module = _Calls(steps, calls, last_calls, sigmas), _Module(denoiser)
    handle = fast.apply(
        module,
        config,
        speedup=speedup,
        scheduler=counted,
        granularity="output",
        max_contexts=max(calls, MAX_CONTEXTS),
        cuda_graphs=False,  # nobody knows what else a function does
        backend=backend,
    )
    return Wrapped(counted, module, handle)
