"""Makes the page of the demo, and pictures of it for the docs: light, dark, on a phone, and enlarged.

    python -m tests.compare.screenshots --write docs/images

Needs a browser, see ``tests/support/browser.py``. ``--page compare.html`` takes a page that is there already.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from hicache.cli import main as hicache
from tests.support import browser

#: Name → width, height, colours, and whether the worst picture is enlarged.
PICTURES = {
    "compare-light": (1280, 2270, "light", False),
    "compare-dark": (1280, 2270, "dark", False),
    "compare-phone": (400, 1500, "light", False),
    "compare-phone-dark": (400, 860, "dark", True),
    "compare-zoom": (1280, 860, "dark", True),
}
LARGEST = 300_000  # bytes of a file


def take(chromium: Any, address: str, width: int, height: int, scheme: str, enlarged: bool) -> bytes:
    """PNG of the top of the page, or of its worst picture beside the full run."""
    page = chromium.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.goto(address)
    if enlarged:
        page.locator(".card").first.locator(".shot.low button").click()
    shot = page.screenshot(caret="initial")
    page.close()
    return bytes(shot)


def smaller(png: bytes) -> bytes:
    """The same; in 256 colours where it is too large otherwise."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    data = b""
    for one in (image, image.quantize(256, dither=Image.Dither.NONE)):
        stream = io.BytesIO()
        one.save(stream, "PNG", optimize=True)
        data = stream.getvalue()
        if len(data) <= LARGEST:
            break
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--page", type=Path, help="in place of the demo's")
    options = parser.parse_args()
    if (reason := browser.missing()) is not None:
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory() as folder, browser.browser() as chromium:
        page = options.page or Path(folder) / "compare.html"
        if options.page is None and hicache(["compare", "--out", str(page)]) != 0:
            raise SystemExit("no page, no pictures")
        for name, how in PICTURES.items():
            data = smaller(take(chromium, page.resolve().as_uri(), *how))
            if len(data) > LARGEST:
                raise SystemExit(f"{name}: expected at most {LARGEST:,} bytes, got {len(data):,}")
            (options.write / f"{name}.png").write_bytes(data)
            print(f"saved {options.write / name}.png, {len(data):,} bytes")


if __name__ == "__main__":
    main()
