"""`universality saes import` and `saes export`: dictionaries of other libraries, features for other tools.

Apart from the commands that the workflow runs, whose results do not depend on this.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from universality.commands import Log, Out, Settings, Threads, example
from universality.errors import StudyError
from universality.runtime import configure, deterministic_torch
from universality.saes.neuronpedia_settings import NeuronpediaSettings
from universality.settings import parse_argument

app = typer.Typer()


@app.command(
    name="import", epilog=example("saes import downloads/pythia-topk/layers.3 --out results/saes/neox/sparsify/layer_3")
)
def import_folder(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a dictionary of sae-lens, dictionary_learning, sparsify or OpenMOSS.")
    ],
    out: Out,
    log: Log = None,
) -> None:
    """Convert a dictionary of another library to a sae-lens 6 folder with the same codes, its metadata kept."""
    configure(1, log)
    from universality.saes.folder import read_frequencies, save_sae
    from universality.saes.load import load_with_metadata

    if out.resolve() == folder.resolve():
        raise StudyError(f"--out: {out} is the folder that is read; name another one")
    sae, metadata = load_with_metadata(folder)
    save_sae(sae, out, metadata, frequencies=read_frequencies(folder))


class Destination(StrEnum):
    """What features can be exported to."""

    neuronpedia = "neuronpedia"


@app.command(
    name="export",
    epilog=example(
        "saes export saes/neox/topk/seed_0/layer_0 --to neuronpedia "
        "--features features/evaluation/neox/topk/seed_0/layer_0 "
        "--activations activations/neox/resid_post.0/evaluation/shard_0 --tokenizer corpus/tokenizer "
        "--model models/neox --settings neuronpedia.yaml --out dashboards/neox_0"
    ),
)
def export_features(
    folder: Annotated[Path, typer.Argument(help="SAE folder.")],
    to: Annotated[Destination, typer.Option(help="Whose format.")],
    features: Annotated[Path, typer.Option(help="Folder of the codes of the evaluation tokens.")],
    activations: Annotated[list[Path], typer.Option(help="A shard that they are of; repeat for more, in their order.")],
    tokenizer: Annotated[Path, typer.Option(help="Tokenizer folder.")],
    model: Annotated[Path, typer.Option(help="Model folder, whose unembedding shows what features do to the logits.")],
    settings: Settings,
    out: Out,
    threads: Threads = 1,
    log: Log = None,
) -> None:
    """Write dashboards of all features: where they are active, how often, and which logits they raise and lower."""
    configure(threads, log)
    parsed = parse_argument(NeuronpediaSettings, settings)
    deterministic_torch(threads)
    from universality.activations.store import ActivationStore
    from universality.features.codes import read_codes
    from universality.saes.load import load_sae
    from universality.saes.neuronpedia import described, write_dashboards

    store = ActivationStore(activations, model=model.name, split="evaluation")
    codes = read_codes(features).by_token
    write_dashboards(load_sae(folder), codes, described(store, tokenizer, model), parsed, out)
