"""Transformers with random weights, and the denoising loop that calls them as their pipelines do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

PICTURE = {"height": 1024, "width": 1024}
HD = {"height": 720, "width": 1280}
SD35_MEDIUM = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
SD35_LARGE = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
_GUIDANCE = 4.0


@dataclass(frozen=True)
class Model:
    """A transformer and what it draws.

    Args:
        name: for people.
        kind: its class in diffusers.
        changes: what differs from the class's defaults.
        drawn: ``height`` and ``width`` in pixels, ``num_frames`` of a video.
        text: tokens of the prompt.
    """

    name: str
    kind: str
    changes: Mapping[str, Any]
    drawn: Mapping[str, Any]
    text: int

    @property
    def size(self) -> str:
        """Say what is drawn: ``1280x720x81``."""
        frames = self.drawn.get("num_frames")
        return f"{self.drawn['width']}x{self.drawn['height']}" + (f"x{frames}" if frames else "")


@dataclass
class Inputs:
    """What a loop begins with.

    Args:
        latents: ``[1, ...]``, as the transformer takes them.
        calls: of one step: the transformer's arguments besides latents and timestep. Two: conditional and
            unconditional.
        samples: copies of the latents in a call; two where both halves of the guidance share it.
        thousandths: the transformer's timestep is a thousandth of the scheduler's, in the latents' dtype.
    """

    latents: Tensor
    calls: list[dict[str, Any]]
    samples: int = 1
    thousandths: bool = False


# Wan 2.1's; its 14B is the class's default
_WAN_1B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_SMALL = {"attention_head_dim": 64, "num_attention_heads": 4, "joint_attention_dim": 512}
_SMALL_ROPE = {"axes_dims_rope": (8, 28, 28)}
_SMALL_PICTURE = {"height": 256, "width": 256}

# device → name on the command line → model, in the order in which they are timed
MODELS: dict[str, dict[str, Model]] = {
    "cuda": {
        "flux": Model("FLUX.1-dev", "FluxTransformer2DModel", {"guidance_embeds": True}, PICTURE, 512),
        "sd3": Model("SD3.5-medium", "SD3Transformer2DModel", SD35_MEDIUM, PICTURE, 333),
        "qwen": Model("Qwen-Image", "QwenImageTransformer2DModel", {}, PICTURE, 256),
        "wan-1.3b": Model(
            "Wan 2.1 1.3B",
            "WanTransformer3DModel",
            _WAN_1B,
            {"height": 480, "width": 832, "num_frames": 81},
            512,
        ),
        "wan-14b": Model("Wan 2.1 14B", "WanTransformer3DModel", {}, {**HD, "num_frames": 81}, 512),
    },
    "cpu": {
        "flux": Model(
            "FLUX.1, small",
            "FluxTransformer2DModel",
            {**_SMALL, **_SMALL_ROPE, "num_layers": 4, "num_single_layers": 8, "guidance_embeds": True},
            _SMALL_PICTURE,
            32,
        ),
        "sd3": Model(
            "SD3.5, small",
            "SD3Transformer2DModel",
            {
                **SD35_MEDIUM,
                **_SMALL,
                "num_layers": 6,
                "caption_projection_dim": 256,
                "dual_attention_layers": (0, 1, 2),
            },
            _SMALL_PICTURE,
            32,
        ),
        "qwen": Model(
            "Qwen-Image, small",
            "QwenImageTransformer2DModel",
            {**_SMALL, **_SMALL_ROPE, "num_layers": 6},
            _SMALL_PICTURE,
            32,
        ),
        "wan": Model(
            "Wan 2.1, small",
            "WanTransformer3DModel",
            {
                "attention_head_dim": 64,
                "num_attention_heads": 4,
                "ffn_dim": 1024,
                "num_layers": 6,
                "text_dim": 512,
            },
            {"height": 160, "width": 160, "num_frames": 9},
            32,
        ),
    },
}


def build(model: Model, device: str, dtype: torch.dtype) -> Any:
    """Make the transformer with random weights where it will run: no copy of it anywhere else.

    The layers' own initialisation shrinks what goes through them, so that activations stay finite whatever
    the depth. Weights that ``from_pretrained`` leaves in fp32 are in fp32.
    """
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            transformer = getattr(diffusers, model.kind)(**model.changes)
    finally:
        torch.set_default_dtype(usual)
    in_fp32 = set(transformer._keep_in_fp32_modules or ())
    for name, parameter in transformer.named_parameters():
        if in_fp32.intersection(name.split(".")):
            parameter.data = parameter.data.float()
    return transformer.eval().requires_grad_(False)


def random_inputs(model: Model, transformer: Any, device: str, dtype: torch.dtype) -> Inputs:
    """Draw noise and embeddings of the shapes and dtypes that the model's pipeline gives it."""
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    return _INPUTS[model.kind](model, transformer.config, draw)


