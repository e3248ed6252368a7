"""The command line, run as a user runs it."""

from __future__ import annotations

import re

import pytest
import torch
from PIL import Image

from hicache import Fitted, Hermite, __version__
from hicache.calibration.file import Calibration, Entry
from hicache.cli import main
from tests.support.scripts import run_python, run_script


def test_demo(tmp_path, capsys):
    out = tmp_path / "sheet.png"
    prompts = ["a red ring on blue", "a white square on green"]
    assert (
        main(["demo", *prompts, "--steps", "9", "--interval", "3", "--repeats", "1", "--out", str(out)]) == 0
    )
    with Image.open(out) as sheet:
        assert sheet.width > sheet.height > 150
        assert len(sheet.getcolors(10**6)) > 20
    printed = capsys.readouterr().out
    for row in (
        r"full steps\s*│\s*9 │\s*5 │",
        r"skipped steps\s*│\s*0 │\s*4 │",
        r"seconds\s*│\s*\d+\.\d+ │\s*\d+\.\d+ │",
        r"speed-up, wall clock\s*│\s*1.00x │\s*\d+\.\d+x │",
        r"bound, steps / full steps\s*│\s*1.00x │\s*1.80x │",
        r"PSNR against full, mean\s*│\s*│\s*\d+\.\d+ dB │",
        r"SSIM against full, mean\s*│\s*│\s*0\.\d+ │",
        r"history\s*│\s*0 bytes │\s*[\d,]+ bytes │",
    ):
        assert re.search(row, printed), (row, printed)


def test_demo_at_interval_one_is_the_full_run(tmp_path, capsys):
    out = tmp_path / "sheet.png"
    assert (
        main(
            [
                "demo",
                "a red ring on blue",
                "--steps",
                "4",
                "--interval",
                "1",
                "--repeats",
                "1",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    assert re.search(r"PSNR against full, mean\s*│\s*│\s*inf dB", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a dragon"], "cannot read the prompt 'a dragon'"),
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--interval", "0"], "interval: expected an int >= 1, got 0"),
        (["--basis", "cubic"], "unknown basis 'cubic'; known bases: hermite"),
        (["--backend", "gpu"], "unknown backend 'gpu'; expected one of auto, reference, native"),
        (["--out", "no/such/folder/x.png"], "--out: expected a file in an existing folder"),
        (["--out", "/proc/x.png"], "--out: cannot write /proc/x.png: "),
        (["--guidance", "inf"], "--guidance: expected a finite number, got inf"),
        (["--seed", str(2**64)], "--seed: expected a number of 64 bits, got 18446744073709551616"),
        (
            ["--granularity", "layer"],
            "unknown granularity 'layer'; expected one of auto, module, low-rank, stack",
        ),
        (["--speedup", "nan"], "expected a finite speedup >= 1, got nan"),
        (["--speedup", "0.5"], "expected a finite speedup >= 1, got 0.5"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, capsys, monkeypatch):
    def run(*_: object, **__: object) -> None:
        raise AssertionError("it began to draw")

    if arguments != ["a dragon"]:
        monkeypatch.setattr("hicache.demo.compare.compare", run)
    assert main(["demo", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hicache demo: ")
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "fitted", "speedup"),
    [
        (["--steps", "10", "--interval", "4"], True, None),
        (["--steps", "10", "--interval", "3"], False, None),  # other full steps than the file's
        (["--steps", "11", "--interval", "4"], False, None),
        (["--steps", "10", "--interval", "4", "--basis", "hermite"], False, None),
        (["--steps", "10", "--interval", "4", "--last-step-full"], False, None),
        (["--speedup", "3"], None, 3.0),  # hicache.fast.apply chooses
        (["--speedup", "3", "--order", "1"], False, 3.0),
    ],
)
def test_what_is_fitted_to_the_model_is_the_default(arguments, fitted, speedup, capsys, monkeypatch):
    class Seen(Exception):
        pass

    def compare(pipe, prompts, config, **settings):
        assert settings["speedup"] == speedup
        assert (None if config is None else isinstance(config.basis, Fitted)) == fitted
        raise Seen

    rows = dict.fromkeys((3, 4, 5, 7, 8, 9), (1.0, 0.0, 0.0))
    entry = Entry(10, 2, 3, (0, 1, 2, 6), {"transformer[0]": rows})
    monkeypatch.setattr(
        "hicache.cli.demo.shipped", lambda *_: [Calibration({}, None, Hermite(0.5), (entry,))]
    )
    monkeypatch.setattr("hicache.demo.compare.compare", compare)
    with pytest.raises(Seen):
        main(["demo", "a red ring on blue", *arguments])


def test_info(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"hicache              {__version__}".split() in [line.split() for line in printed.splitlines()]
    assert re.search(r"^torch +\d", printed, re.M)
    assert re.search(r"^reference on cpu +usable$", printed, re.M)
    assert re.search(r"^native on cpu +(usable \((avx512|avx2|baseline)\)|not usable: .+)$", printed, re.M)
    if not torch.cuda.is_available():
        assert re.search(r"^native on cuda +(sm_\d+(, sm_\d+)*|not built)$", printed, re.M)


def test_command_and_module():
    done = run_python("-m", "hicache.cli", "--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"hicache {__version__}"


def test_info_without_the_extension(tmp_path):
    """As on a machine that had no compiler: says why, and everything still works on torch."""
    done = run_script("cli_without_extension.py", tmp_path / "x.png")
    assert done.returncode == 0, done.stderr
    assert "native on cpu     not usable: the native extension is not built" in done.stdout
    # without these options pip takes the wheel again that it made without a compiler
    assert "pip install --force-reinstall --no-deps --no-cache-dir --no-binary hicache hicache" in done.stdout
    # and nothing else: no progress bar where there is no terminal, no warning of somebody else's
    [error] = done.stderr.splitlines()
    assert "backend 'native' cannot run: the native extension is not built" in error
