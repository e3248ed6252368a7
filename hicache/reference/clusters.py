"""ClusCa in the reference: what becomes of the MLPs of double blocks at a skipped step, token by token.

The rules are those of :class:`hicache.companions.clusca.ClusCa`, in plain formulas over all tokens. Only the
image stream is computed: what a skipped step makes of text never reaches the picture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hicache.companions.clusca.draws import Draws, Groups
from hicache.companions.clusca.families import double_blocks, find_family
from hicache.companions.clusca.settings import ClusCa
from hicache.reference.history import History


class ClusteredModel:
    """Which submodules of a model are MLPs of double blocks.

    Args:
        settings: of the clusters.
        model: the transformer.

    Raises:
        ValueError: its double blocks are not known.
    """

    def __init__(self, settings: ClusCa, model: nn.Module) -> None:
        self.settings = settings
        family = self.family = find_family(model)
        self.blocks: list[nn.Module] = double_blocks(model)
        # path of an MLP in the model → which of the blocks it is in
        self.paths = {f"{family.blocks}.{block}.{family.mlp}": block for block in range(len(self.blocks))}

    def begin(self) -> Clusters:
        """The clusters of a context in a run that begins."""
        return Clusters(self)


class Clusters:
    """The clusters of one context in one run.

    Args:
        model: which MLPs.
    """

    def __init__(self, model: ClusteredModel) -> None:
        self._settings = model.settings
        self._model = model
        self._draws: Draws | None = None
        self._seen: Tensor | None = None  # what clusters are to be found in, once they are needed
        self.groups: Groups | None = None

    def anew(self) -> Clusters:
        """Those of a context that begins anew."""
        return Clusters(self._model)

    def compute(self, path: str) -> bool:
        """Whether a submodule is an MLP that is computed for a few tokens."""
        return path in self._model.paths

    def watch(self, full: bool) -> Callable[[], None]:
        """Look at what clusters are found in, in the call that begins; returns what undoes it.

        Args:
            full: whether its step is.
        """
        if self._settings.labels == "full-steps":
            last = self._model.blocks[-1]
            return last.register_forward_hook(lambda _, args, output: self._leave(full, output)).remove
        first = self._model.blocks[0]
        return first.register_forward_pre_hook(
            lambda _, args, kwargs: self._enter(full, args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        ).remove

    def _leave(self, full: bool, output: Any) -> None:
        if full:
            self._seen = self._model.family.image_of(output).detach().clone()

    def _enter(self, full: bool, hidden: Tensor) -> None:
        if not full and self.groups is None:
            self._seen = hidden.detach().clone()

    def _found(self) -> tuple[Groups, Draws]:
        if self._seen is not None:
            seen, self._seen = self._seen, None
            if self._draws is None:
                self._draws = Draws(self._settings, len(self._model.blocks), seen.device)
            before = None if self.groups is None else self.groups.centroids
            self.groups = Groups.of(seen, self._draws.first, before, self._settings.iterations)
        if self.groups is None or self._draws is None:
            raise RuntimeError("hicache.reference: a step is skipped before the double blocks have run")
        return self.groups, self._draws

    def forecast(
        self,
        step: int,
        path: str,
        run: Callable[[Tensor], Tensor],
        hidden: Tensor,
        history: History,
        forecast: Callable[[], Tensor],
    ) -> Tensor:
        """What stands for an MLP at a skipped step, ``[batch, tokens, channels]``.

        Args:
            step: the skipped step.
            path: of the MLP in the model.
            run: computes it.
            hidden: what it would be given, ``[batch, tokens, channels]``.
            history: of its output.
            forecast: what plain HiCache has in its place, by that history.

        Raises:
            RuntimeError: the MLP is called on other tokens than were clustered.
        """
        groups, draws = self._found()
        if hidden.shape[:2] != groups.labels.shape:
            raise RuntimeError(
                f"hicache.reference: expected {path} to be called on {tuple(groups.labels.shape)} tokens, as "
                f"were clustered, got {tuple(hidden.shape[:2])}"
            )
        block = self._model.paths[path] if self._settings.draws_in_blocks else 0
        drawn = groups.draw(draws.of(step)[block])  # [B, C]
        value = _promoted(run(_rows(hidden, drawn)))  # [B, C, D], one call of the module
        is_drawn = groups.are_drawn(drawn)[..., None]  # [B, T, 1]
        own = _rows(value, groups.labels)  # every token's cluster's
        return self._joined(is_drawn, own, drawn, groups, history, forecast)

    def _joined(
        self,
        is_drawn: Tensor,
        own: Tensor,
        drawn: Tensor,
        groups: Groups,
        history: History,
        forecast: Callable[[], Tensor],
    ) -> Tensor:
        rho, variant = self._settings.rho, self._settings.variant
        if variant == "upstream":
            newest = history.differences[0]
            edited = torch.where(is_drawn, own, rho * own + (1 - rho) * _promoted(newest))
            history.differences[0] = edited.to(newest.dtype)
            return forecast()
        ahead = forecast()
        far = _promoted(ahead)
        if variant == "residual":
            off = own - _rows(_rows(far, drawn), groups.labels)
            others = far + self._settings.kappa * off
        else:
            others = (1 - rho) * far + rho * own
        return torch.where(is_drawn, own, others).to(ahead.dtype)


def _rows(hidden: Tensor, tokens: Tensor) -> Tensor:
    """Rows of ``[batch, tokens, channels]``, by their indices ``[batch, rows]``."""
    return hidden.gather(1, tokens[..., None].expand(-1, -1, hidden.shape[-1]))


def _promoted(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
