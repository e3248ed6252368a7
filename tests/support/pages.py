"""Code that stands in pages of docs/."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parent.parent.parent / "docs"


def code_of(page: str) -> list[str]:
    """The Python blocks of a page, from top to bottom."""
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
