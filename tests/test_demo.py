"""The bundled model: what it draws, its pipeline's manners, and how it is made."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import hicache.demo
import hicache.fast
from hicache import HiCacheConfig
from hicache.demo import packing, pictures, train
from hicache.demo.pictures import COLOURS, POSITIONS, SHAPES, Caption
from hicache.demo.pipeline import ShapesPipeline
from hicache.demo.prompts import PROMPTS

MEGABYTE = 10**6


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_sizes():
    weights = hicache.demo.MODEL / "transformer" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size <= 12 * MEGABYTE
    assert sum(p.numel() for p in train.build_transformer().parameters()) <= 6_000_000


def test_loads_like_any_pipeline(shapes_pipe, tmp_path):
    assert isinstance(shapes_pipe, diffusers.DiffusionPipeline)
    assert type(shapes_pipe.transformer) is diffusers.FluxTransformer2DModel
    shapes_pipe.save_pretrained(tmp_path)
    again = ShapesPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    again.set_progress_bar_config(disable=True)
    assert again.transformer.dtype == torch.bfloat16
    [image] = again("a red ring on blue", 2, generator=noise()).images
    assert isinstance(image, Image.Image)
    assert image.size == (32, 32)


def read_back(pipe, prompts, **kwargs):
    found = pipe(prompts, output_type="pt", generator=noise(3), **kwargs).images
    return pictures.read(found * 2 - 1)


def test_draws_what_it_is_told(shapes_pipe):
    """Every shape and colour, in full and with the cache: named right by a reader that knows only the
    shapes."""
    colours = list(COLOURS)
    prompts = [
        f"a {colours[(i + shift) % 8]} {shape} on {colours[(i + shift + 3) % 8]}"
        for i, shape in enumerate(SHAPES)
        for shift in (0, 5)
    ]
    for config in (HiCacheConfig(interval=1), HiCacheConfig(interval=4), HiCacheConfig()):
        with hicache.fast.apply(shapes_pipe, config):
            named = read_back(shapes_pipe, prompts, num_inference_steps=30)
        asked = [pictures.parse(prompt) for prompt in prompts]
        right = [
            (a.shape, a.colour, a.background) == (n.shape, n.colour, n.background)
            for a, n in zip(asked, named, strict=True)
        ]
        assert sum(right) >= len(prompts) - 1, [str(n) for n, ok in zip(named, right, strict=True) if not ok]


def test_draws_where_it_is_told(shapes_pipe):
    prompts = [f"a large red square at the {position} on white" for position in POSITIONS]
    named = read_back(shapes_pipe, prompts, num_inference_steps=20)
    assert sum(n.position == p for n, p in zip(named, POSITIONS, strict=True)) >= len(POSITIONS) - 1


def test_manners(shapes_pipe):
    prompts = ["a red ring on blue", "a green square on white"]
    call = {"num_inference_steps": 4}
    one = shapes_pipe(prompts, generator=noise(), output_type="np", **call).images
    assert one.shape == (2, 32, 32, 3)
    assert one.dtype == np.float32
    assert np.array_equal(one, shapes_pipe(prompts, generator=noise(), output_type="np", **call)[0])
    (as_tuple,) = shapes_pipe(prompts, generator=noise(), output_type="np", return_dict=False, **call)
    assert np.array_equal(one, as_tuple)
    each = [noise(5), noise(6)]
    many = shapes_pipe(prompts[0], num_images_per_prompt=2, generator=each, output_type="pt", **call).images
    alone = shapes_pipe(prompts[0], generator=noise(6), output_type="pt", **call).images
    torch.testing.assert_close(many[1:], alone, rtol=1e-3, atol=1e-3)
    assert len(shapes_pipe(prompts, guidance_scale=1.0, **call).images) == 2


def test_callbacks(shapes_pipe):
    seen = []

    def watch(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), tuple(tensors["latents"].shape)))
        if step == 2:
            pipe._interrupt = True
        return {"latents": tensors["latents"] * 0 if step == 2 else tensors["latents"]}

    latents = shapes_pipe(
        "a red ring on blue", 6, callback_on_step_end=watch, output_type="latent", generator=noise()
    ).images
    assert [step for step, *_ in seen] == [0, 1, 2]
    assert seen[0][1] == 1000.0
    assert seen[0][2] == (1, 64, packing.CHANNELS)
    assert not latents.any()
    assert shapes_pipe.num_timesteps == 6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompt": "a dragon"}, r"cannot read the prompt 'a dragon': expected .*SHAPE one of circle, ring"),
        ({"prompt": []}, "at least one prompt, got none"),
        ({"prompt": "a red ring on blue", "output_type": "jpg"}, "expected pil, np, pt or latent, got 'jpg'"),
        (
            {"prompt": "a red ring on blue", "latents": torch.zeros(1, 4)},
            r"shape \(1, 64, 48\), got \(1, 4\)",
        ),
        (
            {"prompt": "a red ring on blue", "callback_on_step_end_tensor_inputs": ["noise"]},
            "expected only .*latents.*, got .*noise",
        ),
    ],
)
def test_bad_calls(shapes_pipe, call, message):
    with pytest.raises(ValueError, match=message):
        shapes_pipe(**call)


@pytest.mark.parametrize(
    ("prompt", "caption"),
    [
        ("a red ring on blue", Caption("red", "ring", "blue")),
        ("An orange cross on a black background.", Caption("orange", "cross", "black")),
        ("small white square at the top-left on red", Caption("white", "square", "red", "small", "top left")),
        ("large red circle in the middle on white", Caption("red", "circle", "white", "large", "center")),
        ("", Caption()),
    ],
)
def test_parse(prompt, caption):
    assert pictures.parse(prompt) == caption


def test_captions_pictures_and_reader_agree():
    """What the dataset draws is what its captions say, by a reader that never sees the captions."""
    captions, images = pictures.sample(64, noise())
    assert images.shape == (64, 3, 32, 32)
    assert images.abs().max() <= 1
    for said, read in zip(captions, pictures.read(images), strict=True):
        assert pictures.parse(str(said)) == said
        assert (said.shape, said.colour, said.background) == (read.shape, read.colour, read.background)
        assert said.position in ("", read.position)
        assert said.size in ("", read.size)
    words = pictures.encode(captions)
    assert words.shape == (64, pictures.NUM_SLOTS, pictures.VOCABULARY)
    assert (words.sum(-1) == 1).all()
    assert len({tuple(w.flatten().tolist()) for w in words}) == len(set(captions))


def test_packing_round_trip():
    images = torch.randn(2, 3, 32, 32)
    tokens = packing.pack(images)
    assert tokens.shape == (2, 64, packing.CHANNELS)
    assert torch.equal(packing.unpack(tokens, 32, 32), images)
    ids = packing.position_ids(32, 32)
    assert ids[9].tolist() == [0, 1, 1]
    assert torch.equal(tokens[0, 9].view(3, 4, 4), images[0, :, 4:8, 4:8])


@pytest.mark.parametrize("task", train.TASKS.values(), ids=train.TASKS)
def test_training_is_reproducible_and_resumes(task, tmp_path, monkeypatch):
    """Four steps in one go, and two, a stop and two more, give the same bytes."""

    def weights(out):
        return (out / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.train(task, whole, steps=4, batch=2, peak=1e-3, seed=1, every=100)
    rates = train.learning_rate
    calls = []

    def stop_at_the_third(step, *args):
        calls.append(step)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return rates(step, *args)

    monkeypatch.setattr(train, "learning_rate", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        train.train(task, parts, steps=4, batch=2, peak=1e-3, seed=1, every=2)
    assert (parts / "checkpoint.pt").exists()
    train.train(task, parts, steps=4, batch=2, peak=1e-3, seed=1, every=2)
    assert calls == [0, 1, 2, 2, 3]
    assert weights(whole) == weights(parts)
    assert not (parts / "checkpoint.pt").exists()


def test_aborted_run_of_the_bundled_model(shapes_pipe):
    prompts = list(PROMPTS[:2])

    def abort(pipe, step, timestep, tensors):
        if step == 5:
            raise RuntimeError("stop")
        return tensors

    with hicache.fast.apply(shapes_pipe, HiCacheConfig(interval=3)):
        fresh = shapes_pipe(prompts, 8, generator=noise(), output_type="pt").images
        with pytest.raises(RuntimeError, match="stop"):
            shapes_pipe(prompts[::-1], 8, generator=noise(1), callback_on_step_end=abort)
        again = shapes_pipe(prompts, 8, generator=noise(), output_type="pt").images
    assert torch.equal(fresh, again)


@pytest.mark.parametrize("granularity", ["stack", "output"])
def test_what_is_fitted_to_the_model_is_used_and_draws_better(shapes_pipe, granularity):
    """Of every number of full steps that the model's own files have, the fitted rows are what users get."""
    from hicache.calibration.shipped import shipped
    from hicache.demo.compare import compare

    [found] = shipped(shapes_pipe, granularity)
    assert {len(entry.full_steps) for entry in found.entries} >= {18, 14, 12, 10, 9, 8, 7}
    for entry in found.entries:
        scores = entry.scores
        assert scores["pictures"] >= 48
        assert scores["fitted mean dB"] > scores["prior mean dB"] + 2.5
        # one picture of 48 is drawn worse with so many full steps (docs/calibrating.md)
        allowed = {("stack", 18): 3.2, ("output", 12): 3.8, ("output", 17): 0.6}
        worse = allowed.get((granularity, len(entry.full_steps)), 0.0)
        assert scores["fitted worst dB"] > scores["prior worst dB"] - worse
    prompts = ["a small white cross at the top left on red", "a large blue ring on yellow"]
    paper, fitted = (
        compare(shapes_pipe, prompts, config, repeats=1, granularity=granularity)
        for config in (HiCacheConfig(), None)
    )
    assert fitted.stats.full_steps == paper.stats.full_steps == 9
    assert fitted.stats.config.fallbacks == []
    assert min(fitted.psnr) > min(paper.psnr) + 2.5
    if granularity == "output":  # what `hicache generate` takes
        assert min(fitted.psnr) >= 36
