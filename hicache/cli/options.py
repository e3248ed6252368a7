"""Options from a TOML file, and what is common to commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import typer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def take_file(context: typer.Context, path: Path | None) -> Path | None:
    """Make what a TOML file says the defaults of the other options: the command line comes first.

    Raises:
        ValueError: it cannot be read, or has options that the command does not.
    """
    if path is None or context.resilient_parsing:
        return path
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"--config: {path}: {error}") from error
    options = {name.replace("-", "_"): value for name, value in given.items()}
    known = {parameter.name for parameter in context.command.params} - {"config"}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise ValueError(
            f"--config: {path}: expected options of {context.info_name}, got {', '.join(unknown)}"
        )
    if isinstance(options.get("set"), dict):
        options["set"] = [f"{name}={json.dumps(value)}" for name, value in options["set"].items()]
    context.default_map = {**(context.default_map or {}), **options}
    return path


def assignments(texts: list[str]) -> dict[str, Any]:
    """``NAME=VALUE`` by name; values are JSON, or text where they are none.

    Raises:
        ValueError: one without an equals sign.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"--set: expected NAME=VALUE, got {text!r}")
        try:
            found[name.strip()] = json.loads(value)
        except ValueError:
            found[name.strip()] = value
    return found
