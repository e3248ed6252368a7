"""Draws tasks with one pipeline: pictures as bytes of files, or why there are none."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

import hicache.fast
from hicache._version import __version__
from hicache.launch.backends import VIDEO, Backend
from hicache.launch.files import picture_bytes, read_pictures, video_bytes
from hicache.launch.manifest import Made
from hicache.launch.settings import ORIGINAL, Settings
from hicache.launch.tasks import Picture, Task

#: Settings → names of a pipeline's arguments.
_NAMES = {"steps": "num_inference_steps", "frames": "num_frames", "negative": "negative_prompt"}
_SAID = ("steps", "width", "height", "frames", "guidance", "negative")


class Painter:
    """A pipeline that draws tasks, cached once for all of them.

    Args:
        pipe: loaded; it stays cached until :meth:`close`.
        settings: resolved.
        backend: its family.

    Raises:
        ValueError: settings the pipeline has no argument for, or a pipeline that cannot be cached.
    """

    def __init__(self, pipe: Any, settings: Settings, backend: Backend) -> None:
        self._pipe, self._settings, self._backend = pipe, settings, backend
        self._takes = inspect.signature(pipe.__call__).parameters
        self._warm = False
        self._batch: int | None = None  # at most, once memory has run out
        # of a calibration, run.json has the rows
        self._about = {name: value for name, value in settings.plain().items() if name != "config"}
        self._check()
        self._handle = None
        if settings.mode != ORIGINAL:
            self._handle = hicache.fast.apply(
                pipe,
                settings.config(),
                speedup=settings.speedup,
                granularity=settings.granularity,
                clusters=settings.clusters,
            )

    def _check(self) -> None:
        unknown = [name for name in self._settings.more if name not in self._takes]
        if unknown:
            raise ValueError(f"--set: {type(self._pipe).__name__} takes no {', '.join(unknown)}")

    def close(self) -> None:
        """Leave the pipeline as it was."""
        if self._handle is not None:
            self._handle.remove()

    # What a pipeline is called with.

    def arguments(self, task: Task) -> dict[str, Any]:
        """What the pipeline is called with: settings it has no argument for are left out.

        Raises:
            ValueError: a prompt's own setting that the pipeline does not take, or an unreadable picture.
        """
        backend, said = (
            self._backend,
            {name: getattr(self._settings, name) for name in _SAID} | task.overrides,
        )
        images = said.pop("image", list(self._settings.image))
        names = {**_NAMES, "guidance": backend.guided_by}
        call = {names.get(name, name): value for name, value in said.items() if value is not None}
        for name in task.overrides.keys() - {"image"}:
            if names.get(name, name) not in self._takes:
                raise ValueError(f"{name}: {type(self._pipe).__name__} takes no {names.get(name, name)}")
        call = {name: value for name, value in call.items() if name in self._takes}
        call |= self._prompt([picture.prompt.text for picture in task.pictures], call)
        generators = [torch.Generator().manual_seed(picture.seed) for picture in task.pictures]
        call["generator"] = generators[0] if len(generators) == 1 else generators
        call["output_type"] = "np" if backend.kind == VIDEO else "pil"
        return {**call, **self._given(images), **self._settings.more}

    def _prompt(self, texts: list[str], call: Mapping[str, Any]) -> dict[str, Any]:
        """The prompts, and as many negative ones."""
        if self._backend.prompt == "class_labels":
            return {"class_labels": [self._label(text) for text in texts]}
        many = len(texts) > 1
        prompts: dict[str, Any] = {self._backend.prompt: texts if many else texts[0]}
        if many and "negative_prompt" in call:
            prompts["negative_prompt"] = [call["negative_prompt"]] * len(texts)
        return prompts

    def _label(self, text: str) -> int:
        """The class of a number or of a name.

        Raises:
            ValueError: the model has no such class.
        """
        labels = getattr(self._pipe, "labels", None) or {}
        if text in labels:
            return int(labels[text])
        try:
            return int(text)
        except ValueError:
            raise ValueError(f"expected the number of a class, or one of its names, got {text!r}") from None

    def _given(self, paths: list[str]) -> dict[str, Any]:
        """Pictures to change.

        Raises:
            ValueError: there is none where one is needed, or one where none is taken.
        """
        kind = type(self._pipe).__name__
        if not paths:
            if self._backend.edits or _required(self._takes, "image"):
                raise ValueError(
                    f"image: {kind} changes a picture: give one with --image or in the prompt's line"
                )
            return {}
        if "image" not in self._takes:
            raise ValueError(f"image: {kind} takes no picture")
        images = read_pictures(paths)
        return {"image": images[0] if len(images) == 1 else images}

    # Drawing.

    def draw(self, task: Task) -> Iterator[tuple[Picture, Made]]:
        """The wanted pictures of a task, each with what came of it.

        Where memory runs out, tasks are halved from then on. Where a call of several fails, each is tried
        alone, so that one prompt does not take the others with it.
        """
        if self._batch is not None and len(task.pictures) > self._batch:
            yield from self._draw_all(task.halves())
            return
        try:
            made = self._draw(task)
        except torch.OutOfMemoryError as error:
            if len(task.pictures) == 1 or self._batch is not None:
                yield from self._failed(task, error)
                return
            self._batch = -(-len(task.pictures) // 2)
            _free_memory()
            made = self._draw_all(task.halves())
        except Exception as error:  # whatever a pipeline raises is that prompt's, and told of it
            if len(task.pictures) == 1:
                yield from self._failed(task, error)
                return
            made = self._draw_all(task.singles())
        yield from made

    def _draw_all(self, tasks: list[Task]) -> Iterator[tuple[Picture, Made]]:
        for task in tasks:
            yield from self.draw(task)

    def _draw(self, task: Task) -> Iterator[tuple[Picture, Made]]:
        call = self.arguments(task)
        start = time.perf_counter()
        drawn = self.drawn(call)
        seconds = (time.perf_counter() - start) / len(task.pictures)
        facts = {**self._steps(call), "seconds": round(seconds, 4), "warmup": not self._warm}
        self._warm = True
        wanted = [
            (picture, one)
            for picture, one in zip(task.pictures, drawn, strict=True)
            if picture.index in task.wanted
        ]
        return iter([(picture, self._made(picture, one, facts)) for picture, one in wanted])

    def drawn(self, call: Mapping[str, Any]) -> Any:
        """Pictures, or videos as ``[videos, frames, height, width, 3]`` in [0, 1]."""
        output = self._pipe(**call)
        return output.frames if self._backend.kind == VIDEO else output.images

    def _steps(self, call: Mapping[str, Any]) -> dict[str, int]:
        if self._handle is None:
            return {"full_steps": call.get("num_inference_steps", self._settings.steps), "skipped_steps": 0}
        stats = self._handle.stats
        return {"full_steps": stats.full_steps, "skipped_steps": stats.skipped_steps}

    def _made(self, picture: Picture, drawn: Any, facts: Mapping[str, Any]) -> Made:
        settings, prompt = self._settings, picture.prompt.text
        software = f"hicache {__version__} {settings.tag}"
        about = {**self._about, **picture.prompt.overrides, "seed": picture.seed, "index": picture.index}
        if settings.fps is not None:
            return Made(picture.index, video_bytes(drawn, settings.fps, prompt, software, about), facts)
        return Made(picture.index, picture_bytes(drawn, settings.format, prompt, software, about), facts)

    def _failed(self, task: Task, error: Exception) -> Iterator[tuple[Picture, Made]]:
        text = " ".join(str(error).split()) or type(error).__name__
        for picture in task.keeps():
            yield picture, Made(picture.index, None, {}, text)


def _required(takes: Mapping[str, inspect.Parameter], name: str) -> bool:
    return name in takes and takes[name].default is inspect.Parameter.empty


def _free_memory() -> None:
    """Give back what the failed call held."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
