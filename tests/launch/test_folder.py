"""A folder of pictures: what is there, what is missing, what is refused, and what is told of failures."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import hicache.fast
from hicache import Fitted
from hicache._version import __version__
from hicache.cli import main
from hicache.demo.prompts import PROMPTS
from hicache.launch import manifest
from hicache.launch.drawing import Painter
from hicache.launch.loading import resolve
from hicache.launch.manifest import FolderError, Made, RunFolder
from hicache.launch.prompts import Prompt, PromptFile, given
from hicache.launch.run import run
from hicache.launch.settings import Settings
from hicache.launch.tasks import Picture, Task, Work
from tests.support.scripts import run_python

STEPS = ("--steps", "4", "--interval", "2", "--warmup", "1", "--gpus", "cpu")


def draw(out: Path, *more: str, prompts: tuple[str, ...] = PROMPTS[:4]) -> int:
    return main(["generate", *prompts, "--out", str(out), *STEPS, *more])


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "done.jsonl").read_text().splitlines()]


def files(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("*.png")}


@pytest.fixture
def error(capsys: pytest.CaptureFixture[str]) -> Any:
    """What was told on standard error: one line."""

    def read() -> str:
        [line] = capsys.readouterr().err.strip().splitlines()
        return line

    return read


def test_a_folder_has_pictures_and_what_they_are(tmp_path: Path):
    assert draw(tmp_path / "out", "--seed", "3") == 0
    found = lines(tmp_path / "out")
    assert [line["index"] for line in found] == [0, 1, 2, 3]
    assert [line["seed"] for line in found] == [3, 4, 5, 6]
    assert {line["file"]: line["sha256"] for line in found} == files(tmp_path / "out")
    assert [line["prompt"] for line in found] == list(PROMPTS[:4])
    assert {(line["full_steps"], line["skipped_steps"], line["error"]) for line in found} == {(2, 2, None)}
    assert [line["warmup"] for line in found] == [True, False, False, False]
    run_file = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run_file["tag"].startswith("hicache_N2_O2_s0.5_4st-")
    with Image.open(tmp_path / "out" / "000001.png") as picture:
        assert picture.text["Description"] == PROMPTS[1]
        assert picture.text["Software"] == f"hicache {__version__} {run_file['tag']}"
        assert json.loads(picture.text["hicache"])["seed"] == 4
    assert not (tmp_path / "out" / ".lock.json").exists()


def test_a_jpeg_has_them_too(tmp_path: Path):
    assert draw(tmp_path, "--format", "jpg", prompts=PROMPTS[:1]) == 0
    with Image.open(tmp_path / "000000.jpg") as picture:
        exif = picture.getexif()
        assert exif[0x010E].rstrip("\0") == PROMPTS[0]
        assert exif[0x0131].startswith(f"hicache {__version__} hicache_N2")


def test_exactly_what_is_missing_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert draw(tmp_path) == 0
    before, made = files(tmp_path), len(lines(tmp_path))
    (tmp_path / "000002.png").unlink()
    capsys.readouterr()
    assert draw(tmp_path) == 0
    assert files(tmp_path) == before
    assert [line["index"] for line in lines(tmp_path)[made:]] == [2]
    told = capsys.readouterr().out
    assert "there already" in told
    assert draw(tmp_path, prompts=PROMPTS[:6]) == 0  # prompts may be added
    assert [line["index"] for line in lines(tmp_path)[made + 1 :]] == [4, 5]


def test_the_picture_is_the_same_in_any_order_and_part(tmp_path: Path):
    assert draw(tmp_path / "all") == 0
    for part in (("--offset", "2"), ("--limit", "2"), ("--offset", "1", "--stride", "2")):
        assert draw(tmp_path / "parts", *part) == 0
    assert files(tmp_path / "parts") == files(tmp_path / "all")


def test_a_batch_draws_the_same_pictures(tmp_path: Path):
    """Up to rounding; and the same bits again where a group is drawn for one of it."""
    for batch in ("1", "3"):
        assert draw(tmp_path / batch, "--batch", batch) == 0
    for name in files(tmp_path / "1"):
        with Image.open(tmp_path / "1" / name) as one, Image.open(tmp_path / "3" / name) as other:
            different = [abs(a - b) for a, b in zip(one.tobytes(), other.tobytes(), strict=True)]
            assert max(different) <= 1
    before = files(tmp_path / "3")
    (tmp_path / "3" / "000001.png").unlink()
    assert draw(tmp_path / "3", "--batch", "3") == 0
    assert files(tmp_path / "3") == before


def test_several_pictures_of_a_prompt(tmp_path: Path):
    assert draw(tmp_path, "--images-per-prompt", "2", prompts=PROMPTS[:2]) == 0
    assert [(line["prompt"], line["seed"]) for line in lines(tmp_path)] == [
        (PROMPTS[0], 0),
        (PROMPTS[0], 1),
        (PROMPTS[1], 2),
        (PROMPTS[1], 3),
    ]


# What is refused.


def test_other_settings_are_refused(tmp_path: Path, error: Any):
    assert draw(tmp_path) == 0
    before = files(tmp_path)
    assert draw(tmp_path, "--sigma", "0.3") == 2
    told = error()
    assert "was drawn with sigma None, not 0.3: draw into another folder" in told
    assert files(tmp_path) == before
    assert draw(tmp_path, "--sigma", "0.3", "--force") == 0
    assert len(lines(tmp_path)) == 4
    assert files(tmp_path).keys() == before.keys()


def test_a_changed_prompt_is_refused(tmp_path: Path, error: Any):
    assert draw(tmp_path) == 0
    assert draw(tmp_path, prompts=("a red cross on white", *PROMPTS[1:4])) == 2
    assert "picture 0 is of another prompt than 'a red cross on white'" in error()


def test_pictures_of_somebody_else_are_left_alone(tmp_path: Path, error: Any):
    (tmp_path / "000000.png").write_bytes(b"somebody's")
    assert draw(tmp_path) == 2
    assert "has pictures but no run.json" in error()
    assert (tmp_path / "000000.png").read_bytes() == b"somebody's"


def test_a_second_launcher_is_told_who_holds_the_folder(tmp_path: Path):
    settings, _ = resolve(Settings(steps=4))
    with RunFolder(tmp_path, settings):
        done = run_python("-m", "hicache.cli", "generate", PROMPTS[0], "--steps", "4", "--out", tmp_path)
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.startswith("hicache generate: ")]
    assert f"process {os.getpid()} on {socket.gethostname()}, since" in line
    with RunFolder(tmp_path, settings):
        pass  # it was let go


# What is stopped half-way.


def _made(index: int = 0) -> tuple[Picture, Made]:
    facts = {"full_steps": 1, "skipped_steps": 0, "seconds": 0.0, "warmup": False}
    return Picture(index, index, Prompt(index, "a prompt")), Made(index, b"bytes of a picture", facts)


@pytest.mark.parametrize("when", ["picture", "line", "rename"])
def test_what_is_stopped_at_any_moment_is_whole_or_not_there(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As by kill -9: nothing cleans up."""

    class Killed(BaseException):
        pass

    settings, _ = resolve(Settings(steps=4))
    write, calls = manifest._write, []

    def killed(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == {"picture": 1, "line": 2, "rename": 3}[when]:
            arguments[0].open(arguments[1]).write(arguments[2][:7])
            raise Killed
        write(*arguments)

    with pytest.raises(Killed), RunFolder(tmp_path, settings) as folder:
        monkeypatch.setattr(manifest, "_write", killed)
        if when == "rename":
            monkeypatch.setattr(Path, "rename", lambda *_: killed(tmp_path / "other", "wb", b""))
        folder.add(*_made())
    monkeypatch.undo()
    assert not (tmp_path / "000000.png").exists()
    with RunFolder(tmp_path, settings) as folder:
        assert len(folder) == (when == "rename")
        if not len(folder):
            folder.add(*_made())
        assert not folder.missing(_made()[0])
    assert (tmp_path / "000000.png").read_bytes() == b"bytes of a picture"
    assert len(lines(tmp_path)) == 1
    assert not list(tmp_path.glob("*.part"))


def test_a_full_disk_stops_all_and_leaves_nothing_half_written(tmp_path: Path, error: Any, monkeypatch: Any):
    write, count = manifest._write, []

    def full(path: Path, mode: str, data: bytes, sync: bool) -> None:
        count.append(path)
        if len(count) == 5:
            path.open(mode).write(data[:10])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, mode, data, sync)

    monkeypatch.setattr(manifest, "_write", full)
    assert draw(tmp_path) == 2
    told = error()
    assert "No space left on device; what is there stays: make room and start again" in told
    assert sorted(files(tmp_path)) == ["000000.png", "000001.png"]
    assert not list(tmp_path.glob("*.part"))
    monkeypatch.undo()
    assert draw(tmp_path) == 0
    assert [line["index"] for line in lines(tmp_path)] == [0, 1, 2, 3]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is full")
