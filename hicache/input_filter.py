"""What of latents counts when it is asked how much they have changed.

``"identity"`` takes them as they are. ``"sea"`` (SeaCache, CVPR 2026) weighs frequencies as a Wiener filter
does that finds pictures in noise: ``a P / (a² P + b²)``, with a and b the shares of picture and noise at a
step, and P = |f|^-p the power that pictures have at a frequency. At high noise that leaves coarse shapes,
later finer ones too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

Filter = Callable[[Tensor, float, float], Tensor]


def identity(latents: Tensor, sigma: float, power: float) -> Tensor:
    """The latents, copied: a pipeline may go on in their memory."""
    return latents.detach().clone()


def sea(latents: Tensor, sigma: float, power: float) -> Tensor:
    """Filtered latents, of their shape, in fp32 (float64 for float64).

    Args:
        latents: ``[batch, channels, ..., height, width]``, filtered along all axes but the first two; or
            ``[batch, tokens, channels]``, along the tokens as they come.
        sigma: noise level of the step: flow matching's in [0, 1], or the ratio of noise to picture, above.
        power: p, how fast the power of pictures falls with frequency.
    """
    found = latents.detach().to(torch.promote_types(latents.dtype, torch.float32))
    signal, noise = shares(sigma)
    for axis in range(2, found.ndim) if found.ndim > 3 else (1,) if found.ndim == 3 else ():
        length = found.shape[axis]
        # the mean of an axis has no frequency of its own: it counts as the lowest
        waves = torch.arange(length // 2 + 1, device=found.device, dtype=found.dtype).clamp_min(1)
        content = (waves / length) ** -power
        # one factor a is left out: it is gone once the mean gain is 1, and zero where there is noise alone
        gain = content / (signal**2 * content + noise**2)
        shape = [1] * found.ndim
        shape[axis] = -1
        spectrum = torch.fft.rfft(found, dim=axis) * (gain / gain.mean()).view(shape)
        found = torch.fft.irfft(spectrum, n=length, dim=axis)
    return found


def shares(sigma: float) -> tuple[float, float]:
    """How much of the picture and of the noise is in what the model is given."""
    if sigma <= 1:  # flow matching
        return 1 - sigma, sigma
    return 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)


#: By name.
FILTERS: Final[Mapping[str, Filter]] = {"identity": identity, "sea": sea}


def relative(change: float, size: float) -> float:
    """A change in relation to what changed; NaN where that was nothing."""
    return 0.0 if change == 0 else change / size if size else math.nan
