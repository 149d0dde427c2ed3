"""Encode cached activations with an SAE, and measure on the way how well it does on these held-out tokens."""

from pathlib import Path

import numpy as np

from universality.activations.statistics import statistics
from universality.activations.store import ActivationStore
from universality.errors import StudyError
from universality.features.settings import FeaturesSettings
from universality.runtime import log, progress
from universality.saes.variants import load_sae
from universality.storage import replacing, write_json, write_table


def encode_store(store: ActivationStore, sae_folder: Path, settings: FeaturesSettings, out: Path) -> None:
    """Write the codes of all rows, read block by block. Raises StudyError if the SAE does not fit the site."""
    sae = load_sae(sae_folder)
    d_in, d_sae = sae.W_enc.shape
    if store.d_in != d_in:
        raise StudyError(f"{sae_folder}: reads width {d_in}, but {store.site} has width {store.d_in}")
    data = statistics(store.blocks(settings.batch_size))
    if data.variance == 0:
        raise StudyError(f"{store.site}: is the same at every token; there is nothing to explain")
    parts: dict[str, list[np.ndarray]] = {"token": [], "feature": [], "value": []}
    error, start = 0.0, 0
    n_blocks = -(-store.n_rows // settings.batch_size)
    for block in progress(store.blocks(settings.batch_size), f"{sae_folder} batches", n_blocks):
        batch = block.flatten(1)
        codes = sae.encode(batch)
        error += float((batch - sae.decode(codes)).double().square().sum())
        token, feature = codes.nonzero(as_tuple=True)
        parts["value"].append(codes[token, feature].numpy())
        parts["token"].append((token + start).numpy().astype(np.int32))
        parts["feature"].append(feature.numpy().astype(np.int32))
        start += len(batch)
    columns = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    fired = np.unique(columns["feature"]).size
    summary = {
        "n_tokens": store.n_rows,
        "d_sae": d_sae,
        "L0": len(columns["token"]) / store.n_rows,
        "explained_variance": 1 - error / (data.variance * store.n_rows),
        "dead": 1 - fired / d_sae,
    }
    log.info(
        "L0 %.1f, explained variance %.3f, dead %.3f", summary["L0"], summary["explained_variance"], summary["dead"]
    )
    with replacing(out) as folder:
        folder.mkdir()
        write_table(folder / "codes.parquet", columns)
        write_json(folder / "summary.json", summary)
