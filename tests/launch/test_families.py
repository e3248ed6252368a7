"""Every family on a tiny pipeline in a folder, through the code that loads and draws the real ones."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import imageio_ffmpeg
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from hicache.cli import main
from hicache.launch.drawing import Painter
from hicache.launch.files import video_bytes
from hicache.launch.loading import Place, load, resolve
from hicache.launch.prompts import Prompt
from hicache.launch.settings import Settings
from hicache.launch.tasks import Picture, Task
from tests.support import model_folders, text_models

MODES = ("original", "hicache", "taylor", "reuse")
STEPS = 8
EDITS = ("flux-kontext", "qwen-image-edit")
GUIDANCE = {
    "flux": 3.5,
    "flux-kontext": 2.5,
    "sd3": 4.5,
    "hunyuan-video": 6.0,
    "wan": 5.0,
    "ltx": 3.0,
    "cogvideox": 6.0,
    "dit": 4.0,
}
VIDEOS = ("hunyuan-video", "wan", "ltx", "cogvideox")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a family's model, made once."""
    transformers.utils.logging.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch:
        text_models.allow_no_torchvision(patch)
        # the pipelines scale their input picture to a megapixel
        patch.setattr(
            diffusers.pipelines.qwenimage.pipeline_qwenimage_edit,
            "calculate_dimensions",
            lambda area, ratio: (32, 32, None),
        )
        made: dict[str, Path] = {}

        def folder(name: str) -> Path:
            if name not in made:
                made[name] = model_folders.save(name, tmp_path_factory.mktemp("models") / name)
            return made[name]

        yield folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture to change."""
    path = tmp_path / "given.png"
    colours = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    Image.fromarray(colours).save(path)
    return path


def _settings(name: str, folder: Path, mode: str, picture: Path) -> Settings:
    image = (str(picture),) if name in EDITS else ()
    chosen = {"interval": 3, "warmup": 2} if mode != "original" else {}
    call = {**model_folders.CALLS[name], **chosen}
    return Settings(model=str(folder), backend=name, mode=mode, steps=STEPS, image=image, **call)


def _text(name: str) -> str:
    return "1" if name == "dit" else "a red ring"


def _by_hand(name: str, folder: Path, picture: Path, seed: int) -> Any:
    """What the pipeline draws, called as its own documentation has it."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {**model_folders.CALLS[name]}
    call |= call.pop("more", {})
    if "frames" in call:
        call["num_frames"] = call.pop("frames")
        call["output_type"] = "np"
    if name in EDITS:
        call["image"] = Image.open(picture).convert("RGB")
    if name.startswith("qwen"):
        call |= {"true_cfg_scale": 4.0, "negative_prompt": " "}
    else:
        call["guidance_scale"] = GUIDANCE[name]
    call["class_labels" if name == "dit" else "prompt"] = [1] if name == "dit" else _text(name)
    output = pipe(**call, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(seed))
    return np.asarray(output[0][0])


@pytest.mark.few(4)
@pytest.mark.parametrize("name", model_folders.FAMILIES)
def test_original_is_the_pipeline_called_by_hand(name: str, folders: Any, picture: Path):
    settings, backend = resolve(_settings(name, folders(name), "original", picture))
    painter = Painter(load(settings, Place()), settings, backend)
    task = Task((Picture(0, 5, Prompt(0, _text(name))),), frozenset({0}))
    [drawn] = painter.drawn(painter.arguments(task))
    drawn = np.asarray(drawn)
    by_hand = _by_hand(name, folders(name), picture, 5)
    assert drawn.shape == by_hand.shape
    assert drawn.std() > 0
    assert np.array_equal(drawn, by_hand)
    [(_, made)] = painter.draw(task)
    if name in VIDEOS:
        again = video_bytes(by_hand, settings.fps or 0, _text(name), "other", {})
        assert _frames(made.data) == _frames(again)
    else:
        with Image.open(_file(made.data)) as written:
            assert np.array_equal(np.asarray(written), by_hand)


def _file(data: Any) -> Any:
    return io.BytesIO(data)


def _frames(data: bytes) -> list[bytes]:
    """Frames of a video, decoded."""
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        file.write(data)
        file.flush()
        reader = imageio_ffmpeg.read_frames(file.name)
        next(reader)
        return list(reader)


@pytest.mark.few(4)
@pytest.mark.parametrize("name", model_folders.FAMILIES)
def test_every_mode_draws_a_file(name: str, folders: Any, picture: Path, tmp_path: Path, capsys: Any):
    """By the command line; what is cached draws otherwise than what is not, and skips what it says."""
    calls = dict(model_folders.CALLS[name])
    more = [f"--set={key}={json.dumps(value)}" for key, value in calls.pop("more", {}).items()]
    options = [*more, *(word for key, value in calls.items() for word in (f"--{key}", str(value)))]
    if name in EDITS:
        options += ["--image", str(picture)]
    if name in VIDEOS:
        options += ["--fps", "8"]
    lines = {}
    for mode in MODES:
        out = tmp_path / mode
        cached = [] if mode == "original" else ["--interval", "3", "--warmup", "2"]
        command = ["generate", _text(name), "--model", str(folders(name)), "--out", str(out), "--mode", mode]
        status = main([*command, "--steps", str(STEPS), *cached, *options])
        [line] = map(json.loads, (out / "done.jsonl").read_text().splitlines())
        assert status == 0, line["error"]
        assert (out / line["file"]).stat().st_size > 0
        assert line["file"].endswith(".mp4" if name in VIDEOS else ".png")
        lines[mode] = line
    assert [lines[mode]["skipped_steps"] for mode in MODES] == [0, 4, 4, 4]
    pictures = {mode: (tmp_path / mode / lines[mode]["file"]).read_bytes() for mode in MODES}
    assert len(set(pictures.values())) == len(MODES)


def test_a_family_is_found_by_the_folder(folders: Any):
    for name in ("sd3", "wan"):
        settings, backend = resolve(Settings(model=str(folders(name))))
        assert backend.name == settings.backend == name
    with pytest.raises(ValueError, match=r"--backend flux: expected a FluxPipeline, got .*, a WanPipeline"):
        resolve(Settings(model=str(folders("wan")), backend="flux"))


def test_a_variable_says_where_the_model_is(folders: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QWEN_IMAGE_MODEL_PATH", str(folders("qwen-image")))
    settings, _ = resolve(Settings(backend="qwen-image"))
    assert settings.model == str(folders("qwen-image"))
    monkeypatch.setenv("HICACHE_MODEL_PATH_QWEN_IMAGE", "/no/such/folder")
    with pytest.raises(ValueError, match="/no/such/folder"):
        resolve(Settings(backend="qwen-image"))


@pytest.mark.parametrize("name", ["flux", "wan", "dit"])
def test_a_dry_run_loads_no_weights(name: str, folders: Any, tmp_path: Path, capsys: Any, monkeypatch: Any):
    def read(*_: object, **__: object) -> None:
        raise AssertionError("it read weights")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", read)
    out = tmp_path / "out"
    assert main(["generate", "1", "--model", str(folders(name)), "--out", str(out), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "1 pictures into" in told
    assert "9 of 50 steps are full, bound 5.56x" in told
    assert "bytes of history" in told
    assert not out.exists()