def test_a_line_that_does_not_fit_is_taken_back(tmp_path: Path):
    with pytest.raises(OSError, match="No space left"):
        manifest._write(Path("/dev/full"), "wb", b"x", False)


def test_a_folder_that_cannot_be_made(error: Any):
    assert draw(Path("/proc/no/such")) == 2
    assert "/proc/no/such: cannot write" in error()


def test_ctrl_c_ends_cleanly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn, calls = Painter.draw, []

    def stop(self: Painter, task: Task) -> Iterator[Any]:
        calls.append(task)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return drawn(self, task)

    monkeypatch.setattr(Painter, "draw", stop)
    assert draw(tmp_path) == 130
    assert [line["index"] for line in lines(tmp_path)] == [0, 1]
    monkeypatch.undo()
    assert draw(tmp_path) == 0
    assert [line["index"] for line in lines(tmp_path)] == [0, 1, 2, 3]


# Failures.


def test_a_prompt_that_fails_is_recorded_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    prompts = (PROMPTS[0], "a dragon", PROMPTS[2])
    for batch in ("1", "3"):
        assert draw(tmp_path / batch, "--batch", batch, prompts=prompts) == 1
        assert sorted(files(tmp_path / batch)) == ["000000.png", "000002.png"]
        [failed] = [line for line in lines(tmp_path / batch) if line["error"]]
        assert failed["index"] == 1
        assert "cannot read the prompt 'a dragon'" in failed["error"]
        assert failed["sha256"] is None
    assert "picture 1: cannot read the prompt 'a dragon'" in capsys.readouterr().err
    assert draw(tmp_path / "1", prompts=prompts) == 1  # tried again, and only that
    assert [line["index"] for line in lines(tmp_path / "1")] == [0, 1, 2, 1]


