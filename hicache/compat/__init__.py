"""Every private name of torch, diffusers and accelerate that hicache touches, and nothing else touches one.

Each says which name it reads; the modules below, a subject each, say in which versions that was read.
tests/test_compat.py tells when one moves.
"""

from hicache.compat.calls import (
    guard_calls,
    inside_compiled_call,
    is_calling,
    is_compiled,
    original_module,
    passed_by,
    running_calls,
)
from hicache.compat.diffusers import (
    attention_backend,
    block_metadata,
    diffusers_cache,
    guider_prediction,
    is_context_parallel,
    is_offloaded,
    is_offloaded_by_blocks,
    kept_in_fp32,
    pipeline_kind,
    processor_attention_backend,
    split_for_rank,
)
from hicache.compat.lora import (
    is_lora,
    lora_scaled,
    lora_settings,
)
from hicache.compat.modules import (
    OUTPUT_HOOK,
    add_output_hook,
    children_by_name,
    children_of_list,
    fix_sizes,
    hook_keys,
    is_hooked,
    leave_sizes_open,
    remove_output_hook,
    weights_by_name,
)
from hicache.compat.tensors import (
    TorchDispatchMode,
    end_pool_allocation,
    has_kernel,
    no_torch_function,
    of_any_size,
    pytree,
    take_equal_sizes_for_one,
    write_count,
    write_counts,
)

__all__ = [
    "OUTPUT_HOOK",
    "TorchDispatchMode",
    "add_output_hook",
    "attention_backend",
    "block_metadata",
    "children_by_name",
    "children_of_list",
    "diffusers_cache",
    "end_pool_allocation",
    "fix_sizes",
    "guard_calls",
    "guider_prediction",
    "has_kernel",
    "hook_keys",
    "inside_compiled_call",
    "is_calling",
    "is_compiled",
    "is_context_parallel",
    "is_hooked",
    "is_lora",
    "is_offloaded",
    "is_offloaded_by_blocks",
    "kept_in_fp32",
    "leave_sizes_open",
    "lora_scaled",
    "lora_settings",
    "no_torch_function",
    "of_any_size",
    "original_module",
    "passed_by",
    "pipeline_kind",
    "processor_attention_backend",
    "pytree",
    "remove_output_hook",
    "running_calls",
    "split_for_rank",
    "take_equal_sizes_for_one",
    "weights_by_name",
    "write_count",
    "write_counts",
]
