"""Imports go one way, nothing but the engine calls kernels; and each of these guards is tried on mutations.

A guard takes the root of a tree and returns what is wrong in it, one line each.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import hicache

ROOT = Path(hicache.__file__).parent.parent

# Lowest first: a module imports only from its own layer and those before it, and never in a circle. A name
# stands for the module and all modules below it, but for "hicache", which is the package's __init__ alone.
LAYERS = [
    {"hicache_kernels"},
    {
        "hicache._version",
        "hicache.arguments",
        "hicache.checks",
        "hicache.json_lines",
        "hicache.mixin",
        "hicache.compat",
        "hicache.noise_levels",
        "hicache.numbers",
        "hicache.plain_data",
        "hicache.weights",
        "hicache.shadow",
        "hicache.snapshots",
        "hicache.trees",
    },
    {"hicache.companion", "hicache.model_key", "hicache.run"},
    {
        "hicache.basis",
        "hicache.chebyshev",
        "hicache.feature_rows",
        "hicache.input_change",
        "hicache.input_filter",
        "hicache.schedule",
        "hicache.tables",
    },
    {"hicache.calibration"},
    {"hicache.config"},
    {"hicache.differences"},
    {"hicache.run_numbers"},
    {"hicache.engine"},
    {"hicache"},
    {"hicache.token_view", "hicache.step_plan", "hicache.stats", "hicache.adapters", "hicache.pipeline"},
    {"hicache.hooks", "hicache.handle"},
    {"hicache.cuda_graphs"},
    {"hicache.runtime"},
    {"hicache.companions"},
    {"hicache.dry_run", "hicache.offers"},
    {"hicache.planned_memory"},
    {"hicache.planned"},
    {"hicache.plan"},
    {"hicache.fast"},
    {"hicache.wrapped"},
    {"hicache.reference"},
    {"hicache.demo"},
    {"hicache.fitting"},
    {"hicache.launch"},
    {"hicache.compare"},
    {"hicache.cli"},
]
# The module that calls kernels, and all that any other may use of hicache_kernels.
ENGINE = "hicache.engine"
USED_BY_OTHERS = {
    "hicache.cli.info": {"auto_backend", "backends.native"},
    "hicache.companions.sparse.layer": {
        f"sparse_attention.{name}"
        for name in ("choose_columns", "kept_columns", "row_constants", "sparse_attention")
    },
    "hicache.runtime.gate_weights": {"unchanged.TensorStates", "unchanged.Values"},
}
USED_BY_ANY = {"BACKENDS", "backend_status"}
# What may touch private parts of torch, diffusers and accelerate: one package, one module of the other.
COMPAT = ("hicache.compat", "hicache_kernels.compat")
# of Python's documentation, of an operator's name, of what diffusers tells writers of pipelines to use
NOT_PRIVATE = {"_getframe", "_to_copy", "_execution_device"}
# Packages the kernels do not know.
UNKNOWN_TO_KERNELS = {"hicache", "diffusers", "transformers", "accelerate"}
# What is built from other than Python.
BUILT = {"hicache_kernels._native"}
# Two modules of one layer that do not import each other, for a mutation.
NEIGHBOURS = ("hicache.adapters.wan", "hicache.adapters.ltx")


def modules(root: Path) -> dict[str, Path]:
    """The files of both packages, by the names of their modules."""
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for package in ("hicache", "hicache_kernels")
        for path in sorted((root / package).rglob("*.py"))
    }


@functools.cache
def _nodes(source: str) -> tuple[ast.AST, ...]:
    """All of a file's syntax tree, outer nodes first."""
    return tuple(ast.walk(ast.parse(source)))


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """What a file imports, inside functions too: the module, and the name taken from it or ""."""
    for node in _nodes(path.read_text()):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((module, alias.name) for alias in node.names)


def imported_modules(files: dict[str, Path], path: Path) -> set[str]:
    """The modules of both packages that a file imports."""
    found = set()
    for module, name in imports(path):
        found.add(f"{module}.{name}" if f"{module}.{name}" in files else module)
    return found & files.keys()


