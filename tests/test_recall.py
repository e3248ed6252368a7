"""What only the blocks read, on skipped steps: it is not computed, and its numbers reach nothing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import hicache.fast
from hicache import HiCacheConfig
from hicache.hooks import recall, transformer
from tests.support import models, pipelines

EVERY_THIRD = HiCacheConfig(interval=3)
# a pipeline a model of which the text's embedder is known
NAMES = ("chroma", "flux2", "flux", "hunyuan", "ltx", "pixart", "qwen", "sd3", "sana")


def drawn(pipe: Any, arguments: Any, granularity: str) -> Tensor:
    """By its cached pipeline, twice: the second has what the first remembered."""
    with hicache.fast.apply(pipe, EVERY_THIRD, granularity=granularity):
        return torch.cat([pipelines.draw(pipe, arguments), pipelines.draw(pipe, arguments)])


def known(model: nn.Module) -> list[nn.Module]:
    return [getattr(model, name) for name in recall.TEXT[type(model).__name__]]


def test_every_model_of_the_table_is_tried():
    found = {type(pipelines.build(name)[0].transformer).__name__ for name in NAMES}
    assert found == set(recall.TEXT)


@pytest.mark.parametrize("granularity", ["module", "stack"])
@pytest.mark.parametrize("name", NAMES)
def test_embedders_of_text_run_at_full_steps_alone(
    name: str, granularity: str, monkeypatch: pytest.MonkeyPatch
):
    pipe, arguments = pipelines.build(name)
    ran: Counter[nn.Module] = Counter()
    embedders = known(pipe.transformer)
    kinds = {type(embedder) for embedder in embedders}
    for kind in kinds:
        own = kind.forward

        def counted(self: Any, *args: Any, own: Any = own, **kwargs: Any) -> Any:
            ran[self] += 1
            return own(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", counted)
    with hicache.fast.apply(pipe, EVERY_THIRD, granularity=granularity) as handle:
        picture = pipelines.draw(pipe, arguments)
        stats = handle.stats
        assert stats.skipped_steps
        full = sum(context.full_steps for context in stats.contexts.values())
        assert [ran[embedder] for embedder in embedders] == [full] * len(embedders)
        assert all(type(embedder) in kinds for embedder in embedders)
    monkeypatch.setattr(recall, "TEXT", {})
    with hicache.fast.apply(pipe, EVERY_THIRD, granularity=granularity):
        assert torch.equal(pipelines.draw(pipe, arguments), picture)


@pytest.mark.few(8)
@pytest.mark.parametrize("granularity", ["module", "stack"])
@pytest.mark.parametrize("name", NAMES)
def test_their_numbers_reach_nothing(name: str, granularity: str, monkeypatch: pytest.MonkeyPatch):
    pipe, arguments = pipelines.build(name)
    picture = drawn(pipe, arguments, granularity)
    spoilt: list[Any] = []

    def spoil(leaf: Any) -> Any:
        spoilt.append(leaf)
        return torch.full_like(leaf, torch.nan) if isinstance(leaf, Tensor) else leaf

    monkeypatch.setattr(transformer, "_detached", spoil)
    assert torch.equal(drawn(pipe, arguments, granularity), picture)
    assert len(spoilt) >= len(known(pipe.transformer))


def test_gradients_hold_on_to_nothing():
    """A loop of one's own may have them enabled: what is remembered is no part of a graph of autograd."""
    model, call = models.build("flux")
    seen: list[bool] = []
    embedder = model.context_embedder
    embedder.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    with hicache.fast.apply(model, EVERY_THIRD, granularity="stack", cuda_graphs=False) as handle:
        for step in range(7):
            model(**call(1 - step / 8))
        assert handle.stats.skipped_steps
    assert seen == [True, True, True, False, False, True, False]


def test_a_subclass_may_have_another_use_for_them():
    class Mine(diffusers.FluxTransformer2DModel):
        pass

    model, _ = models.build("flux")
    assert model.context_embedder in list(recall.for_blocks_alone(model))
    model.__class__ = Mine
    assert list(recall.for_blocks_alone(model)) == [model.pos_embed]


def test_a_model_is_left_as_it_was():
    pipe, _ = pipelines.build("qwen")
    before = [(type(embedder), dict(vars(embedder))) for embedder in known(pipe.transformer)]
    with hicache.fast.apply(pipe, EVERY_THIRD):
        assert [vars(embedder).keys() for embedder in known(pipe.transformer)] != [
            attributes.keys() for _, attributes in before
        ]
    assert all(
        type(embedder) is kind and dict(vars(embedder)) == attributes
        for embedder, (kind, attributes) in zip(known(pipe.transformer), before, strict=True)
    )
