"""Gates of low rank: the few directions that a stack's gates go wrong in, found before anything is recorded.

The stack takes gates from the past and forecasts them with all the rest. All gates of a run are known when it
starts, so what that forecast would miss is known too, and mostly lies in one to four directions. A history
that keeps a feature a direction, and one of the rest, takes the present's gates in those and forecasts what
is left (docs/algorithm.md, "Gates of low rank").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from hicache.adapters.base import ModuleAdapter
from hicache.engine import Engine
from hicache.numbers import uploaded

# What gates may be off by, relative to their norm over a run's skipped steps: benchmarks/results/low-rank.csv
# has what pictures make of it.
GATE_TOLERANCE: Final = 0.05
# how much a feature is taken to change from one full step to the next, relative
_DRIFT: Final = 0.03
# singular values below this share of the largest are rounding: they are taken from the squares
_NOISE: Final = 1e-7


def why_not(adapter: ModuleAdapter, num_features: int) -> str | None:
    """Why the gates of a family are not taken in low rank; None where they may be.

    Args:
        adapter: the family's.
        num_features: of a call by module.
    """
    name = type(adapter.module).__name__
    if num_features < 3 or any(factor for output in adapter.outputs() for _, factor in output.features):
        return f"the gates of {name} take {num_features} features as they are"
    if not adapter.foretell:
        return f"the gates of {name} cannot be computed ahead"
    return None


def forecast_misses(engine: Engine, first: int, num_steps: int) -> tuple[Tensor, list[int]]:
    """What a forecast misses of a series, as weights on the series.

    Args:
        engine: has the settings and the schedule; it is not used up.
        first: the first step that is full, as the schedule counts.
        num_steps: steps of the schedule.

    Returns:
        float64 ``[skipped, steps]``, with a row for every skipped step from ``first`` on: its own value less
        the forecast; and which of the steps from ``first`` on are skipped.
    """
    trial = Engine(replace(engine.config, history_dtype=torch.float64))
    trial.reset(num_steps=num_steps)
    series = torch.eye(num_steps - first, dtype=torch.float64)
    missed, skipped = [], []
    for index, value in enumerate(series):
        if trial.is_full(first + index):
            trial.record(first + index, [value])
            continue
        skipped.append(index)
        miss = value - trial.forecast(first + index)[0]
        missed.append(miss)
        for past in miss[:index].nonzero().flatten().tolist():
            missed.append(_DRIFT * miss[past] * (value - series[past]))
    return torch.stack(missed) if missed else series[:0], skipped


@dataclass(frozen=True)
class GateBasis:
    """The directions of one context's gates, from one of its full steps on."""

    first: int  # that step
    directions: Tensor  # [num_features, rank, batch, 1, channels], in the sums' dtype
    levels: Tensor  # [steps, rank, batch]: how far every step's gates go in each, rounded as the gates are
    gates: tuple[Tensor, ...]  # of every step [rank + 1, batch, channels]: those of the features kept
    errors: tuple[float, ...]  # what gates are off by at rank 0, 1, …, relative, in the worst sample

    @classmethod
    def of(
        cls, rows: Tensor, first: int, misses: Tensor, skipped: Sequence[int], tolerance: float
    ) -> GateBasis | None:
        """The least directions that leave gates off by no more than a tolerance. Reads the device, once.

        Args:
            rows: ``[steps, num_features, batch, channels]``, the gates of all steps from ``first`` on.
            first: step of the first row.
            misses: of :func:`forecast_misses`.
            skipped: likewise.
            tolerance: relative error allowed.

        Returns:
            None: the gates are not finite.
        """
        steps, features, batch, channels = rows.shape
        series = rows.permute(2, 0, 1, 3).flatten(2).double()  # [B, steps, D]
        # as many rows as steps: what several make of one step's gates counts together
        _, misses = torch.linalg.qr(misses, mode="r")
        missed = uploaded(misses, series.device) @ series  # [B, steps, D]
        # its squares, and each step's sum of squares, tell all that is to be known on the host: one read
        told = torch.cat([(missed @ missed.mT).flatten(1), series.square().sum(2)], 1).cpu()
        squares, sizes = told[:, :-steps].unflatten(1, missed.shape[1:2] * 2), told[:, -steps:]
        if not bool(sizes.isfinite().all()):
            return None
        energies, mixes = torch.linalg.eigh(squares)
        energies, mixes = energies.flip(-1), mixes.flip(-1)
        noise = _NOISE**2 * energies[:, :1].maximum(_NOISE**2 * sizes.sum(1, keepdim=True))
        energies = energies.where(energies > noise, 0)
        total = sizes[:, list(skipped)].sum(1).clamp_min(torch.finfo(torch.float64).tiny)
        left = torch.cat([energies, energies.new_zeros(batch, 1)], 1).flip(1).cumsum(1).flip(1)
        errors = tuple((left / total[:, None]).amax(0).sqrt().tolist())
        most = int((energies > 0).sum(1).amax())
        rank = next((r for r in range(min(1, most), most) if errors[r] <= tolerance), most)
        # orthonormal to rounding, which the squares alone are not
        mixes = uploaded(mixes[:, :, :rank].contiguous(), series.device)
        directions, _ = torch.linalg.qr((mixes.mT @ missed).mT)  # [B, D, rank]
        scale = math.sqrt(features * channels)  # a mean square of one: levels are of the gates' size
        levels = series @ directions / scale
        if bool((misses.sum(1).abs() < 1e-9).all()):
            # what is constant is forecast exactly: smaller levels are rounded less
            levels = levels - levels.mean(1, keepdim=True)
        levels = levels.to(rows.dtype).permute(1, 2, 0)  # [steps, rank, B]
        gates = torch.cat([levels, levels.new_ones(steps, 1, batch)], 1)
        summed = torch.promote_types(rows.dtype, torch.float32)
        directions = (directions * scale).unflatten(1, (features, 1, channels)).permute(1, 4, 0, 2, 3)
        return cls(
            first,
            directions.to(summed).contiguous(),
            levels.to(summed),
            gates[..., None].expand(-1, -1, -1, channels).contiguous().unbind(0),
            errors,
        )

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return sum(tensor.nbytes for tensor in (self.directions, self.levels, *self.gates))

    @staticmethod
    def planned_nbytes(
        rank: int, num_steps: int, num_features: int, batch: int, channels: int, dtype: torch.dtype
    ) -> int:
        """Bytes one of these takes: ``num_steps`` from its first on, of gates of ``dtype``."""
        summed = torch.promote_types(dtype, torch.float32).itemsize
        directions = num_features * rank * batch * channels * summed
        return directions + num_steps * batch * (rank * summed + (rank + 1) * channels * dtype.itemsize)

    @property
    def rank(self) -> int:
        """How many directions there are."""
        return self.directions.shape[1]

    @property
    def error(self) -> float:
        """What gates are off by, relative."""
        return self.errors[self.rank]

    def write_weights(self, step: int, row: Tensor, out: Tensor) -> None:
        """What a full step's outputs are to be weighed with.

        Args:
            step: of the run.
            row: ``[num_features, batch, channels]``, its gates.
            out: receives ``[num_features, rank + 1, batch, 1, channels]``: the directions, and last what
                they leave of the gates.
        """
        out[:, :-1] = self.directions
        levels = self.levels[step - self.first][:, :, None, None]  # [rank, B, 1, 1]
        torch.sub(row[:, :, None].to(out.dtype), (self.directions * levels).sum(1), out=out[:, -1])


