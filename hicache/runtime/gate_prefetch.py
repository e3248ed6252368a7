"""Gates and embeddings of the skipped steps to come, computed together at the full step before them.

They depend on the timestep, the guidance and the pooled text only (docs/algorithm.md, "Gates are known in
advance"), and those of coming steps are known where they are the scheduler's (``runtime/timestep_check.py``).
Whatever does not fit (a loop of one's own, another prompt half-way) has them computed at each step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from hicache import compat
from hicache.adapters.base import EMBEDDED, ModuleAdapter
from hicache.hooks.timesteps import Rule
from hicache.runtime.gate_constants import Constants
from hicache.runtime.gate_weights import GateWeights
from hicache.runtime.timestep_check import TimestepCheck


class Ahead(NamedTuple):
    """What of a skipped step was computed ahead of it."""

    gates: Tensor | None = None  # [num_features, batch, channels]
    embedded: Tensor | None = None  # what the model's embedder of timesteps would give


_NOTHING: Final = Ahead()


@dataclass(frozen=True)
class _Fetched:
    """What of some skipped steps was computed ahead of them."""

    steps: range
    gates: Tensor | None  # [steps, num_features, batch, channels]
    embedded: Tensor | None  # [steps, batch, width]
    constants: Constants  # the other arguments they were computed for
    by_step: Sequence[Ahead] = ()  # views; empty: they are not written yet
    weights: GateWeights | None = None  # those they were computed with; None: likewise


class GatePrefetch:
    """The gates and embeddings of the skipped steps to come, of one context."""

    def __init__(self) -> None:
        self._check = TimestepCheck()
        self._fetched: _Fetched | None = None
        self._weights: GateWeights | None = None  # of the run
        self.last: int | None = None  # step of the run that nothing is needed after

    def restart(self) -> None:
        """A new run starts: its timesteps may be others."""
        self._check.hear()  # what the device had not come to when the last one ended
        self._check = TimestepCheck()
        self.forget()
        self._weights = self.last = None

    def end_run(self) -> None:
        """The last step of a run is over: hold on to none of the model's weights."""
        self._weights = None
        if self._fetched is not None:
            self._fetched = replace(self._fetched, by_step=(), weights=None)

    def forget(self) -> None:
        """What was computed no longer holds."""
        self._fetched = None

    def meet(
        self, adapter: ModuleAdapter, rules: Sequence[Rule], step: int, model_kwargs: Mapping[str, Any]
    ) -> None:
        """A full step begins: ask whether its timestep is the scheduler's, before its blocks are launched.

        Without it nothing is computed ahead.

        Args:
            adapter: the family's.
            rules: by which the run's timesteps may come out of the scheduler's.
            step: of the run.
            model_kwargs: the transformer's.
        """
        if adapter.foretell:
            self._hear()
            self._check.ask(rules, step, model_kwargs.get("timestep"), self._index(step) is not None)

    def fetch(
        self,
        adapter: ModuleAdapter,
        steps: range,
        block_kwargs: Mapping[str, Any],
        model_kwargs: Mapping[str, Any],
        like: Tensor,
        gates: bool = True,
        embedding: bool = False,
        last: bool = False,
    ) -> None:
        """Compute what is needed at ``steps``, which follow the full step before the first of them.

        They count from :meth:`settle` on.

        Args:
            adapter: the family's.
            steps: ordinals of the coming skipped steps.
            block_kwargs: the first block's arguments at the full step.
            model_kwargs: the transformer's.
            like: anything ``[batch, ..., channels]`` of the hidden state's dtype and device.
            gates: whether gates are needed.
            embedding: whether what the model's embedder gives is.
            last: whether no full step of the run comes after them.
        """
        self.forget()
        self.last = steps.stop - 1 if last else None
        if last and not steps:
            self._weights = None
        self._check.hear()
        timesteps = self._check.timesteps
        if not adapter.foretell or timesteps is None or not steps or not (gates or embedding):
            return
        coming = timesteps[steps.start : steps.stop]
        batch, channels = len(like), like.shape[-1]
        if len(coming) != len(steps) or not _foretellable(adapter, model_kwargs, batch):
            return
        inputs = adapter.gate_inputs(
            block_kwargs, model_kwargs, coming.repeat_interleave(batch), len(steps), like
        )
        found = embedded = None
        if gates:
            found = adapter.gates(inputs, like[:1].expand(len(steps) * batch, *like.shape[1:]))
            found = found.view(-1, len(steps), batch, channels).transpose(0, 1)
        if embedding and not _hooked_embedder(adapter):
            embedded = inputs[EMBEDDED].detach().unflatten(0, (len(steps), batch))
        self._fetched = _Fetched(steps, found, embedded, Constants(adapter, model_kwargs))

    def settle(self, adapter: ModuleAdapter) -> None:
        """What :meth:`fetch` computed has been written, and is :meth:`own`, by the weights of now."""
        fetched = self._fetched
        if fetched is None or fetched.weights is not None:
            return
        nothing = [None] * len(fetched.steps)
        gates = nothing if fetched.gates is None else fetched.gates.unbind()
        embedded = nothing if fetched.embedded is None else fetched.embedded.unbind()
        self._fetched = replace(
            fetched, by_step=list(map(Ahead, gates, embedded)), weights=self._weights_of(adapter, fetched)
        )

    def _weights_of(self, adapter: ModuleAdapter, fetched: _Fetched) -> GateWeights:
        """The state of what was fetched; that of the run's last fetch, where it is the same."""
        roots = adapter.embedding_modules() if fetched.gates is None else adapter.gate_modules()
        unhooked = None if fetched.embedded is None else adapter.embedder
        known = self._weights
        if known is None or not known.of(roots, unhooked) or not known.unchanged():
            known = self._weights = GateWeights(adapter.module, roots, unhooked)
        return known

    def own(self, ones: int = 0) -> None:
        """Copy what :meth:`fetch` computed, and is written: the adapter uses its memory again.

        Args:
            ones: further features, whose gates are one.
        """
        fetched = self._fetched
        if fetched is not None and fetched.gates is not None and fetched.weights is None:
            gates = fetched.gates
            copy = with_ones(gates, ones) if ones else gates.clone(memory_format=torch.contiguous_format)
            self._fetched = replace(fetched, gates=copy.contiguous())

    @property
    def knows_timesteps(self) -> bool:
        """Whether timesteps of coming steps are known."""
        return self._check.timesteps is not None

    @property
    def fetched(self) -> bool:
        """Whether there is anything of coming steps."""
        return self._fetched is not None

    @property
    def rows(self) -> Tensor | None:
        """The gates of all coming steps there are, ``[steps, num_features, batch, channels]``."""
        return None if self._fetched is None else self._fetched.gates

    @property
    def embedded_nbytes(self) -> int:
        """Bytes of the embeddings of all coming steps."""
        embedded = None if self._fetched is None else self._fetched.embedded
        return 0 if embedded is None else embedded.nbytes

    def ahead(self, step: int, model_kwargs: Mapping[str, Any], read: bool = False) -> Ahead:
        """What of a skipped step was fetched, and holds.

        Args:
            step: of the run.
            model_kwargs: the transformer's.
            read: whether numbers may be read from the device, where arguments are made anew: FLUX's
                ControlNet pipelines make a tensor of their guidance in every step.
        """
        self._hear()
        fetched, index = self._fetched, self._index(step)
        timestep = model_kwargs.get("timestep")
        if fetched is None or fetched.weights is None or index is None:
            return _NOTHING
        if not fetched.constants.are(model_kwargs, read) or not fetched.weights.unchanged():
            self.forget()
            return _NOTHING
        if not isinstance(timestep, Tensor) or timestep.ndim > 1:
            return _NOTHING
        self._check.used(step, timestep)
        return fetched.by_step[index]

    def _hear(self) -> None:
        if self._check.hear():
            self.forget()

    def _index(self, step: int) -> int | None:
        """Where a step is among those that were fetched."""
        fetched = self._fetched
        return fetched.steps.index(step) if fetched is not None and step in fetched.steps else None


