"""The code that captures on a GPU, at work on a CPU's transformer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import hicache.fast
from hicache.cuda_graphs import capture_safety
from hicache.cuda_graphs.capture import CudaBackend
from tests.support.cuda.runtime import Runtime


class Backend(CudaBackend):
    """Takes a transformer on the CPU for one on ``cuda:1``."""

    def unavailable(self, device: torch.device) -> str | None:
        return super().unavailable(torch.device("cuda", 1))


@contextmanager
def recorded_on_another_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    """Inside, :mod:`hicache.fast` captures with :class:`Backend` over a mock that records operators."""
    monkeypatch.setattr(hicache.fast, "CudaBackend", Backend)
    # tensors count as the device's there too: what reads them is found before a capture is begun
    monkeypatch.setattr(capture_safety, "_on_host", lambda device: False)
    with Runtime(tensors=1).installed() as mocked:
        yield mocked
