"""Plans of calls of which only what they return is looked at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hicache.runtime.context import BegunCall
from hicache.runtime.output_recorder import OutputRecorder, Returned
from hicache.runtime.planner import CallPlanner


class OutputPlanner(CallPlanner):
    """The planner of a denoiser that is cached by output: nothing inside is learned or checked."""

    def wanted(self, model_kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        # return_dict, and whatever else chooses what is returned
        return tuple((name, value) for name, value in model_kwargs.items() if isinstance(value, bool))

    def begin_full(self, begun: BegunCall) -> None:
        self._hooked.call.plan = self._recorder.plan_full(begun)

    def begin_skipped(self, begun: BegunCall) -> None:
        history = begun.context.engine.history
        assert history is not None
        with self._session.watch.measure(history.orders.device), torch.no_grad():
            self._hooked.call.left_out = self._recorder.plan_output(begun)

    def commit(self, begun: BegunCall, output: Any) -> None:
        context = begun.context
        if self._hooked.call.left_out is not None:
            context.skipped_steps += 1
            return
        context.count_full()
        try:
            returned, tensors = Returned.of(output)
        except ValueError as error:
            self._choice.warn(f"{error}: this call runs uncached")
            context.distrust()
            return
        with self._session.watch.measure(tensors[0].device), torch.no_grad():
            self._recorder.record(begun, returned, tensors)

    @property
    def _recorder(self) -> OutputRecorder:
        recorder = self._choice.recorder
        assert isinstance(recorder, OutputRecorder)
        return recorder
