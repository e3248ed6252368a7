"""The companion of one denoiser: which attention of which context is called, and what becomes of that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hicache.companion import FullCall
from hicache.companions.sparse.families import attentions, check_attentions, family_of
from hicache.companions.sparse.layer import Inputs, Layer, Phase, Sparsity, Tokens, Turn
from hicache.mixin import mix_in

_KEY: Final = "_hicache_sparse"
_COMPILED: Final = "hicache: attention does something else at every kind of full step, so it is not compiled"


@dataclass
class _State:
    """What is kept for one context. It goes with the context."""

    tokens: Tokens
    layers: dict[int, Layer] = field(default_factory=dict)
    turns: dict[int, Turn] = field(default_factory=dict)  # by the ordinal of the full step

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + sum(layer.nbytes for layer in self.layers.values())

    def count(self, phase: Phase) -> int:
        """Full steps of this phase."""
        return sum(turn.phase is phase for turn in self.turns.values())


class SparseSteps:
    """Makes the attention of full steps sparse, in one denoiser.

    Args:
        denoiser: only looked at until :meth:`install`.
        sparsity: of every attention but the first.
        refresh: of the full steps after warm-up, every such one is dense.
        dense_layers: attentions at the beginning that are always dense.

    Raises:
        ValueError: a model or a processor that is not known, or one that is compiled or context parallel.
    """

    eager = "attention does something else at every kind of full step"

    def __init__(self, denoiser: nn.Module, sparsity: Sparsity, refresh: int, dense_layers: int) -> None:
        self._denoiser = denoiser
        self._family = family_of(denoiser)
        check_attentions(denoiser, self._family)
        self._sparsity = sparsity
        self._refresh = refresh
        self._dense_layers = dense_layers
        self._contexts: WeakKeyDictionary[object, _State] = WeakKeyDictionary()
        self._running: tuple[_State, Turn] | None = None
        self._undo: list[Callable[[], None]] = []

    def install(self) -> None:
        """Hook the attentions.

        Raises:
            ValueError: they are sparse already.
        """
        hooked = attentions(self._denoiser, self._family)
        if any(_KEY in attention.__dict__ for attention in hooked):
            raise ValueError(
                f"hicache: the attentions of this {type(self._denoiser).__name__} are sparse already: "
                "remove() what made them so first"
            )
        for index, attention in enumerate(hooked):
            if index >= self._dense_layers:
                self._undo.append(mix_in(attention, _Sparse, _KEY, _Attention(self, index)))

    def remove(self) -> None:
        """Leave the attentions as they were."""
        while self._undo:
            self._undo.pop()()
        self.release()

    def release(self) -> None:
        """Free what is held; every context begins anew."""
        self.end()
        self._contexts.clear()

    def begin(self, call: FullCall) -> None:
        """A full step begins: what its attentions will do.

        Raises:
            ValueError: the attentions are no longer what they were.
        """
        state = self._contexts.get(call.context)
        if state is None or call.ordinal == 0:
            check_attentions(self._denoiser, self._family)
            state = _State(self._family.tokens(self._denoiser, call.model_kwargs))
            self._contexts[call.context] = state
        turn = Turn.at(call.ordinal, call.warmup, self._refresh)
        state.turns[call.ordinal] = turn
        self._running = state, turn

    def end(self) -> None:
        """A call has ended, or never came to its end."""
        self._running = None

    def attend(self, index: int, inputs: Inputs) -> Tensor:
        """An attention is asked for inside of a full step."""
        assert self._running is not None
        state, turn = self._running
        layer = state.layers.setdefault(index, Layer(self._sparsity))
        return layer.attend(turn, state.tokens, inputs)

    @property
    def running(self) -> bool:
        """Whether a full step goes on."""
        return self._running is not None

    @property
    def nbytes(self) -> int:
        """Bytes held: columns and remainders, of all contexts."""
        return sum(state.nbytes for state in tuple(self._contexts.values()))

    def describe(self) -> str:
        """How many full steps were sparse, of the context that had most; and bytes held."""
        most = max(self._contexts.values(), key=lambda state: len(state.turns), default=None)
        turns = 0 if most is None else len(most.turns)
        sparse = 0 if most is None else most.count(Phase.SPARSE)
        return f"sparse attention: {sparse} of {turns} full steps, {self.nbytes:,} bytes"


@dataclass(frozen=True)
class _Attention:
    """One attention of a denoiser, hooked."""

    companion: SparseSteps
    index: int

    def call(self, attention: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """It is called.

        Raises:
            ValueError: it asked for another number of attentions than one, or for one of another kind.
        """
        if not self.companion.running:
            return forward(*args, **kwargs)
        with _OneAttention(self) as seen:
            output = forward(*args, **kwargs)
        # none: a forecast stood for it, or a kernel that is no function of torch was chosen
        if seen.calls != 1:
            raise ValueError(
                f"hicache: sparse full steps expect {type(attention).__name__} to ask torch for one "
                f"scaled_dot_product_attention, got {seen.calls}: leave diffusers' attention backend at "
                "'native', and its processors as they are"
            )
        return output


class _Sparse(nn.Module):
    """Mixed into the class of an attention, outside of what is hooked to it."""

    # torch's own disable: without a graph break fullgraph=True says why there is none
    @torch.compiler.disable(reason=_COMPILED)  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        attention: _Attention = self.__dict__[_KEY]
        return attention.call(self, super().__call__, args, kwargs)


class _OneAttention(TorchFunctionMode):
    """While an attention runs, the product that it asks torch for is the companion's."""

    def __init__(self, attention: _Attention) -> None:
        super().__init__()
        self._attention = attention
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self._asked(func, *args, **(kwargs or {}))

    def _asked(
        self,
        func: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attention of all tokens to all tokens.

        Raises:
            ValueError: of another kind.
        """
        kind = {"attn_mask": attn_mask is not None, "dropout_p": dropout_p, "is_causal": is_causal}
        wrong = [name for name, given in kind.items() if given]
        if wrong or enable_gqa or query.shape != key.shape:
            what = ", ".join(wrong) or f"query {tuple(query.shape)} and key {tuple(key.shape)}"
            raise ValueError(
                f"hicache: sparse full steps expect attention of all tokens to all, without a mask: "
                f"got {what}"
            )
        return self._attention.companion.attend(
            self._attention.index,
            Inputs(query, key, value, scale, lambda: func(query, key, value, scale=scale)),
        )
