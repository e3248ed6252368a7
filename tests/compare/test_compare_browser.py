"""The page in a real browser without a window."""

from __future__ import annotations

import math
import re

import pytest

from hicache.compare.run import Comparison
from tests.support import browser
from tests.support.comparing import asked, written

pytestmark = pytest.mark.skipif(browser.missing() is not None, reason=str(browser.missing()))
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 400, "height": 860}


@pytest.fixture(scope="module")
def made(tmp_path_factory, shapes_pipe) -> tuple[Comparison, str]:
    """Numbers and the page's address: four modes, so that rows wrap, and prompts that are no words."""
    request = asked(
        tmp_path_factory.mktemp("browser"),
        mode=("hicache", "taylor", "scaled-taylor", "reuse"),
        interval=(3, 4, 6),
    )
    prompts = ("a red ring on blue", "large " * 60, "W" * 300)
    return written(shapes_pipe, request, prompts=prompts), request.out.as_uri()


@pytest.fixture(scope="module")
def chromium():
    with browser.browser() as found:
        yield found


@pytest.fixture
def open_page(chromium, made):
    """Opens the page; at the end nothing went wrong in it and nothing was asked of a network."""
    opened, asked_for, errors = [], [], []

    def go(viewport=WIDE, **context):
        page = chromium.new_page(viewport=viewport, **context)
        page.on("request", lambda request: asked_for.append(request.url))
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(made[1])
        opened.append(page)
        return page

    yield go
    for page in opened:
        page.close()
    assert [url for url in asked_for if not url.startswith("data:")] == [made[1]] * len(opened)
    assert errors == []


def indices(page):
    return [int(card.get_attribute("data-index")) for card in page.locator(".card").all()]


def focused(page, what="el => el.dataset.name"):
    return page.evaluate(f"({what})(document.activeElement)")


def test_worst_first_and_by_any_variant(open_page, made):
    page = open_page()
    comparison = made[0]
    assert indices(page) == comparison.worst_first()
    first = page.locator(".card h3").first.text_content()
    assert first == comparison.asked.prompts[comparison.worst_first()[0]]
    for one in comparison.variants:
        page.get_by_label("Sorted by").select_option(label=one.name)
        assert indices(page) == comparison.worst_first(one)


def test_zoom_opens_and_closes(open_page):
    page = open_page()
    dialog = page.locator("dialog")
    assert not dialog.is_visible()
    button = page.locator(".card").nth(1).locator(".shot button").nth(2)
    for close in ("button", "Escape", "beside"):
        button.click()
        assert dialog.is_visible()
        prompt = page.locator(".card").nth(1).locator("h3").text_content()
        assert page.locator("#zoom-title").text_content() == prompt
        assert page.locator("#zoom-note").inner_text().startswith("hicache N=6: PSNR ")
        shown, box = page.locator("#pane-variant img").first, page.locator("#pane-full img").bounding_box()
        assert shown.get_attribute("src") == button.locator("img").get_attribute("src")
        assert box["width"] > 4 * button.bounding_box()["width"]
        assert shown.bounding_box()["y"] == box["y"]  # beside each other
        if close == "button":
            page.get_by_role("button", name="Close").click()
        elif close == "Escape":
            page.keyboard.press("Escape")
        else:
            page.mouse.click(5, 5)
        assert not dialog.is_visible()
        assert focused(page) == "hicache N=6"


def test_zoom_by_keys_alone(open_page, made):
    page = open_page()
    names = [one.name for one in made[0].variants]
    page.locator("#order").focus()
    page.keyboard.press("Tab")
    assert focused(page) == names[0]
    page.keyboard.press("Enter")
    title = page.locator("#zoom-title")
    note, prompt = page.locator("#zoom-note"), title.inner_text()
    page.keyboard.press("ArrowRight")
    assert note.inner_text().startswith(names[1])
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert note.inner_text().startswith(names[-1])
    page.keyboard.press("ArrowDown")
    assert title.inner_text() != prompt
    page.keyboard.press("ArrowUp")
    assert title.inner_text() == prompt
    # neither Tab nor Shift+Tab leaves it for what is under it
    for _ in range(20):
        page.keyboard.press("Tab")
        assert focused(page, "el => el === document.body || !!el.closest('dialog')")
    page.keyboard.press("Escape")
    assert focused(page) == names[-1]


def test_flip_difference_and_size(open_page):
    page = open_page()
    page.locator(".shot button").last.click()
    full, variant = page.locator("#pane-full"), page.locator("#pane-variant")
    page.keyboard.press("f")
    assert (full.is_visible(), variant.is_visible()) == (False, True)
    page.keyboard.press("f")
    assert (full.is_visible(), variant.is_visible()) == (True, False)
    page.get_by_role("button", name="difference").click()
    assert page.locator(".over").is_visible()
    assert page.get_by_role("button", name="difference").get_attribute("aria-pressed") == "true"
    page.keyboard.press("s")
    assert full.is_visible()
    assert variant.is_visible()
    assert not page.locator(".over").is_visible()
    image = full.locator("img")
    assert page.locator("#scale").inner_text() == "fit"
    for _ in range(5):
        page.keyboard.press("+")
    assert page.locator("#scale").inner_text() == "16×"
    assert image.bounding_box()["width"] == 16 * 32
    page.set_viewport_size({"width": 700, "height": 600})
    page.locator("#pane-full .pan").evaluate("el => el.scrollTo(60, 40)")
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert page.locator("#pane-variant .pan").evaluate("el => [el.scrollLeft, el.scrollTop]") == [60, 40]
    page.get_by_role("button", name="Smaller").click()
    assert image.bounding_box()["width"] == 8 * 32


