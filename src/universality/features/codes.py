"""Sparse codes of the evaluation tokens: what fired, where and how strongly."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse

from universality.activations.store import read_site
from universality.errors import StudyError
from universality.features.settings import FeaturesSettings
from universality.runtime import log
from universality.saes.training import load_sae
from universality.storage import read_json, read_table, replacing, write_json, write_table


class Codes(NamedTuple):
    """`by_token` [T, F], CSR: the codes of one SAE on the evaluation tokens."""

    by_token: scipy.sparse.csr_array
    summary: dict


def encode_site(shards: list[Path], site: str, sae_folder: Path, settings: FeaturesSettings, out: Path) -> None:
    """Write a folder: codes.parquet (token, feature, value), sorted by token, then feature; summary.json.

    The summary has n_tokens, d_sae, L0, explained_variance (about the mean), dead (share that never fired).
    Raises StudyError if the SAE does not fit the site.
    """
    sae = load_sae(sae_folder)
    x = read_site(shards, site)
    d_in, d_sae = sae.W_enc.shape
    if x.shape[1] != d_in:
        raise StudyError(f"{sae_folder}: reads width {d_in}, but {site} has width {x.shape[1]}")
    parts: dict[str, list[np.ndarray]] = {"token": [], "feature": [], "value": []}
    error = 0.0
    for start in range(0, len(x), settings.batch_size):
        batch = x[start : start + settings.batch_size]
        codes = sae.encode(batch)
        error += float((batch - sae.decode(codes)).double().square().sum())
        token, feature = codes.nonzero(as_tuple=True)
        parts["value"].append(codes[token, feature].numpy())
        parts["token"].append((token + start).numpy().astype(np.int32))
        parts["feature"].append(feature.numpy().astype(np.int32))
    columns = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    total = float((x.double() - x.double().mean(0)).square().sum())
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


def read_codes(folder: Path) -> Codes:
    """Raises StudyError naming the file if the codes are truncated or do not fit their summary."""
    summary = read_json(folder / "summary.json")
    table = read_table(folder / "codes.parquet")
    token, feature, value = (table.column(name).to_numpy() for name in ("token", "feature", "value"))
    shape = (summary["n_tokens"], summary["d_sae"])
    if len(token) and (token.max() >= shape[0] or feature.max() >= shape[1]):
        raise StudyError(f"{folder}: codes.parquet has tokens or features beyond those of summary.json, {shape}")
    indptr = np.searchsorted(token, np.arange(shape[0] + 1))
    return Codes(scipy.sparse.csr_array((value, feature, indptr), shape=shape), summary)
