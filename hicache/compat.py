"""Every private name of torch, diffusers and accelerate that hicache touches, and nothing else touches one.

Each says which name it reads and in which version that was read; tests/test_compat.py tells when one moves.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import FrameType
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _python_dispatch, _pytree

from hicache.mixin import mix_in

pytree: Final = _pytree
TorchDispatchMode = _python_dispatch.TorchDispatchMode
no_torch_function: Final = torch._C._disabled_torch_function_impl  # what torch has subclasses take it from

# Under this key a module has the hook that records its output. The same on every module: with the key that
# register_forward_hook() counts up, each block would be another block to torch.compile.
OUTPUT_HOOK: Final[Any] = "hicache"


# torch 2.11 – 2.13


# what the compiler passes by, while what it calls is compiled as if it were not there
passed_by: Final = partial(torch.compiler.disable, recursive=False)
_GUARD: Final = "_hicache_guard"


@passed_by
def _guarded(call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
    try:
        _, make = module.__dict__.get(_GUARD, (None, None))
        return call(*args, **kwargs) if make is None else make(call, args, kwargs)
    except BaseException:
        failed, _ = module.__dict__.get(_GUARD, (None, None))
        if failed is not None:
            failed()
        raise


def _own(module: nn.Module, name: str) -> Callable[..., Any]:
    """A method as the module's class has it, without what is mixed in below."""
    owner = super(_GuardedCalls, module) if isinstance(module, _GuardedCalls) else module
    found: Callable[..., Any] = getattr(owner, name)
    return found


