"""Private names of torch, diffusers and accelerate that hicache reads are where it looks for them.

One test a name: when a release moves one, the test names it and the function of hicache/compat to mend.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import torch.distributed as dist
from diffusers.hooks import HookRegistry
from diffusers.hooks.context_parallel import ContextParallelSplitHook
from diffusers.models._modeling_parallel import ContextParallelInput
from diffusers.models.attention import JointTransformerBlock
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from hicache import compat
from hicache.mixin import mix_in
from tests.support.models import flux_transformer


class Doubled(nn.Linear):
    """Mixed into a layer by the tests."""

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return super().forward(given) * self.__dict__["_hicache_factor"]


@pytest.fixture
def layer() -> nn.Linear:
    return nn.Linear(3, 3)


def moved(name: str, function: str) -> str:
    return f"{name} is not what it was: hicache.compat.{function} reads it"


def test_a_mixed_in_class_is_undone_exactly(layer: nn.Linear):
    given, before = torch.randn(2, 3), dict(vars(layer))
    expected = layer(given)
    undo = mix_in(layer, Doubled, "_hicache_factor", 2)
    other = nn.Linear(3, 3)
    undo_other = mix_in(other, Doubled, "_hicache_factor", 3)
    assert torch.equal(layer(given), expected * 2)
    assert type(layer) is type(other), "torch.compile tells blocks apart by their class"
    undo()
    undo_other()
    assert type(layer) is nn.Linear
    assert dict(vars(layer)) == before


def test_subclasses_of_tensor_without_torch_function():
    class Plain(torch.Tensor):
        __torch_function__ = compat.no_torch_function  # type: ignore[assignment]

    given = torch.ones(2).as_subclass(Plain)
    assert type(given + 1) is torch.Tensor, moved(
        "torch._C._disabled_torch_function_impl", "no_torch_function"
    )


def test_operators_with_kernels_of_their_own():
    add, linear = torch.ops.aten.add.Tensor, torch.ops.aten.linear.default
    found = compat.has_kernel(add, "cpu"), compat.has_kernel(add, "meta"), compat.has_kernel(linear, "cpu")
    assert found == (True, True, False), moved("torch._C._dispatch_has_kernel_for_dispatch_key", "has_kernel")


def test_children_of_a_list(layer: nn.Linear):
    assert compat.children_of_list(nn.ModuleList([layer])) == [layer], moved(
        "Module._modules", "children_of_list"
    )


def test_output_hooks(layer: nn.Linear):
    seen: list[torch.Tensor] = []
    others = layer.register_forward_hook(lambda module, args, output: None)
    compat.add_output_hook(layer, lambda module, args, output: seen.append(output))
    output = layer(torch.randn(1, 3))
    assert seen, moved("Module._forward_hooks", "add_output_hook")
    assert seen[0] is output
    assert compat.hook_keys(layer) == ([others.id], []), moved("Module._forward_hooks", "hook_keys")
    assert layer.__module__ != type(layer).__module__, "torch.compile takes what it holds for weights"
    compat.remove_output_hook(layer)
    assert "__module__" not in vars(layer)
    before = dict(vars(layer))
    compat.leave_sizes_open(layer)
    assert layer.__module__ != type(layer).__module__
    compat.fix_sizes(layer)
    assert vars(layer) == before
    others.remove()
    assert not compat.is_hooked(layer)
    before = layer.register_forward_pre_hook(lambda module, args: None)
    assert compat.is_hooked(layer), moved("Module._forward_pre_hooks", "is_hooked")
    assert compat.hook_keys(layer) == ([], [before.id])


def test_compiled_modules(layer: nn.Linear):
    assert compat.original_module(torch.compile(layer)) is layer, moved(
        "OptimizedModule._orig_mod", "original_module"
    )
    assert compat.original_module(layer) is layer
    assert not compat.is_compiled(layer)
    assert compat.is_compiled(nn.Sequential(torch.compile(layer))), moved(
        "OptimizedModule._orig_mod", "is_compiled"
    )
    outer = nn.Sequential(layer)
    layer.compile(backend="eager")
    assert compat.is_compiled(outer), moved("Module._compiled_call_impl", "is_compiled")


def test_inside_a_compiled_call(layer: nn.Linear):
    seen: list[bool] = []
    hook = torch.compiler.disable(lambda module, args: seen.append(compat.inside_compiled_call(module)))
    layer.register_forward_pre_hook(hook)
    layer(torch.randn(1, 3))
    torch.compile(layer, backend="eager")(torch.randn(1, 3))
    assert seen == [False, True], moved(
        "compile_wrapper of torch/_dynamo/eval_frame.py", "inside_compiled_call"
    )
    layer.compile(backend="eager")
    assert compat.inside_compiled_call(layer), moved("Module._compiled_call_impl", "inside_compiled_call")


def test_running_calls():
    class Call:
        def __call__(self, inner: Any, more: int) -> list[Any]:
            return list(compat.running_calls()) if inner is None else inner(None, more)

    inner, outer = Call(), Call()
    (first, variables), (second, _), *_ = outer(inner, 1)
    assert (first, second) == ([inner, None], [outer, inner])
    assert variables["more"] == 1


def test_a_thread_in_a_call():
    class Waiting(nn.Module):
        def forward(self) -> list[bool]:
            thread = threading.get_ident()
            return [compat.is_calling(thread, module) for module in (self, nn.Identity())]

    assert Waiting()() == [True, False], moved("Module._call_impl", "is_calling")
    assert not compat.is_calling(threading.get_ident(), nn.Identity())
    compiled: list[bool] = []
    layer = nn.Linear(2, 2)
    look = torch.compiler.disable(lambda *_: compiled.append(compat.is_calling(threading.get_ident(), layer)))
    layer.register_forward_pre_hook(look)
    layer.register_forward_hook(look)
    torch.compile(layer, backend="eager")(torch.ones(1, 2))
    assert compiled == [True, True], moved("torch_dynamo_resume", "is_calling")


def test_the_part_of_a_process():
    """Of two, in one: a process group that sends nothing."""
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        mesh = dist.init_device_mesh("cpu", (2,))
        config = SimpleNamespace(ulysses_anything=False, ring_anything=False, _flattened_mesh=mesh)
        block = JointTransformerBlock(8, 2, 4).eval()
        plan = {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)}
        hook = ContextParallelSplitHook(plan, config)
        HookRegistry.check_if_exists_or_initialize(block).register_hook(hook, "split")
        hidden, text = torch.randn(1, 6, 8), torch.randn(1, 4, 8)
        args, kwargs = compat.split_for_rank(block, (hidden,), {"encoder_hidden_states": text})
    finally:
        dist.destroy_process_group()
    assert torch.equal(args[0], hidden[:, 3:]), moved("ContextParallelSplitHook", "split_for_rank")
    assert kwargs["encoder_hidden_states"] is text
    args, _ = compat.split_for_rank(JointTransformerBlock(8, 2, 4), (hidden,), {})
    assert args[0] is hidden


def test_predictions_of_a_guider():
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=2.0)
    guider.set_state(step=0, num_inference_steps=2, timestep=torch.tensor(1))
    batches = guider.prepare_inputs({"text": (torch.ones(1), torch.zeros(1))})
    names = [compat.guider_prediction({"guider_state_batch": batch}) for batch in batches]
    assert names == ["pred_cond", "pred_uncond"], moved("BaseGuidance._identifier_key", "guider_prediction")
    assert compat.guider_prediction({}) is None


def test_sizes_that_are_open():
    given = torch.ones(2, 3)
    [alias] = compat.of_any_size((given,))
    assert alias.data_ptr() == given.data_ptr()
    assert alias._dynamo_weak_dynamic_indices == {0, 1}, moved("maybe_mark_dynamic", "of_any_size")
    assert not hasattr(given, "_dynamo_weak_dynamic_indices")
    assert compat.of_any_size("text") == "text"
    assert compat.take_equal_sizes_for_one(False), moved("use_duck_shape", "take_equal_sizes_for_one")
    assert not compat.take_equal_sizes_for_one(True)


@pytest.mark.parametrize("compiled", ["not", "before", "in place", "after"])
def test_calls_are_guarded(compiled: str):
    class Breaking(nn.Linear):
        broken = False

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            self.interrupt()
            return super().forward(given)

        @torch.compiler.disable
        def interrupt(self) -> None:
            if self.broken:
                raise KeyboardInterrupt

    model, failed = Breaking(3, 3), []
    called: nn.Module = model
    if compiled == "before":
        called = torch.compile(model, backend="eager")
    if compiled == "in place":
        model.compile(backend="eager")
    undo = compat.guard_calls(model, lambda: failed.append(True))
    if compiled == "after":
        called = torch.compile(model, backend="eager")
    called(torch.ones(1, 3))
    assert not failed
    model.broken = True
    with pytest.raises(KeyboardInterrupt):
        called(torch.ones(1, 3))
    assert failed, moved("Module._call_impl", "guard_calls")
    undo()
    assert type(model) is Breaking
    failed.clear()
    with pytest.raises(KeyboardInterrupt):
        called(torch.ones(1, 3))
    assert not failed


@pytest.mark.parametrize("compiled", ["not", "before", "in place", "after"])
def test_calls_are_left_out(compiled: str):
    """By both ways into a module, before its hooks; whoever waits for its thread sees that it is called."""
    model, hooked, seen = nn.Linear(3, 3), [], []
    model.register_forward_pre_hook(torch.compiler.disable(lambda *_: hooked.append(True)))
    called: nn.Module = model
    if compiled == "before":
        called = torch.compile(model, backend="eager")
    if compiled == "in place":
        model.compile(backend="eager")

    @compat.passed_by
    def make(call: Any, args: Any, kwargs: Any) -> Any:
        seen.append(compat.is_calling(threading.get_ident(), model))
        return args[0]

    undo = compat.guard_calls(model, lambda: None, make)
    if compiled == "after":
        called = torch.compile(model, backend="eager")
    given = torch.ones(1, 3)
    assert called(given) is given
    assert (seen, hooked) == ([True], []), moved("Module._call_impl", "guard_calls")
    undo()
    assert called(given) is not given
    assert len(hooked) == 1


def test_writes_are_counted():
    tensor = torch.zeros(2)
    before = compat.write_count(tensor)
    tensor.add_(1)
    assert compat.write_count(tensor) != before, moved("Tensor._version", "write_count")
    assert compat.write_counts([tensor]) == [compat.write_count(tensor)], moved(
        "Tensor._version", "write_counts"
    )
    with torch.inference_mode():
        assert compat.write_count(torch.zeros(2)) is None


def test_hooks_by_key():
    module = torch.nn.Linear(2, 2)
    after, before = compat.hooks_by_key(module)
    module.register_forward_hook(print)
    module.register_forward_pre_hook(print)
    assert (len(after), len(before)) == (1, 1), moved("Module._forward_hooks", "hooks_by_key")


def test_kernels_of_attention():
    cuda = torch.backends.cuda
    switches = (
        (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
        (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
        (cuda.math_sdp_enabled, cuda.enable_math_sdp),
        (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
    )
    for index, (enabled, enable) in enumerate(switches):
        before = enabled()
        for wanted in (not before, before):
            enable(wanted)
            assert compat.attention_kernels()[index] is wanted, moved("torch._C", "attention_kernels")


def test_many_tensors_are_copied_at_once():
    into = [torch.zeros(2, 3), torch.zeros(4, dtype=torch.int64)]
    tensors = [torch.arange(6.0).view(2, 3), torch.arange(4)]
    before = [tensor._version for tensor in into]
    compat.copy_all(into, tensors)
    assert all(map(torch.equal, into, tensors)), moved("torch._foreach_copy_", "copy_all")
    assert all(tensor._version > count for tensor, count in zip(into, before, strict=True))


def test_trees_and_dispatch():
    leaves, layout = compat.pytree.tree_flatten(((1, {"a": 2}), [3]))
    assert leaves == [1, 2, 3]
    assert compat.pytree.tree_unflatten(leaves, layout) == ((1, {"a": 2}), [3])
    seen: list[str] = []

    class Names(compat.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Names():
        torch.ones(2).mul(3)
    assert seen[-1] == "mul"


def test_diffusers_knows_blocks():
    from diffusers.models.transformers.transformer_flux import FluxTransformerBlock

    block = FluxTransformerBlock(dim=8, num_attention_heads=1, attention_head_dim=8)
    metadata = compat.block_metadata(block)
    assert metadata is not None, moved("diffusers.hooks._helpers.TransformerBlockRegistry", "block_metadata")
    assert metadata.return_hidden_states_index == 1
    assert compat.block_metadata(nn.Linear(1, 1)) is None


@pytest.fixture
def backend() -> Iterator[Any]:
    from diffusers.models import attention_dispatch as dispatch

    registry = dispatch._AttentionBackendRegistry
    before = registry._active_backend
    yield registry
    registry._active_backend = before


def test_attention_backends(backend: Any):
    first = compat.attention_backend()
    assert first != "None", moved("_AttentionBackendRegistry._active_backend", "attention_backend")
    backend._active_backend = "another"
    assert compat.attention_backend() == "another"
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    assert "_attention_backend" in vars(FluxAttnProcessor), moved(
        "FluxAttnProcessor._attention_backend", "processor_attention_backend"
    )


def test_context_parallelism_is_seen():
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    processor = FluxAttnProcessor()
    name = moved("FluxAttnProcessor._parallel_config", "is_context_parallel")
    assert "_parallel_config" in vars(FluxAttnProcessor), name
    assert not compat.is_context_parallel(processor)
    processor._parallel_config = object()
    assert compat.is_context_parallel(processor)


def test_offloading_is_seen(layer: nn.Linear):
    from accelerate.hooks import ModelHook, add_hook_to_module
    from diffusers.hooks import HookRegistry
    from diffusers.hooks import ModelHook as DiffusersHook

    assert not compat.is_offloaded(layer)
    add_hook_to_module(layer, ModelHook())
    assert compat.is_offloaded(layer), moved("accelerate's _hf_hook", "is_offloaded")
    layer = nn.Linear(3, 3)
    registry = HookRegistry.check_if_exists_or_initialize(layer)
    assert not compat.is_offloaded(layer)
    registry.register_hook(DiffusersHook(), "mine")
    assert compat.is_offloaded(layer), moved("diffusers' _diffusers_hook", "is_offloaded")


def test_offloading_by_blocks_is_seen(layer: nn.Linear):
    from diffusers.hooks import apply_group_offloading

    model, cpu = nn.ModuleDict({"blocks": nn.ModuleList([layer])}), torch.device("cpu")
    assert not compat.is_offloaded_by_blocks(model)
    apply_group_offloading(model, cpu, cpu, "block_level", num_blocks_per_group=1)
    assert compat.is_offloaded_by_blocks(model), moved("group_offloading", "is_offloaded_by_blocks")


def test_caches_of_diffusers_are_seen():
    from diffusers import hooks

    for config, apply in (
        (hooks.FirstBlockCacheConfig(), hooks.apply_first_block_cache),
        (
            hooks.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 1
            ),
            hooks.apply_pyramid_attention_broadcast,
        ),
        (hooks.MagCacheConfig(num_inference_steps=4, calibrate=True), hooks.apply_mag_cache),
        (hooks.TaylorSeerCacheConfig(), hooks.apply_taylorseer_cache),
    ):
        model = flux_transformer()
        assert compat.diffusers_cache(model) is None
        apply(model, config)
        assert compat.diffusers_cache(model) is not None, moved("a cache's hook", "diffusers_cache")
        model = flux_transformer()
        model.enable_cache(config)
        assert compat.diffusers_cache(model) == type(config).__name__, moved(
            "CacheMixin._cache_config", "diffusers_cache"
        )
        model.disable_cache()
        assert compat.diffusers_cache(model) is None


def test_parts_of_a_module(layer: nn.Linear):
    held = compat.weights_by_name(layer)
    assert held == {"weight": layer.weight, "bias": layer.bias}, moved("_parameters", "weights_by_name")
    layer.weight = nn.Parameter(torch.zeros(2, 3))
    assert held["weight"] is layer.weight, moved("_parameters", "weights_by_name")
    outer = nn.Sequential(layer)
    assert compat.children_by_name(outer) == {"0": layer}, moved("_modules", "children_by_name")


def test_lora_layers(layer: nn.Linear):
    peft = pytest.importorskip("peft", reason="LoRA of diffusers models needs peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0"])
    model = peft.inject_adapter_in_model(config, nn.Sequential(layer))
    lora = model[0]
    assert compat.is_lora(lora)
    assert not compat.is_lora(layer)
    before = compat.lora_settings(lora)
    with compat.lora_scaled(model, 0.3):
        assert lora.scaling == {"default": pytest.approx(0.6)}, moved("scale_lora_layers", "lora_scaled")
        assert compat.lora_settings(lora) != before
    assert compat.lora_settings(lora) == before
    for change in (lambda: lora.set_scale("default", 3), lambda: lora.enable_adapters(False), lora.merge):
        seen = compat.lora_settings(lora)
        change()
        assert compat.lora_settings(lora) != seen, moved("a setting of LoRA", "lora_settings")


def test_a_pool_without_a_card_is_left_alone():
    compat.end_pool_allocation(None, None)
    if torch.cuda.is_available():
        assert hasattr(torch._C, "_cuda_endAllocateToPool"), moved(
            "torch._C._cuda_endAllocateToPool", "end_pool_allocation"
        )


def test_parts_of_a_model_that_stay_in_fp32():
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model = WanTransformer3DModel(num_layers=1, num_attention_heads=2, attention_head_dim=12)
    assert "time_embedder" in compat.kept_in_fp32(model)
    assert compat.kept_in_fp32(nn.Linear(2, 2)) == set()


def test_the_class_that_a_saved_pipeline_names(tmp_path: Path):
    pipe = diffusers.DiTPipeline(None, None, diffusers.DDIMScheduler())
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert compat.pipeline_kind(index) == "DiTPipeline", moved("model_index.json", "pipeline_kind")
    assert compat.pipeline_kind({}) is None


def test_every_entry_has_a_test():
    functions = {
        name
        for module in pkgutil.iter_modules(compat.__path__, f"{compat.__name__}.")
        for name, value in vars(importlib.import_module(module.name)).items()
        if inspect.isfunction(value) and value.__module__ == module.name and not name.startswith("_")
    }
    assert len(functions) > 20
    assert functions <= set(compat.__all__)
    source = inspect.getsource(inspect.getmodule(moved))
    assert {
        name for name in functions if f"compat.{name}" not in source and f'"{name}"' not in source
    } == set()


def test_an_object_counts_as_of_the_class_that_was_mixed_into():
    """diffusers' from_pipe() takes a component over only if ``type(component)`` is one of the expected."""

    class First(nn.Module):
        pass

    class Second(nn.Module):
        pass

    module = nn.Linear(2, 2)
    undo_first = mix_in(module, First, "_hicache_first", None)
    undo_second = mix_in(module, Second, "_hicache_second", None)
    assert isinstance(module, First)
    assert isinstance(module, Second)
    assert type(module) in (nn.Linear,)
    assert type(module) in {nn.Linear: 1}
    assert type(module) not in (nn.Conv1d, First, Second)
    undo_second()
    assert not isinstance(module, Second)
    undo_first()
    assert type(module) is nn.Linear
