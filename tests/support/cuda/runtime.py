"""torch.cuda, mocked: devices, streams, graphs and their memory pools, with the rules of the real ones.

Tensors are on the CPU and count as being on one CUDA device. Every operator is a kernel that is launched on
the current stream of that device; :class:`Runtime` raises :class:`Violation` where that would go wrong, or
draw a wrong picture without a word, on a GPU, and torch's own errors where torch would.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from hicache.cuda_graphs import arena
from tests.support.cuda.tape import Memory, Tape, place, written

# operators that make the host wait for the device
SYNCS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.is_nonzero.default,
}
FREE = 1 << 30  # bytes of the device that are free when nothing is captured


def cut_to_size(patch: pytest.MonkeyPatch) -> None:
    """Have the allocator that estimates go by cut a segment for every tensor.

    All that a tiny model works in would be a small part of one that torch takes.
    """
    for name, value in {"_SMALL": 0, "_OWN_SEGMENT": 0, "_ROUND": arena.BLOCK}.items():
        patch.setattr(arena, name, value)


class Violation(AssertionError):
    """What a GPU would not have told."""


class Stream:
    """A stream, and up to where it knows each stream's work to be done."""

    def __init__(self, runtime: Runtime, device: int) -> None:
        self.device = torch.device("cuda", device)
        self.seen: dict[Stream, int] = {}
        self.work = 0
        self._runtime = runtime

    def wait_stream(self, other: Stream) -> None:
        if self._runtime.graph is not None:
            raise Violation("a stream waits for another one while a graph is captured")
        for stream, work in {**other.seen, other: other.work}.items():
            self.seen[stream] = max(self.seen.get(stream, 0), work)

    def knows(self, stream: Stream, work: int) -> bool:
        return stream is self or self.seen.get(stream, 0) >= work


class _Use(NamedTuple):
    """Of a piece of memory: by which of a stream's kernels, and what was there, as memory is used again."""

    stream: Stream
    work: int
    storage: StorageWeakRef | None


class Pool:
    """Memory of graphs: the device's again when all of them are gone, and all tensors that they gave."""

    def __init__(self) -> None:
        self.graphs: weakref.WeakSet[Graph] = weakref.WeakSet()
        self.used = False
        self.taken = 0  # bytes, since its first capture
        self.made: list[StorageWeakRef] = []

    @property
    def nbytes(self) -> int:
        """Bytes it has of the device."""
        held = len(self.graphs) > 0 or not all(storage.expired() for storage in self.made)
        return self.taken if held else 0


