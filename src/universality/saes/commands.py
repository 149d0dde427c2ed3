"""`universality saes`: train sparse autoencoders."""

from pathlib import Path
from typing import Annotated

import typer

from universality.commands import Log, Out, Settings, Threads, example, stage
from universality.runtime import configure, deterministic_torch
from universality.saes.settings import SAETraining, Variant
from universality.settings import Settings as SettingsBase
from universality.settings import parse_argument

app = stage("Train sparse autoencoders on cached activations.")


class SAEJob(SettingsBase):
    """One of saes.variants, with saes.training."""

    variant: Variant
    training: SAETraining


@app.command(
    epilog=example(
        "saes train --activations activations/neox/train/shard_0 --site resid_post.0 --model neox --seed 0 "
        "--settings sae.yaml --out saes/neox/topk/seed_0/layer_0"
    )
)
def train(
    activations: Annotated[list[Path], typer.Option(help="A shard of train activations; repeat for more.")],
    site: Annotated[str, typer.Option(help="The site to read, such as resid_post.0.")],
    model: Annotated[str, typer.Option(help="Name of the model, for the metadata.")],
    seed: Annotated[int, typer.Option(min=0, help="Draws the initial weights and the batches.")],
    settings: Settings,
    out: Out,
    threads: Threads = 1,
    log: Log = None,
) -> None:
    """Train one SAE on one site; the result is a sae-lens folder."""
    configure(threads, log)
    job = parse_argument(SAEJob, settings)
    deterministic_torch(threads)
    from universality.saes.training import train_sae

    train_sae(activations, site, job.variant, job.training, seed, model, out)