class _GuardedCalls(nn.Module):
    """Mixed into a module's class by :func:`guard_calls`.

    Both ways into a module: by itself, and by what ``torch.compile`` made of it. What has been compiled holds
    on to these functions after they are gone from the class.
    """

    @passed_by
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _guarded(_own(self, "__call__"), self, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # its hooks reach into the pipeline, and a copy's would still reach into the original
        raise TypeError("hicache: a cached transformer cannot be copied or pickled; call remove() first")

    @passed_by
    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        return _guarded(_own(self, "_call_impl"), self, args, kwargs)


def guard_calls(
    module: nn.Module, failed: Callable[[], None], make: Callable[..., Any] | None = None
) -> Callable[[], None]:
    """Call ``failed()`` when a call of a module ends in any ``BaseException``; returns what undoes it.

    Forward hooks with ``always_call`` are called for an ``Exception`` only (``Module._call_impl``). With
    ``make``, ``make(call, args, kwargs)`` makes the calls or does not, outside of all hooks; it is
    :data:`passed_by`. A call by one of both ways goes by the other one, too.
    """
    return mix_in(module, _GuardedCalls, _GUARD, (torch.compiler.disable(failed), make))


def children_of_list(blocks: nn.ModuleList) -> list[nn.Module]:
    """The modules of a list, whatever its class makes of iteration (``Module._modules``)."""
    return [block for block in blocks._modules.values() if block is not None]


def add_output_hook(module: nn.Module, hook: Callable[..., None]) -> None:
    """Call ``hook(module, args, output)`` after the module's forward (``Module._forward_hooks``)."""
    module._forward_hooks[OUTPUT_HOOK] = hook
    # torch.compile fixes the shapes of all tensors that it finds by way of a module of torch's own, as it
    # takes them for weights: those a hook writes to as well, so that every height would be another graph
    module.__dict__["__module__"] = __name__


def remove_output_hook(module: nn.Module) -> None:
    """Undo :func:`add_output_hook`."""
    module._forward_hooks.pop(OUTPUT_HOOK, None)
    module.__dict__.pop("__module__", None)


def hook_keys(module: nn.Module) -> tuple[list[Any], list[Any]]:
    """Keys of the forward hooks others put on a module, and of its pre-hooks: torch never uses one again."""
    return [key for key in module._forward_hooks if key != OUTPUT_HOOK], list(module._forward_pre_hooks)


def is_hooked(module: nn.Module) -> bool:
    """Whether a module does more than its class's forward."""
    return bool("forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks)


def original_module(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile(module)`` wraps (``OptimizedModule._orig_mod``); else the module."""
    original = getattr(module, "_orig_mod", module)
    assert isinstance(original, nn.Module)
    return original


def is_compiled(module: nn.Module) -> bool:
    """Whether it or one of its parts was compiled: ``part.compile()`` (``_compiled_call_impl``) or
    ``torch.compile(part)`` in its place (``_orig_mod``)."""
    return any(
        part._compiled_call_impl is not None or "_orig_mod" in part._modules for part in module.modules()
    )


def inside_compiled_call(module: nn.Module) -> bool:
    """Whether a module that is called is compiled as a whole: what it calls is, whatever the stance.

    By itself (``_compiled_call_impl``), or by a callable on the stack, whose frame is ``compile_wrapper`` of
    ``torch/_dynamo/eval_frame.py``.
    """
    if module._compiled_call_impl is not None:
        return True
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "compile_wrapper" and code.co_filename.endswith("eval_frame.py"):
            return True
        frame = frame.f_back
    return False


def is_calling(thread: int, module: nn.Module) -> bool:
    """Whether a thread is in a call of a module (``_call_impl``, ``__call__``), or in a compiled one of any.

    Compiled calls go on in functions called ``torch_dynamo_resume_in_...``.
    """
    frame = sys._current_frames().get(thread)
    while frame is not None:
        name = frame.f_code.co_name
        if name.startswith("torch_dynamo_resume") or name == "compile_wrapper":
            return True
        if name in ("_call_impl", "__call__") and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False


def running_calls() -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """The first two arguments of every ``__call__`` of Python that goes on, and its variables, inside out."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__call__" and code.co_filename != __file__:  # not the guards above
            variables = frame.f_locals
            names = code.co_varnames[: min(2, code.co_argcount)]
            yield [variables[name] for name in names if name in variables], variables
        frame = frame.f_back


def of_any_size(value: Any) -> Any:
    """The same tensors, or those in a tuple, whose sizes torch.compile leaves open from the first time on.

    Without it a second size makes a second graph, and that one serves all (``maybe_mark_dynamic``). Aliases:
    the mark is not to be seen on a tensor of the caller's, nor what that is a view of.
    """
    if isinstance(value, tuple):
        return tuple(map(of_any_size, value))
    if not isinstance(value, Tensor):
        return value
    alias = value.data
    torch._dynamo.maybe_mark_dynamic(alias, list(range(alias.ndim)))
    return alias


def take_equal_sizes_for_one(taken: bool) -> bool:
    """Whether torch.compile takes sizes that are open, and the same once, for the same ever after.

    So it does where nothing is said: a square picture and one that is not are two graphs to it
    (``torch.fx.experimental._config.use_duck_shape``). Returns what held before.
    """
    from torch.fx.experimental import _config

    before: bool = _config.use_duck_shape
    _config.use_duck_shape = taken
    return before


def end_pool_allocation(device: torch.device | None, pool: Any) -> None:
    """Stop the allocator from serving a graph's memory pool after its capture failed.

    ``torch._C._cuda_endAllocateToPool``, which ``CUDAGraph.capture_end`` calls only where it succeeds (2.13)
    or not at all once the capture is invalid (2.11, 2.12). Nothing where the allocation has been ended.
    """
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    if end is None or device is None:
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    with contextlib.suppress(RuntimeError):
        end(index, pool)


def write_count(tensor: Tensor) -> int | None:
    """How often a tensor was written to (``Tensor._version``); None in inference mode."""
    return None if tensor.is_inference() else int(tensor._version)


def write_counts(tensors: Iterable[Tensor]) -> list[int]:
    """How often tensors were written to, none of them in inference mode (``Tensor._version``)."""
    return [tensor._version for tensor in tensors]


def children_by_name(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's children as it has them: what is put in a place is in here (``Module._modules``)."""
    return module._modules


def weights_by_name(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own weights as it has them (``Module._parameters``)."""
    return module._parameters


# diffusers 0.37 – 0.42, accelerate 1.15


# what the hooks of diffusers' caches are called, those without "cache" in their names
_CACHE_HOOKS: Final = ("fbc_", "pyramid_attention_broadcast")


def block_metadata(block: nn.Module) -> Any:
    """diffusers' record of what a block takes and returns (``TransformerBlockRegistry``), or None."""
    try:
        from diffusers.hooks._helpers import TransformerBlockRegistry
    except ImportError:
        return None
    try:
        return TransformerBlockRegistry.get(type(block))
    except ValueError:
        return None


def guider_prediction(variables: Mapping[str, Any]) -> str | None:
    """Which prediction the block of a modular pipeline is calling for: ``"pred_uncond"``.

    Of ``guider_state_batch``, as every one calls it, under the key ``BaseGuidance._identifier_key``.
    """
    batch = variables.get("guider_state_batch")
    return None if batch is None else getattr(batch, "__guidance_identifier__", None)


def split_for_rank(
    block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The part of a block's arguments that this process has, where diffusers splits them at the block itself.

    Context parallelism puts a ``ContextParallelSplitHook`` among the ``hooks`` of ``_diffusers_hook``.
    """
    registry = block.__dict__.get("_diffusers_hook")
    for hook in getattr(registry, "hooks", {}).values():
        if type(hook).__name__ == "ContextParallelSplitHook":
            args, kwargs = hook.pre_forward(block, *args, **kwargs)
    return args, kwargs


def attention_backend() -> str:
    """diffusers' choice for processors that have none of their own (``_AttentionBackendRegistry``)."""
    dispatch: Any = sys.modules.get("diffusers.models.attention_dispatch")
    registry = getattr(dispatch, "_AttentionBackendRegistry", None)
    return str(getattr(registry, "_active_backend", None))


def processor_attention_backend(processor: Any) -> str:
    """A processor's own choice (``_attention_backend``)."""
    return str(getattr(processor, "_attention_backend", None))


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate (``_hf_hook``) or diffusers (``_diffusers_hook``) run code around its forward."""
    registry = module.__dict__.get("_diffusers_hook")  # may be there without any hook in it
    return bool(
        "forward" in module.__dict__ or "_hf_hook" in module.__dict__ or getattr(registry, "hooks", None)
    )


def is_offloaded_by_blocks(module: nn.Module) -> bool:
    """Whether diffusers brings weights of a model to the device for as long as a group of its blocks runs.

    Its hook is called ``group_offloading`` in the registry ``_diffusers_hook``.
    """
    registries = (part.__dict__.get("_diffusers_hook") for part in module.modules())
    return any("group_offloading" in getattr(registry, "hooks", ()) for registry in registries)


def diffusers_cache(module: nn.Module) -> str | None:
    """Which of diffusers' caches a model has, by ``enable_cache`` or by its own function; None for none.

    ``CacheMixin._cache_config``, and the names of hooks in the registries ``_diffusers_hook``.
    """
    config = getattr(module, "_cache_config", None)
    if config is not None:
        return type(config).__name__
    registries = (part.__dict__.get("_diffusers_hook") for part in module.modules())
    names = (str(name) for registry in registries for name in getattr(registry, "hooks", ()))
    return next((name for name in names if "cache" in name or name.startswith(_CACHE_HOOKS)), None)


# peft 0.18 – 0.21; its names are public, but its classes are not always installed


def is_lora(module: nn.Module) -> bool:
    """Whether a module is a LoRA layer around another one."""
    return isinstance(getattr(module, "scaling", None), dict)


def lora_settings(layer: Any) -> tuple[Any, ...]:
    """How a LoRA layer weighs its adapters, which of them are active, and which are merged.

    Weights are rounded: diffusers multiplies them by a call's scale and divides them by it afterwards.
    """
    return (
        *((name, f"{scale:.6g}") for name, scale in layer.scaling.items()),
        str(getattr(layer, "active_adapters", None)),
        bool(getattr(layer, "disable_adapters", False)),
        str(getattr(layer, "merged_adapters", None)),
    )


@contextlib.contextmanager
def lora_scaled(module: nn.Module, scale: float) -> Iterator[None]:
    """Inside, LoRA layers weigh as in a call with this ``scale``, by the functions diffusers' models use."""
    scaled = scale != 1 and any(map(is_lora, module.modules()))
    if scaled:
        from diffusers.utils import scale_lora_layers, unscale_lora_layers

        scale_lora_layers(module, scale)
    try:
        yield
    finally:
        if scaled:
            unscale_lora_layers(module, scale)


def kept_in_fp32(model: Any) -> set[str]:
    """Names of the parts of a model whose weights stay in fp32, whatever dtype it is loaded in."""
    return set(getattr(model, "_keep_in_fp32_modules", None) or ())