def with_ones(gates: Tensor, ones: int) -> Tensor:
    """Gates ``[..., num_features, batch, channels]`` and those of ``ones`` further features: one."""
    return nn.functional.pad(gates, (0, 0, 0, 0, 0, ones), value=1.0) if ones else gates


def come_out_alike(told: Tensor, own: Tensor) -> bool:
    """Whether gates computed as those of coming steps are the step's own; reads the device."""
    allowed = max(1e-3, 4 * torch.finfo(own.dtype).eps)
    return bool((told - own).norm() <= allowed * own.norm())


def foretold(
    adapter: ModuleAdapter,
    block_kwargs: Mapping[str, Any],
    model_kwargs: Mapping[str, Any],
    like: Tensor,
) -> Tensor | None:
    """The gates of this step, computed as those of coming steps are; None where that cannot be done.

    They are others than the step's own where a subclass of the model makes its embedding of more than the
    family's does.

    Args:
        adapter: the family's.
        block_kwargs: the first block's arguments.
        model_kwargs: the transformer's.
        like: ``[batch, ..., channels]`` of the hidden state's dtype and device.
    """
    inputs = _inputs_of_now(adapter, block_kwargs, model_kwargs, like)
    return None if inputs is None else adapter.gates(inputs, like)


def embeds_ahead(
    adapter: ModuleAdapter,
    given: Sequence[Any],
    block_kwargs: Mapping[str, Any],
    model_kwargs: Mapping[str, Any],
    like: Tensor,
) -> bool:
    """Whether this step's embedding comes out as those of coming steps are computed, bit by bit.

    Not where the embedder has hooks: they would see what it gives twice. Reads the device.

    Args:
        adapter: the family's.
        given: by the model's embedder, in each call of it in this step.
        block_kwargs: the first block's arguments.
        model_kwargs: the transformer's.
        like: ``[batch, ..., channels]`` of the hidden state's dtype and device.
    """
    if len(given) != 1 or not isinstance(given[0], Tensor) or _hooked_embedder(adapter):
        return False
    [own] = given
    try:
        inputs = _inputs_of_now(adapter, block_kwargs, model_kwargs, like)
    except Exception:  # of a subclass that embeds something else: by stack it need not be as its family is
        return False
    told = None if inputs is None else inputs.get(EMBEDDED)
    if not isinstance(told, Tensor) or told.dtype != own.dtype or told.device != own.device:
        return False
    return torch.equal(told, own)


def _hooked_embedder(adapter: ModuleAdapter) -> bool:
    return adapter.embedder is None or compat.is_hooked(adapter.embedder)


def _inputs_of_now(
    adapter: ModuleAdapter, block_kwargs: Mapping[str, Any], model_kwargs: Mapping[str, Any], like: Tensor
) -> Mapping[str, Any] | None:
    """What gates of this step are computed from, as for coming steps; None where that cannot be done."""
    batch = len(like)
    if not _foretellable(adapter, model_kwargs, batch):
        return None
    timesteps = model_kwargs["timestep"].reshape(-1).expand(batch)
    return adapter.gate_inputs(block_kwargs, model_kwargs, timesteps, 1, like)


def _foretellable(adapter: ModuleAdapter, model_kwargs: Mapping[str, Any], batch: int) -> bool:
    """Whether gates depend on timesteps and on what else is there once a sample, but for one timestep."""
    timestep = model_kwargs.get("timestep")
    if not adapter.foretell or not isinstance(timestep, Tensor) or timestep.ndim > 1:
        return False
    if timestep.numel() not in (1, batch):
        return False
    values = [model_kwargs.get(name) for name in adapter.gate_arguments]
    return all(len(value) == batch for value in values if isinstance(value, Tensor))
