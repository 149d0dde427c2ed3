"""Two SAEs of one model matched by the cosine of their decoder rows (Paulo & Belrose 2025, arXiv 2501.16615).

Only rows of the same layer are compared, since they are directions of the same space. For each feature: its largest
cosine with any row of the other dictionary, and its partner in the one-to-one matching with the largest sum of cosines
on the graph of all features' best partners. No token is read, so that shares have intervals over features, taken as
independent (Wilson 1927, as scipy computes it), not over documents.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats

from universality.alignment.assignment import one_to_one
from universality.alignment.settings import Statistics
from universality.errors import StudyError
from universality.storage import read_table, read_tensors, write_table

_ROWS = 1024  # whose cosines with all others are held at a time
_WEIGHTS = "sae_weights.safetensors"


def write_decoders(
    comparison: Path, a: list[Path], b: list[Path], partners: int, statistics: Statistics, features: Path, shares: Path
) -> None:
    """`comparison`: its folder; `a`, `b`: SAE folders in the order of the layers; `partners`: best ones kept of each
    feature for the one-to-one matching."""
    matched = read_table(comparison / "features.parquet").to_pandas()
    layers = sorted(matched.layer.unique())
    if not len(layers) == len(a) == len(b):
        raise StudyError(f"{comparison}: has {len(layers)} layers, but {len(a)} and {len(b)} SAEs were given")
    tables = []
    for layer, one, other in zip(layers, a, b, strict=True):
        tables += _of_layer(int(layer), _decoder(one), _decoder(other), partners)
    table = pd.concat(tables).merge(matched, on=["direction", "layer", "feature"], validate="one_to_one")
    table["same_as_mppc"] = (table.best_layer == table.layer) & (table.best_feature == table.partner)
    kept = ["direction", "layer", "feature", "partner", "cosine", "one_to_one", "one_to_one_cosine", "dead"]
    write_table(features, {name: table[name].to_numpy() for name in [*kept, "same_as_mppc"]})
    write_table(shares, _shares(table[~table.dead], statistics))


def _decoder(folder: Path) -> np.ndarray:
    """Rows of W_dec [F, D] at length 1, float32; a row of zeros stays one."""
    W_dec = read_tensors(folder / _WEIGHTS)["W_dec"].astype(np.float32)
    norm = np.linalg.norm(W_dec, axis=1, keepdims=True)
    return W_dec / np.where(norm > 0, norm, 1)


def _of_layer(layer: int, a: np.ndarray, b: np.ndarray, m: int) -> list[pd.DataFrame]:
    if a.shape[1] != b.shape[1]:
        raise StudyError(f"layer {layer}: decoders of width {a.shape[1]} and {b.shape[1]} are not of one space")
    best = [_best(a, b, m), _best(b, a, m)]
    (of_a, r_a), (of_b, r_b) = best
    ends_a = np.concatenate([np.repeat(np.arange(len(a)), of_a.shape[1]), of_b.ravel()])
    ends_b = np.concatenate([of_a.ravel(), np.repeat(np.arange(len(b)), of_b.shape[1])])
    partner_a = one_to_one(ends_a, ends_b, np.concatenate([r_a.ravel(), r_b.ravel()]), len(a), len(b))
    partner_b = np.full(len(b), -1)
    partner_b[partner_a[partner_a >= 0]] = np.flatnonzero(partner_a >= 0)
    return [
        _frame(direction, layer, *found, partner, own, other)
        for direction, found, partner, own, other in (
            ("a_to_b", best[0], partner_a, a, b),
            ("b_to_a", best[1], partner_b, b, a),
        )
    ]


def _best(x: np.ndarray, y: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
    """The m largest cosines of each row of x with rows of y, descending: (which [n, m], cosines [n, m])."""
    m = min(m, len(y))
    which, cosine = [], []
    for start in range(0, len(x), _ROWS):
        r = x[start : start + _ROWS] @ y.T
        top = np.argpartition(-r, m - 1, axis=1)[:, :m]
        values = np.take_along_axis(r, top, axis=1)
        order = np.lexsort((top, -values), axis=1)
        which.append(np.take_along_axis(top, order, axis=1))
        cosine.append(np.take_along_axis(values, order, axis=1))
    return np.concatenate(which), np.concatenate(cosine)


def _frame(direction: str, layer: int, which, cosine, partner, own, other) -> pd.DataFrame:
    matched = partner >= 0
    of_partner = np.full(len(own), np.nan)
    of_partner[matched] = np.einsum("fd,fd->f", own[matched], other[partner[matched]])
    return pd.DataFrame(
        {
            "direction": direction,
            "layer": np.int32(layer),
            "feature": np.arange(len(own), dtype=np.int32),
            "partner": which[:, 0].astype(np.int32),
            "cosine": cosine[:, 0].astype(np.float64),
            "one_to_one": partner.astype(np.int32),
            "one_to_one_cosine": of_partner,
        }
    )


def _shares(live: pd.DataFrame, statistics: Statistics) -> dict:
    """Of the live features of each direction and layer (-1: all of them)."""
    rows: list[tuple] = []
    for direction, whole in live.groupby("direction"):
        for layer, part in [(-1, whole), *whole.groupby("layer")]:
            counted = {f"cosine_{t}": part.cosine >= t for t in statistics.thresholds}
            counted |= {f"one_to_one_{t}": part.one_to_one_cosine >= t for t in statistics.thresholds}
            counted["same_as_mppc"] = part.same_as_mppc
            for name, is_so in counted.items():
                found = scipy.stats.binomtest(int(is_so.sum()), len(part))
                low, high = found.proportion_ci(statistics.confidence, method="wilson")
                rows.append((direction, layer, name, found.statistic, low, high, len(part)))
    names = ("direction", "layer", "statistic", "share", "low", "high", "live")
    return {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
