"""`universality analysis`: what kind of features are shared."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from universality.alignment.commands import RowsA, RowsB, SideA, SideB
from universality.analysis.settings import FeaturesJob, IdiosyncraticJob, JudgeJob, SimilarityJob
from universality.commands import Log, Out, Settings, Threads, example, stage
from universality.errors import StudyError
from universality.runtime import configure, deterministic_torch
from universality.settings import parse_argument

app = stage("Tell what kind of features are shared.")
Codes = Annotated[Path, typer.Option(help="An SAE's codes from `features encode`.")]
Model = Annotated[Path, typer.Option(help="Model folder.")]
Tokens = Annotated[Path, typer.Option(help="Tokens folder from `corpus tokens`.")]
Tokenizer = Annotated[Path, typer.Option(help="The folder of the model's tokenizer.")]
ComparisonFolder = Annotated[Path, typer.Option(help="A comparison's folder from `alignment compare`.")]
_WIDTH = 160  # where there is no terminal


@app.command(
    epilog=example(
        "analysis features --settings job.yaml --sae saes/neox/topk/seed_0/layer_0 "
        "--codes features/evaluation/neox/topk/seed_0/layer_0 --model models/neox --tokens corpus/tokens "
        "--out analysis/features/evaluation/neox/topk/seed_0/layer_0"
    )
)
def features(
    settings: Settings,
    sae: Annotated[Path, typer.Option(help="SAE folder.")],
    codes: Codes,
    model: Model,
    tokens: Tokens,
    out: Out,
    threads: Threads = 1,
    log: Log = None,
) -> None:
    """Contexts and measures of every feature of an SAE."""
    configure(threads, log)
    job = parse_argument(FeaturesJob, settings)
    deterministic_torch(threads)
    from universality.analysis.features import write_features
    from universality.analysis.held_out import read_held_out
    from universality.models.loading import load_model
    from universality.saes.load import load_sae

    held = read_held_out(codes, tokens, job.held)
    write_features(job, held, load_sae(sae), load_model(model, job.held.run.products, job.held.run.device), out)


@app.command(
    epilog=example(
        "analysis judge --settings job.yaml --features analysis/features/evaluation/neox/topk/seed_0/layer_0 "
        "--codes features/evaluation/neox/topk/seed_0/layer_0 --tokens corpus/tokens --tokenizer corpus/tokenizer "
        "--cache judge_answers --out judged"
    )
)
def judge(
    settings: Settings,
    features: Annotated[Path, typer.Option(help="The folder of `analysis features`.")],
    codes: Codes,
    tokens: Tokens,
    tokenizer: Tokenizer,
    cache: Annotated[Path, typer.Option(help="Folder of answers; what is known there is not asked again.")],
    out: Out,
    threads: Threads = 1,
    log: Log = None,
) -> None:
    """Ask a language model what features mean, and test what it says."""
    configure(threads, log)
    job = parse_argument(JudgeJob, settings)
    deterministic_torch(threads)
    from universality.analysis.held_out import read_held_out
    from universality.analysis.judging import write_judged
    from universality.corpus.tokenizer import load_tokenizer

    held = read_held_out(codes, tokens, job.held)
    write_judged(job.judge, features, held, load_tokenizer(tokenizer), cache, out)


@app.command(
    epilog=example(
        "analysis similarity --settings job.yaml --comparison alignment/cross "
        "--a features/evaluation/neox/topk/seed_0/layer_0 --b features/evaluation/mamba/topk/seed_0/layer_0 "
        "--rows-a activations/neox/resid_post.0/evaluation/shard_0 "
        "--rows-b activations/mamba/resid_post.0/evaluation/shard_0 "
        "--measures-a analysis/features/evaluation/neox/topk/seed_0/layer_0 "
        "--measures-b analysis/features/evaluation/mamba/topk/seed_0/layer_0 --out analysis/similarity/cross"
    )
)
def similarity(
    settings: Settings,
    comparison: ComparisonFolder,
    rows_a: RowsA,
    rows_b: RowsB,
    a: SideA,
    b: SideB,
    measures_a: Annotated[list[Path], typer.Option(help="Folders of `analysis features` for the layers of side a.")],
    measures_b: Annotated[list[Path], typer.Option(help="The same of side b.")],
    out: Out,
    judged_a: Annotated[list[Path] | None, typer.Option(help="Folders of `analysis judge`, if there are any.")] = None,
    judged_b: Annotated[list[Path] | None, typer.Option(help="The same of side b.")] = None,
    threads: Threads = 1,
    log: Log = None,
) -> None:
    """What features are against how well they are matched: rank correlations with intervals."""
    configure(threads, log)
    job = parse_argument(SimilarityJob, settings)
    layers = (job.layers_a, job.layers_b)
    of_a, of_b = (
        (_of_layers("similarity", "measures", numbers, measures), _of_layers("similarity", "judged", numbers, judged))
        for numbers, measures, judged in zip(layers, (measures_a, measures_b), (judged_a, judged_b), strict=True)
    )
    from universality.alignment.sides import read_sides, read_text
    from universality.analysis.similarity import write_similarity

    text = read_text(rows_a, rows_b, job.matching)
    sides = read_sides(job.comparison, layers, (a, b), text)
    write_similarity(sides, text.order, comparison, (of_a[0], of_b[0]), (of_a[1], of_b[1]), job.against, out)


@app.command(
    epilog=example(
        "analysis idiosyncratic --settings job.yaml --comparison alignment/cross --model models/neox "
        "--sae saes/neox/topk/seed_0/layer_0 --codes features/evaluation/neox/topk/seed_0/layer_0 "
        "--measures analysis/features/evaluation/neox/topk/seed_0/layer_0 --tokens corpus/tokens "
        "--tokenizer corpus/tokenizer --out analysis/idiosyncratic/cross/a"
    )
)
def idiosyncratic(
    settings: Settings,
    comparison: ComparisonFolder,
    model: Model,
    sae: Annotated[list[Path], typer.Option(help="An SAE for each of the settings' `layers`, in their order.")],
    codes: Annotated[list[Path], typer.Option(help="Its codes, in the same order.")],
    measures: Annotated[list[Path], typer.Option(help="Its folder of `analysis features`, in the same order.")],
    tokens: Tokens,
    tokenizer: Tokenizer,
    out: Out,
    threads: Threads = 1,
    log: Log = None,
) -> None:
    """List complex features of one side that nothing matches, with contexts and what ablating them does."""
    configure(threads, log)
    job = parse_argument(IdiosyncraticJob, settings)
    given = {"sae": sae, "codes": codes, "measures": measures}
    by_layer = [_of_layers("idiosyncratic", flag, job.layers, paths) for flag, paths in given.items()]
    deterministic_torch(threads)
    from universality.analysis.idiosyncratic import Folders, write_idiosyncratic

    write_idiosyncratic(job, Folders(*by_layer), comparison, model, tokens, tokenizer, out)


def _of_layers(command: str, flag: str, layers: list[int], paths: list[Path] | None) -> dict[int, Path]:
    if paths is not None and len(paths) != len(layers):
        raise StudyError(f"analysis {command}: {len(paths)} times --{flag} for {len(layers)} layers")
    return dict(zip(layers, paths or [], strict=False))


@app.command(epilog=example("analysis show evaluation/neox/topk/seed_0/layer_1 120"))
def show(
    features: Annotated[str, typer.Argument(help="CORPUS/MODEL/VARIANT/seed_SEED/layer_LAYER of the study.")],
    feature: Annotated[int, typer.Argument(min=0)],
    study: Annotated[Path, typer.Option(help="The study's params.yaml, with its results beside it.")] = Path(
        "params.yaml"
    ),
    contexts: Annotated[int, typer.Option(min=1, help="Top contexts.")] = 10,
) -> None:
    """Print a feature's measures, its top contexts and others from strong to weak."""
    from rich.console import Console

    from universality.analysis.show import show as print_feature

    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    print_feature(study, features, feature, contexts, console)
