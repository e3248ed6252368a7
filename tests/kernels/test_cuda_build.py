"""What nvcc makes of csrc/, read without a GPU; what the extension does without one; the build's options.

That the kernels compute the right numbers is tests/kernels/test_cuda_on_host.py.
"""

from __future__ import annotations

import itertools
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_tools import nvcc, output, tool

from hicache_kernels import backend_status
from hicache_kernels.backends import native

ROOT = Path(__file__).parents[2]
BOOLEANS = ("true", "false")
PACKS = {"float": 4, "bf16": 8, "fp16": 8, "double": 2}
# history dtype → base dtypes
PAIRS = {
    "float": ("float", "bf16", "fp16"),
    "bf16": ("bf16", "float"),
    "fp16": ("fp16", "float"),
    "double": ("double",),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A file with the kernels, its architectures and history dtypes: the extension, or one dtype of it."""
    if native._MISSING is None and native.cuda_archs():
        return Path(native._native.__file__), native.cuda_archs(), tuple(PACKS)
    out = tmp_path_factory.mktemp("cuda") / "bf16.o"
    command = [
        nvcc(), "-std=c++17", "--fmad=false", "-gencode", "arch=compute_90,code=[sm_90,compute_90]",
        f"-I{ROOT / 'csrc' / 'include'}", "-DHICACHE_TYPE=bf16",
        "-c", ROOT / "csrc" / "cuda_kernels.cu", "-o", out,
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return out, (90,), ("bf16",)


def demangled(text: str) -> str:
    if shutil.which("c++filt") is None:
        pytest.skip("no c++filt to read names with")
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


def short(name: str) -> str | None:
    """``void hicache::(anonymous namespace)::update_kernel<hicache::bf16, 8, 2>(…)`` → its last part."""
    found = re.search(r"(\w+_kernel<[^>]*>)\(", name)
    return found and found.group(1).replace("hicache::", "")


def expected(types: tuple[str, ...]) -> set[str]:
    """Every kernel there must be; the rows of a tile are left out."""
    names = set()
    for t in types:
        names.add(f"update_any_kernel<{t}>")
        names |= {f"update_kernel<{t}, {PACKS[t]}, {read}>" for read in range(5)}
        for by_feature in BOOLEANS:
            for op in ("update_forecast", "forecast"):
                names.add(f"{op}_any_kernel<{t}, {by_feature}>")
                names |= {f"{op}_kernel<{t}, {PACKS[t]}, {read}, {by_feature}>" for read in range(5)}
            for base in PAIRS[t]:
                names.add(f"gated_sum_any_kernel<{t}, {base}, {by_feature}>")
                kind = f"{t}, {base}, {max(PACKS[t], PACKS[base])}"
                for orders, update in itertools.product(range(1, 6), BOOLEANS):
                    names.add(f"gated_sum_kernel<{kind}, {orders}, {update}, {by_feature}>")
    return names


def without_rows(name: str) -> str:
    return re.sub(r"(gated_sum_kernel<\w+, \w+, \d+), \d+", r"\1", name)


def test_every_kernel_is_there_and_nothing_spills(compiled):
    path, archs, types = compiled
    text = demangled(output(tool("cuobjdump"), "--dump-resource-usage", path))
    used: dict[int, set[str]] = {}
    for section in re.split(r"^arch = sm_", text, flags=re.M)[1:]:
        arch = int(re.match(r"\d+", section).group())
        functions = re.findall(r"Function (.*):\n\s*REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", section)
        for name, registers, stack, local in functions:
            assert 0 < int(registers) <= 128, (arch, name, registers)
            assert stack == local == "0", (arch, name, stack, local)
            used.setdefault(arch, set()).add(without_rows(short(name)))
    assert tuple(sorted(used)) == archs
    for arch, names in used.items():
        assert names == expected(types), (arch, names ^ expected(types))


def test_products_and_sums_are_rounded_apart(compiled):
    """In the PTX, which goes to ptxas with every operation's rounding spelt out."""
    path, _, types = compiled
    ptx = demangled(output(tool("cuobjdump"), "--dump-ptx", path))
    kernels = {}
    for body in re.split(r"^\.visible \.entry |^\.entry |^\.weak \.entry ", ptx, flags=re.M)[1:]:
        name = short(body)
        assert name is not None, body[:200]
        kernels[name] = body
    assert {without_rows(name) for name in kernels} == expected(types)
    for name, body in kernels.items():
        assert not re.search(r"\bfma\.\w+\.f(32|64)\b", body), name
        floats = re.findall(r"\b(?:add|sub|mul)\.(?:\w+\.)*f(?:32|64)\b", body)
        assert floats or name.startswith("update"), name  # with no old difference there is nothing to compute
        assert all(".rn." in operation for operation in floats), (name, set(floats))
        for narrow, cast in (("bf16", "cvt.rn.bf16.f32"), ("fp16", "cvt.rn.f16.f32")):
            if re.search(rf"<{narrow}\b", name) and "forecast" in name:
                assert cast in body, name


@pytest.mark.slow
def test_wide_accesses(compiled):
    """In the machine code of every architecture: what is wide on one may not be on another."""
    path, archs, types = compiled
    tool("nvdisasm")
    for arch in archs:
        code = demangled(output(tool("cuobjdump"), "--dump-sass", "--gpu-architecture", f"sm_{arch}", path))
        seen = set()
        for body in re.split(r"^\s*Function : ", code, flags=re.M)[1:]:
            name = short(body.split("\n", 1)[0])
            seen.add(without_rows(name))
            assert not re.search(r"\b(LDL|STL)\b", body), (arch, name)
            loads = re.findall(r"\bLDG?\.E([.\w]*)", body)
            stores = re.findall(r"\bSTG?\.E([.\w]*)", body)
            assert loads, (arch, name)
            assert stores, (arch, name)
            if "_any_kernel" in name:
                assert not any(".128" in access for access in loads + stores), (arch, name)
                continue
            assert all(".128" in store for store in stores), (arch, name, stores)
            assert any(".128" in load for load in loads), (arch, name, loads)
            # Either of two dtypes of at most five coefficients and a gap. Where features have coefficients of
            # their own a gated sum loads them wherever it loads a feature: so often may the loop be unrolled,
            # and a tile of one row stands beside that of several.
            narrow = [load for load in loads if ".128" not in load]
            by_feature = name.startswith("gated_sum_kernel") and name.endswith("true>")
            most = 2 * (len(loads) - len(narrow)) + 2 if by_feature else 12
            assert len(narrow) <= most, (arch, name, narrow)
            assert not any(".U16" in load for load in narrow), (arch, name, narrow)
        assert seen == expected(types)


def test_without_a_device_every_call_fails_cleanly():
    """In a process of its own that sees no device."""
    if native._MISSING is not None:
        pytest.skip(native._MISSING)
    if not native.cuda_archs():
        pytest.skip("the extension was built without CUDA")
    script = Path(__file__).parent / "scripts" / "no_device.py"
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_status_says_why(monkeypatch):
    if native._MISSING is not None:
        pytest.skip(native._MISSING)
    device = torch.device("cuda", 0)
    monkeypatch.setattr(native, "cuda_archs", lambda: ())
    assert "built without CUDA: no working nvcc" in backend_status(device)["native"]
    monkeypatch.setattr(native, "cuda_archs", lambda: (80, 90))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend_status(device)["native"] == "torch sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 80 and above, and this device has 75" in backend_status(device)["native"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert backend_status(device)["native"] is None
    assert "CPU and CUDA tensors" in backend_status("meta")["native"]


# ---- the options of the build


def cmake() -> str:
    found = shutil.which(
        "cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    )
    if found is None:
        pytest.skip("no cmake")
    return found


def options(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """csrc/cuda.cmake up to the compiler, which a script has none of."""
    script = tmp_path / "options.cmake"
    script.write_text(f'cmake_minimum_required(VERSION 3.18)\ninclude("{ROOT}/csrc/cuda.cmake")\n')
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HICACHE_", "CUDA"))}
    return subprocess.run(
        [cmake(), "-P", str(script)],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def stand_in(tmp_path: Path) -> str:
    """An nvcc that knows some architectures and cannot compile."""
    path = tmp_path / "nvcc"
    path.write_text(
        '#!/bin/sh\n[ "$1" = --list-gpu-arch ] || exit 1\nprintf "compute_75\\ncompute_80\\ncompute_90\\n"\n'
    )
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"HICACHE_SKIP_CUDA_BUILD": "1"}, "built without CUDA: HICACHE_SKIP_CUDA_BUILD=1"),
        ({"CUDACXX": "/no/such/nvcc"}, "built without CUDA: no nvcc was found"),
        ({"CUDACXX": "/bin/false"}, "built without CUDA: /bin/false --list-gpu-arch failed"),
    ],
    ids=["skipped", "absent", "broken"],
)
def test_cpu_only(tmp_path, environment, message):
    done = options(tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert message in done.stdout


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"HICACHE_FORCE_CUDA_BUILD": "1", "CUDACXX": "/no/such/nvcc"},
            "HICACHE_FORCE_CUDA_BUILD=1: no nvcc was found",
        ),
        (
            {"HICACHE_FORCE_CUDA_BUILD": "1", "CUDACXX": "/bin/false"},
            "HICACHE_FORCE_CUDA_BUILD=1: /bin/false",
        ),
        (
            {"HICACHE_FORCE_CUDA_BUILD": "1", "HICACHE_SKIP_CUDA_BUILD": "1"},
            "expected at most one of them, got both",
        ),
        ({"HICACHE_SKIP_CUDA_BUILD": "yes"}, "HICACHE_SKIP_CUDA_BUILD: expected 0 or 1, got 'yes'"),
        ({"HICACHE_CUDA_ARCHS": "80,90"}, "HICACHE_CUDA_ARCHS: expected compute capabilities such as"),
        ({"HICACHE_CUDA_ARCHS": "90a"}, "got '90a'"),
        ({"HICACHE_CUDA_ARCHS": "80;61"}, "expected some of 75, 80, 90"),
        ({"HICACHE_CUDA_ARCHS": "75"}, "HICACHE_CUDA_ARCHS: expected 80 or above, got 75"),
    ],
    ids=lambda v: " ".join(f"{k[8:]}={x}" for k, x in v.items()) if isinstance(v, dict) else "",
)
def test_bad_options_are_errors(tmp_path, environment, message):
    done = options(tmp_path, **{"CUDACXX": stand_in(tmp_path), **environment})
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split()), done.stderr


