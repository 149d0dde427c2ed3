"""`universality activations`: cache what a model computes."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from universality.activations.settings import CacheSettings
from universality.commands import Log, Out, Settings, Threads, example, stage
from universality.runtime import configure, deterministic_torch
from universality.settings import parse_argument

app = stage("Cache activations of a model on a sample of the corpus.")


class Split(StrEnum):
    train = "train"
    evaluation = "evaluation"


@app.command(
    epilog=example(
        "activations cache --model models/neox --layer 0 --layer 1 --tokens tokens --split train --shard 0 "
        "--settings activations.yaml --out activations/neox/train/shard_0"
    )
)
def cache(
    model: Annotated[Path, typer.Option(help="Model folder.")],
    layer: Annotated[list[int], typer.Option(help="A layer to cache; repeat for more.")],
    tokens: Annotated[Path, typer.Option(help="Tokens folder from `corpus tokens`.")],
    split: Annotated[Split, typer.Option(help="Which documents.")],
    shard: Annotated[int, typer.Option(min=0, help="Number of the shard.")],
    settings: Settings,
    out: Out,
    threads: Threads = 1,
    log: Log = None,
) -> None:
    """Run the model over one shard of the sample and write its residual streams (and, held out, its neurons)."""
    configure(threads, log)
    parsed = parse_argument(CacheSettings, settings)
    deterministic_torch(threads)
    from universality.activations.cache import cache_shard

    cache_shard(model, layer, tokens, split.value, shard, parsed, out)
