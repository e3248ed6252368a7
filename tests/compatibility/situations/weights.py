"""Weights that change: LoRA, other dtypes, other storage."""

from __future__ import annotations

import functools
from typing import Any, Final

import peft
import torch
from torch import nn

from tests.compatibility.checks import (
    Change,
    Outcome,
    as_reference,
    between,
    draw_alone,
    judge,
)
from tests.compatibility.registry import Theme
from tests.compatibility.situations.offloading import offload_blocks
from tests.compatibility.situations.requests import with_arguments
from tests.compatibility.subjects import FEW, MOST, Subject, build

LORA: Final = Theme("LoRA")
THEME: Final = Theme("Weights")

# Layers that every family has, and its modulation where that is a layer of each block.
_TARGETS: Final = ["to_q", "to_out.0", "net.2", "proj_out", "linear_1"]
_MODULATION: Final = {
    "flux": ["norm1.linear", "norm.linear"],
    "flux_cfg": ["norm1.linear", "norm.linear"],
    "flux_controlnet": ["norm1.linear", "norm.linear"],
    "qwen": ["img_mod.1"],
    "qwen_edit_plus": ["img_mod.1"],
    "sd3": ["norm1.linear"],
    "hunyuan": ["norm1.linear"],
    "cogvideox": ["norm1.linear"],
}
_MODELS: Final = (
    *_MODULATION,
    "flux2",
    "chroma",
    "wan",
    "wan22",
    "ltx",
    "sana",
    "auraflow",
    "z_image",
)
_CORE: Final = ("flux", "qwen", "sd3", "wan", "flux2")


def add(subject: Subject, name: str, adapter: str = "default", seed: int = 3, **options: Any) -> None:
    """Give the first transformer a LoRA whose numbers come from a seed."""
    model = subject.transformer
    found = {path.split(".")[-1] for path, part in model.named_modules() if isinstance(part, nn.Linear)}
    targets = [t for t in _TARGETS if t.split(".")[0] in found or "." in t] + _MODULATION.get(name, [])
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False, **options)
    model.add_adapter(config, adapter_name=adapter)
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        if "lora_" in path and f".{adapter}" in path and "magnitude" not in path:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.requires_grad_(False)


def _with_lora(name: str, **options: Any) -> Change:
    return lambda subject: add(subject, name, **options)


@LORA.situation("LoRA", "Added before the cache.", _MODELS)
def _before(name: str) -> Outcome:
    return as_reference(_with_lora(name), name)


@LORA.situation("LoRA added between runs", "On attention, MLP and modulation layers.", _MODELS)
def _added(name: str) -> Outcome:
    return between(_with_lora(name), name)


@LORA.situation("LoRA deleted between runs", "`delete_adapters`.", _CORE)
def _deleted(name: str) -> Outcome:
    return between(lambda s: s.transformer.delete_adapters("default"), name, before=_with_lora(name))


def _life(name: str, what: str, change: Change, models: tuple[str, ...] = _CORE) -> None:
    def run(model: str) -> Outcome:
        return between(change, model, before=_with_lora(model))

    LORA.situation(name, what, models)(run)


_life("LoRA switched off", "`disable_lora()` between runs.", lambda s: s.transformer.disable_lora())
_life(
    "LoRA weighed anew",
    "`set_adapters(..., weights=0.4)` between runs.",
    lambda s: s.transformer.set_adapters(["default"], weights=[0.4]),
)
_life("LoRA fused", "`fuse_lora()` between runs.", lambda s: s.transformer.fuse_lora(lora_scale=0.7))


def _fuse_and_back(subject: Subject) -> None:
    subject.transformer.fuse_lora()
    subject.draw()
    subject.transformer.unfuse_lora()


_life("LoRA fused and unfused", "With a run in between.", _fuse_and_back)


@LORA.situation("LoRA exchanged", "Two adapters; `set_adapters` between runs.", _CORE)
def _exchanged(name: str) -> Outcome:
    def two(subject: Subject) -> None:
        add(subject, name, "one", 3)
        add(subject, name, "two", 4)
        subject.transformer.set_adapters(["one"])

    return between(lambda s: s.transformer.set_adapters(["two"], weights=[0.8]), name, before=two)


@LORA.situation("LoRA, two at once", "Weighed 0.5 and 0.8, before the cache.", _CORE)
def _two(name: str) -> Outcome:
    def prepare(subject: Subject) -> None:
        add(subject, name, "one", 3)
        add(subject, name, "two", 4)
        subject.transformer.set_adapters(["one", "two"], weights=[0.5, 0.8])

    return as_reference(prepare, name)


_SCALES: Final = ("flux", "qwen", "sd3", "wan", "hunyuan", "sana")


