"""Small pipelines on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.support import pipelines, unets
from tests.support.models import Arguments


def build(name: str) -> tuple[Any, Arguments]:
    """As the builders of pipelines and U-Nets do, with weights and tensors on the device."""
    pipe, arguments = (unets if name in unets.PIPELINES else pipelines).build(name)
    return pipe.to("cuda"), to_gpu(arguments)


def to_gpu(arguments: Arguments) -> Arguments:
    """The same arguments with every tensor on the device."""
    return {n: value.cuda() if isinstance(value, Tensor) else value for n, value in arguments.items()}


def draw(pipe: Any, arguments: Arguments, steps: int = 12) -> Tensor:
    """As :func:`tests.support.pipelines.draw`, without gradients, which would keep graphs away."""
    with torch.no_grad():
        return pipelines.draw(pipe, arguments, steps)


def near(ours: Tensor, theirs: Tensor) -> None:
    """Assert that pictures are as near as kernels that round otherwise leave them."""
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
