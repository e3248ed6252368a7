"""Gates from the rows of modulation layers: equal to the whole layer's, whatever has become of the layer."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import hicache.fast
from hicache import HiCacheConfig
from hicache.adapters.gates import GateRows, Gates
from tests.support.comparisons import relative_rms
from tests.support.runs import by_fast, by_reference, recorded, recorded_in, replay
from tests.support.schedulers import CountingScheduler

CONFIG = HiCacheConfig(interval=3, order=2, sigma=0.5, warmup=3)
WIDTH, CHANNELS, BATCH = 24, 16, 3
ROWS = [((2,), 3), ((2, 5), 6), ((2, 5, 8), 9), ((1, 3), 4), ((2,), 6)]
rows_and_parts = pytest.mark.parametrize(("rows", "parts"), ROWS, ids=[f"{r}of{p}" for r, p in ROWS])


class Owner(nn.Module):
    def __init__(self, parts: int, bias: bool = True, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.linear: Any = nn.Linear(WIDTH, parts * CHANNELS, bias=bias, dtype=dtype)


def activated(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(5), dtype=dtype)


def wanted(layer: nn.Module, rows: tuple[int, ...], parts: int, x: Tensor) -> Tensor:
    """``[rows, batch, channels]`` of all that the layer gives."""
    return torch.stack([layer(x).chunk(parts, dim=-1)[row] for row in rows])


@torch.no_grad()
def got(rows: GateRows, x: Tensor) -> Tensor:
    out = torch.full((rows.count, len(x), CHANNELS), torch.nan, dtype=x.dtype)
    rows.write(x, out)
    return out


@rows_and_parts
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_are_the_layers(rows: tuple[int, ...], parts: int, bias: bool, dtype: torch.dtype):
    owner = Owner(parts, bias, dtype)
    x = activated(dtype)
    exact = wanted(copy.deepcopy(owner.linear).double(), rows, parts, x.double())
    ours = got(GateRows(owner, "linear", rows, parts), x)
    theirs = wanted(owner.linear, rows, parts, x)
    tiny = 1e-15
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + tiny
    assert relative_rms(ours.double(), exact) <= 2 * relative_rms(theirs.double(), exact) + tiny


class Quantised(nn.Linear):
    """A subclass that computes something of its own from its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).round(decimals=1)


