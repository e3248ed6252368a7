"""hicache_kernels imported again, as a reload and as another copy: what is said, and what still works."""

from __future__ import annotations

import importlib
import sys

import torch

import hicache_kernels
from hicache_kernels import library


def second_copy() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "hicache_kernels"]:
        del sys.modules[name]
    importlib.import_module("hicache_kernels")


def main() -> None:
    for attempt in (lambda: importlib.reload(library), second_copy):
        try:
            attempt()
        except ImportError as error:
            print(error)
    orders, coeffs = torch.ones(2, 3), torch.tensor([1.0, 2.0])
    print(hicache_kernels.forecast(orders, coeffs).tolist())


if __name__ == "__main__":
    main()
