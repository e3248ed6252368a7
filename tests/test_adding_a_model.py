"""The code of docs/adding-a-model.md, as it stands there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hicache.fast
from hicache import HiCacheConfig
from hicache.adapters import registry
from hicache.adapters.base import ModuleOutput
from hicache.reference.history import Feature as PaperFeature
from hicache.schedule import is_full
from tests.support.comparisons import relative_rms, snapshot
from tests.support.pages import code_of
from tests.support.schedulers import CountingScheduler

PAGE = "adding-a-model.md"
CONFIG = HiCacheConfig(interval=4, order=2, warmup=3)
TIMES = torch.linspace(1, 0.1, 14, dtype=torch.float64)


@pytest.fixture(scope="module")
def page() -> Iterator[dict[str, Any]]:
    """What the page's code defines, run from top to bottom."""
    blocks = code_of(PAGE)
    assert len(blocks) == 3
    names: dict[str, Any] = {"__name__": "adding_a_model"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))
        torch.manual_seed(0)
        for block in blocks:
            exec(compile(block, PAGE, "exec"), names)
        yield names


def run(model: nn.Module, scheduler: CountingScheduler) -> Tensor:
    """One set of latents of two pictures: what the model says at every time."""
    latents = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    scheduler.set_timesteps(len(TIMES))
    said = []
    with torch.no_grad():
        for t in TIMES:
            said.append(model(latents, timestep=t.expand(2)))
            scheduler.step()
    return torch.stack(said)


def paper(model: nn.Module) -> Tensor:
    """Blocks run at every step, with forecasts in place of what attention and MLP give."""
    step = -1
    last_full: int | None = None
    histories: dict[nn.Module, PaperFeature] = defaultdict(lambda: PaperFeature(CONFIG))

    def start(*_: Any) -> None:
        nonlocal step, last_full
        step += 1
        if is_full(CONFIG, step, last_full, len(TIMES)):
            last_full = step

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        if step == last_full:
            histories[module].record(step, output)
            return None
        return histories[module].forecast(step)

    hooks = [model.register_forward_pre_hook(start)]
    for block in model.blocks:
        hooks += [part.register_forward_hook(replace) for part in (block.attention, block.mlp)]
    said = run(model, CountingScheduler())
    for hook in hooks:
        hook.remove()
    return said


def test_the_page_runs_and_is_the_paper(page: dict[str, Any]):
    assert page["handle"].stats.granularity == "module"
    assert page["handle"].stats.skipped_steps == 12
    assert page["latents"].isfinite().all()

    model = page["Pebble"]().double().eval()
    uncached, before = run(model, CountingScheduler()), snapshot(model)
    expected = paper(model)
    scheduler = CountingScheduler()
    with hicache.fast.apply(model, CONFIG, scheduler=scheduler) as handle:
        ours = run(model, scheduler)
        assert handle.stats.choices["transformer"].startswith("module: ")
    assert relative_rms(ours, expected) <= 1e-12
    assert relative_rms(expected, uncached) > 1e-4
    assert snapshot(model) == before


def test_subclasses_are_known_and_replacing_an_adapter_replaces_it(page: dict[str, Any]):
    class Boulder(page["Pebble"]):
        pass

    class Other(page["PebbleAdapter"]):
        pass

    assert type(registry.find(Boulder())) is page["PebbleAdapter"]
    registry.register(Boulder, Other)
    assert type(registry.find(Boulder())) is Other
    assert type(registry.find(page["Pebble"]())) is page["PebbleAdapter"]
    assert "Boulder" in registry.known()


@pytest.mark.parametrize("arguments", [(nn.Linear(2, 2), "PebbleAdapter"), ("Pebble", nn.Linear)])
def test_what_is_no_adapter_is_not_registered(page: dict[str, Any], arguments: tuple[Any, Any]):
    model_class, adapter = (page.get(a, a) if isinstance(a, str) else a for a in arguments)
    known = registry.known()
    with pytest.raises(TypeError, match="to be a subclass of"):
        registry.register(model_class, adapter)
    assert registry.known() == known


def wrong(page: dict[str, Any], kind: str) -> type[Any]:
    """An adapter with one mistake."""
    base = page["PebbleAdapter"]

    class Wrong(base):
        def __init__(self, module: nn.Module) -> None:
            super().__init__(module)
            if kind == "rows":  # scales in place of gates
                rows = [page["GateRows"](block, "modulation", (0, 2), 4) for block in module.blocks]
                self._gates = page["Gates"](rows)

        def outputs(self) -> list[ModuleOutput]:
            found = list(super().outputs())
            if kind == "element":  # the attention's tuple itself
                return [ModuleOutput(output.module, output.features) for output in found]
            if kind == "order":
                return [
                    ModuleOutput(o.module, ((f ^ 1, None),), o.element) for o in found for f, _ in o.features
                ]
            return found[:-1] if kind == "missing" else found

        def num_features(self, block_kwargs: Any) -> int:
            return 6

    return Wrong


@pytest.mark.parametrize("kind", ["rows", "element", "order", "missing"])
@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_a_wrong_adapter_is_found_out(page: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(registry._ADAPTERS, "Pebble", wrong(page, kind))
    model = page["Pebble"]().double().eval()
    before = snapshot(model)
    scheduler = CountingScheduler()
    with hicache.fast.apply(model, CONFIG, scheduler=scheduler, granularity="stack"):
        stack = run(model, scheduler)
    with hicache.fast.apply(model, CONFIG, scheduler=scheduler) as handle:
        with pytest.warns(RuntimeWarning, match="its stack is cached instead") as caught:
            assert torch.equal(run(model, scheduler), stack)
            assert torch.equal(run(model, scheduler), stack)
        assert len(caught) == 1
        assert handle.stats.granularity == "stack"
    with hicache.fast.apply(model, CONFIG, scheduler=scheduler, granularity="module"):
        with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match="granularity='module'"):
            run(model, scheduler)
    assert snapshot(model) == before
