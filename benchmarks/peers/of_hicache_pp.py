"""hicache-pp: forecasts of the velocity, for a loop of one's own.

It forecasts what classifier-free guidance has made of the transformer's two halves. So the transformer is
wrapped: at full steps it runs and the guided velocity is recorded, at skipped ones both halves are the
forecast, of which guidance makes the forecast again.
"""

from __future__ import annotations

from typing import Any, Final

import torch

from benchmarks.peers.method import WARMUP, Apply, Method
from hicache.demo.pipeline import ShapesPipeline

PACKAGE: Final = "hicache-pp"

_FORECASTS: Final = {
    "hermite": "hicache_forecast",
    "dmd": "dmd_forecast_state",
    "auto": "auto_forecast_state",
}


def forecast(backend: str, **settings: Any) -> Apply:
    """Cache with one of its backends; a state a run."""

    def apply(pipe: ShapesPipeline, setting: float, steps: int) -> None:
        import hicache_pp

        inner = pipe.transformer.forward
        state: dict[str, Any] = {"step": steps}

        def forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
            nonlocal state
            if state["step"] == steps:
                state = hicache_pp.hicache_init(
                    steps, interval=int(setting), first_enhance=WARMUP, backend=backend, **settings
                )
            if hicache_pp.hicache_decide(state) == "forecast":
                velocity = getattr(hicache_pp, _FORECASTS[backend])(state)
                halves = torch.cat([velocity, velocity])
            else:
                [halves] = inner(*args, **kwargs)
                without, guided = halves.chunk(2)
                velocity = torch.lerp(without, guided, pipe.guidance_scale)
                hicache_pp.hicache_update_derivatives(state, velocity)
                hicache_pp.dmd_update_snapshots(state, velocity, state["history"])
            state["step"] += 1
            return (halves,)

        pipe.transformer.forward = forward

    return apply


METHODS: Final = (
    Method("hicache-pp Hermite O=1", PACKAGE, forecast("hermite", max_order=1), default=True),
    Method("hicache-pp Hermite O=2", PACKAGE, forecast("hermite", max_order=2)),
    Method("hicache-pp DMD", PACKAGE, forecast("dmd", history=6), looks=True),
    Method("hicache-pp auto", PACKAGE, forecast("auto", history=6), looks=True),
)
