"""Caches a pipeline where torch sees a GPU, and Triton finds the stub of libcuda in the folder given.

Prints, as JSON, whether Triton can launch, what "auto" takes, what apply() says of each choice of a backend,
and what it leaves on the transformer.
"""

import json
import sys
from pathlib import Path

import torch

from benchmarks.common import stub_driver
from hicache_kernels.backends import native

stub_driver.load(Path(sys.argv[1]) / "libcuda.so.1")
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda device=None: (9, 0)
native.cuda_archs = lambda: (80,) if sys.argv[2] == "native" else ()

import hicache.fast  # noqa: E402
from hicache_kernels import auto_backend, backend_status  # noqa: E402
from tests.support import pipelines  # noqa: E402

pipe, _ = pipelines.build("flux")
told = {}
for backend in ("auto", "triton"):
    try:
        hicache.fast.apply(pipe, backend=backend).remove()
        told[backend] = "cached"
    except ValueError as error:
        told[backend] = str(error)
left = [name for name in vars(pipe.transformer) if "hicache" in name]
auto = auto_backend("cuda")
print(
    json.dumps(
        {
            "triton": backend_status("cuda")["triton"],
            "auto": auto.name,
            "words": str(auto),
            "told": told,
            "left": left,
        }
    )
)