@pytest.mark.parametrize("works", [True, False], ids=["nvcc", "nvcc that cannot compile"])
def test_configure(tmp_path, works):
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed")
    if works:
        nvcc()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HICACHE_", "CUDACXX"))}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    if works:
        environment["HICACHE_CUDA_ARCHS"] = "90;80;90"
    else:
        environment["CUDACXX"] = stand_in(tmp_path)
    command = [
        cmake(), "-S", ROOT, "-B", tmp_path / "build", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if works:
        assert re.search(r"hicache: CUDA with \S*nvcc for 80,90$", done.stdout, re.M)
    else:
        assert "built without CUDA" in done.stdout
        assert "does not compile a program" in done.stdout


@pytest.mark.parametrize("forced", [False, True], ids=["", "forced"])
def test_setup_falls_back_to_the_cpu(tmp_path, monkeypatch, forced):
    """When the build with CUDA fails, one without it follows, unless CUDA was asked for."""
    setuptools = pytest.importorskip("setuptools", reason="setuptools is not installed")
    pytest.importorskip("pybind11", reason="pybind11 is not installed")
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    runpy.run_path(str(ROOT / "setup.py"))
    for name in ("HICACHE_SKIP_CUDA_BUILD", "HICACHE_SKIP_NATIVE_BUILD", "HICACHE_FORCE_NATIVE_BUILD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HICACHE_FORCE_CUDA_BUILD", str(int(forced)))
    calls = []

    def run(command, check, env, **options):
        if "--version" in command:  # of the tools, for the digest
            return subprocess.CompletedProcess(command, 0, b"")
        calls.append(env.get("HICACHE_SKIP_CUDA_BUILD", "0"))
        if "--build" in command and calls[-1] == "0":
            raise subprocess.CalledProcessError(1, command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    builder = given["cmdclass"]["build_ext"](setuptools.Distribution({"packages": []}))
    builder.build_temp, builder.build_lib = str(tmp_path / "temp"), str(tmp_path / "lib")
    [extension] = given["ext_modules"]
    if forced:
        with pytest.raises(subprocess.CalledProcessError):
            builder.build_extension(extension)
        assert calls == ["0", "0"]
    else:
        builder.build_extension(extension)
        assert calls == ["0", "0", "1", "1"]