class Adapted(nn.Module):
    """As LoRA wraps a layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.more = nn.Linear(WIDTH, base.out_features, dtype=base.weight.dtype)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.more(x)


def _subclass(owner: Owner) -> None:
    plain, owner.linear = owner.linear, Quantised(WIDTH, owner.linear.out_features, dtype=torch.float64)
    owner.linear.load_state_dict(plain.state_dict())


def _wrapped(owner: Owner) -> None:
    owner.linear = Adapted(owner.linear)


def _pre_hook(owner: Owner) -> None:
    owner.linear.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def _hook(owner: Owner) -> None:
    owner.linear.register_forward_hook(lambda module, args, output: output + 1)


def _forward_of_the_instance(owner: Owner) -> None:
    forward = owner.linear.forward
    owner.linear.forward = lambda x: forward(x) - 1


def _parametrized(owner: Owner) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    nn.utils.parametrize.register_parametrization(owner.linear, "weight", Doubled())


def _pruned(owner: Owner) -> None:
    """Its weight is a tensor that a pre-hook computes."""
    mask = torch.arange(owner.linear.weight.numel()).view_as(owner.linear.weight) % 3 > 0
    prune.custom_from_mask(owner.linear, "weight", mask)


def _offloaded(owner: Owner) -> None:
    accelerate.cpu_offload(owner, execution_device=torch.device("cpu"))
    assert owner.linear.weight.is_meta


def _weight_subclass(owner: Owner) -> None:
    """A weight that knows how to multiply by itself, as quantised ones do."""

    class Packed(Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = super().__torch_function__(function, types, args, kwargs or {})
            return result * 3 if function is nn.functional.linear else result

    owner.linear.weight = nn.Parameter(owner.linear.weight.detach().as_subclass(Packed))


CHANGES: dict[str, Callable[[Owner], None]] = {
    "subclass": _subclass,
    "wrapped": _wrapped,
    "pre-hook": _pre_hook,
    "hook": _hook,
    "forward of the instance": _forward_of_the_instance,
    "parametrized": _parametrized,
    "pruned": _pruned,
    "offloaded": _offloaded,
    "subclass of the weight": _weight_subclass,
}


@pytest.mark.parametrize("late", [False, True], ids=["before", "after use"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_layers_that_are_not_plain_are_called(change: Callable[[Owner], None], late: bool):
    owner, x = Owner(6), activated()
    rows = GateRows(owner, "linear", (2, 5), 6)
    plain = wanted(owner.linear, (2, 5), 6, x)
    if late:
        torch.testing.assert_close(got(rows, x), plain)
    change(owner)
    now = wanted(owner.linear, (2, 5), 6, x)
    if change is not _offloaded:
        assert not torch.allclose(now, plain)
    torch.testing.assert_close(got(rows, x), now.as_subclass(Tensor), rtol=0, atol=1e-14)


def test_a_layer_of_another_dtype_is_called():
    """As in models that keep some layers in fp32, or multiply under autocast."""
    owner, x = Owner(6, dtype=torch.float32), activated(torch.float32)
    rows = GateRows(owner, "linear", (2, 5), 6)
    out = torch.full((2, BATCH, CHANNELS), torch.nan, dtype=torch.bfloat16)
    with torch.no_grad():
        rows.write(x, out)
    torch.testing.assert_close(out, wanted(owner.linear, (2, 5), 6, x).bfloat16(), rtol=0, atol=0)


def _in_place(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight.mul_(2)
        layer.bias.add_(1)


def _other_data(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data * 2
    layer.bias.data = layer.bias.data + 1


def _only_the_bias(layer: nn.Linear) -> None:
    layer.bias = nn.Parameter(layer.bias.detach() - 3)


def _no_bias(layer: nn.Linear) -> None:
    layer.bias = None


def _other_parameters(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(-layer.weight.detach())


def _to_and_back(layer: nn.Linear) -> None:
    layer.to(torch.float32)
    layer.to(torch.float64)


def _transposed_storage(layer: nn.Linear) -> None:
    """The same address, other strides."""
    layer.weight.data = layer.weight.data.t().contiguous().t().mul_(2)


@pytest.mark.parametrize(
    "change",
    [_in_place, _other_data, _only_the_bias, _no_bias, _other_parameters, _to_and_back, _transposed_storage],
    ids=lambda change: change.__name__.strip("_"),
)
def test_weights_that_change_between_runs(change: Callable[[nn.Linear], None]):
    owner, x = Owner(6), activated()
    rows = GateRows(owner, "linear", (2, 5), 6)
    got(rows, x)
    change(owner.linear)
    torch.testing.assert_close(got(rows, x), wanted(owner.linear, (2, 5), 6, x), rtol=0, atol=1e-14)


def test_gates_of_a_model_come_in_one_tensor():
    owners = [Owner(6), Owner(3), Owner(9, bias=False)]
    taken = ((2, 5), (2,), (2, 5, 8))
    gates = Gates(
        [GateRows(o, "linear", r, p) for o, r, p in zip(owners, taken, (6, 3, 9), strict=True)], ones=2
    )
    for batch in (BATCH, 1, BATCH):
        x = activated()[:batch]
        with torch.no_grad():
            found = gates.of(x, CHANNELS)
            expected = [wanted(o.linear, r, p, x) for o, r, p in zip(owners, taken, (6, 3, 9), strict=True)]
        assert found.shape == (8, batch, CHANNELS)
        assert found.is_contiguous()
        torch.testing.assert_close(found[:6], torch.cat(expected), rtol=0, atol=1e-14)
        assert torch.equal(found[6:], torch.ones_like(found[6:]))


def test_gates_of_a_form_keep_their_place():
    """A CUDA graph goes on writing to where it was captured, whatever has been called since."""
    gates = Gates([GateRows(Owner(3), "linear", (2,), 3)])
    x = activated()
    with torch.no_grad():
        place = gates.of(x, CHANNELS).data_ptr()
        assert gates.of(x.repeat(3, 1), CHANNELS).data_ptr() != place
        assert gates.of(x, CHANNELS).data_ptr() == place


def test_gates_of_embeddings_of_their_own():
    owners = [Owner(6), Owner(6)]
    gates = Gates([GateRows(owner, "linear", (2, 5), 6) for owner in owners])
    xs = [activated(), -activated()]
    with torch.no_grad():
        found = gates.of_each([lambda x=x: x for x in xs], torch.empty(BATCH, 1, CHANNELS, dtype=xs[0].dtype))
        expected = [wanted(o.linear, (2, 5), 6, x) for o, x in zip(owners, xs, strict=True)]
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-14)


def storages() -> dict[int, int]:
    """Bytes of every tensor memory there is, by its address."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    parts = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return {part.data_ptr(): part.nbytes() for part in parts if part.nbytes()}


def test_no_copy_of_the_weights_is_made():
    """Neither while the gates are computed nor after."""
    torch.manual_seed(0)
    owner = Owner(6)
    owner.linear = nn.Linear(512, 6 * CHANNELS)
    owner.linear.requires_grad_(False)
    rows = GateRows(owner, "linear", (2, 5), 6)
    out, x = torch.empty(2, 1, CHANNELS), torch.randn(1, 512)
    before = storages()
    with torch.profiler.profile(profile_memory=True) as profile:
        rows.write(x, out)
    assert storages() == before
    taken = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert taken < owner.linear.weight.nbytes / 6  # a third of the rows is gates
    torch.testing.assert_close(out[:, 0], owner.linear(x).view(6, -1)[[2, 5]])


# In a model, between its runs.


