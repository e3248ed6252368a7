"""Imports go one way: hicache_kernels knows nothing of hicache or diffusers, no module of a higher one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import hicache
import hicache_kernels

ROOT = Path(hicache.__file__).parent.parent
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in (hicache, hicache_kernels)
    for path in Path(package.__file__).parent.rglob("*.py")
}
# lowest first; a module imports only from layers before its own
LAYERS = [
    {"hicache_kernels"},
    {"hicache._version", "hicache.basis", "hicache.cuda_graphs.capture_safety"},
    {"hicache.config"},
    {"hicache.schedule"},
    {"hicache.engine"},
    {"hicache"},
    {"hicache.pipeline", "hicache.stats"},
    {"hicache.handle"},
    {"hicache.hooks.step_clock", "hicache.adapters"},
    {"hicache.runtime.gate_prefetch", "hicache.hooks.dynamo", "hicache.plan"},
    {"hicache.runtime.recorders"},
    {"hicache.cuda_graphs.capture"},
    {"hicache.cuda_graphs.block_graphs"},
    {"hicache.cuda_graphs.runner"},
    {"hicache.runtime.denoiser"},
    {"hicache.fast"},
    {"hicache.reference"},
    {"hicache.demo"},
    {"hicache.cli"},
]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer(module: str) -> int:
    matches = [(len(name), i) for i, names in enumerate(LAYERS) for name in names if module == name]
    matches += [
        (len(name), i)
        for i, names in enumerate(LAYERS)
        for name in names
        if name != "hicache" and module.startswith(name + ".")
    ]
    assert matches, f"{module} has no layer: give it one in LAYERS"
    return max(matches)[1]


@pytest.mark.parametrize("module", FILES)
def test_imports_go_one_way(module):
    for name in imports(FILES[module]):
        if name.split(".")[0] in ("hicache", "hicache_kernels") and name in FILES:
            assert layer(name) <= layer(module), f"{module} imports {name}"


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("hicache_kernels")])
def test_kernels_know_only_torch(module):
    for name in imports(FILES[module]):
        assert name.split(".")[0] not in ("hicache", "diffusers", "transformers"), f"{module} imports {name}"


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("hicache_kernels.backends.")])
def test_backends_do_not_import_one_another(module):
    others = {name for name in FILES if name.startswith("hicache_kernels.backends.")} - {module}
    assert not imports(FILES[module]) & others


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("hicache.")])
def test_only_the_engine_calls_kernels(module):
    ops = {f"hicache_kernels.{op}" for op in ("update_", "forecast", "update_forecast_", "gated_sum")}
    if module != "hicache.engine":
        assert not imports(FILES[module]) & ops
