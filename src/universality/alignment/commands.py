"""`universality alignment`: compare two sets of features."""

from pathlib import Path
from typing import Annotated

import typer

from universality.alignment.settings import MatchJob, Spaces, Statistics
from universality.commands import Log, Out, Settings, Threads, example, stage
from universality.runtime import configure
from universality.settings import Fraction, Positive, parse_argument
from universality.settings import Settings as SettingsBase

app = stage("Match features across models.")
RowsA = Annotated[list[Path], typer.Option(help="An evaluation shard of any one site of model a; repeat.")]
RowsB = Annotated[list[Path], typer.Option(help="The same of model b.")]
SideA = Annotated[
    list[Path],
    typer.Option(
        help="Codes of side a, in the order of its layers; where neurons are compared, the evaluation shards of all "
        "their sites; repeat."
    ),
]
SideB = Annotated[list[Path], typer.Option(help="The same of side b.")]


class CompareJob(MatchJob):
    """The same with all layers, and alignment.statistics."""

    statistics: Statistics


class SpacesJob(CompareJob):
    """The same, and alignment.spaces."""

    spaces: Spaces


class DecodersJob(SettingsBase):
    """Partners kept for the one-to-one matching, and alignment.statistics."""

    partners: Positive
    statistics: Statistics


class TablesJob(SettingsBase):
    confidence: Fraction


@app.command(
    epilog=example(
        "alignment match --settings job.yaml --a features/neox/topk/seed_0/layer_0 "
        "--b features/mamba/topk/seed_0/layer_0 --rows-a activations/neox/resid_post.0/evaluation/shard_0 "
        "--rows-b activations/mamba/resid_post.0/evaluation/shard_0 --out part.safetensors"
    )
)
def match(
    settings: Settings,
    rows_a: RowsA,
    rows_b: RowsB,
    a: SideA,
    b: SideB,
    out: Out,
    threads: Threads = 1,
    log: Log = None,
) -> None:
    """The best partners of every feature, both ways, between some layers of each side; a part of a comparison."""
    configure(threads, log)
    job = parse_argument(MatchJob, settings)
    from universality.alignment.blocks import write_block
    from universality.alignment.sides import read_sides, read_text

    text = read_text(rows_a, rows_b, job.matching)
    sides = read_sides(job.comparison, (job.layers_a, job.layers_b), (a, b), text)
    write_block(*sides, text.order, job.matching, out)


@app.command(
    epilog=example(
        "alignment compare --settings job.yaml --a features/neox/topk/seed_0/layer_0 "
        "--b features/mamba/topk/seed_0/layer_0 --rows-a activations/neox/resid_post.0/evaluation/shard_0 "
        "--rows-b activations/mamba/resid_post.0/evaluation/shard_0 --part part.safetensors --out cross"
    )
)
def compare(
    settings: Settings,
    rows_a: RowsA,
    rows_b: RowsB,
    a: SideA,
    b: SideB,
    part: Annotated[list[Path], typer.Option(help="What `alignment match` wrote of some of the layers; repeat.")],
    out: Out,
    threads: Threads = 1,
    log: Log = None,
) -> None:
    """Put the parts of a comparison together: partners over all layers, p-values, one-to-one matches, intervals."""
    configure(threads, log)
    job = parse_argument(CompareJob, settings)
    from universality.alignment.compare import write_comparison
    from universality.alignment.sides import read_sides, read_text

    text = read_text(rows_a, rows_b, job.matching)
    sides = read_sides(job.comparison, (job.layers_a, job.layers_b), (a, b), text)
    write_comparison(job.comparison, *sides, part, text.order, job.matching, job.statistics, out)


@app.command(
    epilog=example(
        "alignment decoders --settings job.yaml --comparison sae_seed_neox --a saes/neox/topk/seed_0/layer_0 "
        "--b saes/neox/topk/seed_1/layer_0 --features features.parquet --shares shares.parquet"
    )
)
def decoders(
    settings: Settings,
    comparison: Annotated[Path, typer.Option(help="The folder of a comparison of two SAEs of one model.")],
    a: Annotated[list[Path], typer.Option(help="SAE folders of side a, in the order of the layers; repeat.")],
    b: Annotated[list[Path], typer.Option(help="The same of side b.")],
    features: Annotated[Path, typer.Option(help="Where each feature's partners go.")],
    shares: Annotated[Path, typer.Option(help="Where the shares matched go.")],
    threads: Threads = 1,
    log: Log = None,
) -> None:
    """Match the features of two SAEs of one model by the cosine of their decoders."""
    configure(threads, log)
    job = parse_argument(DecodersJob, settings)
    from universality.alignment.decoders import write_decoders

    write_decoders(comparison, a, b, job.partners, job.statistics, features, shares)


@app.command(
    epilog=example(
        "alignment spaces --settings job.yaml --a activations/neox/resid_post.0/evaluation/shard_0 "
        "--b activations/mamba/resid_post.0/evaluation/shard_0 "
        "--rows-a activations/neox/resid_post.0/evaluation/shard_0 "
        "--rows-b activations/mamba/resid_post.0/evaluation/shard_0 --out spaces.parquet"
    )
)
def spaces(
    settings: Settings,
    rows_a: RowsA,
    rows_b: RowsB,
    a: Annotated[list[Path], typer.Option(help="Shards of the residual stream of model a, of all layers; repeat.")],
    b: Annotated[list[Path], typer.Option(help="The same of model b.")],
    out: Out,
    threads: Threads = 1,
    log: Log = None,
) -> None:
    """Compare whole layers of two models: CKA, SVCCA, RSA, each beside its null."""
    configure(threads, log)
    job = parse_argument(SpacesJob, settings)
    from universality.alignment.spaces import write_spaces

    models, layers = (job.comparison.a.model, job.comparison.b.model), (job.layers_a, job.layers_b)
    write_spaces(models, layers, (a, b), (rows_a, rows_b), job.matching, job.statistics, job.spaces, out)


@app.command(
    epilog=example(
        "alignment tables --settings '{\"confidence\": 0.95}' --comparison cross --comparison neurons "
        "--saes metrics.parquet --differences differences.parquet --quality quality.parquet"
    )
)
def tables(
    settings: Settings,
    comparison: Annotated[list[Path], typer.Option(help="A comparison's folder; repeat.")],
    saes: Annotated[Path, typer.Option(help="metrics.parquet of the SAEs.")],
    differences: Annotated[Path, typer.Option(help="Where paired differences of comparisons go.")],
    quality: Annotated[Path, typer.Option(help="Where means beside L0 and explained variance go.")],
    threads: Threads = 1,
    log: Log = None,
) -> None:
    """Tables across comparisons: paired differences with intervals, and means beside what the SAEs keep."""
    configure(threads, log)
    job = parse_argument(TablesJob, settings)
    from universality.alignment.tables import write_tables

    write_tables(comparison, saes, job.confidence, differences, quality)