class SumMemory:
    """What a full step adds its features up in: of one address for as long as it is held.

    Args:
        rows: features, rank + 1.
        num_features: of a call by module.
        shape: of the hidden state, ``[batch, tokens, channels]``.
        dtype: sums are in fp32, or float64 for that.
        device: where the memory lives.
    """

    def __init__(
        self, rows: int, num_features: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        dtype = torch.promote_types(dtype, torch.float32)
        weights = (num_features, rows, shape[0], 1, shape[-1])
        # outlives the mode of the run that made it
        with torch.inference_mode(False):
            self.weights = torch.empty(weights, dtype=dtype, device=device)
            self.sums = torch.empty(rows, *shape, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return self.weights.nbytes + self.sums.nbytes

    @staticmethod
    def planned_nbytes(rows: int, num_features: int, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Bytes that one of this form takes; arguments as for the class."""
        numbers = math.prod(shape) + num_features * shape[0] * shape[-1]
        return rows * numbers * torch.promote_types(dtype, torch.float32).itemsize


class RunGates:
    """What one context has of its run's gates."""

    def __init__(self) -> None:
        self.release()

    def restart(self) -> None:
        """A run starts: its gates may be others. The memory is kept."""
        self.basis: GateBasis | None = None
        self.row: Tensor | None = None  # [num_features, batch, channels], the gates of the full step
        self.missed = 0  # steps since the last skipped one that were to be skipped, and had other gates

    def release(self) -> None:
        """Let go of everything."""
        self.restart()
        self.memory: SumMemory | None = None
