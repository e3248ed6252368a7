"""Compares on a Ray cluster: each worker draws batches in full and by every variant, and times them itself.

So a speed-up is of two runs on one machine, whoever made them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from hicache.compare.desk import Desk
from hicache.compare.origin import Origin
from hicache.compare.request import Request
from hicache.compare.run import Comparison
from hicache.fitting.pictures import Pictures
from hicache.launch.actors import Actors
from hicache.launch.hiring import Team
from hicache.launch.loading import Place, pipeline


class _Remote:
    """A process of a cluster that compares; it loads the model when it is first asked."""

    def __init__(self, asked: Request, place: Place) -> None:
        self._load = partial(Desk, asked, partial(pipeline, place=place))
        self._desk: Desk | None = None

    def _loaded(self) -> Desk:
        self._desk = self._desk or self._load()
        return self._desk

    def origin(self) -> Origin:
        """Where the numbers come from."""
        return self._loaded().origin()

    def compare(self, pictures: Pictures) -> Comparison:
        """One batch."""
        return self._loaded().compare(pictures)


def compare(asked: Request, team: Team, on_batch: Callable[[int, int], None]) -> tuple[Comparison, Origin]:
    """Draw, time and judge by a team.

    A worker that is lost is started again, and its batch with it.

    Args:
        asked: what is compared.
        team: who does it.
        on_batch: called after every batch, with how many are done and how many there are.

    Raises:
        TypeError, ValueError: what was asked for cannot be.
        RuntimeError: no Ray, no cluster, or a variant failed; the message names it.
    """
    actors = Actors(team.staff, team.cards, _Remote, (asked,), retries=-1)
    try:
        from ray.util import ActorPool

        origin = actors.ray.get(actors.all[0].origin.remote())
        parts = [asked.pictures.part(batch) for batch in asked.pictures.batches()]
        on_batch(0, len(parts))
        found: Comparison | None = None
        drawn = ActorPool(actors.all).map(lambda actor, part: actor.compare.remote(part), parts)
        for done, one in enumerate(drawn, start=1):
            if found is None:
                found = one
            else:
                found.add(one)
            on_batch(done, len(parts))
        assert found is not None
        return found, origin
    except actors.ray.exceptions.RayTaskError as error:  # of our own code: the same for every picture
        raise error.cause from None
    finally:
        actors.close()