class Hungry:
    """The bundled pipeline with memory for so many pictures at once."""

    def __init__(self, pipe: Any, room: int) -> None:
        self.pipe, self.room, self.calls = pipe, room, []

    def __call__(self, prompt: Any, num_inference_steps: int, generator: Any, output_type: str) -> Any:
        count = 1 if isinstance(prompt, str) else len(prompt)
        self.calls.append(count)
        if count > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.pipe(prompt, num_inference_steps, generator=generator, output_type=output_type)


@pytest.mark.parametrize(
    ("room", "calls", "failed"), [(4, [4, 4], 0), (2, [4, 2, 2, 2, 2], 0), (1, [4, 2, 2, 2, 2], 8)]
)
def test_out_of_memory_halves_the_batch_once(room: int, calls: list[int], failed: int, shapes_pipe: Any):
    settings, backend = resolve(Settings(mode="original", steps=1))
    pipe = Hungry(shapes_pipe, room)
    painter = Painter(pipe, settings, backend)
    work = Work(given(PROMPTS), settings, batch=4)
    made = [made for task in work.tasks(lambda _: True) for _, made in painter.draw(task)]
    assert pipe.calls == calls
    assert [one.index for one in made] == list(range(8))
    assert sum(one.error is not None for one in made) == failed


# Ten times ten thousand prompts.


class Nobody:
    """Workers that draw nothing in no time."""

    count = 1

    def draw(self, tasks: Iterator[Task]) -> Iterator[Any]:
        for task in tasks:
            for picture in task.pictures:
                yield picture, Made(picture.index, None, {}, "nobody draws")

    def close(self) -> None:
        pass


@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_memory_is_flat_over_many_prompts(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of a prompt nothing is held: the texts of 10⁵ would be 100 MB."""
    path = tmp_path / "prompts.jsonl"
    with path.open("w") as file:
        for number in range(count):
            file.write(json.dumps({"prompt": f"{number} " + "x" * 1000}) + "\n")
    settings, _ = resolve(Settings(steps=4))
    tracemalloc.start()
    with RunFolder(tmp_path / "out", settings) as folder:
        monkeypatch.setattr(folder, "add", lambda picture, made: None)
        run(Work(PromptFile(path), settings), folder, Nobody)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2**20


def test_the_bundled_model_is_drawn_as_by_hand(tmp_path: Path, shapes_pipe: Any):
    assert draw(tmp_path, "--mode", "original", prompts=PROMPTS[:1]) == 0
    by_hand = shapes_pipe(PROMPTS[0], 4, generator=torch.Generator().manual_seed(0)).images[0]
    with Image.open(tmp_path / "000000.png") as picture:
        assert picture.tobytes() == by_hand.tobytes()


def test_what_comes_with_the_model_is_a_mode(tmp_path: Path, shapes_pipe: Any):
    """``fitted`` is what apply() takes of itself."""
    out = str(tmp_path / "out")
    assert (
        main(["generate", PROMPTS[0], "--mode", "fitted", "--steps", "50", "--gpus", "cpu", "--out", out])
        == 0
    )
    with hicache.fast.apply(shapes_pipe) as handle:
        by_hand = shapes_pipe(PROMPTS[0], 50, generator=torch.Generator().manual_seed(0)).images[0]
    assert isinstance(handle.stats.config.basis, Fitted)
    with Image.open(tmp_path / "out" / "000000.png") as picture:
        assert picture.tobytes() == by_hand.tobytes()
    [line] = lines(tmp_path / "out")
    assert (line["full_steps"], line["skipped_steps"]) == (
        handle.stats.full_steps,
        handle.stats.skipped_steps,
    )


def test_a_line_that_is_none_of_ours(tmp_path: Path):
    settings, _ = resolve(Settings(steps=4))
    with RunFolder(tmp_path, settings):
        pass
    (tmp_path / "done.jsonl").write_text('{"index": 0}\n')
    with pytest.raises(FolderError, match=r"done.jsonl: line 1 is none of ours: KeyError\('file'\)"):
        RunFolder(tmp_path, settings)