class Graph:
    """``torch.cuda.CUDAGraph``."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.device = runtime.device
        self.tape = Tape(runtime.memory)
        self.stream: Stream | None = None
        self.pool: Pool | None = None
        self.broken: str | None = None

    def capture_begin(self, pool: Pool, capture_error_mode: str = "global") -> None:
        runtime = self._runtime
        if runtime.device != runtime.tensors:
            raise Violation(f"a capture on cuda:{runtime.device} of tensors on cuda:{runtime.tensors}")
        if runtime.stream() is runtime.default(runtime.device):
            raise RuntimeError("CUDA graphs must be captured on a non-default stream")
        if runtime.graph is not None or pool in runtime.allocating:
            raise RuntimeError("a capture is under way already")
        if pool.used and not pool.graphs:
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED: the graphs of this pool are gone")
        self.pool, self.stream = pool, runtime.stream()
        pool.used = True
        runtime.allocating.append(pool)
        pool.graphs.add(self)
        runtime.graph = self

    def capture_end(self) -> None:
        runtime = self._runtime
        if runtime.graph is not self:
            raise RuntimeError("no capture is under way")
        runtime.graph = None
        if self.broken is not None:
            raise RuntimeError("operation failed due to a previous error during capture")
        assert self.pool is not None
        runtime.allocating.remove(self.pool)
        made = self.tape.made
        self.pool.made += [StorageWeakRef(tensor.untyped_storage()) for tensor in made]
        total = sum(tensor.untyped_storage().nbytes() for tensor in made)
        self.pool.taken += total if runtime.takes is None else runtime.takes
        with runtime.quiet():
            self.tape.finish()

    def replay(self) -> None:
        runtime = self._runtime
        if runtime.device != self.device:
            raise Violation(f"a graph of cuda:{self.device} is replayed with cuda:{runtime.device} current")
        with runtime.quiet():
            self.tape.replay()
            reads, writes = self.tape.outside(writes=False), self.tape.outside(writes=True)
            writes |= self.tape._mine.keys()
        runtime.launched(reads, writes, of_graph=True)
        runtime.replays += 1


class Runtime(TorchDispatchMode):
    """What ``torch.cuda`` is while :meth:`installed`.

    Args:
        tensors: index of the device that tensors count as being on; another one is current at first.
        takes: bytes that a capture takes; None: of all tensors it makes, one beside the other.
    """

    def __init__(self, tensors: int = 1, takes: int | None = 1000) -> None:
        super().__init__()
        self.tensors = tensors
        self.takes = takes
        self.device = 0
        self.graph: Graph | None = None
        self.replays = self.captures = 0
        self.pools: weakref.WeakSet[Pool] = weakref.WeakSet()
        self.allocating: list[Pool] = []  # which the allocator gives memory to, whoever has forgotten them
        self._defaults: dict[int, Stream] = {}
        self._current: dict[int, Stream] = {}
        self.memory = Memory()
        self._writes: dict[int, _Use] = {}  # by place
        self._of_graphs: dict[int, _Use] = {}  # the last of memory that graphs work in, by place
        self._quiet = False

    @property
    def pool_nbytes(self) -> int:
        """Bytes that graphs have of the device."""
        return sum(pool.nbytes for pool in self.pools)

    @property
    def free(self) -> int:
        """Bytes of the device that are left."""
        return FREE - self.pool_nbytes

    def default(self, device: int) -> Stream:
        if device not in self._defaults:
            self._defaults[device] = Stream(self, device)
        return self._defaults[device]

    def stream(self, device: Any = None) -> Stream:
        index = self.device if device is None else torch.device(device).index
        return self._current.get(index) or self.default(index)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """What is done inside is not seen."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._quiet:
            return func(*args, **kwargs)
        stream, graph = self.stream(f"cuda:{self.tensors}"), self.graph
        if graph is not None:
            if func in SYNCS:
                graph.broken = str(func)
                raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
            if stream is not graph.stream:
                raise Violation(f"{func} is launched on another stream than the one that is captured")
            with self.quiet():
                return graph.tape.record(func, args, kwargs)
        output = func(*args, **kwargs)
        self.memory.note(pytree.tree_leaves((args, kwargs, output)))
        reads = {place(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        made = {place(leaf) for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)}
        targets = {place(tensor) for tensor in written(func, args, kwargs)}
        self.launched(reads, (made - reads) | targets)
        return output

    def launched(self, reads: set[int], writes: set[int], of_graph: bool = False) -> None:
        """Work on the current stream: what it reads must be known to have been written.

        And what it writes of a graph's memory, which is there once for all replays, to have been read.
        """
        stream = self.stream(f"cuda:{self.tensors}")
        stream.work += 1
        for where in reads:
            if self._unknown(self._writes, where, stream):
                raise Violation("a stream reads what another one may not have written yet")
        for where in writes:
            if self._unknown(self._of_graphs, where, stream):
                raise Violation("a stream writes to memory of a graph that another one may be working with")
            self._writes[where] = _Use(stream, stream.work, self.memory.at(where))
        for where in reads | writes:
            if of_graph or where in self._of_graphs:
                self._of_graphs[where] = _Use(stream, stream.work, self.memory.at(where))

    def _unknown(self, uses: dict[int, _Use], where: int, stream: Stream) -> bool:
        """Whether the last of these uses of what is at a place may not be over for a stream."""
        use = uses.get(where)
        return (
            use is not None
            and use.storage is self.memory.at(where)
            and not stream.knows(use.stream, use.work)
        )

    @contextmanager
    def _device(self, device: Any) -> Iterator[None]:
        before = self.device
        if device is not None:
            self.device = device if isinstance(device, int) else torch.device(device).index
        try:
            yield
        finally:
            self.device = before

    @contextmanager
    def _stream(self, stream: Stream) -> Iterator[None]:
        index = stream.device.index
        before_stream, before = self._current.get(index), self.device
        self._current[index], self.device = stream, index
        try:
            yield
        finally:
            self.device = before
            if before_stream is None:
                del self._current[index]
            else:
                self._current[index] = before_stream

    def _synchronize(self) -> None:
        if self.graph is not None:
            self.graph.broken = "synchronize"
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def _empty_cache(self) -> None:
        if self.allocating:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    def _pool(self) -> Pool:
        pool = Pool()
        self.pools.add(pool)
        return pool

    def _end_pool(self, device: int, pool: Pool) -> None:
        if device != self.tensors:
            raise Violation(f"the pool is of cuda:{self.tensors}, not of cuda:{device}")
        if pool not in self.allocating:
            raise RuntimeError("no allocation to this pool")
        self.allocating.remove(pool)

    def _graph(self) -> Graph:
        self.captures += 1
        return Graph(self)

    def _record_stream(self, tensor: torch.Tensor, stream: Stream) -> None:
        if stream.device.index != self.tensors:
            raise Violation(f"a tensor on cuda:{self.tensors} is recorded on a stream of {stream.device}")

    @contextmanager
    def installed(self) -> Iterator[Runtime]:
        """Be ``torch.cuda``."""
        with pytest.MonkeyPatch.context() as patch, self:
            for name, value in {
                "device": self._device,
                "stream": self._stream,
                "Stream": lambda: Stream(self, self.device),
                "current_stream": self.stream,
                "current_device": lambda: self.device,
                "is_current_stream_capturing": lambda: self.graph is not None,
                "graph_pool_handle": self._pool,
                "CUDAGraph": self._graph,
                "synchronize": self._synchronize,
                "empty_cache": self._empty_cache,
                "memory_reserved": lambda device=None: self.pool_nbytes,
                "mem_get_info": lambda device=None: (self.free, 2 * FREE),
            }.items():
                patch.setattr(torch.cuda, name, value)
            cut_to_size(patch)
            patch.setattr(torch._C, "_cuda_endAllocateToPool", self._end_pool, raising=False)
            patch.setattr(torch.Tensor, "record_stream", lambda tensor, to: self._record_stream(tensor, to))
            yield self
