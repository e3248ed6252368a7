"""HiCache for one context: a history, a schedule and a basis. The only module that runs kernels.

>>> import torch
>>> from hicache import Engine, HiCacheConfig
>>> engine = Engine(HiCacheConfig(interval=5, order=2, warmup=3))
>>> for step in range(12):
...     if engine.is_full(step):
...         engine.record(step, [torch.tensor([float(step) ** 2], dtype=torch.float64)])
...     else:
...         [forecast] = engine.forecast(step)
>>> round(forecast.item(), 6)  # step 11, four steps after the full step 7
69.1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import hicache_kernels as kernels
from hicache.config import HiCacheConfig
from hicache.differences import Differences, Span
from hicache.run_numbers import RunNumbers
from hicache.schedule import is_full


@dataclass(frozen=True)
class Sum:
    """A skipped step's sum over a history, but for the base and the gates."""

    orders: Tensor  # [K, features, slot]
    coeffs: Tensor
    inv_gap: Tensor | None  # an update of the differences waits, and is done with it
    filled: int
    backend: str

    def __call__(self, base: Tensor, gates: Tensor | None) -> Tensor:
        """See :meth:`Engine.gated_sum`."""
        return kernels.gated_sum(
            base.detach().contiguous(),
            self.orders,
            gates,
            self.coeffs,
            inv_gap=self.inv_gap,
            filled=self.filled,
            backend=self.backend,
        )

    def ahead(self, orders: Tensor) -> Tensor:
        """The forecast of some of the history's numbers: ``[features, ...]``, of their dtype.

        Args:
            orders: ``[K, features, ...]``, a copy of numbers of the first features, which is written to where
                an update waits.
        """
        coeffs = self.coeffs
        if coeffs.ndim == 2:
            coeffs = coeffs[:, : orders.shape[1]].contiguous()
        if self.inv_gap is None:
            return kernels.forecast(orders, coeffs, backend=self.backend)
        return kernels.update_forecast_(orders, self.inv_gap, coeffs, self.filled, backend=self.backend)