def layer(module: str) -> int | None:
    """The index of a module's layer: that of the longest name it is below."""
    matches = [
        (len(name), index)
        for index, names in enumerate(LAYERS)
        for name in names
        if module == name or (name != "hicache" and module.startswith(f"{name}."))
    ]
    return max(matches)[1] if matches else None


# Guards.


def imports_go_one_way(root: Path) -> list[str]:
    """No module imports from a layer above its own; every module has a layer; no import is relative."""
    files, wrong = modules(root), []
    for module, path in files.items():
        own = layer(module)
        if own is None:
            wrong.append(f"{module} has no layer: give it one in LAYERS")
            continue
        wrong += [f"{module}: relative import" for name, _ in imports(path) if name.startswith(".")]
        for name in sorted(imported_modules(files, path)):
            other = layer(name)
            if other is not None and other > own:
                wrong.append(f"{module} imports {name}, which is above it")
    return wrong


def no_circles(root: Path) -> list[str]:
    """No module imports itself by way of others, whatever their layers."""
    files = modules(root)
    graph = {module: imported_modules(files, path) - {module} for module, path in files.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [f"circle: {' <- '.join(error.args[1])}"]
    return []


def kernels_know_only_torch(root: Path) -> list[str]:
    """hicache_kernels imports nothing of hicache or diffusers."""
    return [
        f"{module} imports {name}"
        for module, path in modules(root).items()
        if module.split(".")[0] == "hicache_kernels"
        for name, _ in imports(path)
        if name.split(".")[0] in UNKNOWN_TO_KERNELS
    ]


def backends_stand_alone(root: Path) -> list[str]:
    """No backend imports another."""
    files = modules(root)
    backends = {name for name in files if name.startswith("hicache_kernels.backends.")}
    return [
        f"{module} imports {name}"
        for module in sorted(backends)
        for name in sorted(imported_modules(files, files[module]) & backends - {module})
    ]


def private_names_stay_private(root: Path) -> list[str]:
    """No module imports a name of another that begins with an underscore."""
    files = modules(root)
    return [
        f"{module} imports {other}.{name}"
        for module, path in files.items()
        for other, name in imports(path)
        if other in files and name.startswith("_") and not name.startswith("__")
        if f"{other}.{name}" not in files
        if f"{other}.{name}" not in BUILT
    ]


def private_parts_of_others_stand_in_compat(root: Path) -> list[str]:
    """Names with an underscore that no file of ours defines are used in one place, by name or by string."""
    files = modules(root)
    own = {name for path in files.values() for name in _private_names_defined(path)}
    return [
        f"{module} touches {name}"
        for module, path in files.items()
        if module not in COMPAT and not module.startswith(tuple(f"{name}." for name in COMPAT))
        for name in sorted(_private_names_used(path) - own - NOT_PRIVATE)
    ]


def _private(name: object) -> bool:
    return (
        isinstance(name, str) and name.isidentifier() and name[:1] == "_" and name[:2] != "__" and name != "_"
    )


def _private_names_defined(path: Path) -> Iterator[str]:
    """Attributes that a file stores to, its functions and classes, and keys of an object's ``__dict__``."""
    for node in _nodes(path.read_text()):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store):
            yield node.attr if isinstance(node, ast.Attribute) else node.id
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "_hicache" in node.value:
            yield node.value


def _private_names_used(path: Path) -> set[str]:
    found: set[object] = set()
    for node in _nodes(path.read_text()):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant):
            found.add(node.value)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] not in (
            "hicache",
            "hicache_kernels",
        ):
            found |= {*(alias.name for alias in node.names), *(node.module or "").split(".")}
        elif isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".")}
    return {str(name) for name in found if _private(name)}


def only_the_engine_calls_kernels(root: Path) -> list[str]:
    """Other modules of hicache take nothing of hicache_kernels but what is listed, however they reach it."""
    wrong = []
    for module, path in modules(root).items():
        if module.split(".")[0] != "hicache" or module == ENGINE:
            continue
        allowed = USED_BY_ANY | USED_BY_OTHERS.get(module, set())
        wrong += [f"{module} uses hicache_kernels.{use}" for use in sorted(_uses(path) - allowed)]
    return wrong