def _kwargs(name: str) -> str:
    return "joint_attention_kwargs" if name in ("flux", "sd3") else "attention_kwargs"


@LORA.situation("LoRA scaled by the call", "`attention_kwargs={'scale': 0.4}` between runs.", _SCALES)
def _scaled(name: str) -> Outcome:
    return between(with_arguments(**{_kwargs(name): {"scale": 0.4}}), name, before=_with_lora(name))


@LORA.situation("DoRA", "`use_dora=True`, before the cache.", ("flux", "qwen", "sd3", "wan"))
def _dora(name: str) -> Outcome:
    return as_reference(_with_lora(name, use_dora=True), name)


@LORA.situation(
    "DoRA added between runs", "On attention, MLP and modulation layers.", ("flux", "qwen", "sd3", "wan")
)
def _dora_added(name: str) -> Outcome:
    return between(_with_lora(name, use_dora=True), name)


@LORA.situation("LoRA under group offload", "Blocks offloaded one by one, before the cache.", _CORE)
def _offloaded(name: str) -> Outcome:
    def prepare(subject: Subject) -> None:
        add(subject, name)
        offload_blocks(subject)

    return as_reference(prepare, name)


# Weights.


@THEME.situation("bfloat16 and back", "Float32, a run in bfloat16, float32.", MOST)
def _there_and_back(name: str) -> Outcome:
    def change(subject: Subject) -> None:
        subject.to(torch.bfloat16)
        subject.draw()
        subject.to(torch.float32)

    return between(change, name)


def _in(dtype: torch.dtype, name: str) -> Outcome:
    subject = build(name)
    subject.to(dtype)
    drawn = draw_alone(subject)
    return Outcome(judge(subject, drawn), drawn.granularity)


_LOW: Final = [name for name in MOST if name != "pixart"]  # whose clipped steps make much of rounding
_LOW_FEW: Final = [name for name in FEW if name != "pixart"]
THEME.situation("bfloat16", "All weights, before the cache.", _LOW)(functools.partial(_in, torch.bfloat16))
THEME.situation("float16", "All weights, before the cache.", _LOW_FEW)(functools.partial(_in, torch.float16))


@THEME.situation("to bfloat16 between runs", "`pipe.to(torch.bfloat16)` after the first run.", _LOW_FEW)
def _to_low(name: str) -> Outcome:
    return between(lambda subject: subject.to(torch.bfloat16), name)


def _store_in_float8(subject: Subject) -> None:
    for transformer in subject.transformers:
        transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


_QUANTISED: Final = (
    "flux",
    "flux2",
    "chroma",
    "qwen",
    "sd3",
    "wan22",
    "hunyuan",
    "ltx",
    "pixart",
    "dit",
    "z_image",
)


@THEME.situation(
    "weights stored in float8", "diffusers' `enable_layerwise_casting`, before the cache.", _QUANTISED
)
def _float8(name: str) -> Outcome:
    return as_reference(_store_in_float8, name)


@THEME.situation(
    "weights stored in float8 between runs", "`enable_layerwise_casting` after the first run.", FEW
)
def _float8_between(name: str) -> Outcome:
    return between(_store_in_float8, name)


class _Int8Linear(nn.Module):
    """A linear layer whose weights are int8 with a scale for every row: weight-only quantisation."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scale = layer.weight.detach().abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
        self.register_buffer("weight", (layer.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def _store_in_int8(subject: Subject) -> None:
    for transformer in subject.transformers:
        for part in [*transformer.modules()]:
            for name, child in [*part.named_children()]:
                if type(child) is nn.Linear:
                    setattr(part, name, _Int8Linear(child))


@THEME.situation(
    "weights stored in int8", "Weight-only: layers in place of `nn.Linear`, before the cache.", _QUANTISED
)
def _int8(name: str) -> Outcome:
    return as_reference(_store_in_int8, name)


@THEME.situation(
    "weights stored in int8 between runs",
    "Layers put in place of `nn.Linear` after the first run.",
    FEW,
)
def _int8_between(name: str) -> Outcome:
    return between(_store_in_int8, name)


@THEME.situation("other weights loaded", "`load_state_dict` between runs.", MOST)
def _loaded(name: str) -> Outcome:
    def change(subject: Subject) -> None:
        for transformer in subject.transformers:
            transformer.load_state_dict({k: v * 0.9 for k, v in transformer.state_dict().items()})

    return between(change, name)


@THEME.situation(
    "channels last",
    "`to(memory_format=torch.channels_last)` between runs.",
    ("sd3", "pixart", "sana", "dit", "lumina2"),
)
def _channels_last(name: str) -> Outcome:
    return between(lambda s: s.transformer.to(memory_format=torch.channels_last), name)
