"""`universality align`: look at what a comparison found."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from universality.commands import example, stage

_WIDTH = 160  # where there is no terminal

app = stage("Look at what a comparison found.")


@app.callback()
def _group() -> None:
    """Look at what a comparison found."""


@app.command(epilog=example("align show a:3:120 --comparison cross"))
def show(
    feature: Annotated[str, typer.Argument(help="SIDE:LAYER:FEATURE, such as a:3:120.")],
    comparison: Annotated[str, typer.Option(help="One of alignment.comparisons.")] = "cross",
    study: Annotated[Path, typer.Option(help="The study's params.yaml, with its results beside it.")] = Path(
        "params.yaml"
    ),
    contexts: Annotated[int, typer.Option(min=1, help="Contexts of the feature and of its best partner.")] = 8,
) -> None:
    """Print a feature's partners, and its top contexts and its best partner's side by side."""
    from rich.console import Console

    from universality.alignment.show import parse_feature
    from universality.alignment.show import show as print_feature

    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    print_feature(study, comparison, parse_feature(feature), contexts, console)
