"""The bundled model's sibling: super-resolution of the shapes, whole and by tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

import hicache.demo
import hicache.fast
from hicache import HiCacheConfig
from hicache.demo import pictures, upscaler
from hicache.demo.upscaler import enlarge, shrink

STEPS = 12


@pytest.fixture(scope="module")
def pipe() -> upscaler.ShapesUpscaler:
    made = hicache.demo.load_upscaler(torch_dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    return made


def shapes(count: int, size: int = upscaler.TILE) -> torch.Tensor:
    """Pictures in [0, 1] that it was not trained on."""
    return pictures.sample(count, torch.Generator().manual_seed(77), size)[1] / 2 + 0.5


def draw(pipe: upscaler.ShapesUpscaler, small: torch.Tensor, steps: int = STEPS) -> np.ndarray:
    noise = [torch.Generator().manual_seed(index) for index in range(len(small))]
    return pipe(small, steps, generator=noise, output_type="np").images


def near(drawn: np.ndarray, wanted: np.ndarray) -> float:
    """PSNR in dB, of all pictures together."""
    return peak_signal_noise_ratio(wanted, drawn, data_range=1.0)


def test_it_is_small(pipe):
    assert sum(p.numel() for p in pipe.transformer.parameters()) <= 6_000_000
    assert sum(file.stat().st_size for file in hicache.demo.UPSCALER.rglob("*") if file.is_file()) <= 12e6


@pytest.mark.parametrize("size", [32, 64])
def test_it_draws_more_of_the_truth_than_bicubic_interpolation_does(pipe, size):
    truth = shapes(8, size)
    wanted = truth.permute(0, 2, 3, 1).numpy()
    bicubic = enlarge(shrink(truth)).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert near(draw(pipe, shrink(truth)), wanted) > near(bicubic, wanted) + 1


def test_a_picture_of_four_tiles_is_each_tile_alone(pipe):
    """But that bicubic interpolation looks over their borders."""
    small = shrink(shapes(1, 64))
    [whole] = upscaler._join(upscaler._tiles(enlarge(small)), 64, 64)
    torch.testing.assert_close(whole, enlarge(small)[0], rtol=0, atol=0)
    assert draw(pipe, small).shape == (1, 64, 64, 3)


def test_pictures_of_any_kind_and_shape_of_result(pipe):
    small = shrink(shapes(2))
    array = (small.permute(0, 2, 3, 1).numpy() * 255).round().astype("uint8")
    images = [Image.fromarray(one) for one in array]
    drawn = pipe(images, 4, generator=torch.Generator().manual_seed(0))
    assert [image.size for image in drawn.images] == [(32, 32)] * 2
    [alone] = pipe(
        images[0].convert("RGBA"), 4, generator=torch.Generator().manual_seed(0), return_dict=False
    )
    assert alone[0].size == (32, 32)
    wide = pipe(torch.rand(1, 3, 8, 24), 2, output_type="pt").images
    assert wide.shape == (1, 3, 32, 96)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([], "expected one or more pictures of one size, got none"),
        (
            [Image.new("RGB", (8, 8)), Image.new("RGB", (16, 8))],
            r"of one size, got 16 x 8, 8 x 8|8 x 8, 16 x 8",
        ),
        (torch.zeros(1, 3, 8, 12), r"multiples of 8 pixels, got \(1, 3, 8, 12\)"),
        (torch.zeros(3, 8, 8), r"got \(3, 8, 8\) as"),
    ],
)
def test_bad_pictures_are_named(pipe, image, message):
    with pytest.raises(ValueError, match=message):
        pipe(image)
    with pytest.raises(ValueError, match=r"expected pil, np or pt, got 'latent'"):
        pipe(torch.zeros(1, 3, 8, 8), output_type="latent")


@pytest.mark.few(1)
@pytest.mark.parametrize("granularity", ["module", "stack", "output"])
def test_cached_tiles(pipe, granularity):
    small = shrink(shapes(2, 64))
    full = draw(pipe, small)
    with hicache.fast.apply(pipe, HiCacheConfig(interval=1), granularity=granularity):
        np.testing.assert_array_equal(draw(pipe, small), full)
    with hicache.fast.apply(pipe, HiCacheConfig(interval=3), granularity=granularity) as handle:
        assert near(draw(pipe, small), full) > 30
        contexts = handle.stats.contexts.values()
        assert [(context.full_steps, context.skipped_steps) for context in contexts] == [(6, 6)] * 4
