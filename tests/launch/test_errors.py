"""What goes wrong is one line that says what to do, and a status that is not zero."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import hicache.demo
from hicache.cli import main
from hicache.cli.app import app
from hicache.demo.prompts import PROMPTS
from hicache.launch.loading import Place
from hicache.launch.settings import Settings
from hicache.launch.workers import Staff
from tests.support import model_folders

#: A few steps, on any machine.
STEPS = ("--steps", "4", "--gpus", "cpu")


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs what is to fail before anything is drawn; the one line that is told."""

    def run(*options: str, prompts: tuple[str, ...] = (PROMPTS[0],)) -> str:
        out = tmp_path / "out"
        assert main(["generate", *prompts, "--out", str(out), *STEPS, *options]) == 2
        [line] = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("hicache generate: ")
        assert not list(out.glob("*.png"))
        assert not (out / "done.jsonl").exists()
        return line.removeprefix("hicache generate: ")

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of a whole model."""
    return model_folders.save("dit", tmp_path / "model")


def test_a_model_that_is_not_there(refused: Any, tmp_path: Path):
    told = refused("--model", str(tmp_path / "none"))
    assert (
        told
        == f"--model: expected a folder of a diffusers pipeline or a name of the hub, got {tmp_path / 'none'}"
    )
    (tmp_path / "empty").mkdir()
    assert refused("--model", str(tmp_path / "empty")).endswith("got one without model_index.json")
    assert "nobody/nothing is no folder here, nor in the cache of downloads" in refused(
        "--model", "nobody/nothing"
    )


def test_an_interrupted_download(refused: Any, model: Path):
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    for kept in (4, 100, len(data) // 2, len(data) - 1):
        weights.write_bytes(data[:kept])
        told = refused("--model", str(model), prompts=("1",))
        assert "transformer/diffusion_pytorch_model.safetensors" in told
        assert told.endswith("fetch or copy the model again")
    weights.rename(weights.with_name(weights.name + ".incomplete"))
    assert "is missing: fetch or copy the model again" in refused("--model", str(model), prompts=("1",))
    shutil.rmtree(model / "transformer")
    assert "its part transformer is missing" in refused("--model", str(model), prompts=("1",))


def test_a_shard_that_is_missing(refused: Any, model: Path):
    index = {"metadata": {}, "weight_map": {"one": "a-00001-of-00002.safetensors"}}
    (model / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert "vae/a-00001-of-00002.safetensors is missing" in refused("--model", str(model), prompts=("1",))


def test_weights_that_are_no_weights(refused: Any, model: Path):
    (model / "model_index.json").write_text("{")
    assert "expected the description of a pipeline" in refused("--model", str(model))
    (model / "model_index.json").write_text("{}")
    assert "got model_index.json without its class" in refused("--model", str(model))
    (model / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    assert "has no NoSuchPipeline" in refused("--model", str(model))


def test_a_picture_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Of one prompt: it is recorded, and the others are drawn; of none, before anything is."""
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows = [{"prompt": PROMPTS[0]}, {"prompt": PROMPTS[1], "image": "broken.png"}, {"prompt": PROMPTS[2]}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    assert main(["generate", "--prompts", str(tmp_path / "p.jsonl"), "--out", str(out), *STEPS]) == 1
    assert sorted(path.name for path in out.glob("*.png")) == ["000000.png", "000002.png"]
    assert "picture 1: image: ShapesPipeline takes no " in capsys.readouterr().err


def test_a_picture_to_change_that_is_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = model_folders.save("flux-kontext", tmp_path / "model")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    call = ["generate", "a ring", "--model", str(folder), "--out", str(tmp_path / "out"), *STEPS]
    assert main([*call, "--image", str(tmp_path / "broken.png")]) == 1
    path = tmp_path / "broken.png"
    assert f"picture 0: image: expected a picture, got {path}, which is none" in capsys.readouterr().err
    assert main([*call, "--image", str(tmp_path / "none.png")]) == 2
    assert "cannot read" in capsys.readouterr().err
    assert main([*call[:4], "--out", str(tmp_path / "other"), *STEPS]) == 1
    assert "FluxKontextPipeline changes a picture: give one with --image" in capsys.readouterr().err


def test_a_gpu_that_is_not_there(refused: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    told = "this machine has no GPU that torch can use; --gpus cpu draws without"
    assert refused("--gpus", "0") == f"--gpus 0: {told}"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for wrong in ("2", "0,0", "x", "0,7"):
        expected = f"--gpus: expected cpu, all, or some of 0 … 1 divided by commas, got {wrong}"
        assert refused("--gpus", wrong) == expected
    assert Staff(gpus="all").cards() == Staff(gpus="0, 1").cards() == ["0", "1"]
    assert Staff().cards() == ["0"]
    assert refused("--gpus", "0", "--workers", "2") == "--workers: expected at most one a GPU, 1, got 2"


def test_more_workers_without_ray(refused: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    for options in (("--workers", "2"), ("--ray", "auto")):
        assert refused(*options).startswith("more than one worker needs Ray: pip install 'hicache[cluster]'")


def test_a_cluster_that_is_not_there(refused: Any):
    pytest.importorskip("ray", reason="pip install 'hicache[cluster]'")
    assert "Ray cannot reach a cluster at 127.0.0.1:1: " in refused("--ray", "127.0.0.1:1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mode", "cubic"], "--mode: expected one of original, hicache, scaled-taylor"),
        (
            ["--mode", "fitted", "--order", "1"],
            "--mode fitted takes what comes with the model: leave out --order",
        ),
        (["--mode", "no.json"], "no.json"),
        (["--backend", "pixel"], "--backend: expected one of shapes, flux,"),
        (["--steps", "0"], "--steps: expected an int >= 1, got 0"),
        (["--interval", "0"], "HiCacheConfig.interval: expected an int >= 1, got 0"),
        (["--order", "9"], "HiCacheConfig.order: expected an int from 0 to 4, got 9"),
        (["--schedule", "daily"], "unknown schedule 'daily'"),
        (["--history-dtype", "int8"], "--history-dtype: expected one of float64, float32"),
        (["--granularity", "layer"], "unknown granularity 'layer'"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--format", "gif"], "unknown format 'gif'"),
        (["--speedup", "0.5"], "expected a finite speedup >= 1, got 0.5"),
        (["--frames", "9"], "--frames: shapes draws pictures, not videos"),
        (["--set", "x"], "--set: expected NAME=VALUE, got 'x'"),
        (["--set", "colour=1"], "--set: ShapesPipeline takes no colour"),
        (["--offload", "model"], "--offload model: expected a GPU to offload from, got the CPU"),
        (["--offset", "7"], "expected prompts to draw, got none after --offset"),
        (["--prompts", "p.txt"], "expected prompts, or --prompts with a file of them, got both"),
        (["--lora", "no/such"], "--lora: cannot load no/such"),
    ],
)
def test_settings_that_are_wrong(options: list[str], message: str, refused: Any):
    assert message in refused(*options)


def test_no_prompts(refused: Any):
    assert refused(prompts=()) == "expected prompts, or --prompts with a file of them, got none"


# Options from a file.


def test_a_file_of_options_comes_after_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = 'interval = 2\nsteps = 8\nmode = "taylor"\nset = { guidance_scale = 3.0 }\n'
    (tmp_path / "run.toml").write_text(text)
    call = ["generate", PROMPTS[0], "--config", str(tmp_path / "run.toml"), "--out", str(tmp_path / "out")]
    assert main([*call, "--steps", "6", "--gpus", "cpu"]) == 0
    settings = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    assert (settings["interval"], settings["steps"], settings["mode"]) == (2, 6, "taylor")
    assert settings["more"] == {"guidance_scale": 3.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("intervall = 2", "expected options of generate, got intervall"),
        ("interval = 1 2", "line 1"),
        (None, "cannot read"),
    ],
)
def test_a_file_of_options_that_is_wrong(text: str | None, message: str, refused: Any, tmp_path: Path):
    if text is not None:
        (tmp_path / "run.toml").write_text(text)
    told = refused("--config", str(tmp_path / "run.toml"))
    assert told.startswith("--config: ")
    assert message in told


