"""Prints how many kernels each op launches, counted in Triton's interpreter (TRITON_INTERPRET=1)."""

import sys
from pathlib import Path
from unittest import mock

from triton.runtime.interpreter import GridExecutor, InterpretedFunction

from hicache_kernels import triton_kernels
from hicache_kernels.backends import triton as backend

sys.path.insert(0, str(Path(__file__).parents[1]))
from op_calls import calls

assert backend.interpreted()
kernels = [value for name, value in vars(triton_kernels).items() if name.endswith("_kernel")]
assert len(kernels) == 4
assert all(isinstance(kernel, InterpretedFunction) for kernel in kernels)
launched = []
run = GridExecutor.__call__


def counted(self, *args, **kwargs):
    """A launch: the grid's programs are run by this call."""
    launched.append(self.fn.__name__)
    return run(self, *args, **kwargs)


with mock.patch.object(GridExecutor, "__call__", counted):
    for name, call in calls("triton").items():
        launched.clear()
        call()
        print(name, len(launched), sep=": ")