def _uses(path: Path) -> set[str]:
    """Names that a file takes of hicache_kernels or of ``torch.ops.hicache``, below that package."""
    nodes = _nodes(path.read_text())
    aliases: dict[str, str] = {}  # a name bound to a module of the kernels → which
    uses: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                package, _, rest = alias.name.partition(".")
                if package == "hicache_kernels":
                    aliases[alias.asname or package] = rest if alias.asname else ""
        elif isinstance(node, ast.ImportFrom):
            package, _, rest = (node.module or "").partition(".")
            if package == "hicache_kernels":
                uses |= {".".join(filter(None, (rest, alias.name))) for alias in node.names}
    inner = set()  # names and attributes that are a part of a longer chain
    for node in nodes:
        if not isinstance(node, (ast.Name, ast.Attribute)) or node in inner:
            continue
        parts: list[str] = []
        link: ast.expr = node
        while isinstance(link, ast.Attribute):
            parts.insert(0, link.attr)
            link = link.value
            inner.add(link)
        if not isinstance(link, ast.Name):
            continue
        if link.id in aliases:
            uses.add(".".join(filter(None, (aliases[link.id], *parts))) or "the package itself")
        elif [link.id, *parts][:3] == ["torch", "ops", "hicache"]:
            uses.add(".".join(["torch.ops", *parts[2:]]))
    return uses


def no_test_imports_another(root: Path) -> list[str]:
    """No test module imports another: what they share is in tests.support."""
    return [
        f"{path.name} imports {'.'.join(filter(None, (module, name)))}"
        for path in sorted((root / "tests").rglob("*.py"))
        for module, name in imports(path)
        if any(part.startswith("test_") for part in (*module.split("."), name))
    ]


GUARDS = (
    imports_go_one_way,
    no_circles,
    kernels_know_only_torch,
    backends_stand_alone,
    private_names_stay_private,
    private_parts_of_others_stand_in_compat,
    only_the_engine_calls_kernels,
    no_test_imports_another,
)


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.__name__)
def test_the_tree_is_clean(guard: Callable[[Path], list[str]]):
    assert guard(ROOT) == []


# Mutations: each is made in a copy of the tree, and is what its guard finds there and all that it finds.


@dataclass(frozen=True)
class Mutation:
    """Lines put at the end of modules, and what a guard then says.

    Args:
        guard: the one that must find it.
        added: source by module; a module that does not exist is made.
        found: in the guard's answer.
    """

    guard: Callable[[Path], list[str]]
    added: dict[str, str]
    found: str