Draw = Callable[..., Tensor]


def _flux(model: Model, config: Any, draw: Draw) -> Inputs:
    height, width = model.drawn["height"] // 16, model.drawn["width"] // 16
    latents = draw(1, height * width, config.in_channels)
    ids = latents.new_zeros(height, width, 3)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)
    call = {
        "encoder_hidden_states": draw(1, model.text, config.joint_attention_dim),
        "pooled_projections": draw(1, config.pooled_projection_dim),
        "guidance": torch.full([1], 3.5, device=latents.device),
        "txt_ids": latents.new_zeros(model.text, 3),
        "img_ids": ids.flatten(0, 1),
    }
    return Inputs(latents, [call], thousandths=True)


def _sd3(model: Model, config: Any, draw: Draw) -> Inputs:
    height, width = model.drawn["height"] // 8, model.drawn["width"] // 8
    call = {
        "encoder_hidden_states": draw(2, model.text, config.joint_attention_dim),
        "pooled_projections": draw(2, config.pooled_projection_dim),
    }
    return Inputs(draw(1, config.in_channels, height, width), [call], samples=2)


def _qwen(model: Model, config: Any, draw: Draw) -> Inputs:
    height, width = model.drawn["height"] // 16, model.drawn["width"] // 16
    calls = [
        {
            "encoder_hidden_states": draw(1, model.text, config.joint_attention_dim),
            "encoder_hidden_states_mask": None,  # as the pipeline does where no token is padding
            "img_shapes": [[(1, height, width)]],
        }
        for _ in range(2)
    ]
    return Inputs(draw(1, height * width, config.in_channels), calls, thousandths=True)


def _wan(model: Model, config: Any, draw: Draw) -> Inputs:
    frames = (model.drawn["num_frames"] - 1) // 4 + 1
    height, width = model.drawn["height"] // 8, model.drawn["width"] // 8
    calls = [{"encoder_hidden_states": draw(1, model.text, config.text_dim)} for _ in range(2)]
    return Inputs(draw(1, config.in_channels, frames, height, width), calls)


_INPUTS: dict[str, Callable[[Model, Any, Draw], Inputs]] = {
    "FluxTransformer2DModel": _flux,
    "SD3Transformer2DModel": _sd3,
    "QwenImageTransformer2DModel": _qwen,
    "WanTransformer3DModel": _wan,
}


def denoise(
    transformer: Any,
    inputs: Inputs,
    scheduler: Any,
    steps: int,
    stop: int | None = None,
    mark: Callable[[], None] | None = None,
) -> Tensor:
    """Run the loop of a pipeline, without its text encoders and its autoencoder.

    Args:
        transformer: the model, or one that is cached.
        inputs: :func:`random_inputs`.
        scheduler: a ``FlowMatchEulerDiscreteScheduler``.
        steps: of the run.
        stop: leave after so many of them.
        mark: called before the first step and after each.

    Returns:
        Tensor: the latents after the last step taken.
    """
    latents = inputs.latents
    scheduler.set_timesteps(steps, device=latents.device)
    scheduler.set_begin_index(0)
    if mark:
        mark()
    for now in scheduler.timesteps[:stop]:
        given = torch.cat([latents] * inputs.samples) if inputs.samples > 1 else latents
        timestep = now.expand(inputs.samples)
        if inputs.thousandths:
            timestep = timestep.to(latents.dtype) / 1000
        outputs = [
            transformer(hidden_states=given, timestep=timestep, return_dict=False, **call)[0]
            for call in inputs.calls
        ]
        parts = outputs[0].chunk(inputs.samples) if len(outputs) == 1 else outputs
        noise = parts[0]
        if len(parts) == 2:  # classifier-free guidance
            noise = parts[1] + _GUIDANCE * (parts[0] - parts[1])
        latents = scheduler.step(noise, now, latents, return_dict=False)[0]
        if mark:
            mark()
    return latents
