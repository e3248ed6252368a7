"""The commands, put together. Each is a module of its own, which imports what is slow where it is needed."""

from __future__ import annotations

from typing import Annotated

import typer

import hicache
from hicache.cli.calibrate import calibrate
from hicache.cli.compare import compare
from hicache.cli.demo import demo
from hicache.cli.generate import generate
from hicache.cli.info import info
from hicache.cli.plan import plan

app = typer.Typer(
    help=(hicache.__doc__ or "").split("\n")[0],
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (generate, demo, compare, plan, calibrate, info):
    app.command()(_command)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"hicache {hicache.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Options of no command."""
