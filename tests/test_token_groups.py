"""A timestep for every token: groups of neighbours share gates, and that they do is not taken on trust."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hicache.fast
from hicache import HiCacheConfig
from hicache.adapters import registry
from hicache.runtime import token_layout
from tests.support import pipelines
from tests.support.comparisons import first, relative_rms
from tests.support.runs import Run, by_fast, by_reference, recorded_in, replay
from tests.support.schedulers import CountingScheduler

CONFIG = HiCacheConfig(interval=4, order=2, warmup=3)


def masked(name: str, *runs_of_tokens: int, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Run]:
    """The calls of an unconditioned video, with a timestep for every token: half, zero, half, zero, …

    Args:
        name: of the pipeline.
        *runs_of_tokens: lengths of the runs; the rest has the timestep of now.
        dtype: of the model.
    """
    model, run = recorded_in(name, dtype)
    run = copy.deepcopy(run)
    for calls in run:
        for _, kwargs in calls:
            hidden, time = kwargs["hidden_states"], kwargs["timestep"]
            tokens = hidden.shape[1] if name == "ltx" else hidden[0, 0].numel() // 4
            factors = torch.ones(tokens, dtype=time.dtype)
            start = 0
            for index, length in enumerate(runs_of_tokens):
                factors[start : start + length] = 0.5 if index % 2 == 0 else 0.0
                start += length
            kwargs["timestep"] = time.reshape(-1, 1) * factors
    return model, run


@pytest.mark.parametrize(
    "lengths", [(), (4,), (2, 4), (6,)], ids=["all alike", "a frame", "unequal", "most of them"]
)
def test_ltx_equals_the_reference(lengths: tuple[int, ...]):
    model, run = masked("ltx", *lengths)
    expected = by_reference(model, run, CONFIG)
    assert relative_rms(by_fast(model, run, CONFIG), expected) <= 1e-10
    assert relative_rms(by_fast(model, run, CONFIG, "stack"), expected) > 1e-4


@pytest.mark.parametrize("lengths", [(), (1,)], ids=["all alike", "a frame"])
def test_wan_equals_the_reference(lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    """In float64 throughout: its blocks compute in ``.float()``."""
    name = "wan_ti2v_picture" if lengths else "wan_ti2v"
    model, run = recorded_in(name, torch.float64)
    single = Tensor.float
    monkeypatch.setattr(Tensor, "float", lambda self: self if self.dtype == torch.float64 else single(self))
    expected = by_reference(model, run, CONFIG)
    assert relative_rms(by_fast(model, run, CONFIG), expected) <= 1e-10


def test_the_history_is_as_large_as_without():
    """Groups are a view of it."""
    held = {}
    for name in ("ltx", "ltx_picture"):
        pipe, arguments = pipelines.build(name)
        with hicache.fast.apply(pipe, CONFIG) as handle:
            pipelines.draw(pipe, arguments, 6)
            held[name] = handle.stats.history_bytes
            assert handle.stats.granularity == "module"
    assert held["ltx"] == held["ltx_picture"]


def test_gates_are_of_groups(monkeypatch: pytest.MonkeyPatch):
    """Three features of two samples, of two frames each: not of four tokens more."""
    pipe, arguments = pipelines.build("ltx_picture")
    adapter = type(registry.find(pipe.transformer))
    gates, shapes = adapter.gates, set()

    def seen(self: Any, block_kwargs: Any, base: Tensor) -> Tensor:
        found: Tensor = gates(self, block_kwargs, base)
        shapes.add((found.shape[:2], base.shape[:2]))
        return found

    monkeypatch.setattr(adapter, "gates", seen)
    with hicache.fast.apply(pipe, CONFIG, granularity="module"):
        pipelines.draw(pipe, arguments, 6)
    assert shapes == {((3, 4), (4, 4))}


def test_a_picture_given_in_the_next_run_only():
    """The same forms of arguments, other groups."""
    (model, plain), (_, given) = masked("ltx"), masked("ltx", 4)
    runs = [plain, given, plain]
    expected = [by_reference(model, run, CONFIG) for run in runs]
    scheduler = CountingScheduler()
    with hicache.fast.apply(model, CONFIG, scheduler=scheduler, granularity="module"):
        for run, theirs in zip(runs, expected, strict=True):
            assert relative_rms(replay(model, run, scheduler), theirs) <= 1e-10


# Groups that change in the middle of a run.


def changing(at: int) -> tuple[nn.Module, Run]:
    """A picture is given from a step on."""
    (model, plain), (_, given) = masked("ltx"), masked("ltx", 4)
    return model, [*plain[:at], *given[at:]]


def played(model: nn.Module, run: Run) -> tuple[list[Tensor], list[bool]]:
    """What is said at every step, and whether blocks ran for it."""
    scheduler, said, ran = CountingScheduler(), [], []
    hook = model.transformer_blocks[0].register_forward_hook(lambda *_: ran.append(len(said)))
    with hicache.fast.apply(model, CONFIG, scheduler=scheduler, granularity="module"), torch.no_grad():
        scheduler.set_timesteps(len(run))
        for [(args, kwargs)] in run:
            said.append(first(model(*args, **kwargs)))
            scheduler.step()
    hook.remove()
    return said, [step in ran for step in range(len(run))]


def test_a_change_runs_in_full():
    model, run = changing(at=8)
    before, steps = played(model, masked("ltx")[1])
    assert not steps[8]
    said, ran = played(model, run)
    assert ran[:8] == steps[:8]
    assert ran[8]  # in place of gates that would be another group's
    assert not all(ran[9:])
    assert all(map(torch.equal, said[:8], before[:8]))
    args, kwargs = run[8][0]
    with torch.no_grad():
        assert torch.equal(said[8], first(model(*args, **kwargs)))


def test_a_device_that_answers_late_is_told_of_a_step_later(monkeypatch: pytest.MonkeyPatch):
    def late(flag: Tensor) -> Any:
        answers = [None, bool(flag)]
        return lambda: answers.pop(0) if len(answers) > 1 else answers[0]

    monkeypatch.setattr(token_layout, "reading", late)
    model, run = changing(at=7)
    with pytest.warns(RuntimeWarning, match="some tokens were forecast as others"):
        _, ran = played(model, run)
    assert not ran[7]
    assert ran[8]
    assert not all(ran[9:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        played(model, masked("ltx", 4)[1])


def test_groups_that_become_alike_are_no_change():
    """Of a condition that is not quite kept, once the timestep has fallen below its own."""
    model, run = masked("ltx", 4)
    for step, calls in enumerate(run):
        if step >= 7:
            for _, kwargs in calls:
                kwargs["timestep"] = kwargs["timestep"][:, -1:].expand(kwargs["timestep"].shape)
    expected = by_reference(model, run, CONFIG)
    assert relative_rms(by_fast(model, run, CONFIG), expected) <= 1e-10


@pytest.mark.parametrize(
    ("times", "group"),
    [
        ([[5, 5, 5, 5, 5, 5]], 6),
        ([[0, 0, 5, 5, 5, 5]], 2),
        ([[0, 0, 0, 5, 5, 5]], 3),
        ([[0, 0, 5, 5, 5, 5], [0, 0, 0, 0, 5, 5]], 2),
        ([[0, 5, 5, 5, 5, 5]], None),
        ([[5, 5, 5, 5]], None),  # of other tokens than the hidden state's
    ],
)
def test_the_length_of_groups(times: list[list[int]], group: int | None):
    adapter = registry.find(pipelines.build("ltx")[0].transformer)
    given = {"timestep": torch.tensor(times), "hidden_states": torch.zeros(len(times), 6, 8)}
    layout = token_layout.token_layout(adapter, given, torch.Size([len(times), 6, 32]))
    assert layout.group == group
    assert (layout.refusal is None) == (group is not None)


def test_the_check_waits_for_its_device(monkeypatch: pytest.MonkeyPatch):
    """Asked again before it has answered, it does not forget."""
    flags: list[Tensor] = []

    def never(flag: Tensor) -> Any:
        flags.append(flag)
        return lambda: None

    monkeypatch.setattr(token_layout, "reading", never)
    adapter = registry.find(pipelines.build("ltx")[0].transformer)
    layout = token_layout.TokenLayout(range(4), 2)
    check = token_layout.LayoutCheck(adapter, layout, {})
    for times in ([0, 0, 5, 5], [0, 0, 0, 5], [0, 0, 5, 5]):
        given = {"timestep": torch.tensor([times]), "hidden_states": torch.zeros(1, 4, 8)}
        assert check.holds(given, gated=True)
    assert [bool(flag) for flag in flags] == [True, False, False]
    assert check.holds(given, gated=False)
    assert len(flags) == 3
