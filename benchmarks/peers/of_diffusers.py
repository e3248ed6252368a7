"""The caches that diffusers has itself: ``transformer.enable_cache(config)``.

Their state is by ``cache_context``, which a pipeline enters around each call of its transformer. The bundled
model's pipeline does not, so its transformer does.
"""

from __future__ import annotations

import ast
import contextlib
import io
from collections.abc import Callable
from typing import Any, Final

import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from torch import Tensor

from benchmarks.peers.method import WARMUP, Apply, Method
from hicache.demo import packing
from hicache.demo.pipeline import ShapesPipeline
from hicache.demo.prompts import PROMPTS

PACKAGE: Final = "diffusers"

# setting, steps, pipeline → the configuration for enable_cache
Configure = Callable[[float, int, ShapesPipeline], Any]


def cached(configure: Configure) -> Apply:
    """Return what enables a cache and gives each call its context: step, σ and number of steps."""

    def apply(pipe: ShapesPipeline, setting: float, steps: int) -> None:
        transformer = pipe.transformer
        transformer.enable_cache(configure(setting, steps, pipe))
        inner, calls = transformer.forward, 0

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            step = calls % steps
            calls += 1
            sigma = float(pipe.scheduler.sigmas[step])
            with transformer.cache_context("cond", step_index=step, sigma=sigma, num_inference_steps=steps):
                return inner(*args, **kwargs)

        transformer.forward = forward

    return apply


def taylorseer(**settings: Any) -> Apply:
    """TaylorSeer, with the first steps full as they are everywhere here."""
    return cached(
        lambda interval, steps, pipe: TaylorSeerCacheConfig(
            cache_interval=int(interval), disable_cache_before_step=WARMUP, **settings
        )
    )


def magnitude_ratios(pipe: ShapesPipeline, steps: int) -> list[float]:
    """Calibrate MagCache: its configuration prints what a run found, for its user to copy.

    On the first prompt of ``hicache demo``, which nothing is judged on.
    """
    pipe.transformer.enable_cache(MagCacheConfig(num_inference_steps=steps, calibrate=True))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        generator = torch.Generator().manual_seed(0)
        pipe(PROMPTS[0], steps, generator=generator, output_type="latent")
    pipe.transformer.disable_cache()
    [line] = [line for line in printed.getvalue().splitlines() if line.startswith("[1.0")]
    ratios: list[float] = ast.literal_eval(line)
    return ratios


def _flux_ratios(pipe: ShapesPipeline, steps: int) -> Any:
    from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

    return FLUX_MAG_RATIOS


def magcache(ratios: Callable[[ShapesPipeline, int], Any], **settings: Any) -> Apply:
    """MagCache, with ratios of FLUX.1-dev or of the model itself."""
    return cached(
        lambda threshold, steps, pipe: MagCacheConfig(
            threshold=threshold, num_inference_steps=steps, mag_ratios=ratios(pipe, steps), **settings
        )
    )


def seacache(**settings: Any) -> Apply:
    """SeaCache, which asks for the latents as videos: pictures are of one frame."""

    def configure(threshold: float, steps: int, pipe: ShapesPipeline) -> Any:
        # diffusers before 0.42 has none
        from diffusers.hooks import SeaCacheConfig

        return SeaCacheConfig(threshold=threshold, raw_vision_callback=_drawn_latents, **settings)

    return cached(configure)


def _drawn_latents(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Latents ``[channels, 1, height, width]`` of each picture, of the conditional half of the batch."""
    tokens = kwargs["hidden_states"]
    side = packing.PICTURE_SIZE // packing.PATCH
    return [one.T.unflatten(1, (1, side, side)) for one in tokens[len(tokens) // 2 :]]


_FP32 = {"taylor_factors_dtype": torch.float32}
_BLOCKS = r"(single_)?transformer_blocks\.\d+"

METHODS: Final = (
    # attention is forecast, MLPs run: its default
    Method("diffusers TaylorSeer", PACKAGE, taylorseer(), runs_blocks=True, default=True),
    Method("diffusers TaylorSeer fp32", PACKAGE, taylorseer(**_FP32), runs_blocks=True),
    Method("diffusers TaylorSeer fp32 O=2", PACKAGE, taylorseer(max_order=2, **_FP32), runs_blocks=True),
    # blocks return zeros, the output's projection is forecast
    Method("diffusers TaylorSeer lite", PACKAGE, taylorseer(use_lite_mode=True)),
    Method("diffusers TaylorSeer lite fp32", PACKAGE, taylorseer(use_lite_mode=True, **_FP32)),
    Method(
        "diffusers TaylorSeer lite fp32 O=2", PACKAGE, taylorseer(use_lite_mode=True, max_order=2, **_FP32)
    ),
    # every block's output is forecast, by the modules' names
    Method("diffusers TaylorSeer by block", PACKAGE, taylorseer(cache_identifiers=[_BLOCKS], **_FP32)),
    Method(
        "diffusers FirstBlockCache", PACKAGE, cached(lambda t, steps, pipe: FirstBlockCacheConfig(t)),
        "threshold", (0.05, 0.1, 0.15, 0.2, 0.3, 0.4), runs_blocks=True, looks=True, default=True,
    ),
    Method(
        "diffusers MagCache, FLUX's ratios", PACKAGE, magcache(_flux_ratios),
        "threshold", (0.03, 0.06, 0.12, 0.24), default=True,
    ),
    Method(
        "diffusers MagCache, calibrated", PACKAGE, magcache(magnitude_ratios),
        "threshold", (0.03, 0.06, 0.12, 0.24),
    ),
    Method(
        "diffusers MagCache, calibrated, gaps to 9", PACKAGE,
        magcache(magnitude_ratios, max_skip_steps=9, retention_ratio=0.06),
        "threshold", (0.06, 0.12, 0.24, 0.5, 1.0),
    ),
    Method(
        "diffusers SeaCache", PACKAGE, seacache(), "threshold", (0.05, 0.1, 0.15, 0.2, 0.25, 0.5),
        looks=True, default=True,
    ),
    Method(
        "diffusers SeaCache, any gap", PACKAGE, seacache(max_consecutive_cached=0),
        "threshold", (0.1, 0.15, 0.2, 0.25, 0.35, 0.5), looks=True,
    ),
    Method(
        "diffusers SeaCache, any gap O=0", PACKAGE, seacache(max_consecutive_cached=0, residual_order=0),
        "threshold", (0.1, 0.15, 0.2, 0.25, 0.35, 0.5), looks=True,
    ),
)  # fmt: skip