def test_a_difference_is_black_where_pictures_are_equal(open_page):
    """The browser's own arithmetic: |a - b| × 8, of every pixel that is shown."""
    page = open_page()
    page.locator(".shot button").last.click()
    page.keyboard.press("d")
    pixels = """async (equal) => {
      const both = document.querySelector(".both");
      if (equal) both.firstElementChild.src = both.lastElementChild.src;
      await both.firstElementChild.decode();
    }"""
    pan = page.locator("#pane-variant .both")
    page.evaluate(pixels, False)
    different = pan.screenshot()
    page.evaluate(pixels, True)
    equal = pan.screenshot()

    def brightest(png: bytes) -> int:
        import io

        import numpy as np
        from PIL import Image

        return int(np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))[2:-2, 2:-2].max())

    assert brightest(equal) == 0
    assert brightest(different) > 50


@pytest.mark.parametrize("width", [320, 400, 1280])
def test_nothing_is_wider_than_the_screen(width, open_page):
    page = open_page({"width": width, "height": 860})

    def across():
        return page.evaluate("document.documentElement.scrollWidth")

    assert across() == width
    # what is cut off can be scrolled to, in its own frame and by keys
    table = page.locator(".scroll")
    if width < 500:
        assert table.evaluate("el => el.scrollWidth > el.clientWidth && el.tabIndex === 0")
    outside = page.evaluate(
        """() => [...document.querySelectorAll("main *:not(table, table *):not(svg *)")]
             .filter((el) => el.getBoundingClientRect().right > innerWidth + 0.5)
             .map((el) => el.outerHTML.slice(0, 80))"""
    )
    assert outside == []
    page.locator(".shot button").first.click()
    box = page.locator("dialog").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    assert box["y"] >= 0
    assert box["y"] + box["height"] <= 860
    assert page.locator("dialog").evaluate("el => el.scrollWidth <= el.clientWidth")


def test_a_phone_shows_three_pictures_beside_each_other(open_page):
    page = open_page(NARROW)
    boxes = [one.bounding_box() for one in page.locator(".group").nth(1).locator("button").all()]
    assert len({box["y"] for box in boxes}) == 1
    assert all(box["width"] > 100 for box in boxes)
    sizes = page.locator(".plot svg text").evaluate_all(
        "els => els.map(el => el.getBoundingClientRect().height)"
    )
    assert min(size for size in sizes if size) > 9


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2) of ``rgb(…)``."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return math.fsum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


COLOURS = """() => {
  const behind = (el) => {
    for (; el; el = el.parentElement) {
      const found = getComputedStyle(el).backgroundColor;
      if (!found.startsWith("rgba(0, 0, 0, 0")) return found;
    }
  };
  const shown = (el) => el.getClientRects().length && [...el.childNodes].some(
    (node) => node.nodeType === 3 && node.textContent.trim());
  return [...document.querySelectorAll("body *")].filter(shown).map((el) => {
    const style = getComputedStyle(el), drawn = el.closest("svg");
    return [el.textContent.trim().slice(0, 30), drawn ? style.fill : style.color, behind(el)];
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme, open_page):
    """Text 4.5 to 1, lines of plots and the dots of the table 3 to 1, by what the browser computes."""
    page = open_page(color_scheme=scheme)
    page.locator(".shot button").first.click()
    texts = page.evaluate(COLOURS)
    assert len(texts) > 200
    wrong = [text for text in texts if contrast(text[1], text[2]) < 4.5]
    assert wrong == []
    background = page.locator(".plot").first.evaluate("el => getComputedStyle(el).backgroundColor")
    assert (luminance(background) > 0.5) == (scheme == "light")
    body = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(body) > 0.5) == (scheme == "light")
    dots = page.locator(".dot").evaluate_all("els => els.map(el => getComputedStyle(el).backgroundColor)")
    assert len(set(dots)) == 4
    series = page.evaluate(
        """[1, 2, 3, 4, 5, 6, 7, 8].map((at) => {
             const probe = document.createElement("i");
             probe.style.color = `var(--series-${at})`;
             document.body.append(probe);
             return getComputedStyle(probe).color; })"""
    )
    assert len(set(series)) == 8
    assert min(contrast(one, background) for one in [*dots, *series]) >= 3


def test_it_can_be_read_without_scripts(open_page):
    page = open_page(java_script_enabled=False)
    assert page.locator(".card h3").first.is_visible()
    assert page.locator("table tbody tr").count() == 13
    assert page.locator(".plot svg").count() == 6
