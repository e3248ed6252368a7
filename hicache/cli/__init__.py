"""The ``hicache`` command: generate, demo, compare, plan, calibrate and info."""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    command = next((word for word in given if not word.startswith("-")), "")
    try:
        from hicache.cli.app import app
    except ImportError as error:
        print(f"hicache: needs the cli extra: pip install 'hicache[cli]' ({error})", file=sys.stderr)
        return 2
    try:
        app(args=given, prog_name="hicache")
    except SystemExit as end:
        return int(end.code or 0)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"hicache {command}: {text}", file=sys.stderr)
        return 2
    return 0