class Engine:
    """Records the features of full steps and forecasts them at skipped ones.

    The update of the differences is lazy (docs/algorithm.md, "Lazy update"): it waits for the first skipped
    step and shares its launch.

    Args:
        config: the cache's settings.
        backend: of :mod:`hicache_kernels`: ``"auto"`` or a name.
    """

    def __init__(self, config: HiCacheConfig, backend: str = "auto") -> None:
        self.backend = backend
        self.history: kernels.History | None = None
        self.numbers = RunNumbers()  # coefficients and gaps
        self.reset(config)

    def reset(
        self,
        config: HiCacheConfig | None = None,
        num_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        context: str = "",
    ) -> None:
        """Start a new run. The history's memory is kept for it, its contents are forgotten.

        Args:
            config: settings of the run; None keeps them.
            num_steps: its steps, if known; ``last_step_full`` needs it.
            sigmas: the scheduler's noise levels, one a step; for bases that read them.
            context: what the features are of; for bases that tell contexts apart.
        """
        if config is not None:
            self.config = config
        self.num_steps = num_steps  # of the run, if known
        self.numbers.settle(self.config, Span(num_steps, None if sigmas is None else tuple(sigmas), context))
        self.distrust()

    def distrust(self) -> None:
        """What is recorded is not to be forecast from: the run goes on with a full step."""
        self.differences = Differences()  # those that exist
        self._pending: int | None = None  # differences the waiting update takes; None: no update waits
        self._blank: int | None = None  # orders from this one on hold zeros

    def release(self) -> None:
        """Free the history and forget the run's state."""
        self.history = None
        self.numbers.clear()
        self.distrust()

    @property
    def nbytes(self) -> int:
        """Bytes of history held."""
        return 0 if self.history is None else self.history.nbytes

    @property
    def backend_taken(self) -> str | None:
        """The backend that runs, and why none that "auto" prefers; None without a history."""
        if self.history is None:
            return None
        orders = self.history.orders
        auto = kernels.auto_backend(orders.device, len(orders), orders.dtype)
        return str(auto) if self.backend == "auto" else self.backend

    def planned_nbytes(self, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> int:
        """Bytes of history that features of these shapes and this dtype would take."""
        return kernels.history_nbytes(shapes, self.config.order, self.config.history_dtype or dtype)

    def is_full(self, step: int, last_full: int | None = None) -> bool:
        """Whether the transformer runs at this step; after ``last_full``, where that is not recorded yet."""
        last_full = self.differences.last_full if last_full is None else last_full
        return is_full(self.config, step, last_full, self.num_steps)

    def open(
        self,
        shapes: Sequence[Sequence[int]],
        dtype: torch.dtype,
        device: torch.device,
        layers: Sequence[str | None] | None = None,
    ) -> list[Tensor]:
        """Make room for the features of a full step: views to write them into, then :meth:`commit`.

        Args:
            shapes: shape of each feature. Others than before, or another dtype or device, start a new
                history.
            dtype: of the features; the history's dtype unless the config names one.
            device: where the features live.
            layers: of the features, for bases that have rows by feature (:meth:`hicache.Basis.for_features`);
                each is one by itself when None.

        Raises:
            ValueError: such a basis, and features of several shapes.
        """
        dtype = self.config.history_dtype or dtype
        form = tuple(torch.Size(shape) for shape in shapes), self.config.order, dtype, device
        held = self.history
        if held is None or (held.shapes, held.order, held.orders.dtype, held.orders.device) != form:
            self.distrust()
            self.numbers.clear()
            self.history = held = kernels.History(*form)
        else:
            self.flush()  # the inbox of the last full step must be taken in before it is written again
        if self.config.by_feature:
            layers = [str(index) for index in range(len(shapes))] if layers is None else layers
            self.numbers.begin_full(layers, self._first_differences(held), device)
        return [held.inbox(index) for index in range(len(form[0]))]

    def _first_differences(self, history: kernels.History) -> Tensor | None:
        """D1 of all features, ``[features, batch, tokens, channels]``; None where there is none."""
        orders, shape = history.orders_by_feature(), history.shapes[0]
        if self.differences.filled < 2:
            return None
        return orders[1, :, : shape.numel()].view(-1, *shape)

    def commit(self, step: int) -> None:
        """The views of :meth:`open` hold the features of full step ``step``.

        Raises:
            ValueError: ``step`` is not later than the last full step.
        """
        self.differences.check_before(step)
        self.differences = self.differences.after(step, self.config)
        # at order 0 the inbox is D0 itself: nothing waits
        self._pending = self.differences.taken if self.config.order else None

    def record(self, step: int, features: Sequence[Tensor]) -> None:
        """Record the features of a full step: tensors of any shapes, of one dtype and device.

        Raises:
            ValueError: no features, or several dtypes or devices, or ``step`` is not later than the last full
                step.
        """
        forms = [(str(feature.dtype), str(feature.device)) for feature in features]
        if len(set(forms)) != 1:
            raise ValueError(f"Engine.record: expected features of one dtype and device, got {forms}")
        first = features[0]
        with torch.no_grad():
            slots = self.open([feature.shape for feature in features], first.dtype, first.device)
            for slot, feature in zip(slots, features, strict=True):
                slot.copy_(feature)
        self.commit(step)

    def flush(self) -> None:
        """Do the waiting update of the differences now, if there is one."""
        if self._pending is not None and self.history is not None:
            kernels.update_(self.history.orders, self._inv_gap(), self._pending, backend=self.backend)
        self._pending = None

    def forecast(self, step: int) -> list[Tensor]:
        """Every feature at a skipped step, in its shape, of the history's dtype.

        Raises:
            RuntimeError, ValueError: as :meth:`gated_sum`.
        """
        history, coeffs = self._ahead(step)
        orders = history.orders if coeffs.ndim == 1 else history.orders_by_feature()
        if self._pending is None:
            row = kernels.forecast(orders, coeffs, backend=self.backend)
        else:
            row = kernels.update_forecast_(
                orders, self._inv_gap(), coeffs, self._pending, backend=self.backend
            )
            self._pending = None
        return history.split(row if row.ndim == 1 else row.view(-1))

    def gated_sum(self, step: int, base: Tensor, gates: Tensor | None = None) -> Tensor:
        """The hidden state after all blocks at a skipped step: ``base + Σ_i gates[i] ⊙ forecast_i``.

        Args:
            step: the skipped step.
            base: ``[batch, ..., channels]``, the hidden state before the blocks; all features are of its
                shape.
            gates: ``[features, batch, channels]``, or None for gates of one.

        Returns:
            ``[batch, ..., channels]``, contiguous, of base's dtype.

        Raises:
            RuntimeError: nothing is recorded to forecast from.
            ValueError: ``step`` is not after the last full step, or shapes do not match.
        """
        out = self.prepare(step)(base, gates)
        self.settle()
        return out

    def prepare(self, step: int, fixed: bool = False, fused: bool = True) -> Sum:
        """The sum of a skipped step, to be done later; :meth:`settle` says that it was.

        Args:
            step: the skipped step.
            fixed: weigh all orders, those that do not exist yet with zero: sums of all steps are then alike
                but for their numbers, in two kinds, with the waiting update and without. An update that does
                not take all orders yet is done now.
            fused: leave a waiting update to the sum; without, ``fixed`` sums are of one kind.

        Raises:
            RuntimeError, ValueError: as :meth:`gated_sum`.
        """
        if fixed and self._pending is not None and not (fused and self._pending == self.config.order):
            self.flush()
        history, coeffs = self._ahead(step, padded=fixed)
        filled = self.differences.filled
        if fixed and self._blank != filled:
            # weighed with zero, which makes nothing of numbers but not of what an earlier run overflowed to
            history.orders[filled:].zero_()
            self._blank = filled
        inv_gap = None if self._pending is None else self._inv_gap()
        return Sum(history.orders_by_feature(), coeffs, inv_gap, self._pending or 0, self.backend)

    def settle(self) -> None:
        """A sum has been done, and with it the waiting update."""
        self._pending = None

    def _ahead(self, step: int, padded: bool = False) -> tuple[kernels.History, Tensor]:
        if self.history is None or self.differences.last_full is None:
            raise RuntimeError(f"Engine: expected a full step recorded before step {step}, got none")
        self.differences.check_before(step)
        return self.history, self.numbers.coeffs(self.differences, step, padded, self.history.orders)

    def _inv_gap(self) -> Tensor:
        assert self.history is not None
        return self.numbers.inv_gap(self.differences, self.history.orders)
