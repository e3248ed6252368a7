"""Private names of torch that the ops need: all of them are here."""

from __future__ import annotations

import torch
from torch._C import DispatchKey, DispatchKeySet

# What a thread's dispatcher adds to the keys of tensors where nothing else is going on; the second in
# inference mode. Modes, transforms of torch.func, tracing and functionalisation each add a key of their own.
_SELECT = DispatchKeySet(DispatchKey.BackendSelect)
_USUAL = frozenset(
    keys.raw_repr() for keys in (_SELECT | DispatchKeySet(DispatchKey.ADInplaceOrView), _SELECT)
)


def nobody_listens() -> bool:
    """Whether nothing of torch's would see, change or record a call of an op on ordinary tensors.

    Not so inside torch.compile or export, under a mode, a transform, a tracer or a profiler.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_function_stack()
        and not torch._C._autograd._profiler_enabled()
        and torch._C._dispatch_tls_local_include_set().raw_repr() in _USUAL
    )
