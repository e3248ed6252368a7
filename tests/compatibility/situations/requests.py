"""One request after the other, each of another kind."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from tests.compatibility.checks import Change, Outcome, between
from tests.compatibility.registry import Theme
from tests.compatibility.subjects import FAMILIES, FEW, MOST, VIDEO, Subject

THEME: Final = Theme("Requests that differ from one another")
_EMBEDDINGS: Final = ("prompt_embeds", "encoder_hidden_states", "pooled")
# drawn at the size that fits the given picture, or the model's own
_FIXED_SIZE: Final = ("flux_kontext", "qwen_edit", "qwen_edit_plus", "dit")
_ONE_PROMPT: Final = (
    "dit",
    "flux_kontext",
    "flux_ip_adapter",
    "sd3_ip_adapter",
    "cogvideox",
    "qwen_edit_plus",
)
_GUIDED: Final = ("qwen", "qwen_edit", "sd3", "wan", "wan22", "ltx", "cogvideox", "pixart", "sana", "chroma")


def with_arguments(**changes: Any) -> Change:
    """Other arguments from now on."""
    return lambda subject: subject.arguments.update(changes)


def other_prompt(subject: Subject) -> None:
    """Embeddings of another prompt, and of another negative one."""
    subject.arguments.update(
        {name: value * 0.6 + 0.1 for name, value in subject.arguments.items() if _is_embedding(name, value)}
    )
    if "cap_feats" in subject.arguments:
        subject.arguments["cap_feats"] = [part * 0.6 + 0.1 for part in subject.arguments["cap_feats"]]
    if "class_labels" in subject.arguments:
        subject.arguments["class_labels"] = [2]


def _is_embedding(name: str, value: Any) -> bool:
    named = any(part in name for part in _EMBEDDINGS)
    return named and isinstance(value, Tensor) and value.is_floating_point()


def repeat_batch(subject: Subject, times: int) -> None:
    """Every row of the embeddings and masks so many times."""
    subject.arguments.update(
        {
            name: value.repeat(times, *[1] * (value.ndim - 1))
            for name, value in subject.arguments.items()
            if (isinstance(value, Tensor) and "embeds" in name) or name.endswith("mask")
        }
    )


@THEME.situation(
    "another prompt",
    "Other embeddings, negative ones too, after the first picture.",
    (*MOST, "dit", "cogvideox", "ltx", "chroma", "flux_kontext", "qwen_edit", "mochi", "bria"),
)
def _prompt(name: str) -> Outcome:
    return between(other_prompt, name)


@THEME.situation(
    "another resolution", "Larger than the first picture.", [n for n in FAMILIES if n not in _FIXED_SIZE]
)
def _resolution(name: str) -> Outcome:
    return between(lambda s: s.arguments.update(height=2 * s.arguments["height"]), name)


@THEME.situation("a resolution and back", "Large, small, large.", ("flux", "qwen", "sd3", "wan", "sana"))
def _back(name: str) -> Outcome:
    def change(subject: Subject) -> None:
        small = subject.arguments["height"]
        subject.draw(height=2 * small)
        subject.draw(height=small)

    return between(change, name)


@THEME.situation("more steps", "Five more than in the first run.", MOST)
def _more_steps(name: str) -> Outcome:
    return between(lambda subject: setattr(subject, "steps", subject.steps + 5), name)


@THEME.situation(
    "fewer steps", "One less than in the first run.", ("flux", "qwen", "sd3", "wan22", "pixart", "dit")
)
def _fewer_steps(name: str) -> Outcome:
    return between(lambda subject: setattr(subject, "steps", subject.steps - 1), name)


@THEME.situation("more frames", "Seventeen after nine.", VIDEO)
def _frames(name: str) -> Outcome:
    return between(with_arguments(num_frames=17), name)


@THEME.situation(
    "two pictures of a prompt, then one",
    "`num_images_per_prompt` (of videos `num_videos_per_prompt`) is 2 in the first run.",
    [n for n in FAMILIES if n not in ("dit", "flux_kontext", "chroma", "ltx") and not n.startswith("sd3")],
)
def _many_then_one(name: str) -> Outcome:
    many = f"num_{'videos' if name in VIDEO else 'images'}_per_prompt"
    return between(with_arguments(**{many: 1}), name, before=with_arguments(**{many: 2}))


@THEME.situation(
    "a batch of prompts, then one",
    "Two prompts in the first run, one of them in the second.",
    [n for n in FAMILIES if n not in _ONE_PROMPT],
)
def _batch_then_one(name: str) -> Outcome:
    def one_again(subject: Subject) -> None:
        subject.arguments.update(subject.notes)

    def two(subject: Subject) -> None:
        subject.notes.update(subject.arguments)
        repeat_batch(subject, 2)

    return between(one_again, name, before=two)


@THEME.situation("guidance off", "A guided run, then one at a scale of 1.", _GUIDED[:6])
def _guidance_off(name: str) -> Outcome:
    scale = "true_cfg_scale" if name.startswith("qwen") else "guidance_scale"
    return between(with_arguments(**{scale: 1.0}), name)


@THEME.situation("guidance on", "A run at a scale of 1, then a guided one.", _GUIDED)
def _guidance_on(name: str) -> Outcome:
    scale = "true_cfg_scale" if name.startswith("qwen") else "guidance_scale"

    def on(subject: Subject) -> None:
        subject.arguments[scale] = 4.0

    return between(on, name, before=with_arguments(**{scale: 1.0}))


@THEME.situation(
    "no negative prompt, then one",
    "True classifier-free guidance begins with the second run.",
    ("flux_cfg", "qwen", "qwen_edit"),
)
def _negative(name: str) -> Outcome:
    def without(subject: Subject) -> None:
        subject.notes = {key: value for key, value in subject.arguments.items() if key.startswith("negative")}
        for key in subject.notes:
            del subject.arguments[key]

    return between(lambda subject: subject.arguments.update(subject.notes), name, before=without)


@THEME.situation(
    "another picture given", "The same prompt, another input picture.", ("flux_kontext", "qwen_edit")
)
def _picture(name: str) -> Outcome:
    def change(subject: Subject) -> None:
        given = subject.arguments["image"]
        subject.arguments["image"] = given * -0.5 if isinstance(given, Tensor) else given.point(lambda v: 90)

    return between(change, name)


@THEME.situation("embeddings changed in place", "The next prompt is written to the buffer of the last.", FEW)
def _in_place(name: str) -> Outcome:
    def change(subject: Subject) -> None:
        for key, value in subject.arguments.items():
            if _is_embedding(key, value):
                value.mul_(0.6).add_(0.1)

    return between(change, name)


@THEME.situation(
    "the same seed twice",
    "Two runs of one generator's seed between runs of others.",
    ("flux", "sd3", "wan", "dit"),
)
def _seeds(name: str) -> Outcome:
    def change(subject: Subject) -> None:
        for seed in (5, 6):
            generator = torch.Generator().manual_seed(seed)
            subject.pipe(num_inference_steps=7, generator=generator, **subject.arguments)

    return between(change, name)
