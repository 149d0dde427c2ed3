"""`universality saes evaluate` and `gather`: how well dictionaries do on held-out documents.

Apart from training, so that what is trained does not depend on how it is measured.
"""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import Field

from universality.commands import Log, Out, Settings, Threads, example
from universality.errors import StudyError
from universality.runtime import configure, deterministic_torch
from universality.saes.settings import EvaluationRun, EvaluationSettings
from universality.settings import Name, Seed, parse_argument
from universality.settings import Settings as SettingsBase

app = typer.Typer()


class EvaluatedSAE(SettingsBase):
    """Whose dictionary it is, as the results are to name it."""

    sources: Annotated[list[Annotated[str, Field(pattern="^[^:]+:.+$")]], Field(min_length=1)]
    """MODEL:SITE each, as in training."""
    variant: Name
    seed: Seed


class EvaluationJob(SettingsBase):
    """What is measured in one go, sharing what it needs of the models, and how."""

    saes: Annotated[list[EvaluatedSAE], Field(min_length=1)]
    evaluation: EvaluationSettings
    run: EvaluationRun


@app.command(
    epilog=example(
        "saes evaluate --sae saes/neox/topk/seed_0/layer_0 "
        "--activations activations/neox/resid_post.0/evaluation/shard_0 --model models/neox --tokens corpus/tokens "
        "--settings job.yaml --out saes/neox/topk/seed_0/evaluation.json"
    )
)
def evaluate(
    sae: Annotated[list[Path], typer.Option(help="A folder for each of the settings' `saes`, in their order.")],
    activations: Annotated[
        list[Path], typer.Option(help="A shard of evaluation activations of a source; repeat for more.")
    ],
    model: Annotated[list[Path], typer.Option(help="A source's model folder; repeat for more.")],
    tokens: Annotated[Path, typer.Option(help="The tokens folder that the activations are of.")],
    settings: Settings,
    out: Out,
    threads: Threads = 1,
    log: Log = None,
) -> None:
    """Measure dictionaries on held-out documents, from their activations and from runs with reconstructions in place.

    Writes a JSON file; for a crosscoder a table of its features beside it, NAME.features.parquet.
    """
    configure(threads, log)
    job = parse_argument(EvaluationJob, settings)
    if len(sae) != len(job.saes):
        raise StudyError(f"saes evaluate: {len(sae)} times --sae for {len(job.saes)} SAEs in the settings")
    deterministic_torch(threads)
    from universality.saes.evaluation import evaluate as evaluate_saes
    from universality.saes.placement import Evaluated
    from universality.saes.sources import parse_source

    wanted = [
        Evaluated(folder, [parse_source(source) for source in one.sources], one.variant, one.seed)
        for folder, one in zip(sae, job.saes, strict=True)
    ]
    evaluate_saes(wanted, activations, model, tokens, job.evaluation, job.run, out)


@app.command(
    epilog=example("saes gather --evaluation saes/neox/topk/seed_0/evaluation.json --out saes/metrics.parquet")
)
def gather(
    evaluation: Annotated[list[Path], typer.Option(help="A file that `saes evaluate` wrote; repeat for more.")],
    out: Out,
    log: Log = None,
) -> None:
    """Put the metrics of all dictionaries in one table."""
    configure(1, log)
    from universality.saes.metrics import gather as gather_metrics

    gather_metrics(evaluation, out)
