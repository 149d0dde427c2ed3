"""`universality saes`: train sparse autoencoders, transcoders and crosscoders."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import Field

from universality.activations.settings import StreamSettings
from universality.commands import Log, Settings, Threads, example, stage
from universality.errors import StudyError
from universality.runtime import configure, deterministic_torch
from universality.saes.settings import AnyVariant, SAETraining
from universality.settings import OnMismatch, Seed, parse_argument
from universality.settings import Settings as SettingsBase

app = stage("Train sparse autoencoders, transcoders and crosscoders on activations, and evaluate them.")


class WantedSAE(SettingsBase):
    variant: AnyVariant
    seed: Seed
    """Draws the initial weights."""


class SAEJob(SettingsBase):
    """What is trained in one pass over the activations; to train from running models, what they run on."""

    saes: Annotated[list[WantedSAE], Field(min_length=1)]
    training: SAETraining
    stream: StreamSettings | None = None


@app.command(
    epilog=example(
        "saes train --source neox:resid_post.0 --activations activations/neox/resid_post.0/train/shard_0 "
        "--settings job.yaml --checkpoint checkpoints/neox_0.pt --out saes/neox/topk/seed_0/layer_0"
    )
)
def train(
    source: Annotated[
        list[str],
        typer.Option(
            help="MODEL:SITE to train on, such as neox:resid_post.0. A transcoder takes two, what it reads and what it "
            "predicts, a crosscoder all of its sites."
        ),
    ],
    settings: Settings,
    out: Annotated[list[Path], typer.Option(help="A folder for each of the settings' `saes`, in their order.")],
    checkpoint: Annotated[Path, typer.Option(help="File that an interrupted training goes on from.")],
    activations: Annotated[
        list[Path] | None, typer.Option(help="A shard of train activations of a source; repeat for more.")
    ] = None,
    stream_model: Annotated[
        list[Path] | None,
        typer.Option(help="Instead of shards: a source's model folder to run; the settings then have `stream`."),
    ] = None,
    tokens: Annotated[Path | None, typer.Option(help="With --stream-model: the tokens folder to run it on.")] = None,
    on_mismatch: Annotated[
        OnMismatch, typer.Option(help="What to do with a checkpoint of another training.")
    ] = OnMismatch.refuse,
    tensorboard: Annotated[Path | None, typer.Option(help="Folder for TensorBoard's event files.")] = None,
    threads: Threads = 1,
    log: Log = None,
) -> None:
    """Train one or several dictionaries from one pass over shards or running models, each to a sae-lens folder."""
    configure(threads, log)
    job = parse_argument(SAEJob, settings)
    if len(out) != len(job.saes):
        raise StudyError(f"saes train: {len(out)} times --out for {len(job.saes)} SAEs in the settings")
    if len(set(out)) < len(out):
        raise StudyError("saes train: --out names one folder twice")
    deterministic_torch(threads)
    from universality.saes.sources import open_batches
    from universality.saes.training import Wanted, train_saes

    batches = open_batches(source, activations or [], stream_model or [], tokens, job.stream)
    wanted = [Wanted(one.variant, one.seed, folder) for one, folder in zip(job.saes, out, strict=True)]
    train_saes(batches, wanted, job.training, checkpoint, on_mismatch, tensorboard)
