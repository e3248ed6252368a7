"""What a user chooses about clusters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from hicache.checks import check_positive, check_whole

VARIANTS: Final = ("exact", "upstream", "residual")
LABELS: Final = ("full-steps", "once-first-block")


@dataclass(frozen=True)
class ClusCa:
    """Which tokens are computed at skipped steps, and what becomes of the others.

    Write v for what the MLP gives for a cluster's drawn token and F for the forecast of a token.

    Args:
        clusters: C, of every picture; with fewer tokens than that, every token is one. 0 is plain HiCache.
        rho: ρ, how much v counts for the other tokens of its cluster, 0 … 1; of no use to ``"residual"``.
        variant: ``"exact"``: drawn tokens are v, others ``(1 − ρ) · F + ρ · v``. ``"residual"``: drawn tokens
            are v, others move by κ times what the drawn token's forecast was off by. ``"upstream"``, as the
            authors' code: v is written into the last feature, ρ of it into those of the others, and the
            forecast goes on from there, at this skipped step and all later ones; tokens are drawn anew in
            every block, with the other variants in every step.
        kappa: κ >= 0, for ``"residual"``.
        labels: ``"full-steps"``: clusters are found anew after every full step, in what leaves the last
            double block. ``"once-first-block"``: once a run, at its first skipped step, in what enters the
            first double block.
        iterations: of k-means, at most.
        seed: of the draws. Every run begins anew with it, and no other random number is touched.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range.
    """

    clusters: int = 16
    rho: float = 0.005
    variant: str = "exact"
    kappa: float = 0.5
    labels: str = "full-steps"
    iterations: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("ClusCa.clusters", self.clusters, 0)
        check_whole("ClusCa.iterations", self.iterations, 1)
        check_whole("ClusCa.seed", self.seed, 0, 2**63 - 1)
        check_positive("ClusCa.rho", self.rho, zero=True)
        check_positive("ClusCa.kappa", self.kappa, zero=True)
        if self.rho > 1:
            raise ValueError(f"ClusCa.rho: expected a number from 0 to 1, got {self.rho!r}")
        for name, known in (("variant", VARIANTS), ("labels", LABELS)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"ClusCa.{name}: expected one of {', '.join(known)}, got {value!r}")

    @property
    def correctors(self) -> str | None:
        """What :mod:`hicache.fast` corrects skipped steps by, see :mod:`hicache.runtime.corrector`."""
        return "hicache.companions.clusca.corrector:ClusterCorrectors" if self.clusters else None

    @property
    def draws_in_blocks(self) -> bool:
        """Whether tokens are drawn anew in every block, and not once a step."""
        return self.variant == "upstream"
