"""The page and its numbers: whole, readable, alone in the world."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hicache import HiCacheConfig
from hicache.cli import main
from hicache.compare import command
from hicache.compare.files import appearing
from hicache.compare.metrics import METRICS
from hicache.compare.origin import Origin
from hicache.compare.page import numbers, page
from hicache.compare.plots import VARIABLES, plots
from hicache.compare.request import Request
from hicache.compare.run import Comparison, Measured
from hicache.compare.variants import Variant
from tests.support.comparing import asked, written

HOSTILE = "<script>alert(1)</script> & \"quoted\" 'so'"


class Elements(HTMLParser):
    """Tags and their attributes, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def of(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.found if tag in tags]


@pytest.fixture(scope="module")
def request_(tmp_path_factory) -> Request:
    return asked(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def found(request_, shapes_pipe) -> Comparison:
    return written(shapes_pipe, request_, {"LPIPS": "not <here>"})


@pytest.fixture
def text(found, request_) -> str:
    return request_.out.read_text(encoding="utf-8")


def test_nothing_of_the_page_is_elsewhere(text):
    elements = Elements(text)
    addresses = [
        str(value)
        for _, attributes in elements.found
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data", "action", "xlink:href")
    ]
    assert len(addresses) > 15
    assert all(re.match(r"data:|#", address) for address in addresses)
    assert not re.search(r"@import|url\((?!#)|https?://|fetch\(|XMLHttpRequest", text)
    [policy] = [meta["content"] for meta in elements.of("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_names_are_unique_and_what_refers_to_them_finds_them(text):
    elements = Elements(text)
    ids = [str(attributes["id"]) for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids)) > 50
    targets = re.findall(r'(?:href="#|url\(#|aria-labelledby="|for=")([\w.-]+)', text)
    assert len(targets) > 20
    assert set(targets) <= set(ids)


def test_pictures_and_plots_are_told_to_those_who_do_not_see_them(text, found):
    elements = Elements(text)
    alts = [image["alt"] for image in elements.of("img")]
    assert "a red ring on blue, full run" in alts
    assert "a green square on yellow, reuse N=6" in alts
    assert alts.count("") == 3  # of the dialog, empty until it opens
    drawn = [one for one in elements.of("svg") if one["role"] == "img"]
    assert len(drawn) == len(elements.of("svg")) == 6
    mean = found.variants[0].mean("psnr")
    said = str(drawn[0]["aria-label"])
    assert (
        f"hicache: {METRICS[0].text(found.variants[1].mean('psnr'))} at {found.variants[1].full_steps}"
        in said
    )
    assert f"{METRICS[0].text(mean)} at {found.variants[0].full_steps}" in said
    assert elements.of("html") == [{"lang": "en"}]


def test_plots_have_no_colour_of_their_own(found):
    drawn = plots(found)
    assert [plot.title for plot in drawn] == [
        *("PSNR over full steps", "PSNR over seconds", "Speed-up over full steps"),
        *("Error of latents, step by step", "SSIM over full steps", "SSIM over seconds"),
    ]
    for plot in drawn:
        assert not [colour for colour in VARIABLES if colour in plot.svg]
        assert "var(--series-1)" in plot.svg
        assert not re.search(r"(?:fill|stroke): #", plot.svg)
    assert plots(found) == drawn


def test_worst_pictures_come_first(text, found):
    cards = [int(str(one["data-index"])) for one in Elements(text).of("article")]
    assert cards == found.worst_first()


def test_what_anybody_wrote_is_text(found, request_):
    hostile = replace(found.asked, prompts=(HOSTILE, *found.asked.prompts[1:]))
    origin = Origin(HOSTILE, HOSTILE, {HOSTILE: HOSTILE}, {HOSTILE: HOSTILE}, {HOSTILE: HOSTILE})
    text = page(replace(found, asked=hostile), origin)
    assert len(Elements(text).of("script")) == 1
    assert "<script>alert" not in text
    assert text.count("&lt;script&gt;alert(1)") > 10


def test_numbers(found, request_):
    data = json.loads(request_.numbers.read_text(encoding="utf-8"))
    assert [one["prompt"] for one in data["pictures"]] == list(request_.prompt)
    assert [one["seed"] for one in data["pictures"]] == [0, 1, 2]
    assert data["worst_first"] == found.worst_first()
    assert data["metrics"]["psnr"] == {"name": "PSNR", "unit": "dB", "higher_is_better": True}
    assert data["not_measured"] == {"LPIPS": "not <here>"}
    assert data["versions"].keys() >= {"hicache", "torch", "diffusers", "device"}
    assert data["full"]["speedup"] == 1.0
    for plain, one in zip(data["variants"], found.variants, strict=True):
        assert one.variant is not None
        assert plain["scores"] == one.scores
        assert plain["error_per_step"] == one.errors
        assert HiCacheConfig.from_json(json.dumps(plain["config"])) == one.variant.config


def test_a_picture_that_equals_the_full_run_is_null_in_json(found, request_):
    measured = Measured(Variant("hicache", HiCacheConfig(interval=1)), [1.0], 12, 0)
    measured.scores = {"psnr": [float("inf"), 40.0, 50.0], "ssim": [1.0, 0.9, 0.9]}
    measured.pictures = found.full.pictures
    origin = Origin("m", "c", {}, {}, {})
    equal = replace(found, variants=[measured])
    assert json.loads(numbers(equal, origin))["variants"][0]["scores"]["psnr"] == [None, 40.0, 50.0]
    assert "∞ dB" in page(equal, origin)
    assert "Error of latents" not in page(equal, origin)  # nobody handed latents out


def test_the_command_on_the_page_asks_for_the_same(request_, tmp_path, monkeypatch):
    """Of every option that is not left at its default."""
    monkeypatch.chdir(tmp_path)
    other = Request(
        ('it\'s "one"', "--two"),
        model="folder of/mine",
        out=Path("x.html"),
        mode=("taylor", "reuse"),
        interval=(2, 3),
        steps=9,
        order=1,
        sigma=0.25,
        warmup=2,
        seed=5,
        batch=3,
        repeats=1,
        granularity="output",
        backend="reference",
        metrics=("ssim",),
        call={"guidance_scale": 1.5, "width": 64, "height": 32},
    )
    asked: list[Request] = []
    monkeypatch.setattr(command, "run", asked.append)
    for one in (replace(request_, out=Path("compare.html")), other):
        program, *words = shlex.split(one.command())
        assert (program, main(words)) == ("hicache", 0)
        assert asked.pop() == one


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: expected an int >= 1, got 0"),
        (["--repeats", "0"], "--repeats: expected an int >= 1, got 0"),
        (["--batch", "0"], "--batch: expected an int >= 1, got 0"),
        (["--interval", "5,six"], "--interval: expected whole numbers with commas, got 'six'"),
        (["--interval", "5,0"], "--interval: expected an int >= 1, got 0"),
        (["--order", "9"], "order: expected an int from 0 to 4, got 9"),
        (["--mode", "reuse,cubic"], "unknown mode 'cubic'; known modes: fitted, hicache, taylor"),
        (["--metrics", "fid"], "unknown metric 'fid'; known metrics: psnr, ssim"),
        (["--granularity", "layer"], "unknown granularity 'layer'; expected one of auto, module"),
        (["--backend", "gpu"], "unknown backend 'gpu'; expected one of auto, reference, native"),
        (["--guidance", "nan"], "--guidance: expected a finite number, got nan"),
        (["--seed", "-1"], "--seed: expected an int from 0 to"),
        (
            ["--out", "compare.png"],
            "--out: expected the name of a page such as compare.html, got",
        ),
        (["--out", "no/such/folder/x.html"], "--out: expected a file in an existing folder"),
        (["--out", "/proc/x.html"], "--out: cannot write /proc/x.html: "),
        (["--prompts", "no-such.txt"], "--prompts: cannot read no-such.txt"),
        (["a red ring on blue", "--prompts", "x.txt"], "expected prompts or --prompts, got both"),
        (["--model", "somewhere"], "expected at least one prompt, got none"),
        (["--mode", "fitted", "--interval", "2"], "for 26 full steps of 50 (N=2); it has 7, 8, 9, 10, 12"),
        (["a dragon"], "cannot read the prompt 'a dragon'"),
    ],
)
def test_bad_input_is_one_clear_line_and_no_file(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hicache compare: ")
    assert message in error
    assert not list(tmp_path.iterdir())


def test_files_appear_whole_or_not_at_all(tmp_path):
    paths = [tmp_path / "one", tmp_path / "two"]
    paths[0].write_text("old")
    with pytest.raises(RuntimeError, match="late"), appearing(paths) as drafts:
        drafts[0].write_text("new")
        raise RuntimeError("late")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    assert paths[0].read_text() == "old"
    with appearing(paths) as drafts:
        for draft in drafts:
            draft.write_text("new")
        assert paths[0].read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    fresh = tmp_path / "fresh"
    fresh.touch()
    assert {path.stat().st_mode for path in paths} == {fresh.stat().st_mode}
    (tmp_path / "three").mkdir()
    with pytest.raises(ValueError, match="three: it is a folder"), appearing([tmp_path / "three"]):
        pass


def test_command(tmp_path, capsys):
    """As a user calls it; a pipeline may be anybody's."""
    out = tmp_path / "mine.html"
    words = ["--steps", "6", "--interval", "2,3", "--mode", "taylor", "--repeats", "1", "--metrics", "psnr"]
    assert main(["compare", "a red ring on blue", *words, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"taylor N=3 +│ +4 │ +\d+\.\d+ │ +\d+\.\d+x │ +\d+\.\d dB │", printed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.html", "mine.json"]
    assert "hicache compare &#39;a red ring on blue&#39;" in out.read_text(encoding="utf-8")


def test_the_loader_is_the_callers(tmp_path, shapes_pipe):
    names = []

    def load(model):
        names.append(model)
        return shapes_pipe

    request = asked(tmp_path, model="somewhere", prompt=("a red ring on blue",), interval=(3,))
    assert command.run(request, load) == 0
    assert names == ["somewhere"]
    assert json.loads(request.numbers.read_text())["model"] == "somewhere"


def test_pictures_of_the_docs_are_small():
    folder = Path(__file__).parents[2] / "docs" / "images"
    sizes = {path.name: path.stat().st_size for path in folder.glob("compare-*.png")}
    assert {"compare-light.png", "compare-dark.png", "compare-phone.png"} <= sizes.keys()
    assert max(sizes.values()) <= 300_000
