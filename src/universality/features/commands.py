"""`universality features`: sparse codes of held-out tokens."""

from pathlib import Path
from typing import Annotated

import typer

from universality.commands import Log, Out, Settings, Threads, example, stage
from universality.features.settings import FeaturesSettings
from universality.runtime import configure, deterministic_torch
from universality.settings import parse_argument

app = stage("Encode held-out tokens with an SAE.")


@app.command(
    epilog=example(
        "features encode --activations activations/neox/resid_post.0/code/shard_0 --model neox "
        "--site resid_post.0 --corpus code --sae saes/neox/topk/seed_0/layer_0 --settings features.yaml "
        "--out features/code/neox/topk/seed_0/layer_0"
    )
)
def encode(
    activations: Annotated[
        list[Path], typer.Option(help="A shard of the site's activations on held-out documents; repeat for more.")
    ],
    model: Annotated[str, typer.Option(help="Name of the model, which the shards must be of.")],
    site: Annotated[str, typer.Option(help="The site they must be of, such as resid_post.0.")],
    corpus: Annotated[str, typer.Option(help="The documents they must be of: evaluation or another corpus.")],
    sae: Annotated[Path, typer.Option(help="SAE folder.")],
    settings: Settings,
    out: Out,
    threads: Threads = 1,
    log: Log = None,
) -> None:
    """Write the sparse codes."""
    configure(threads, log)
    parsed = parse_argument(FeaturesSettings, settings)
    deterministic_torch(threads)
    from universality.activations.store import ActivationStore
    from universality.features.encode import encode_store

    store = ActivationStore(activations, model=model, site=site, split=corpus)
    encode_store(store, sae, parsed, out)
