"""`universality ablation`: take well and badly matched features out of a model."""

from pathlib import Path
from typing import Annotated

import typer

from universality.ablation.settings import AblationJob
from universality.commands import Log, Out, Settings, Threads, example, stage
from universality.errors import StudyError
from universality.runtime import configure, deterministic_torch
from universality.settings import parse_argument

app = stage("Ablate the features that another model shares, and those that it does not.")


@app.command(
    epilog=example(
        "ablation measure --model models/neox --sae saes/neox/topk/seed_0/layer_0 "
        "--codes features/evaluation/neox/topk/seed_0/layer_0 --comparison alignment/cross --tokens corpus/tokens "
        "--tokenizer corpus/tokenizer --settings job.yaml --out ablation/cross/a"
    )
)
def measure(
    model: Annotated[Path, typer.Option(help="Model folder.")],
    sae: Annotated[list[Path], typer.Option(help="An SAE for each of the settings' `layers`, in their order.")],
    codes: Annotated[list[Path], typer.Option(help="Its codes, in the same order.")],
    comparison: Annotated[Path, typer.Option(help="The comparison that tells how well features are matched.")],
    tokens: Annotated[Path, typer.Option(help="Tokens folder from `corpus tokens`.")],
    tokenizer: Annotated[Path, typer.Option(help="The folder of the model's tokenizer.")],
    settings: Settings,
    out: Out,
    threads: Threads = 1,
    log: Log = None,
) -> None:
    """Effects on loss and tasks of ablating well and badly matched features that fire as often and write as much."""
    configure(threads, log)
    job = parse_argument(AblationJob, settings)
    if not len(sae) == len(codes) == len(job.layers):
        raise StudyError(
            f"ablation measure: {len(sae)} times --sae and {len(codes)} times --codes for {len(job.layers)} layers"
        )
    deterministic_torch(threads)
    from universality.ablation.tables import Folders, write_ablation

    folders = Folders(model, dict(zip(job.layers, sae, strict=True)), dict(zip(job.layers, codes, strict=True)))
    write_ablation(job, folders, comparison, tokens, tokenizer, out)
