"""The bundled model's sibling: pictures of shapes at four times the size, by a small FLUX transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Final

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch.nn import functional

from hicache.demo import packing
from hicache.demo.pipeline import ShapesPipeline

SCALE: Final = 4
TILE: Final = packing.PICTURE_SIZE  # pixels a side of what one call of the transformer draws
WORD: Final = 1  # numbers in the one word that the transformer is given, which is always zero


def shrink(pictures: torch.Tensor) -> torch.Tensor:
    """``[batch, 3, height, width]`` → a quarter of both sides: the mean of every 4 × 4 pixels."""
    return functional.avg_pool2d(pictures, SCALE)


def enlarge(small: torch.Tensor) -> torch.Tensor:
    """``[batch, 3, height, width]`` → four times both sides, bicubic: what the transformer starts from."""
    return functional.interpolate(small, scale_factor=SCALE, mode="bicubic", align_corners=False)


def constants(batch: int, like: torch.Tensor) -> dict[str, Any]:
    """What all calls of the transformer have in common, on the device and in the dtype of ``like``."""
    return {
        "encoder_hidden_states": like.new_zeros(batch, 1, WORD),
        "pooled_projections": like.new_zeros(batch, WORD),
        "img_ids": packing.position_ids(TILE, TILE).to(like),
        "txt_ids": like.new_zeros(1, 3),
        "return_dict": False,
    }


class ShapesUpscaler(DiffusionPipeline):
    """Super-resolution by 4 of pictures of any size, tile by tile.

    :func:`hicache.demo.load_upscaler` gives the bundled one. Every tile of 32 × 32 pixels is a call of the
    transformer in every step, as in tiled pipelines for large pictures; tiles do not overlap.

    Args:
        transformer: a FLUX transformer for twice :data:`hicache.demo.packing.CHANNELS` channels a token.
        scheduler: any flow-matching scheduler.
    """

    model_cpu_offload_seq = "transformer"
    vae_scale_factor: ClassVar[int] = ShapesPipeline.vae_scale_factor
    default_sample_size: ClassVar[int] = ShapesPipeline.default_sample_size

    def __init__(
        self, transformer: FluxTransformer2DModel, scheduler: FlowMatchEulerDiscreteScheduler
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        image: Image.Image | Sequence[Image.Image] | torch.Tensor,
        num_inference_steps: int = 28,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Enlarge pictures: an ``ImagePipelineOutput`` with ``images``, or a tuple of them.

        Args:
            image: one picture or several of one size, or a tensor ``[pictures, 3, height, width]`` in [0, 1];
                sides are multiples of 8 pixels.
            num_inference_steps: denoising steps.
            generator: of the starting noise; a list gives each picture its own.
            output_type: ``"pil"``, ``"np"`` (``[pictures, 4 height, 4 width, 3]`` in [0, 1]) or ``"pt"``.
            return_dict: False gives a tuple.

        Raises:
            ValueError: no picture, pictures of several sizes, sides that are no multiples of 8, or an unknown
                output type.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type: expected pil, np or pt, got {output_type!r}")
        device, dtype = self._execution_device, self.transformer.dtype
        large = enlarge(_tensor(image) * 2 - 1).to(device, dtype)
        noise = randn_tensor(large.shape, generator=generator, device=device, dtype=dtype)
        given, latents = _tiles(large), _tiles(noise)  # lists of tokens, tile by tile
        fixed = constants(len(large), large)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            time = (timestep / self.scheduler.config.num_train_timesteps).to(dtype).expand(len(large))
            velocity = [
                self.transformer(hidden_states=torch.cat(tile, dim=-1), timestep=time, **fixed)[0]
                for tile in zip(latents, given, strict=True)
            ]
            moved = self.scheduler.step(
                torch.stack(velocity), timestep, torch.stack(latents), return_dict=False
            )
            latents = list(moved[0])

        images = ShapesPipeline.finish(_join(latents, *large.shape[-2:]), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _tensor(image: Any) -> torch.Tensor:
    """Pictures as ``[pictures, 3, height, width]`` in [0, 1], checked."""
    if not isinstance(image, torch.Tensor):
        given = [image] if isinstance(image, Image.Image) else list(image)
        if not given or len({picture.size for picture in given}) > 1:
            sizes = ", ".join(f"{w} x {h}" for w, h in sorted({picture.size for picture in given}))
            raise ValueError(f"image: expected one or more pictures of one size, got {sizes or 'none'}")
        image = torch.stack(
            [
                torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)
                for picture in given
            ]
        ).movedim(-1, 1)
    side = TILE // SCALE
    if image.ndim != 4 or image.shape[1] != 3 or image.shape[2] % side or image.shape[3] % side:
        raise ValueError(
            f"image: expected pictures with 3 channels and sides that are multiples of {side} pixels, got "
            f"{tuple(image.shape)} as [pictures, channels, height, width]"
        )
    pictures: torch.Tensor = image.float()
    return pictures


def _tiles(pictures: torch.Tensor) -> list[torch.Tensor]:
    """``[batch, 3, height, width]`` → tokens ``[batch, 64, 48]`` of each tile, row by row."""
    rows = pictures.split(TILE, dim=2)
    return [packing.pack(tile) for row in rows for tile in row.split(TILE, dim=3)]


def _join(tiles: list[torch.Tensor], height: int, width: int) -> torch.Tensor:
    """The inverse of :func:`_tiles`."""
    pictures = [packing.unpack(tile, TILE, TILE) for tile in tiles]
    across = width // TILE
    rows = [torch.cat(pictures[i : i + across], dim=3) for i in range(0, len(pictures), across)]
    return torch.cat(rows, dim=2)
