"""cache-dit: DBCache, which always runs the first blocks, with its calibrators.

It knows a pipeline by the beginning of its class's name, and changes that class: each pipeline here gets a
class of its own that begins with Flux, so that its adapter for FLUX is what is measured.
"""

from __future__ import annotations

from typing import Any, Final

from benchmarks.peers.method import WARMUP, Apply, Method
from hicache.demo.pipeline import ShapesPipeline

PACKAGE: Final = "cache-dit"


def full_steps(interval: int, steps: int) -> list[int]:
    """The mask of the steps that are full: the first ones, then one of every ``interval``; 1 is full."""
    return [int(step < WARMUP or (step - WARMUP + 1) % interval == 0) for step in range(steps)]


def masked(calibrator: str = "", two_lists: bool = False, **settings: Any) -> Apply:
    """One block runs at each step, and the mask says at which steps the others do.

    Args:
        calibrator: the name of its configuration in cache-dit; none reuses the last residual.
        two_lists: FLUX's two lists of blocks are cached one by one, as a user's own adapter would; one block
            of each runs at each step.
        settings: of the calibrator.
    """

    def apply(pipe: ShapesPipeline, setting: float, steps: int) -> None:
        import cache_dit

        mask = full_steps(int(setting), steps)
        config = _one_block(steps, steps_computation_mask=mask, steps_computation_policy="static")
        made = getattr(cache_dit, calibrator)(**settings) if calibrator else None
        _enable(pipe, config, made, two_lists)

    return apply


def dynamic(calibrator: str = "", **settings: Any) -> Apply:
    """One block runs at each step, and how its residual has changed says whether the others do."""

    def apply(pipe: ShapesPipeline, setting: float, steps: int) -> None:
        import cache_dit

        made = getattr(cache_dit, calibrator)(**settings) if calibrator else None
        _enable(pipe, _one_block(steps, residual_diff_threshold=setting), made)

    return apply


def as_it_comes(pipe: ShapesPipeline, setting: float, steps: int) -> None:
    """Its defaults: eight blocks run at each step, and the first eight steps are full."""
    import cache_dit

    _enable(pipe, cache_dit.DBCacheConfig(residual_diff_threshold=setting), None)


def _one_block(steps: int, **settings: Any) -> Any:
    import cache_dit

    return cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=WARMUP,
        num_inference_steps=steps,
        **settings,
    )


def _enable(pipe: ShapesPipeline, config: Any, calibrator: Any, two_lists: bool = False) -> None:
    import cache_dit

    pipe.__class__ = type("FluxShapesPipeline", (type(pipe),), {})
    cached: Any = pipe
    if two_lists:
        lists = [pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks]
        pattern = cache_dit.ForwardPattern.Pattern_1
        cached = cache_dit.BlockAdapter(
            pipe=pipe, transformer=pipe.transformer, blocks=lists, forward_pattern=[pattern] * len(lists)
        )
    cache_dit.enable_cache(cached, cache_config=config, calibrator_config=calibrator)


_TAYLOR = "TaylorSeerCalibratorConfig"
_THRESHOLDS: Final = (0.04, 0.08, 0.12, 0.16, 0.24, 0.4)


def _by_mask(name: str, apply: Apply, looks: bool = False) -> Method:
    return Method(f"cache-dit F1B0, mask{name}", PACKAGE, apply, runs_blocks=True, looks=looks)


def _by_threshold(name: str, apply: Apply, default: bool = False) -> Method:
    return Method(
        f"cache-dit {name}",
        PACKAGE,
        apply,
        "threshold",
        _THRESHOLDS,
        runs_blocks=True,
        looks=True,
        default=default,
    )


METHODS: Final = (
    _by_mask("", masked()),
    _by_mask(", TaylorSeer O=1", masked(_TAYLOR, taylorseer_order=1)),
    _by_mask(", TaylorSeer O=2", masked(_TAYLOR, taylorseer_order=2)),
    _by_mask(", TaylorSeer O=1, two lists", masked(_TAYLOR, two_lists=True, taylorseer_order=1)),
    _by_mask(", FoCa", masked("FoCaCalibratorConfig")),
    _by_mask(", DMD", masked("DMDCalibratorConfig"), looks=True),
    _by_threshold("F8B0", as_it_comes, default=True),
    _by_threshold("F1B0", dynamic()),
    _by_threshold("F1B0, TaylorSeer O=1", dynamic(_TAYLOR, taylorseer_order=1)),
)
