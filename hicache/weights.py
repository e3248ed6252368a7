"""What holds the numbers of weights, where they are, and whether they are at hand.

Quantised weights are tensors around others (torchao), and so are weights that are sharded over processes
(FSDP2's ``fully_shard``); those, and weights that are offloaded in groups of blocks, are whole only while
their own block runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, distributed, nn

from hicache import compat


def weight_parts(weight: Tensor) -> Iterator[Tensor]:
    """The tensors that hold a weight's numbers: those of a quantised or a sharded one are inside it."""
    if not hasattr(weight, "__tensor_flatten__"):
        yield weight
        return
    names, _ = weight.__tensor_flatten__()
    for part in (getattr(weight, name) for name in names):
        if isinstance(part, Tensor):  # the mesh of processes is another part of a sharded weight
            yield from weight_parts(part)


def addresses(tensors: Iterable[Tensor]) -> list[int]:
    """Where tensors have their numbers: asked of hundreds at a step, so without a line of Python for each."""
    return list(map(Tensor.data_ptr, tensors))


def is_sharded(module: nn.Module) -> bool:
    """Whether weights of a model are spread over processes, which gather them as they come to need them."""
    if not distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # slow to import, and in some builds it cannot be

    return any(isinstance(weight, DTensor) for weight in module.parameters())


def only_in_their_blocks(module: nn.Module) -> bool:
    """Whether weights of a model's blocks are at hand for as long as their block runs, and no longer."""
    return compat.is_offloaded_by_blocks(module) or is_sharded(module)
