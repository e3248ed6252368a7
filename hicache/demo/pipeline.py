"""The pipeline of the bundled model: prompts such as ``"a red ring on blue"`` to 32×32 pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from hicache.demo import packing, pictures


class ShapesPipeline(DiffusionPipeline):
    """Text to picture with a small FLUX transformer that works on pixels, with classifier-free guidance.

    ``ShapesPipeline.from_pretrained(hicache.demo.MODEL)`` or :func:`hicache.demo.load` gives the bundled one.

    Args:
        transformer: a FLUX transformer for :data:`hicache.demo.packing.CHANNELS` channels a token.
        scheduler: any flow-matching scheduler.
    """

    model_cpu_offload_seq = "transformer"
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]
    # as if an autoencoder came before the patches of 2 x 2 that FLUX has: what plan() reckons with
    vae_scale_factor: ClassVar[int] = packing.PATCH // 2
    default_sample_size: ClassVar[int] = packing.PICTURE_SIZE // vae_scale_factor
    guided_in_one_batch: ClassVar[bool] = True

    def __init__(
        self, transformer: FluxTransformer2DModel, scheduler: FlowMatchEulerDiscreteScheduler
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self._interrupt = False
        self._guidance_scale = 1.0
        self._num_timesteps = 0

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set ``_interrupt`` to True in a callback to leave out the steps that remain, as in diffusers."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any]]
        | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Draw pictures: an ``ImagePipelineOutput`` with ``images``, or a tuple of them.

        Args:
            prompt: one prompt or several, of the form :func:`hicache.demo.pictures.parse` reads.
            num_inference_steps: denoising steps.
            guidance_scale: weight of classifier-free guidance; 1 and below run without it, at half the cost.
            num_images_per_prompt: pictures of each prompt.
            generator: of the starting noise; a list gives each picture its own.
            latents: the starting noise itself, ``[pictures, 64, 48]``.
            output_type: ``"pil"``, ``"np"`` (``[pictures, 32, 32, 3]`` in [0, 1]), ``"pt"`` (``[pictures, 3,
                32, 32]`` in [0, 1]) or ``"latent"`` (tokens ``[pictures, 64, 48]``).
            return_dict: False gives a tuple.
            callback_on_step_end: called as ``callback(pipe, step, timestep, {"latents": …})`` after each
                step; may return other latents.
            callback_on_step_end_tensor_inputs: tensors the callback asks for; ``"latents"`` is there.

        Raises:
            ValueError: a prompt that cannot be read, an unknown output type or tensor, or latents of another
                shape.
        """
        captions = [pictures.parse(text) for text in ([prompt] if isinstance(prompt, str) else prompt)]
        captions = [caption for caption in captions for _ in range(num_images_per_prompt)]
        if not captions:
            raise ValueError("prompt: expected at least one prompt, got none")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type: expected pil, np, pt or latent, got {output_type!r}")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs: expected only {self._callback_tensor_inputs}, got "
                f"{unknown}"
            )
        device, dtype = self._execution_device, self.transformer.dtype
        side = packing.PICTURE_SIZE
        shape = (len(captions), (side // packing.PATCH) ** 2, packing.CHANNELS)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents: expected shape {shape}, got {tuple(latents.shape)}")
        latents = latents.to(device, dtype)

        self._interrupt = False
        self._guidance_scale = guidance_scale
        guided = guidance_scale > 1.0
        # the unconditional half first, in one batch, as Stable Diffusion 3 does
        words = pictures.encode([pictures.Caption()] * len(captions) + captions if guided else captions)
        words = words.to(device, dtype)  # [B, slots, vocabulary]
        pooled = words.sum(1)
        img_ids = packing.position_ids(side, side).to(device, dtype)
        txt_ids = torch.zeros(pictures.NUM_SLOTS, 3, device=device, dtype=dtype)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=len(timesteps)) as bar:
            for step, timestep in enumerate(timesteps):
                if self._interrupt:
                    continue
                inputs = torch.cat([latents, latents]) if guided else latents
                velocity = self.transformer(
                    hidden_states=inputs,
                    encoder_hidden_states=words,
                    pooled_projections=pooled,
                    timestep=(timestep / self.scheduler.config.num_train_timesteps)
                    .to(dtype)
                    .expand(len(inputs)),
                    img_ids=img_ids,
                    txt_ids=txt_ids,
                    return_dict=False,
                )[0]
                if guided:
                    without, with_caption = velocity.chunk(2)
                    velocity = torch.lerp(without, with_caption, guidance_scale)
                latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    asked = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                    latents = (callback_on_step_end(self, step, timestep, asked) or {}).pop(
                        "latents", latents
                    )
                bar.update()

        images = latents if output_type == "latent" else self.decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @staticmethod
    def decode(latents: torch.Tensor, output_type: str = "pil") -> Any:
        """Tokens ``[pictures, 64, 48]`` to pictures: ``"pil"``, ``"np"`` or ``"pt"``."""
        pixels = packing.unpack(latents.float(), packing.PICTURE_SIZE, packing.PICTURE_SIZE)
        return ShapesPipeline.finish(pixels, output_type)

    @staticmethod
    def finish(pixels: torch.Tensor, output_type: str) -> Any:
        """``[pictures, 3, height, width]`` in [−1, 1] to pictures: ``"pil"``, ``"np"`` or ``"pt"``."""
        pixels = (pixels.float() / 2 + 0.5).clamp(0, 1).cpu()
        if output_type == "pt":
            return pixels
        array = pixels.permute(0, 2, 3, 1).numpy()
        if output_type == "np":
            return array
        return [Image.fromarray((picture * 255).round().astype("uint8")) for picture in array]
