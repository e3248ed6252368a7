"""``hicache info``: versions, devices, and which backends are usable and why the others are not."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import hicache
from hicache.basis import known_bases


def info() -> None:
    """Versions, devices and backends; of those that cannot be used, why.

    [dim]Example:[/] hicache info
    """
    import torch

    from hicache_kernels import auto_backend, backend_status
    from hicache_kernels.backends import native

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    rows: list[tuple[str, Any]] = [("hicache", hicache.__version__), ("python", platform.python_version())]
    rows += [(name, version(name)) for name in ("torch", "diffusers", "transformers", "triton")]
    rows.append(("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads"))
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        rows += [(str(device), torch.cuda.get_device_name(device)) for device in devices[1:]]
    else:
        rows.append(("cuda", "no device"))
        built = native.target(torch.device("cuda")) if native.cuda_archs() else "not built"
        rows.append(("native on cuda", built))
    for device in devices:
        for name, reason in backend_status(device).items():
            if reason is not None:
                state = f"not usable: {reason}"
            else:
                state = f"usable ({native.target(device)})" if name == "native" else "usable"
            rows.append((f"{name} on {device}", state))
        rows.append((f"auto on {device}", auto_backend(device)))
    rows.append(("bases", ", ".join(known_bases())))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