# The commands.


@pytest.mark.parametrize("command", ["generate", "demo", "plan", "calibrate", "info"])
def test_help_has_examples(command: str):
    done = CliRunner().invoke(app, [command, "--help"])
    assert done.exit_code == 0
    assert f"hicache {command}" in done.output


def test_the_shell_is_told_how_to_complete():
    done = CliRunner().invoke(
        app,
        [],
        env={"_ROOT_COMPLETE": "complete_bash", "COMP_WORDS": "hicache ge", "COMP_CWORD": "1"},
        prog_name="root",
    )
    assert "generate" in done.output


def test_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["plan"]) == 0
    told = capsys.readouterr().out
    assert "9 of 50 steps are full, bound 5.56x" in told
    assert "2 x [" not in told
    assert "1 x [2, 64, 192]" in told
    assert main(["plan", str(tmp_path / "none")]) == 2
    assert main(["plan", "--steps", "4"]) == 0
    assert "3 of 4 steps are full, bound 1.33x: little is left to skip" in capsys.readouterr().out


def test_a_place_off_the_gpu():
    with pytest.raises(ValueError, match="unknown offload 'disk'"):
        Place("cuda:0", "disk")
    with pytest.raises(ValueError, match="--seed: expected an int from 0"):
        Settings(seed=-1)
    assert hicache.demo.MODEL.is_dir()
