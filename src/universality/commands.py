"""The options that commands of all stages share."""

from pathlib import Path
from typing import Annotated

import typer

Settings = Annotated[
    str,
    typer.Option(help="The stage's settings: inline JSON, or the path of a YAML or JSON file.", metavar="JSON|FILE"),
]
Out = Annotated[Path, typer.Option(help="Where the result goes; written whole or not at all.")]
Threads = Annotated[int, typer.Option(min=1, help="Numerical threads; other numbers can give other last digits.")]
Log = Annotated[Path | None, typer.Option(help="Log file; messages go to the terminal as well.")]


def example(command: str) -> str:
    """The closing part of a command's help."""
    return f"Example:  universality {command}"


def stage(help: str) -> typer.Typer:
    """An empty group of commands, one a stage."""
    return typer.Typer(help=help, no_args_is_help=True, add_completion=False)
