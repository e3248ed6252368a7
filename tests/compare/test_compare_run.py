"""What is drawn, timed and judged is what somebody would draw by hand."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import hicache.fast
from hicache import Fitted, HiCacheConfig
from hicache.compare.clock import LoopClock
from hicache.compare.trail import Distance, Trail
from hicache.compare.variants import Variant, known_modes, variants
from hicache.demo.compare import psnr
from hicache.pipeline import HANDLE_ATTRIBUTES
from tests.support.comparing import asked, compared


@pytest.fixture(scope="module")
def found(shapes_pipe, tmp_path_factory):
    return compared(shapes_pipe, asked(tmp_path_factory.mktemp("found")))


def by_hand(pipe, request, config=None, callback=None):
    """Pictures [n, 32, 32, 3], one call each."""

    def draw(index):
        generator = torch.Generator().manual_seed(request.seed + index)
        more = {} if callback is None else {"callback_on_step_end": callback}
        prompt = request.prompt[index]
        return pipe(prompt, request.steps, generator=generator, output_type="np", **more, **request.call)[0][
            0
        ]

    if config is None:
        return np.stack([draw(index) for index in range(len(request.prompt))])
    with hicache.fast.apply(pipe, config, granularity="stack"):
        return np.stack([draw(index) for index in range(len(request.prompt))])


def image(address: str) -> np.ndarray:
    data = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)))


def test_pictures_and_scores_are_those_drawn_by_hand(found, shapes_pipe, tmp_path):
    request = asked(tmp_path)
    full = by_hand(shapes_pipe, request)
    for measured in (found.full, *found.variants):
        config = None if measured.variant is None else measured.variant.config
        drawn = full if config is None else by_hand(shapes_pipe, request, config)
        for index, address in enumerate(measured.pictures):
            np.testing.assert_allclose(image(address), drawn[index] * 255, atol=1.01)  # batches round apart
        if config is not None:
            np.testing.assert_allclose(measured.scores["psnr"], psnr(full, drawn), atol=0.05)
            assert all(0 < value <= 1 for value in measured.scores["ssim"])


def test_full_and_skipped_steps(found):
    assert (found.full.full_steps, found.full.skipped_steps, found.full.bound) == (12, 0, 1.0)
    named = {one.name: one for one in found.variants}
    assert list(named) == ["hicache N=3", "hicache N=6", "reuse N=3", "reuse N=6"]
    for one in found.variants:
        assert one.full_steps == len(one.places) < 12
        assert one.full_steps + one.skipped_steps == 12
        assert one.bound == 12 / one.full_steps
        assert one.history_bytes > 0
        assert len(one.seconds) == 1
        assert found.speedup(one) == found.full.seconds[0] / one.seconds[0]
    assert named["hicache N=6"].full_steps < named["hicache N=3"].full_steps


def test_worst_first(found):
    lowest = [min(one.scores["psnr"][at] for one in found.variants) for at in range(3)]
    assert [lowest[at] for at in found.worst_first()] == sorted(lowest)
    one = found.variants[1]
    assert [one.scores["psnr"][at] for at in found.worst_first(one)] == sorted(one.scores["psnr"])


def test_error_per_step_is_that_of_latents(found, shapes_pipe, tmp_path):
    request, kept = asked(tmp_path), []

    def keep(pipe, step, timestep, tensors):
        kept.append((step, tensors["latents"].clone()))
        return tensors

    by_hand(shapes_pipe, request, callback=keep)
    full, kept = kept, []
    by_hand(shapes_pipe, request, found.variants[1].variant.config, keep)
    for step, error in enumerate(found.variants[1].errors):
        pairs = [(a, b) for (s, a), (_, b) in zip(full, kept, strict=True) if s == step]
        off = sum(float((a - b).square().sum()) for a, b in pairs)
        size = sum(float(a.square().sum()) for a, _ in pairs)
        assert error == pytest.approx(math.sqrt(off / size), rel=1e-3, abs=1e-5)
    assert len(found.variants[1].errors) == 12
    assert found.variants[1].errors[-1] > 0.001


def test_interval_one_is_the_full_run(shapes_pipe, tmp_path):
    found = compared(shapes_pipe, asked(tmp_path, interval=(1,), mode=("hicache",)))
    [one] = found.variants
    assert one.scores["psnr"] == [math.inf] * 3
    assert list(one.errors) == [0.0] * 12
    assert one.pictures == found.full.pictures


def test_the_pipeline_is_as_it_was(shapes_pipe, tmp_path):
    bar = shapes_pipe.progress_bar
    compared(shapes_pipe, asked(tmp_path))
    assert shapes_pipe.progress_bar == bar
    failing = [Variant("hicache", HiCacheConfig())]
    with pytest.raises(RuntimeError, match=r"hicache N=7: .*unknown granularity 'none'"):
        from hicache.compare.run import compare

        compare(shapes_pipe, asked(tmp_path).pictures, failing, {}, granularity="none")
    assert shapes_pipe.progress_bar == bar
    assert not set(HANDLE_ATTRIBUTES.values()) & shapes_pipe.transformer.__dict__.keys()


def test_every_run_is_counted_and_each_round_timed(shapes_pipe, tmp_path):
    steps = []
    found = compared(shapes_pipe, asked(tmp_path, repeats=2), on_step=lambda: steps.append(0))
    # two rounds, five of them (full run and variants), two batches, untimed and timed, 12 steps
    assert len(steps) == 2 * 5 * 2 * 2 * 12
    for one in (found.full, *found.variants):
        assert len(one.seconds) == 2
        assert one.least_seconds == min(one.seconds)
    assert all(len(one.scores["psnr"]) == 3 for one in found.variants)


class Slow:
    """A pipeline whose time goes by outside of its loop as well."""

    def __init__(self, clock, iterates):
        self.time = clock
        self.iterates = iterates

    def progress_bar(self, iterable=None, total=None):
        from tqdm import tqdm

        return tqdm(iterable, total=total, disable=True)

    def __call__(self):
        self.time[0] += 100  # text encoders
        if self.iterates:
            for _ in self.progress_bar(range(3)):
                self.time[0] += 1
        else:
            with self.progress_bar(total=3) as bar:
                for _ in range(3):
                    self.time[0] += 1
                    bar.set_description("on its way")
                    bar.update()
        self.time[0] += 1000  # the VAE


@pytest.mark.parametrize("iterates", [True, False], ids=["iterates", "updates"])
def test_the_clock_times_the_loop_alone(iterates, monkeypatch):
    time, steps = [0.0], []
    monkeypatch.setattr("hicache.compare.clock._now", lambda: time[0])
    pipe = Slow(time, iterates)
    clock = LoopClock(pipe, lambda: steps.append(0))
    pipe()
    pipe()
    assert clock.read() == 6
    assert len(steps) == 6
    with pytest.raises(RuntimeError, match="Slow opened no progress bar"):
        clock.read()
    clock.stop()
    assert "progress_bar" not in pipe.__dict__
    with pytest.raises(TypeError, match=r"expected a pipeline .* with progress_bar\(\), got object"):
        LoopClock(object(), lambda: None)


def test_distances_add_up_over_batches():
    trail, distance = Trail(), Distance()
    for full, other in ((3.0, 3.0), (4.0, 9.0)):
        trail.forget()
        trail.keep(None, 0, None, {"latents": torch.tensor([full])})
        distance.against(trail)(None, 0, None, {"latents": torch.tensor([other])})
    assert distance.read() == [(25.0, 25.0)]  # 0² + 5², 3² + 4²


def test_parts_make_the_whole(found, shapes_pipe, tmp_path):
    request = asked(tmp_path)
    parts = [
        compared(shapes_pipe, replace(request, prompt=prompt, seed=request.seed + first))
        for first, prompt in ((0, request.prompt[:2]), (2, request.prompt[2:]))
    ]
    seconds = [[one.seconds[0] for one in part.variants] for part in parts]
    whole, further = parts
    whole.add(further)
    assert (whole.asked.prompts, whole.asked.seeds) == (found.asked.prompts, found.asked.seeds)
    for one, wanted in zip((whole.full, *whole.variants), (found.full, *found.variants), strict=True):
        assert (one.scores, one.pictures) == (wanted.scores, wanted.pictures)
        assert (one.errors, one.places) == (wanted.errors, wanted.places)
        assert one.history_bytes == wanted.history_bytes
    assert [one.seconds for one in whole.variants] == [[sum(both)] for both in zip(*seconds, strict=True)]
    assert whole.worst_first() == found.worst_first()


def test_variants(shapes_pipe):
    base = HiCacheConfig(order=1, warmup=2)
    found = variants(shapes_pipe, ["scaled-taylor", "reuse"], [4, 8, 4], 50, base)
    assert [one.name for one in found] == [
        *("scaled-taylor N=4", "scaled-taylor N=8"),
        *("reuse N=4", "reuse N=8"),
    ]
    assert found[0].config == HiCacheConfig(interval=4, order=1, warmup=2, basis="scaled_taylor")
    assert {"fitted", "hicache", "taylor", "scaled-taylor", "reuse"} <= set(known_modes())


def test_what_is_fitted_to_the_model_comes_first_where_it_is_there(shapes_pipe):
    found = variants(shapes_pipe, None, [2, 7], 50, HiCacheConfig(), "stack")
    assert [one.name for one in found[:2]] == ["fitted N=7", "hicache N=2"]  # none has so many full steps
    assert isinstance(found[0].config.basis, Fitted)
    by_output = variants(shapes_pipe, None, [2, 7], 50, HiCacheConfig())[:2]
    assert [one.name for one in by_output] == ["fitted N=2", "fitted N=7"]
    assert {one.config.fitted_by for one in by_output} == {"output"}
    assert variants(shapes_pipe, None, [7], 50, HiCacheConfig(), "module")[0].name == "hicache N=7"
    with pytest.raises(ValueError, match=r"rows .* for \d+ full steps of 50 \(N=2\); it has 7, 8, 9, 10, 12"):
        variants(shapes_pipe, ["fitted"], [7, 2], 50, HiCacheConfig(), "stack")
    with pytest.raises(ValueError, match="it has none"):
        variants(object(), ["fitted"], [7], 50, HiCacheConfig())
    with pytest.raises(ValueError, match="unknown mode 'best'; known modes: fitted, hicache, taylor"):
        variants(object(), ["best"], [7], 50, HiCacheConfig())
    with pytest.raises(ValueError, match="at least one mode and one interval"):
        variants(object(), ["reuse"], [], 50, HiCacheConfig())
