"""What of each model's call a CUDA graph cannot capture: ``python -m benchmarks.capture_safety``.

Every model runs with random weights on an emulated GPU, by itself and cached, and every operation is looked
at. Prints the page, or writes it with ``--write``.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.capture_safety.models import builders
from benchmarks.capture_safety.page import page
from benchmarks.capture_safety.survey import survey
from benchmarks.common import command


def main() -> None:
    parser = command.parser(__doc__, csv=False)
    parser.add_argument("--write", type=Path, help="write the page here instead of printing it")
    options = parser.parse_args()
    made = page({title: survey(build) for title, build in builders().items()})
    if options.write is None:
        print(made)
    else:
        options.write.write_text(made)


if __name__ == "__main__":
    main()
