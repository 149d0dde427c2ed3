"""`universality circuits`: which components carry induction, and how."""

from pathlib import Path
from typing import Annotated

import typer

from universality.circuits.settings import CircuitsSettings
from universality.commands import Log, Out, Settings, Threads, example, stage
from universality.runtime import configure, deterministic_torch
from universality.settings import parse_argument

app = stage("Ablate and patch circuits.")

Model = Annotated[Path, typer.Option(help="Model folder.")]
Tokens = Annotated[Path, typer.Option(help="Tokens folder from `corpus tokens`.")]


@app.command(
    epilog=example(
        "circuits induction --model models/neox --tokens tokens --settings circuits.yaml --out induction.parquet"
    )
)
def induction(
    model: Model, tokens: Tokens, settings: Settings, out: Out, threads: Threads = 1, log: Log = None
) -> None:
    """Path patching on the induction task: every sender to the logits, and through the strongest receiver."""
    configure(threads, log)
    parsed = parse_argument(CircuitsSettings, settings)
    deterministic_torch(threads)
    from universality.circuits.tables import induction_table

    induction_table(model, tokens, parsed, out)


@app.command(
    epilog=example(
        "circuits off-by-one --model models/mamba --tokens tokens --settings circuits.yaml --out off_by_one.parquet"
    )
)
def off_by_one(
    model: Model, tokens: Tokens, settings: Settings, out: Out, threads: Threads = 1, log: Log = None
) -> None:
    """Mamba: exchange the write of single positions into the state that the last position reads."""
    configure(threads, log)
    parsed = parse_argument(CircuitsSettings, settings)
    deterministic_torch(threads)
    from universality.circuits.tables import off_by_one_table

    off_by_one_table(model, tokens, parsed, out)
