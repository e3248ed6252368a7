"""A pipeline of one's own with a ControlNet: what diffusers' do, with a say in all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.support import models, pipelines
from tests.support.models import Arguments, flux_call
from tests.support.schedulers import flow_matching

RESIDUALS = ("controlnet_block_samples", "controlnet_single_block_samples")


class ControlLoop:
    """FLUX after a ControlNet, step by step.

    Args:
        transformer: FLUX.
        controlnet: its own.
        between: what is done with the residuals before the transformer is given them.
        second_from: the step from which on the transformer is called a second time, with another prompt.
        scale: of the ControlNet, by step.
    """

    def __init__(
        self,
        transformer: Any,
        controlnet: Any,
        between: Callable[[int, Any], Any] = lambda step, residuals: residuals,
        second_from: int = 1000,
        scale: Callable[[int], float] = lambda step: 0.7,
    ) -> None:
        self.transformer = transformer
        self.controlnet = controlnet
        self.scheduler = flow_matching()
        self.between = between
        self.second_from = second_from
        self.scale = scale
        self.call, self.hint = flux_call(models.noise(1, 16, 4), torch.tensor([0.5])), models.noise(1, 16, 4)
        self.outputs: list[list[Tensor]] = []  # of the transformer, by step

    @classmethod
    def build(cls, **more: Any) -> ControlLoop:
        """With weights that make every gate count."""
        pipe, _ = pipelines.build_randomized("flux_controlnet")
        return cls(pipe.transformer, pipe.controlnet, **more)

    def residuals(self, now: Arguments, step: int) -> Any:
        """What the ControlNet gives for these latents and this timestep."""
        return self.controlnet(
            **{**self.call, **now}, controlnet_cond=self.hint, conditioning_scale=self.scale(step)
        )

    def __call__(self, steps: int = 12) -> Tensor:
        return self.run(steps)

    @torch.no_grad()
    def run(self, steps: int = 12) -> Tensor:
        """The same as a function of one's own: not what a pipeline is known by."""
        torch.manual_seed(0)
        self.outputs = []
        self.scheduler.set_timesteps(steps)
        latents = models.noise(1, 16, 4)
        calls = [self.call, {**self.call, "encoder_hidden_states": self.call["encoder_hidden_states"] * 0.3}]
        for step, timestep in enumerate(self.scheduler.timesteps):
            now = {"hidden_states": latents, "timestep": timestep.expand(1) / 1000}
            residuals = self.between(step, self.residuals(now, step))
            self.outputs.append([])
            for call in calls[: 1 + (step >= self.second_from)]:
                more = dict(zip(RESIDUALS, residuals, strict=True))
                output = self.transformer(**{**call, **now}, **more)[0]
                self.outputs[-1].append(output)
            latents = self.scheduler.step(self.outputs[-1][0], timestep, latents, return_dict=False)[0]
        return latents
