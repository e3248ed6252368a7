"""ClusCa in the fast path: what is recorded at full steps, and the corrections of skipped ones."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from hicache.adapters.base import ModuleAdapter, ModuleOutput
from hicache.companions.clusca.correction import ClusterCorrection
from hicache.companions.clusca.draws import Draws
from hicache.companions.clusca.modules import Mlps
from hicache.companions.clusca.places import Places
from hicache.companions.clusca.settings import ClusCa
from hicache.hooks.module_outputs import ModuleOutputs, watched
from hicache.numbers import uploaded
from hicache.runtime.call_form import CallForm
from hicache.runtime.corrector import Corrector, Correctors
from hicache.step_plan import RunningCall

_NOT_SEEN: Final = "its last double block is left out, in whose output clusters are found"


class ClusterCorrector(Corrector):
    """The clusters of one context.

    Clusters are found at the first skipped step after a full one: full steps in a row find none.

    Args:
        settings: of the clusters.
        mlps: of the model.
        form: of the context's calls.
    """

    def __init__(self, settings: ClusCa, mlps: Mlps, form: CallForm) -> None:
        self.edits = settings.variant == "upstream"
        self.fits = form.shape, form.dtype, form.device
        self._settings = settings
        self._mlps = mlps
        with torch.inference_mode(False):  # outlives the mode of the run that made it
            self._draws = Draws(settings, len(mlps.all), form.device)
            self._places = Places(settings, self._draws, *self.fits)
            empty = torch.empty(form.shape, dtype=form.dtype, device=form.device)
        self.memory = (empty,) if settings.labels == "full-steps" else ()
        self._recorded = False  # whether memory has what clusters are to be found in next
        self._weights: Tensor | None = None  # of all features, in the sum of a skipped step; None: they are 1

    def restart(self) -> None:
        self._places.found = self._recorded = False

    def commit(self) -> None:
        self._recorded = bool(self.memory)

    def correct(self, step: int, form: CallForm) -> ClusterCorrection:
        present = tuple(self._mlps.present(form.missing))
        if self.memory and self._mlps.all[-1] not in present:
            raise RuntimeError(f"hicache: no token can be drawn at step {step}: {_NOT_SEEN}")
        if self._recorded:
            self._places.find(self.memory[0])
            self._places.found, self._recorded = True, False
        held = 0 if self._weights is None else len(self._weights)
        if self._settings.variant == "exact" and held != form.num_features:
            self._weights = self._weighed(form)
        return ClusterCorrection(
            self._settings,
            self._mlps,
            present,
            self._places,
            self._weights,
            self._draws.of(step),
            finds=not self._places.found,
        )

    def settle(self) -> None:
        self._places.found = True

    def _weighed(self, form: CallForm) -> Tensor:
        """How much each feature's forecast counts: that of MLPs a little less."""
        with torch.inference_mode(False):  # outlives the mode of the run
            weights = torch.ones(form.num_features, dtype=torch.float64)
            weights[[mlp.feature for mlp in self._mlps.all]] = 1 - self._settings.rho
            return uploaded(weights, form.device)

    @property
    def nbytes(self) -> int:
        held = [*self.memory, *self._places.memory]
        held += [] if self._weights is None else [self._weights]
        return self._draws.nbytes + sum(tensor.nbytes for tensor in held)


class ClusterCorrectors(Correctors):
    """Makes them for one transformer; its arguments are those of the base class."""

    def __init__(self, settings: ClusCa, adapter: ModuleAdapter, call: RunningCall) -> None:
        super().__init__(settings, adapter, call)
        self._settings = settings
        self._mlps = Mlps(adapter)
        self._outputs: ModuleOutputs | None = None  # watches the last double block

    def watch(self, corrector: Corrector | None, form: CallForm) -> Corrector:
        fits = form.shape, form.dtype, form.device
        if not isinstance(corrector, ClusterCorrector) or corrector.fits != fits:
            corrector = ClusterCorrector(self._settings, self._mlps, form)
        if corrector.memory:
            last = self._mlps.all[-1].block
            output = ModuleOutput(last, ((0, None),), element=self._mlps.family.image)
            self._outputs = watched(self._outputs, self.call, [output])
            self._outputs.bind(corrector.memory, form.view)
        return corrector

    def refusal(self, form: CallForm) -> str | None:
        if any(feature < form.num_outputs for feature in self._mlps.shared):
            return "an image prompt (IP-Adapter) adds to its hidden state between MLPs"
        if self._settings.labels == "full-steps" and self._mlps.all[-1].feature in form.missing:
            return _NOT_SEEN
        if form.view is not None and form.view.groups is not None:
            return "its gates differ between tokens"
        return None

    def describe(self) -> str:
        settings = self._settings
        return f"{settings.clusters} clusters of tokens, {settings.variant}, {settings.labels}"

    def end(self) -> None:
        if self._outputs is not None:
            self._outputs.unbind()

    def forget(self) -> None:
        if self._outputs is not None:
            self._outputs.remove()
        self._outputs = None
