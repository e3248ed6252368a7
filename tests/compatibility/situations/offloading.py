"""Weights that are brought in for as long as they are used."""

from __future__ import annotations

import functools
import tempfile
from typing import Any, Final

import accelerate
import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

from tests.compatibility.checks import Change, Outcome, afterwards, as_reference, between
from tests.compatibility.registry import Theme
from tests.compatibility.subjects import FAMILIES, FEW, MOST, Subject

THEME: Final = Theme("Offloading")
_CPU: Final = torch.device("cpu")


def offload_blocks(subject: Subject) -> None:
    """Group offloading, a block a group."""
    _groups(subject, "block_level", num_blocks_per_group=1)


def _offload_leaves(subject: Subject) -> None:
    _groups(subject, "leaf_level")


def _groups(subject: Subject, kind: str, **options: Any) -> None:
    for transformer in subject.transformers:
        apply_group_offloading(transformer, _CPU, _CPU, kind, **options)


def _offload_to_disk(subject: Subject) -> None:
    folder = subject.notes["folder"] = tempfile.TemporaryDirectory()
    _groups(subject, "block_level", num_blocks_per_group=1, offload_to_disk_path=folder.name)


def _offload_sequentially(subject: Subject) -> None:
    """As ``enable_sequential_cpu_offload`` does: weights are on the meta device while they are not used."""
    parts = subject.transformers if isinstance(subject.pipe, nn.Module) else subject.pipe.components.values()
    for part in parts:
        if isinstance(part, nn.Module):
            accelerate.cpu_offload(part, _CPU)


def _offload_model(subject: Subject) -> None:
    """As ``enable_model_cpu_offload`` does."""
    for transformer in subject.transformers:
        accelerate.cpu_offload_with_hook(transformer, _CPU)


_WAYS: Final[dict[str, tuple[str, Change, tuple[str, ...]]]] = {
    "model offload": ("accelerate's hook, as of `enable_model_cpu_offload`", _offload_model, MOST),
    "sequential offload": ("as of `enable_sequential_cpu_offload`", _offload_sequentially, MOST),
    "group offload of blocks": ("diffusers' `block_level`, a block a group", offload_blocks, FAMILIES),
    "group offload of leaves": ("diffusers' `leaf_level`", _offload_leaves, MOST),
    "group offload to disk": (
        "`offload_to_disk_path`",
        _offload_to_disk,
        [n for n in MOST if n in FAMILIES and n != "dit"],
    ),
}
for _name, (_what, _way, _models) in _WAYS.items():
    THEME.situation(_name, f"{_what[0].upper()}{_what[1:]}, before the cache.", _models)(
        functools.partial(as_reference, _way)
    )
    THEME.situation(
        f"{_name} between runs",
        f"{_what[0].upper()}{_what[1:]}, after the first run.",
        ("flux", "qwen", "wan22"),
    )(functools.partial(between, _way))


@THEME.situation("group offload that ends", "Its hooks are taken away between runs.", FEW)
def _ends(name: str) -> Outcome:
    def event(subject: Subject, handle: Any) -> None:
        offload_blocks(subject)
        subject.draw()
        for transformer in subject.transformers:
            for part in transformer.modules():
                registry = getattr(part, "_diffusers_hook", None)
                for hook in list(getattr(registry, "hooks", ())):
                    registry.remove_hook(hook, recurse=False)

    return afterwards(event, name)
