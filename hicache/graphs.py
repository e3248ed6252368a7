"""CUDA graphs of full and skipped steps: one launch by the host for all kernels of a call.

A call is captured the second time it comes in the same form (the first runs eagerly and warms up libraries
and kernels) and replayed from then on, with its inputs copied into the graph's own memory and its outputs
cloned out of it. What a call reads besides its inputs is fixed memory: the history, and buffers for
coefficients and gates. So one graph of a skipped step serves every distance, one of a full step every gap.
"""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hicache.block_graphs import BlockGraphs
from hicache.capture import Backend, Replay, describe, like, modes, parts, tensors
from hicache.models.call import Call, Mode
from hicache.stats import GraphStats

ENVIRONMENT: Final = "HICACHE_CUDA_GRAPHS"  # "0" switches graphs off, whatever the code asks for
LIMIT: Final = 16  # live graphs of one transformer


class _Replayable(nn.Module):
    """Mixed into the transformer's class while its calls are replayed."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        graphs: Graphs = self.__dict__["_hicache_graphs"]
        if not graphs.due:
            return super().forward(*args, **kwargs)
        return graphs.run(super().forward, args, kwargs)


@dataclass
class _Graph:
    """One captured call."""

    replay: Replay
    output: Any
    inputs: list[Tensor]  # its own memory for the call's tensors …
    state: list[Tensor]  # … and for coefficients, gates and residuals
    # what its code left in the call's state, for whoever reads that after it
    remembered: list[Any]
    sums: dict[int, Tensor]


class Graphs:
    """The graphs of one transformer.

    Args:
        module: the transformer.
        call: state of its current call.
        backend: what captures.
        wanted: asked for, and not only where they can be had: say so where they cannot.
        limit: live graphs; the least recently used is dropped.
    """

    def __init__(
        self, module: nn.Module, call: Call, backend: Backend, wanted: bool = False, limit: int = LIMIT
    ) -> None:
        self._module = module
        self._call = call
        self._backend = backend
        self._wanted = wanted
        self._limit = limit
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        self._warmed: set[Any] = set()
        self._parameters: list[Tensor] = []
        self._scaled: list[Any] = []  # LoRA layers
        self._processors: list[Any] = []  # of attentions
        self._weights: tuple[Any, ...] = ()
        self._whole: str | None = None  # why calls cannot be captured as a whole
        self._failed: str | None = None  # nor blocks
        self._class: type[nn.Module] | None = None  # of the transformer, while it has ours
        self.due = False  # whether the current call is to be replayed
        self.stats = GraphStats()
        self._blocks = BlockGraphs(call, backend, self.stats, limit=8 * limit)

    def start_run(self, changed: bool) -> None:
        """A run starts.

        Args:
            changed: parts of the model are not what they were.
        """
        self._parameters = [part for weight in self._module.parameters() for part in parts(weight)]
        modules = list(self._module.modules())
        self._scaled = [m for m in modules if isinstance(getattr(m, "scaling", None), dict)]
        processors = [getattr(m, "processor", None) for m in modules]
        self._processors = [processor for processor in processors if hasattr(processor, "__dict__")]
        if changed:
            self.drop()
        before, self.stats.eager = self.stats.eager, self._failed or self._reason()
        if self._wanted and self.stats.eager not in (None, before):
            name = type(self._module).__name__
            warnings.warn(
                f"hicache: {name} runs without CUDA graphs: {self.stats.eager}", RuntimeWarning, stacklevel=2
            )
        if self.stats.eager is None and self._class is None:
            # it is the class that makes forward ours: from the next call on, as this one has looked its up
            self._class = cls = type(self._module)
            self._module.__class__ = type(cls.__name__, (_Replayable, cls), {"__module__": cls.__module__})
            self._module.__dict__["_hicache_graphs"] = self

    def _reason(self) -> str | None:
        if os.environ.get(ENVIRONMENT) == "0":
            return f"{ENVIRONMENT}=0"
        if not self._parameters:
            return "the transformer has no weights"
        devices = {parameter.device for parameter in self._parameters}
        if len(devices) > 1:
            return f"its weights are on {', '.join(sorted(map(str, devices)))}"
        for module in self._module.modules():
            registry = module.__dict__.get("_diffusers_hook")  # may be there without any hook in it
            if (
                "forward" in module.__dict__
                or "_hf_hook" in module.__dict__
                or getattr(registry, "hooks", None)
            ):
                return f"{type(module).__name__} is offloaded or hooked"
        return self._backend.unavailable(devices.pop())

    def usable(self) -> bool:
        """Whether the call that begins may be replayed: it has been learned from, and wants no gradients."""
        return (
            self.stats.eager is None
            and self._call.mode in (Mode.FULL, Mode.SKIP)
            and not torch.is_grad_enabled()
            and not self._module.training
        )

    def refuse(self, reason: str) -> None:
        """This run goes without.

        Raises:
            RuntimeError: graphs were asked for and cannot be had.
        """
        if self._wanted:
            raise RuntimeError(
                f"hicache: cuda_graphs=True, but {reason}: torch.compile makes its graphs itself "
                "(mode='reduce-overhead'); pass cuda_graphs=False, or compile_repeated_blocks() in its place"
            )
        self.stats.eager = reason

    def begin(self) -> None:
        """A call that is :meth:`usable` begins."""
        self.due = True

    def end(self) -> None:
        """The call has ended."""
        self.due = False

    def remove(self) -> None:
        """Leave the transformer as it was, and forget all graphs."""
        if self._class is not None:
            self._module.__class__ = self._class
            del self._module.__dict__["_hicache_graphs"]
            self._class = None
        self.drop()

    def drop(self) -> None:
        """Forget all graphs."""
        self._graphs.clear()
        self._warmed.clear()
        self._blocks.drop()

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the transformer: eagerly the first time in this form, captured the second, then replayed.

        Args:
            forward: the transformer's own.
            args: of the call.
            kwargs: of the call.
        """
        weights = self._current_weights()
        if weights != self._weights:
            self._weights = weights
            self.drop()
        if self._whole is not None:
            return self._run_blocks(forward, args, kwargs)
        leaves, layout = pytree.tree_flatten((args, kwargs))
        state = self._state()
        key = self._key(leaves, layout, state)
        if key is None:
            return forward(*args, **kwargs)
        graph = self._graphs.get(key)
        if graph is None:
            if key not in self._warmed:
                if len(self._warmed) > 8 * self._limit:
                    self._warmed.clear()
                self._warmed.add(key)
                return self._backend.warm(lambda: forward(*args, **kwargs))
            graph = self._capture(forward, leaves, layout, state)
            if graph is None:
                return forward(*args, **kwargs)
            self._graphs[key] = graph
            if len(self._graphs) > self._limit:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return self._replay(graph, leaves, state)

    def _run_blocks(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Around captured blocks all is eager; a skipped step has no blocks."""
        call = self._call
        if call.mode != Mode.FULL:
            return forward(*args, **kwargs)
        self._blocks.begin()
        call.run_block = self._run_block
        return _cloned(forward(*args, **kwargs))

    def _run_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._failed is None:
            sums = dict(self._call.sums)
            try:
                return self._blocks.run(block, args, kwargs)
            except Exception as error:
                self._call.sums = sums
                self._give_up(error)
        return block(*args, **kwargs)

    def _replay(self, graph: _Graph, leaves: Sequence[Any], state: Sequence[Tensor]) -> Any:
        for own, given in zip(graph.inputs, tensors(leaves), strict=True):
            own.copy_(given)
        for own, given in zip(graph.state, state, strict=True):
            own.copy_(given)
        graph.replay()
        self.stats.replays += 1
        call = self._call
        call.entered = call.left = True
        call.sums = dict(graph.sums)
        call.remembered[:] = graph.remembered
        # the next replay overwrites them, and this call's output may outlive it
        return _cloned(graph.output)

    def _capture(
        self,
        forward: Callable[..., Any],
        leaves: Sequence[Any],
        layout: pytree.TreeSpec,
        state: Sequence[Tensor],
    ) -> _Graph | None:
        call = self._call
        kept = dict(call.__dict__)
        remembered = list(call.remembered)
        inputs = [like(tensor) for tensor in tensors(leaves)]
        own = [like(tensor) for tensor in state]
        queue = iter(inputs)
        own_leaves = [next(queue) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        own_args, own_kwargs = pytree.tree_unflatten(own_leaves, layout)
        for buffer, given in zip([*inputs, *own], [*tensors(leaves), *state], strict=True):
            buffer.copy_(given)
        self._set_state(own)
        try:
            replay, output = self._backend.capture(lambda: forward(*own_args, **own_kwargs))
        except Exception as error:
            call.__dict__.update(kept)
            call.remembered[:] = remembered
            self._fail(error)
            return None
        if describe(pytree.tree_leaves(output)) is None:
            # its tensors would be overwritten by the next replay
            call.__dict__.update(kept)
            call.remembered[:] = remembered
            self._give_up(TypeError(f"expected tensors to be returned, got {type(output).__name__}"))
            return None
        self.stats.captures += 1
        graph = _Graph(replay, output, inputs, own, list(call.remembered), dict(call.sums))
        call.__dict__.update(kept)
        return graph

    def _fail(self, error: Exception) -> None:
        """A call cannot be captured as a whole, maybe for what is before its blocks: try them alone."""
        self._whole = _first_line(error)
        self.stats.partly = f"only its blocks are captured: {self._whole}"
        self.drop()

    def _give_up(self, error: Exception) -> None:
        """From here on eagerly: what failed once fails again, and each time costs a step."""
        name = type(self._module).__name__
        self._failed = f"a capture failed: {_first_line(error)}"
        if self._whole not in (None, _first_line(error)):
            self._failed += f" (of a block; of the whole call: {self._whole})"
        self.stats.eager, self.stats.partly = self._failed, None
        self.drop()
        warnings.warn(
            f"hicache: {name} runs without CUDA graphs, as {self._failed}", RuntimeWarning, stacklevel=2
        )

    # What a call depends on.

    def _state(self) -> list[Tensor]:
        """Tensors besides the inputs whose numbers change from call to call."""
        call = self._call
        if call.mode != Mode.SKIP or call.sum is None:
            return []
        return [call.sum.coeffs, *([] if call.gates is None else [call.gates]), *call.between]

    def _set_state(self, own: Sequence[Tensor]) -> None:
        call = self._call
        if call.mode != Mode.SKIP or call.sum is None:
            return
        coeffs, *others = own
        call.sum = replace(call.sum, coeffs=coeffs)
        if call.gates is not None:
            call.gates = others.pop(0)
        call.between = others

    def _key(self, leaves: Sequence[Any], layout: pytree.TreeSpec, state: Sequence[Tensor]) -> Any:
        """What must be equal for a graph to serve; None where that cannot be told."""
        call = self._call
        if call.sum is not None and call.sum.inv_gap is not None:
            return None  # an update waits: it runs once
        described = describe([*leaves, *state])
        if described is None:
            return None
        # fixed memory: the history, and what full steps left for skipped ones
        fixed = [call.base, call.slot, None if call.sum is None else call.sum.orders, *call.targets]
        if call.mode == Mode.SKIP:
            fixed += tensors(pytree.tree_leaves(call.remembered))
        return (
            call.mode,
            layout,
            described,
            # the form too: a history may be followed by a smaller one in the same place
            tuple(None if tensor is None else (tensor.data_ptr(), tensor.shape) for tensor in fixed),
            call.gates is not None,
            len(call.between),
            *modes(),
        )

    def _current_weights(self) -> tuple[Any, ...]:
        """Where the weights are, how LoRA weighs its own, and the settings of attention processors.

        Numbers of Python are part of a graph: an IP-Adapter's scale may change between any two calls.
        """
        return (
            *(parameter.data_ptr() for parameter in self._parameters),
            *(tuple(layer.scaling.items()) for layer in self._scaled),
            *(str(getattr(layer, "active_adapters", None)) for layer in self._scaled),
            *(bool(getattr(layer, "disable_adapters", False)) for layer in self._scaled),
            *(_settings(processor) for processor in self._processors),
        )


def _settings(processor: Any) -> tuple[Any, ...]:
    """The plain values among an object's attributes, and lists of them."""
    found: list[Any] = []
    for name, value in vars(processor).items():
        values = value if isinstance(value, (list, tuple)) else (value,)
        if all(isinstance(one, (bool, int, float, str)) for one in values):
            found.append((name, *values))
    return tuple(found)


def _cloned(output: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
