"""Whether the timesteps of a context are its scheduler's: asked of the device, and heard when it is there."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hicache.hooks.timesteps import Rule
from hicache.runtime.reading import reading


class TimestepCheck:
    """By which rule a run's timesteps come out of its scheduler's. Never waits for a CUDA device.

    Rules that fit the run's first call are told by its clock. The likeliest is taken to hold until the device
    says otherwise: full steps ask about themselves, before their blocks, and about the skipped ones before
    them. Timesteps of low precision may be the same at neighbouring steps, and several rules fit at first.
    """

    def __init__(self) -> None:
        self._rules: dict[int, Tensor] | None = None  # the run's timesteps by each that may hold
        self._taken: Tensor | None = None  # those that something was computed for
        self._by_step: Sequence[Tensor] = ()  # the same, a view a step
        self._off: list[Tensor] = []  # where timesteps are others than what is used was computed for
        self._last: int | None = None  # the last step that used such
        # which rules a question is about, and its answer: whether each does not hold, and the above
        self._asked: deque[tuple[tuple[int, ...], Callable[[], Any]]] = deque()

    @property
    def timesteps(self) -> Tensor | None:
        """``[steps]``, the run's from step 0 on, as far as is known; None: they are not its scheduler's."""
        return next(iter((self._rules or {}).values()), None)

    def ask(self, rules: Sequence[Rule], step: int, timestep: Any, ahead: bool) -> None:
        """A full step begins.

        Args:
            rules: that fit the run's first call.
            step: of the run.
            timestep: what the model is called with.
            ahead: whether something of it was computed ahead.
        """
        if not isinstance(timestep, Tensor) or timestep.ndim > 1:
            return
        if self._rules is None:
            self._rules = {index: rule.timesteps(timestep) for index, rule in enumerate(rules)}
        if ahead:
            self.used(step, timestep)
        # a scheduler has no timesteps past its last
        self._rules = {index: known for index, known in self._rules.items() if step < len(known)}
        flags = [(timestep != known[step]).any() for known in self._rules.values()]
        if self._off:
            flags.append(torch.cat([off.reshape(-1) for off in self._off]).any())
        if flags:
            self._asked.append((tuple(self._rules), reading(torch.stack(flags))))
        self._off = []

    def used(self, step: int, timestep: Tensor) -> None:
        """What was computed ahead serves a step: the next full one asks whether it is of its timestep."""
        if step == self._last:
            return
        self._last = step
        expected = self.timesteps
        assert expected is not None
        if expected is not self._taken:
            self._taken, self._by_step = expected, expected.unbind()
        self._off.append(timestep != self._by_step[step])  # all that a skipped step launches for it

    def hear(self) -> bool:
        """Take in what the device has answered; whether what is computed so far is of other timesteps."""
        if not self._asked:
            return False
        before, wrong = self.timesteps, False
        while self._asked and (answer := self._asked[0][1]()) is not None:
            rules, _ = self._asked.popleft()
            for index, off in zip(rules, answer, strict=False):
                if off and self._rules is not None:
                    self._rules.pop(index, None)
            wrong = wrong or answer[len(rules) :] == [True]
        if wrong:
            warnings.warn(
                "hicache: the transformer was called with timesteps that are not the scheduler's: gates and "
                "embeddings of the last skipped steps were computed for others; from here on none are "
                "computed ahead",
                RuntimeWarning,
                stacklevel=2,
            )
            self._rules = {}
            self._asked.clear()
        return self.timesteps is not before
