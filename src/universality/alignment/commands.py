"""`universality alignment`: compare two sets of features."""

from pathlib import Path
from typing import Annotated

import typer

from universality.alignment.settings import Comparison, Statistics
from universality.commands import Log, Out, Settings, Threads, example, stage
from universality.runtime import configure
from universality.settings import Settings as SettingsBase
from universality.settings import parse_argument

app = stage("Match features across models.")


class AlignmentJob(SettingsBase):
    """One of alignment.comparisons, the layers of its sides, and alignment.statistics."""

    comparison: Comparison
    layers_a: list[int]
    layers_b: list[int]
    statistics: Statistics


@app.command(
    epilog=example(
        "alignment compare --settings job.yaml --a features/neox/topk/seed_0/layer_0 "
        "--b features/mamba/topk/seed_0/layer_0 --rows-a activations/neox/resid_post.0/evaluation/shard_0 "
        "--rows-b activations/mamba/resid_post.0/evaluation/shard_0 --out cross.parquet --summary cross.json"
    )
)
def compare(
    settings: Settings,
    rows_a: Annotated[list[Path], typer.Option(help="An evaluation shard of any one site of model a; repeat.")],
    rows_b: Annotated[list[Path], typer.Option(help="The same of model b.")],
    out: Out,
    summary: Annotated[Path, typer.Option(help="Where the means and their intervals go.")],
    a: Annotated[
        list[Path] | None,
        typer.Option(
            help="Codes of side a, in the order of its layers; where neurons are compared, the evaluation shards of "
            "all its neuron sites; repeat."
        ),
    ] = None,
    b: Annotated[list[Path] | None, typer.Option(help="The same of side b.")] = None,
    threads: Threads = 1,
    log: Log = None,
) -> None:
    """Max pairwise Pearson correlation both ways over all layers, with bootstrap intervals over documents."""
    configure(threads, log)
    job = parse_argument(AlignmentJob, settings)
    from universality.activations.store import ActivationStore, check_aligned
    from universality.alignment.compare import read_feature_side, read_neuron_side, write_comparison

    check_aligned(rows_a, rows_b)
    read = read_neuron_side if job.comparison.setting == "neurons" else read_feature_side
    side_a = read(job.comparison.a.model, job.layers_a, a or [])
    side_b = read(job.comparison.b.model, job.layers_b, b or [])
    documents = ActivationStore(rows_a, model=job.comparison.a.model).rows().documents
    write_comparison(job.comparison, side_a, side_b, documents, job.statistics, out, summary)
