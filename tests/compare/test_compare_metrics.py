"""Metrics: a table; what needs weights is left out with the reason where they are not there."""

from __future__ import annotations

import json
import math
import socket
import sys
import types

import numpy as np
import pytest
import torch

from hicache.compare import metrics
from hicache.compare.metrics import METRICS, Batch
from hicache.compare.pictures import as_arrays, as_image, data_uri, size_text

BY_KEY = {metric.key: metric for metric in METRICS}


def package(name: str, **parts: object) -> types.ModuleType:
    """One that is installed, as far as anybody can see."""
    module = types.ModuleType(name)
    module.__spec__ = types.SimpleNamespace()
    vars(module).update(parts)
    return module


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """And nothing of the machine's own: neither packages of others nor their weights."""

    def refuse(*_, **__):
        raise AssertionError("it looked for something on a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HICACHE_CLIP_MODEL", str(tmp_path / "clip"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HOME", str(tmp_path))
    weights = types.SimpleNamespace(IMAGENET1K_V1=types.SimpleNamespace(url="https://nowhere/alexnet.pth"))
    for name, more in (("torchvision", {}), ("torchvision.models", {"AlexNet_Weights": weights})):
        monkeypatch.setitem(sys.modules, name, package(name, **more))
    for name in ("lpips", "ImageReward"):
        monkeypatch.setitem(sys.modules, name, None)


def pictures(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape, dtype=np.float32)


def test_distances_of_pictures_and_videos():
    full = pictures(2, 16, 24, 3)
    other = np.clip(full + 0.1, 0, 1)
    for one, another in ((list(full), list(other)), ([full], [other])):
        batch = Batch(another, one, ["a prompt"] * len(one))
        psnr, ssim = (BY_KEY[key].load()(batch) for key in ("psnr", "ssim"))
        assert len(psnr) == len(ssim) == len(one)
        expected = [
            -10 * math.log10(float(np.square(a - b).mean())) for a, b in zip(one, another, strict=True)
        ]
        assert psnr == pytest.approx(expected, abs=1e-3)
        assert all(0.5 < value < 1 for value in ssim)
    assert BY_KEY["ssim"].load()(Batch([full], [full], ["a prompt"])) == [1.0]


def test_what_cannot_be_measured_says_why():
    found, missing = metrics.load(None)
    assert [metric.key for metric in found] == ["psnr", "ssim"]
    assert missing["LPIPS"] == "the package lpips is not installed"
    assert missing["ImageReward"] == "the package ImageReward is not installed"
    assert missing["CLIP score"].startswith("the weights of ")
    with pytest.raises(ValueError, match="metric 'lpips': the package lpips is not installed"):
        metrics.load(["lpips"])
    with pytest.raises(ValueError, match="unknown metric 'fid'; known metrics: psnr, ssim, lpips"):
        metrics.load(["fid"])
    assert [metric.key for metric in metrics.load(["ssim"])[0]] == ["psnr", "ssim"]


@pytest.mark.parametrize("name", ["lpips", "ImageReward"])
def test_a_package_without_its_weights_fetches_nothing(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, package(name))
    reason = metrics.load(None)[1]["LPIPS" if name == "lpips" else name]
    assert reason.endswith("not on this machine")


def test_lpips_is_given_what_it_wants(monkeypatch, tmp_path):
    """Tensors in [-1, 1] of at least 64 pixels a side; of a video, frame by frame."""
    seen = []

    class LPIPS(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            assert net == "alex"

        def forward(self, one, other):
            seen.append((one, other))
            return (one - other).abs().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", package("lpips", LPIPS=LPIPS))
    weights = tmp_path / "torch" / "hub" / "checkpoints"
    weights.mkdir(parents=True)
    (weights / "alexnet.pth").touch()
    full = [np.zeros((32, 48, 3), np.float32), np.zeros((5, 80, 80, 3), np.float32)]
    other = [full[0] + 1, full[1]]
    assert BY_KEY["lpips"].load()(Batch(other, full, ["a", "b"])) == [2.0, 0.0]
    assert [tuple(one.shape) for one, _ in seen] == [(1, 3, 64, 96), (5, 3, 80, 80)]
    assert seen[0][0].min() == -1
    assert seen[0][1].max() == 1


def test_clip_score_of_a_clip_on_this_machine(tmp_path):
    """A tiny one with random weights, through the real loading code."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = tmp_path / "clip"
    folder.mkdir()
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: at for at, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **sizes,
        "vocab_size": len(words),
        "max_position_embeddings": 24,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=8
    )
    model = transformers.CLIPModel(config).eval()
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    model.save_pretrained(folder)
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)

    found, missing = metrics.load(["clip"])
    prompts, drawn = ["a red ring", "a dragon " * 40], list(pictures(2, 32, 32, 3))
    scores = found[BY_KEY["clip"]](Batch(drawn, drawn, prompts))
    assert missing == {}
    inputs = transformers.CLIPProcessor.from_pretrained(folder)(
        text=prompts[:1], images=[as_image(drawn[0])], return_tensors="pt"
    )
    with torch.no_grad():
        cosine = float(model(**inputs).logits_per_image[0, 0] / model.logit_scale.exp())
    assert scores[0] == pytest.approx(100 * max(0.0, cosine), abs=1e-3)
    assert len(scores) == 2


def test_numbers_in_words():
    psnr = BY_KEY["psnr"]
    assert psnr.text(36.04) == "36.0 dB"
    assert psnr.text(math.inf) == "∞ dB"
    assert BY_KEY["ssim"].text(0.98765) == "0.9877"
    assert psnr.worst([3.0, 1.0]) == 1.0
    assert BY_KEY["lpips"].worst([3.0, 1.0]) == 3.0


def test_pictures_as_arrays_and_addresses():
    [small] = as_arrays(pictures(1, 8, 12, 3))
    [video] = as_arrays(pictures(1, 5, 8, 300, 3))
    assert data_uri(as_image(small)).startswith("data:image/png;base64,")
    assert data_uri(as_image(video)).startswith("data:image/webp;base64,")
    assert as_image(video).size == (300, 8)
    assert np.array_equal(np.asarray(as_image(video)), (video[2] * 255).round().astype("uint8"))
    assert size_text([small]) == "12 × 8"
    assert size_text([video]) == "5 frames of 300 × 8"
    with pytest.raises(TypeError, match=r"expected pictures .* got \[8, 8\]"):
        as_arrays(pictures(1, 8, 8))
