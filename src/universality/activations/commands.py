"""`universality activations`: cache what a model computes."""

from pathlib import Path
from typing import Annotated

import typer

from universality.activations.settings import ShardSettings
from universality.commands import Log, Out, Settings, Threads, example, stage
from universality.runtime import configure, deterministic_torch
from universality.settings import parse_argument

app = stage("Cache activations of a model on a sample of the corpus.")


@app.command(
    epilog=example(
        "activations cache --model models/neox --site resid_post.0 --site resid_post.1 --tokens tokens --split train "
        "--shard 0 --settings shard.yaml --out activations/neox"
    )
)
def cache(
    model: Annotated[Path, typer.Option(help="Model folder.")],
    site: Annotated[list[str], typer.Option(help="A site to cache, such as resid_post.0; repeat for more.")],
    tokens: Annotated[Path, typer.Option(help="Tokens folder from `corpus tokens`.")],
    split: Annotated[str, typer.Option(help="Which documents: train, evaluation or the name of another corpus.")],
    shard: Annotated[int, typer.Option(min=0, help="Number of the shard.")],
    settings: Settings,
    out: Out,
    threads: Threads = 1,
    log: Log = None,
) -> None:
    """Run the model once over one shard of the sample; each site goes to OUT/{site}/{split}/shard_{shard}."""
    configure(threads, log)
    parsed = parse_argument(ShardSettings, settings)
    deterministic_torch(threads)
    from universality.activations.cache import cache_shard

    cache_shard(model, site, tokens, split, shard, parsed, out)


@app.command(epilog=example("activations verify results/activations/*/*/*/shard_*"))
def verify(shard: Annotated[list[Path], typer.Argument(help="Shard folders.")]) -> None:
    """Recompute every checksum of shards; the first file that is not what was written is an error."""
    from universality.activations.verify import verify_shard

    for folder in shard:
        manifest = verify_shard(folder)
        print(f"{folder}: {manifest.rows} rows of {manifest.model} {manifest.site} {manifest.split}, as written")
