"""The arguments that the commands have in common."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def parser(description: str | None, csv: bool = True) -> argparse.ArgumentParser:
    """A parser that prints a module's docstring as it stands; ``csv`` adds the option ``--csv``."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if csv:
        made.add_argument("--csv", type=Path, help="also write the rows here")
    return made


def require(device: str, hint: str = "") -> None:
    """End the command where it is to run on a GPU and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--device cuda: no CUDA device{hint}")
