"""`universality saes`: train sparse autoencoders."""

from pathlib import Path
from typing import Annotated

import typer

from universality.activations.settings import StreamSettings
from universality.commands import Log, Out, Settings, Threads, example, stage
from universality.errors import StudyError
from universality.runtime import configure, deterministic_torch
from universality.saes.settings import SAETraining, Variant
from universality.settings import Settings as SettingsBase
from universality.settings import parse_argument

app = stage("Train sparse autoencoders on activations.")


class SAEJob(SettingsBase):
    """One of saes.variants, with saes.training; to train from a running model, what it runs on."""

    variant: Variant
    training: SAETraining
    stream: StreamSettings | None = None


@app.command(
    epilog=example(
        "saes train --activations activations/neox/resid_post.0/train/shard_0 --model neox --site resid_post.0 "
        "--seed 0 --settings sae.yaml --out saes/neox/topk/seed_0/layer_0"
    )
)
def train(
    model: Annotated[str, typer.Option(help="Name of the model, which the shards must be of.")],
    site: Annotated[str, typer.Option(help="The site to train on, such as resid_post.0.")],
    seed: Annotated[int, typer.Option(min=0, help="Draws the initial weights and the batches.")],
    settings: Settings,
    out: Out,
    activations: Annotated[
        list[Path] | None, typer.Option(help="A shard of train activations of the site; repeat for more.")
    ] = None,
    stream_model: Annotated[
        Path | None, typer.Option(help="Instead of shards: the model folder to run; the settings then have `stream`.")
    ] = None,
    tokens: Annotated[Path | None, typer.Option(help="With --stream-model: the tokens folder to run it on.")] = None,
    threads: Threads = 1,
    log: Log = None,
) -> None:
    """Train one SAE on one site, from shards or from the running model; the result is a sae-lens folder."""
    configure(threads, log)
    job = parse_argument(SAEJob, settings)
    deterministic_torch(threads)
    from universality.saes.training import train_sae

    batches = open_batches(job.stream, activations or [], stream_model, tokens, model, site)
    train_sae(batches, job.variant, job.training, seed, out)


def open_batches(
    stream: StreamSettings | None,
    shards: list[Path],
    stream_model: Path | None,
    tokens: Path | None,
    model: str,
    site: str,
):
    """From the store or from the running model, as the options say. Raises StudyError if they do not fit together."""
    from universality.activations.batches import StoredBatches
    from universality.activations.store import ActivationStore
    from universality.activations.stream import StreamedBatches

    if shards and stream_model is None and tokens is None and stream is None:
        return StoredBatches(ActivationStore(shards, model=model, site=site, split="train"))
    if shards or stream_model is None or tokens is None or stream is None:
        raise StudyError(
            "saes train: needs either --activations, or --stream-model, --tokens and settings with the key `stream`"
        )
    if stream_model.name != model:
        raise StudyError(f"--stream-model: {stream_model} is not the folder of --model {model}")
    return StreamedBatches(stream_model, tokens, site, stream)
