"""How far a picture is from the full run's, and how good it is: a table, an entry a metric.

What needs weights is measured where its package is installed and its weights are on the machine. Nothing is
fetched.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from hicache.compare.pictures import Array, as_image, enlarged, frames
from hicache.demo.compare import psnr, ssim


class UnavailableError(Exception):
    """A metric cannot be measured here; the message says what is missing."""


@dataclass(frozen=True)
class Batch:
    """Pictures to judge.

    Args:
        pictures: of a variant.
        full: the full run's of the same prompts and noise.
        prompts: what was to be drawn.
    """

    pictures: Sequence[Array]
    full: Sequence[Array]
    prompts: Sequence[str]


#: A number a picture.
Score = Callable[[Batch], list[float]]


@dataclass(frozen=True)
class Metric:
    """One entry of :data:`METRICS`.

    Args:
        key: on the command line and in JSON.
        name: on the page.
        about: what it says, in a few words.
        load: gives what measures it; :class:`UnavailableError` where that is not possible.
        unit: after its numbers.
        digits: of them that are shown.
        higher: whether more is better.
        compares: whether it is a distance to the full run's picture, which then has none itself.
    """

    key: str
    name: str
    about: str
    load: Callable[[], Score]
    unit: str = ""
    digits: int = 3
    higher: bool = True
    compares: bool = True

    def text(self, value: float) -> str:
        """A number as the page shows it."""
        number = "∞" if math.isinf(value) else f"{value:.{self.digits}f}"
        return f"{number} {self.unit}".rstrip()

    def worst(self, values: Sequence[float]) -> float:
        return min(values) if self.higher else max(values)


def _psnr() -> Score:
    return lambda batch: [psnr(full[None], one[None])[0] for full, one in _pairs(batch)]


def _ssim() -> Score:
    return lambda batch: [float(np.mean(ssim(frames(full), frames(one)))) for full, one in _pairs(batch)]


def _pairs(batch: Batch) -> zip[tuple[Array, Array]]:
    return zip(batch.full, batch.pictures, strict=True)


def _lpips() -> Score:
    package = _package("lpips")
    address = _package("torchvision.models").AlexNet_Weights.IMAGENET1K_V1.url  # of what it would fetch
    if not (Path(torch.hub.get_dir()) / "checkpoints" / Path(address).name).is_file():
        raise UnavailableError("the weights of torchvision's AlexNet are not on this machine")
    model = package.LPIPS(net="alex", verbose=False).to(_device())

    def tensors(picture: Array) -> torch.Tensor:
        images = [enlarged(as_image(frame), 64) for frame in frames(picture)]  # AlexNet needs as many pixels
        stacked = torch.from_numpy(np.stack([np.asarray(image, np.float32) for image in images]))
        return (stacked.permute(0, 3, 1, 2) / 127.5 - 1).to(_device())

    @torch.no_grad()
    def score(batch: Batch) -> list[float]:
        return [float(model(tensors(full), tensors(one)).mean()) for full, one in _pairs(batch)]

    return score


def _clip() -> Score:
    package = _package("transformers")
    name = os.environ.get("HICACHE_CLIP_MODEL", "openai/clip-vit-large-patch14")
    try:
        model = package.CLIPModel.from_pretrained(name, local_files_only=True).to(_device()).eval()
        processor = package.CLIPProcessor.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UnavailableError(f"the weights of {name} are not on this machine") from error

    most = model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def score(batch: Batch) -> list[float]:
        images = [as_image(picture) for picture in batch.pictures]
        inputs = processor(
            text=list(batch.prompts),
            images=images,
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=most,
        )
        found = model(**inputs.to(_device()))
        cosines = torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds)
        return [100 * max(0.0, float(cosine)) for cosine in cosines]

    return score


def _image_reward() -> Score:
    package = _package("ImageReward")
    folder = Path("~/.cache/ImageReward").expanduser()
    weights, settings = folder / "ImageReward.pt", folder / "med_config.json"
    from huggingface_hub import try_to_load_from_cache

    tokenizer = try_to_load_from_cache("bert-base-uncased", "vocab.txt")
    if not (weights.is_file() and settings.is_file() and isinstance(tokenizer, str)):
        raise UnavailableError("its weights, or the words of bert-base-uncased, are not on this machine")
    model = package.load(str(weights), device=_device(), med_config=str(settings))

    def score(batch: Batch) -> list[float]:
        pairs = zip(batch.prompts, batch.pictures, strict=True)
        return [float(model.score(prompt, as_image(picture))) for prompt, picture in pairs]

    return score


def _package(name: str) -> Any:
    package = name.split(".")[0]
    if importlib.util.find_spec(package) is None:
        raise UnavailableError(f"the package {package} is not installed")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(f"the package {name} cannot be imported: {error}") from error


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


METRICS: Final = (
    Metric("psnr", "PSNR", "distance to the full run, pixel by pixel", _psnr, unit="dB", digits=1),
    Metric("ssim", "SSIM", "structural similarity to the full run", _ssim, digits=4),
    Metric("lpips", "LPIPS", "distance to the full run, by features", _lpips, digits=4, higher=False),
    Metric("clip", "CLIP score", "whether it shows the prompt", _clip, digits=1, compares=False),
    Metric("image-reward", "ImageReward", "what people prefer, predicted", _image_reward, compares=False),
)


def load(keys: Sequence[str] | None) -> tuple[dict[Metric, Score], dict[str, str]]:
    """What measures, and of what cannot be measured here, why.

    Args:
        keys: of :data:`METRICS`; None takes all that can be measured here.

    Raises:
        ValueError: a key that is not known, or one that was asked for and cannot be measured here.
    """
    known = {metric.key: metric for metric in METRICS}
    for key in keys or ():
        if key not in known:
            raise ValueError(f"unknown metric {key!r}; known metrics: {', '.join(known)}")
    found: dict[Metric, Score] = {}
    missing: dict[str, str] = {}
    # PSNR always: pictures are sorted by it
    for metric in METRICS if keys is None else [known[key] for key in dict.fromkeys(("psnr", *keys))]:
        try:
            found[metric] = metric.load()
        except UnavailableError as error:
            if keys is not None:
                raise ValueError(f"metric {metric.key!r}: {error}") from error
            missing[metric.name] = str(error)
    return found, missing
