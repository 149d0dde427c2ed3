"""Encode cached activations with an SAE, and measure on the way how well it does on these held-out tokens."""

from pathlib import Path

import numpy as np

from universality.activations.store import read_site
from universality.errors import StudyError
from universality.features.settings import FeaturesSettings
from universality.runtime import log, progress
from universality.saes.variants import load_sae
from universality.storage import replacing, write_json, write_table


def encode_site(shards: list[Path], site: str, sae_folder: Path, settings: FeaturesSettings, out: Path) -> None:
    """Write the codes of all rows of `site`. Raises StudyError if the SAE does not fit the site."""
    sae = load_sae(sae_folder)
    x = read_site(shards, site)
    d_in, d_sae = sae.W_enc.shape
    if x.shape[1] != d_in:
        raise StudyError(f"{sae_folder}: reads width {d_in}, but {site} has width {x.shape[1]}")
    parts: dict[str, list[np.ndarray]] = {"token": [], "feature": [], "value": []}
    error = 0.0
    for start in progress(range(0, len(x), settings.batch_size), f"{sae_folder} batches"):
        batch = x[start : start + settings.batch_size]
        codes = sae.encode(batch)
        error += float((batch - sae.decode(codes)).double().square().sum())
        token, feature = codes.nonzero(as_tuple=True)
        parts["value"].append(codes[token, feature].numpy())
        parts["token"].append((token + start).numpy().astype(np.int32))
        parts["feature"].append(feature.numpy().astype(np.int32))
    columns = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    total = float((x.double() - x.double().mean(0)).square().sum())
    if total == 0:
        raise StudyError(f"{site}: is the same at every token; there is nothing to explain")
    fired = np.unique(columns["feature"]).size
    summary = {
        "n_tokens": len(x),
        "d_sae": d_sae,
        "L0": len(columns["token"]) / len(x),
        "explained_variance": 1 - error / total,
        "dead": 1 - fired / d_sae,
    }
    log.info(
        "L0 %.1f, explained variance %.3f, dead %.3f", summary["L0"], summary["explained_variance"], summary["dead"]
    )
    with replacing(out) as folder:
        folder.mkdir()
        write_table(folder / "codes.parquet", columns)
        write_json(folder / "summary.json", summary)