@pytest.mark.parametrize("change", ["wrapped", "subclass", "forward of the instance", "hook"])
@pytest.mark.parametrize("name", ["flux", "sd3", "dit", "cogvideox"])
def test_modulation_layers_that_change_between_runs(name: str, change: str):
    """LoRA on the modulation, after the cache was put in: in later runs its gates count."""
    model, run = recorded_in(name, torch.float64)

    def alter(layer: nn.Linear) -> nn.Module:
        if change == "wrapped":
            return _Halved(layer)
        if change == "subclass":
            layer.__class__ = _HalvedLinear
        elif change == "hook":
            layer.register_forward_hook(lambda module, args, output: output * 0.5)
        else:
            forward = layer.forward
            layer.forward = lambda x: forward(x) * 0.5  # type: ignore[method-assign]
        return layer

    scheduler = CountingScheduler()
    with hicache.fast.apply(model, CONFIG, scheduler=scheduler, granularity="module"):
        plain = replay(model, run, scheduler)
        for block in model.transformer_blocks:
            block.norm1.linear = alter(block.norm1.linear)
        altered = replay(model, run, scheduler)
    assert relative_rms(altered, by_reference(model, run, CONFIG)) <= 1e-10
    assert relative_rms(altered, plain) > 1e-3


class _Halved(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) * 0.5


class _HalvedLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 0.5


LORA_TARGETS = {
    "flux": ["norm1.linear", "norm.linear", "proj_out", "to_q", "ff.net.2"],
    "qwen": ["img_mod.1", "to_q", "net.2"],
    "sd3": ["norm1.linear", "to_q", "ff.net.2"],
    "sana": ["to_q", "conv_point"],
    "wan": ["to_q", "ffn.net.2"],
}


@pytest.mark.parametrize("name", LORA_TARGETS)
def test_lora_comes_and_goes(name: str):
    """On the modulation, on features and inside them; put in, switched off, fused and deleted."""
    peft = pytest.importorskip("peft", reason="LoRA of diffusers models needs peft")
    model, run = recorded_in(name, torch.float64)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=LORA_TARGETS[name], init_lora_weights=False)
    tolerance = 1e-6 if name == "wan" else 1e-10
    scheduler = CountingScheduler()
    adapted = copy.deepcopy(model)
    adapted.add_adapter(config)
    # the adapters' weights are drawn at random, and in fp32
    weights = {key: value.double() for key, value in adapted.state_dict().items()}
    expected = by_reference(adapted.double(), run, CONFIG)
    with hicache.fast.apply(model, CONFIG, scheduler=scheduler, granularity="module"):
        plain = replay(model, run, scheduler)
        assert relative_rms(expected, plain) > 0.01
        model.add_adapter(config)
        model.double().load_state_dict(weights)
        assert relative_rms(replay(model, run, scheduler), expected) <= tolerance
        model.disable_adapters()
        assert relative_rms(replay(model, run, scheduler), plain) <= tolerance
        model.enable_adapters()
        model.fuse_lora()
        assert relative_rms(replay(model, run, scheduler), expected) <= tolerance
        model.unfuse_lora()
        model.delete_adapters("default")
        assert relative_rms(replay(model, run, scheduler), plain) <= tolerance


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_weights_loaded_between_runs_count(name: str):
    model, run = recorded_in(name, torch.float64)
    scheduler = CountingScheduler()
    with hicache.fast.apply(model, CONFIG, scheduler=scheduler, granularity="module"):
        plain = replay(model, run, scheduler)
        for index, parameter in enumerate(model.parameters()):
            if index % 2:
                parameter.data = parameter.data * 0.7
            else:
                parameter.data.mul_(0.7)
        altered = replay(model, run, scheduler)
    assert relative_rms(altered, by_fast(model, run, CONFIG)) <= 1e-12
    assert relative_rms(altered, plain) > 1e-3


def test_a_cached_model_holds_its_history_and_no_weights():
    model, run = recorded("flux")
    model = copy.deepcopy(model).requires_grad_(False)
    scheduler = CountingScheduler()
    replay(model, run, scheduler)
    before = storages()
    with hicache.fast.apply(model, CONFIG, scheduler=scheduler, granularity="module") as handle:
        replay(model, run, scheduler)
        after = storages()
        more = sum(size for address, size in after.items() if address not in before)
        history = handle.stats.history_bytes
        [weights] = {block.norm1.linear.weight.nbytes for block in model.transformer_blocks}
        assert history <= more < history + weights


@pytest.mark.parametrize(
    "name",
    [
        "flux",
        "wan",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("sd3", "qwen", "hunyuan", "cogvideox", "dit", "chroma")
        ),
    ],
)
def test_weights_that_move_leave_no_memory_behind(name: str):
    """Offloading a cached model frees all of it: nothing holds on to a view of where a weight was."""
    model, run = recorded(name)
    model = copy.deepcopy(model).requires_grad_(False)
    scheduler = CountingScheduler()
    with hicache.fast.apply(model, CONFIG, scheduler=scheduler, granularity="module"):
        expected = replay(model, run, scheduler)
        old = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        copies = [parameter.data.clone() for parameter in model.parameters()]
        assert old <= set(storages())
        for parameter, moved in zip(model.parameters(), copies, strict=True):
            parameter.data = moved
        assert not old & set(storages())
        assert torch.equal(replay(model, run, scheduler), expected)
