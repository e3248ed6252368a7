"""Prompt files: what is read from them, and which line is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from hicache.cli import main
from hicache.launch.prompts import PromptError, PromptFile
from hicache.launch.settings import Settings
from hicache.launch.tasks import Selection, Work


def read(path: Path, data: str | bytes) -> list[tuple[str, dict[str, object]]]:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    found = list(PromptFile(path))
    assert [prompt.index for prompt in found] == list(range(len(found)))
    return [(prompt.text, dict(prompt.overrides)) for prompt in found]


def texts(path: Path, data: str | bytes) -> list[str]:
    return [text for text, _ in read(path, data)]


@pytest.mark.parametrize(
    "data",
    [
        b"one\ntwo\n",
        b"\xef\xbb\xbfone\r\ntwo",
        b"\n  one \n\n\n two\n\n",
    ],
)
def test_text(data: bytes, tmp_path: Path):
    assert texts(tmp_path / "prompts.txt", data) == ["one", "two"]


def test_text_is_taken_as_it_is(tmp_path: Path):
    odd = ["# no comment", 'says "no"', "a, b", "ünïcödé ☃", "x" * 1000, "same", "same"]
    assert texts(tmp_path / "prompts.txt", "\n".join(odd)) == odd


def test_jsonl(tmp_path: Path):
    (tmp_path / "cat.png").write_bytes(b"")
    line = (
        '{"prompt": "two\\nlines", "negative": "", "seed": 5, "steps": 9, "guidance": 2, "image": "cat.png"}'
    )
    [(text, overrides)] = read(tmp_path / "prompts.jsonl", line + "\n\n")
    assert text == "two\nlines"
    image = [str(tmp_path / "cat.png")]
    assert overrides == {"negative": "", "seed": 5, "steps": 9, "guidance": 2.0, "image": image}


def test_tables(tmp_path: Path):
    csv = 'prompt,seed,width\n"a, b",7,\n"says ""no""",,64\n'
    assert read(tmp_path / "p.csv", csv) == [("a, b", {"seed": 7}), ('says "no"', {"width": 64})]
    assert texts(tmp_path / "q.csv", "a red ring,x\na blue ring,y\n") == ["a red ring", "a blue ring"]
    parti = "Prompt\tCategory\tChallenge\na ring\tArts\tBasic\n"
    assert read(tmp_path / "p.tsv", parti) == [("a ring", {})]
    assert PromptFile(tmp_path / "p.tsv").unused() == ["category", "challenge"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.txt", b"", "expected prompts, got none"),
        ("p.jsonl", b"\n\n", "expected prompts, got none"),
        ("p.txt", b"one\n\xff\xfe\n", "line 2: expected UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2: expected a JSON object, got Expecting value"),
        ("p.jsonl", b'{"prompt": "a"}\n["b"]\n', 'line 2: expected an object with a "prompt", got ["b"]'),
        ("p.jsonl", b'{"prompt": "a", "sead": 1}\n', "line 1: expected prompt and any of negative, seed"),
        ("p.jsonl", b'{"prompt": "a", "seed": "x"}\n', "line 1: seed: expected a whole number >= 0, got 'x'"),
        ("p.jsonl", b'{"prompt": "a", "width": 0}\n', "line 1: width: expected a whole number >= 1, got 0"),
        ("p.jsonl", b'{"prompt": "a", "steps": true}\n', "line 1: steps: expected a whole number >= 1"),
        (
            "p.jsonl",
            b'\n{"prompt": "a", "image": "no.png"}\n',
            "line 2: image: expected a picture, got no file",
        ),
        ("p.jsonl", b'{"prompt": "a", "image": []}\n', "line 1: image: expected the path of a picture"),
        ("p.csv", b"prompt,seed\na,1\nb,x\n", "line 3: seed: expected a whole number >= 0, got 'x'"),
        ("p.csv", b"prompt,seed\na,1,2\n", "line 2: expected at most 2 cells, got 3"),
        ("p.csv", b"prompt,seed\n,1\n", "line 2: expected a prompt, got an empty cell"),
        ("p.csv", b'prompt,seed\n"a,1\n', "expected a row of a table"),
    ],
)
def test_the_line_is_named(
    name: str, data: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PromptError) as raised:
        list(PromptFile(tmp_path / name))
    assert f"{tmp_path / name}: {message}" in str(raised.value) or message in str(raised.value)
    out = tmp_path / "out"
    assert main(["generate", "--prompts", str(tmp_path / name), "--out", str(out), "--gpus", "cpu"]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"hicache generate: {tmp_path / name}: ")
    assert message in line
    assert not out.exists()


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(PromptError, match="cannot read the prompts: No such file"):
        list(PromptFile(tmp_path / "no.txt"))


def test_groups_are_of_equal_settings(tmp_path: Path):
    rows = ["a,,", "b,,", "c,5,", "d,,9", "e,,9", "f,,"]
    (tmp_path / "p.csv").write_text("\n".join(["prompt,seed,steps", *rows]))
    work = Work(PromptFile(tmp_path / "p.csv"), Settings(steps=4, seed=100), batch=2)
    groups = [[(one.prompt.text, one.seed) for one in task.pictures] for task in work.tasks(lambda _: True)]
    assert groups == [[("a", 100), ("b", 101)], [("c", 5)], [("d", 103), ("e", 104)], [("f", 105)]]


def test_selection_keeps_numbers(tmp_path: Path):
    (tmp_path / "p.txt").write_text("\n".join("abcdefgh"))
    prompts = PromptFile(tmp_path / "p.txt")
    work = Work(prompts, Settings(steps=4), Selection(offset=1, stride=3, limit=2))
    assert [(one.index, one.seed, one.prompt.text) for one in work.pictures()] == [(1, 1, "b"), (4, 4, "e")]
    with pytest.raises(ValueError, match="--stride: expected an int >= 1, got 0"):
        Selection(stride=0)