ONE, OTHER = NEIGHBOURS
MUTATIONS = {
    "upwards": Mutation(
        imports_go_one_way,
        {"hicache.basis": "from hicache.engine import Engine"},
        "hicache.basis imports hicache.engine, which is above it",
    ),
    "upwards, in a function": Mutation(
        imports_go_one_way,
        {"hicache.schedule": "def late():\n    import hicache.fast"},
        "hicache.schedule imports hicache.fast, which is above it",
    ),
    "upwards, a module of a package": Mutation(
        imports_go_one_way,
        {"hicache.config": "from hicache.reference import history"},
        "hicache.config imports hicache.reference.history, which is above it",
    ),
    "relative": Mutation(
        imports_go_one_way, {"hicache.fast": "from . import config"}, "hicache.fast: relative import"
    ),
    "no layer": Mutation(
        imports_go_one_way, {"hicache.brand_new": ""}, "hicache.brand_new has no layer: give it one in LAYERS"
    ),
    "a circle inside a layer": Mutation(
        no_circles, {ONE: f"import {OTHER}", OTHER: f"from {ONE} import *"}, f"{OTHER} <- {ONE}"
    ),
    "a circle in functions": Mutation(
        no_circles,
        {ONE: f"def late():\n    import {OTHER}", OTHER: f"def late():\n    import {ONE}"},
        f"{OTHER} <- {ONE}",
    ),
    "kernels that know hicache": Mutation(
        kernels_know_only_torch,
        {"hicache_kernels.ops": "import hicache.config"},
        "hicache_kernels.ops imports hicache.config",
    ),
    "kernels that know diffusers": Mutation(
        kernels_know_only_torch,
        {"hicache_kernels.history": "def late():\n    from diffusers import FluxPipeline"},
        "hicache_kernels.history imports diffusers",
    ),
    "a backend on another": Mutation(
        backends_stand_alone,
        {"hicache_kernels.backends.native": "from hicache_kernels.backends import reference"},
        "hicache_kernels.backends.native imports hicache_kernels.backends.reference",
    ),
    "a private name": Mutation(
        private_names_stay_private,
        {"hicache.fast": "from hicache.config import _whole"},
        "hicache.fast imports hicache.config._whole",
    ),
    "a private part of torch": Mutation(
        private_parts_of_others_stand_in_compat,
        {"hicache.fast": "def late(module):\n    return module._forward_hooks"},
        "hicache.fast touches _forward_hooks",
    ),
    "a private part of diffusers, by string": Mutation(
        private_parts_of_others_stand_in_compat,
        {"hicache.stats": 'def late(module):\n    return getattr(module, "_diffusers_hook", None)'},
        "hicache.stats touches _diffusers_hook",
    ),
    "a private module of torch": Mutation(
        private_parts_of_others_stand_in_compat,
        {"hicache.engine": "from torch.utils import _pytree"},
        "hicache.engine touches _pytree",
    ),
    "a private part of torch, in a module called alike": Mutation(
        private_parts_of_others_stand_in_compat,
        {"hicache.compatible": "def late(module):\n    return module._forward_hooks"},
        "hicache.compatible touches _forward_hooks",
    ),
    "an op imported": Mutation(
        only_the_engine_calls_kernels,
        {"hicache.fast": "from hicache_kernels import gated_sum as harmless"},
        "hicache.fast uses hicache_kernels.gated_sum",
    ),
    "an op of the package": Mutation(
        only_the_engine_calls_kernels,
        {"hicache.fast": "import hicache_kernels as kernels\nkernels.update_(None, None, 0)"},
        "hicache.fast uses hicache_kernels.update_",
    ),
    "an op of a module": Mutation(
        only_the_engine_calls_kernels,
        {"hicache.stats": "def late():\n    import hicache_kernels.ops\n    hicache_kernels.ops.forecast()"},
        "hicache.stats uses hicache_kernels.ops.forecast",
    ),
    "an op of a module imported": Mutation(
        only_the_engine_calls_kernels,
        {"hicache.cli.info": "from hicache_kernels import ops\nops.update_forecast_()"},
        "hicache.cli.info uses hicache_kernels.ops",
    ),
    "an op by its name": Mutation(
        only_the_engine_calls_kernels,
        {"hicache.fast": "import hicache_kernels as k\ngetattr(k, 'update_')()"},
        "hicache.fast uses hicache_kernels.the package itself",
    ),
    "an op of torch's library": Mutation(
        only_the_engine_calls_kernels,
        {"hicache.fast": "import torch\ntorch.ops.hicache.gated_sum_()"},
        "hicache.fast uses hicache_kernels.torch.ops.gated_sum_",
    ),
    "a test on another": Mutation(
        no_test_imports_another,
        {"tests.test_brand_new": "from tests.test_architecture import ROOT"},
        "test_brand_new.py imports tests.test_architecture.ROOT",
    ),
}


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources that guards read."""
    root = tmp_path_factory.mktemp("tree")
    for part in ("hicache", "hicache_kernels", "tests"):
        for path in (ROOT / part).rglob("*.py"):
            target = root / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    return root


@pytest.mark.parametrize("name", MUTATIONS)
def test_guards_find_mutations(name: str, copied: Path):
    mutation = MUTATIONS[name]
    assert mutation.guard(copied) == []
    before: dict[Path, str | None] = {}
    for module, source in mutation.added.items():
        path = copied.joinpath(*module.split(".")).with_suffix(".py")
        before[path] = path.read_text() if path.exists() else None
        path.write_text(f"{before[path] or ''}\n{source}\n")
    try:
        [found] = mutation.guard(copied)
    finally:
        for path, old in before.items():
            path.unlink() if old is None else path.write_text(old)
    assert mutation.found in found


def test_every_guard_is_tried():
    assert {mutation.guard for mutation in MUTATIONS.values()} == set(GUARDS)
