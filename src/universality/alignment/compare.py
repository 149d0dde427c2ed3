"""One comparison (A, B): MPPC both ways over all layers, with intervals; a table of features and a summary.

The table has a row a feature: model, layer, feature, best_model, best_layer, best_feature, mppc, mppc_low, mppc_high,
frequency (share of the evaluation tokens where it fires), dead. The summary has, for each direction and for both
together, the mean MPPC of live features with its interval.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import scipy.sparse

from universality.alignment.bootstrap import (
    DocumentSums,
    document_index,
    percentile_interval,
    resample_weights,
    resampled_correlations,
    sparse_sums,
)
from universality.alignment.mppc import (
    Matches,
    best_matches,
    best_of_correlations,
    best_over_layers,
)
from universality.alignment.neurons import Neurons, correlations, pair_sums, read_neurons
from universality.alignment.settings import Comparison, Statistics
from universality.errors import StudyError
from universality.features.codes import read_codes
from universality.runtime import log, progress
from universality.storage import write_json, write_table

Layer: TypeAlias = scipy.sparse.csr_array | Neurons
_CHUNK = 2048  # features whose per-document sums are held at a time


class ModelSide(NamedTuple):
    """One side: the model's name, the numbers of its compared layers, and what their features do [T, F] each."""

    model: str
    numbers: list[int]
    layers: list[Layer]


def read_feature_side(model: str, numbers: list[int], folders: list[Path]) -> ModelSide:
    return ModelSide(model, numbers, [read_codes(folder).by_token for folder in folders])


def read_neuron_side(model: str, numbers: list[int], shards: list[Path]) -> ModelSide:
    return ModelSide(model, numbers, [*read_neurons(model, numbers, shards)])


def shuffled(side: ModelSide, seed: int) -> ModelSide:
    """The side with the tokens of its codes in one random order, the same for all layers: what chance alone gives."""
    order = np.random.default_rng(seed).permutation(side.layers[0].shape[0])
    return side._replace(layers=[layer[order] for layer in side.layers if not isinstance(layer, Neurons)])


def compare(a: ModelSide, b: ModelSide, documents: np.ndarray, settings: Statistics) -> tuple[dict, dict]:
    """(columns of the table, summary). `documents` [T] tells each token's document."""
    for side in (a, b):
        for layer in side.layers:
            if layer.shape[0] != len(documents):
                raise StudyError(
                    f"{side.model}: codes of {layer.shape[0]} tokens, but {len(documents)} tokens were cached; "
                    "remake its features"
                )
    index = document_index(documents)
    weights = resample_weights(index.shape[0], settings.bootstrap_samples, settings.bootstrap_seed)
    tables, summary, pooled = [], {}, []
    for direction, x, y in (("a_to_b", a, b), ("b_to_a", b, a)):
        table, resampled = _one_way(x, y, index, weights, settings.confidence)
        tables.append(table)
        pooled.append(resampled)
        summary[direction] = _summary(x.model, y.model, table["mppc"], resampled, settings.confidence)
    columns = {name: np.concatenate([t[name] for t in tables]) for name in tables[0]}
    both = _summary(a.model, b.model, columns["mppc"], np.concatenate(pooled, axis=1), settings.confidence)
    return columns, {**summary, "both": both, "n_tokens": len(documents), "n_documents": index.shape[0]}


def _one_way(x: ModelSide, y: ModelSide, index, weights: np.ndarray, confidence: float) -> tuple[dict, np.ndarray]:
    tables, resampled = [], []
    numbers = np.array([*y.numbers, -1], dtype=np.int32)  # place -1, of features without a match, stays -1
    for layer, features in zip(x.numbers, progress(x.layers, f"{x.model} -> {y.model}, layers"), strict=True):
        mppc, place, best_feature = best_over_layers([_match(features, other) for other in y.layers])
        r = _resample(features, y.layers, place, best_feature, index, weights)
        low, high = percentile_interval(r, confidence)
        n = len(mppc)
        tables.append(
            {
                "model": np.full(n, x.model),
                "layer": np.full(n, layer, dtype=np.int32),
                "feature": np.arange(n, dtype=np.int32),
                "best_model": np.full(n, y.model),
                "best_layer": numbers[place],
                "best_feature": best_feature,
                "mppc": mppc,
                "mppc_low": low,
                "mppc_high": high,
                "frequency": _frequency(features),
                "dead": np.isnan(mppc),
            }
        )
        resampled.append(r)
    return {k: np.concatenate([t[k] for t in tables]) for k in tables[0]}, np.concatenate(resampled, axis=1)


def _frequency(x: Layer) -> np.ndarray:
    if isinstance(x, Neurons):
        return x.moments.frequency
    return np.asarray((x != 0).sum(axis=0)).ravel() / x.shape[0]


def _match(x: Layer, y: Layer) -> Matches:
    if isinstance(x, Neurons) and isinstance(y, Neurons):
        return best_of_correlations(correlations(x, y))
    return best_matches(x, y)


def _resample(x: Layer, others: list[Layer], place, best_feature, index, weights) -> np.ndarray:
    """Correlation of each live feature of x with its partner in every resample [R, F]; NaN for dead ones."""
    r = np.full((len(weights), x.shape[1]), np.nan)
    for number, other in enumerate(others):
        matched = np.flatnonzero(place == number)
        sums_of = _pair_sums(index, x, other)
        for start in range(0, len(matched), _CHUNK):
            part = matched[start : start + _CHUNK]
            r[:, part] = resampled_correlations(sums_of(part, best_feature[part]), weights)
    return r


def _pair_sums(index, x: Layer, y: Layer) -> Callable[[np.ndarray, np.ndarray], DocumentSums]:
    """(features of x, their partners in y) -> per-document sums."""
    if isinstance(x, Neurons) and isinstance(y, Neurons):
        return functools.partial(pair_sums, index, x, y)
    assert not isinstance(x, Neurons)
    assert not isinstance(y, Neurons)
    x_columns, y_columns = x.tocsc(), y.tocsc()
    return lambda features, partners: sparse_sums(index, x_columns[:, features], y_columns[:, partners])


def _summary(model: str, other: str, mppc: np.ndarray, resampled: np.ndarray, confidence: float) -> dict:
    alive = ~np.isnan(mppc)
    if not alive.any():
        raise StudyError(f"alignment of {model} with {other}: every feature is dead on the evaluation tokens")
    means = np.nanmean(resampled[:, alive], axis=1)
    low, high = percentile_interval(means[:, None], confidence)
    return {
        "model": model,
        "best_model": other,
        "mean": float(mppc[alive].mean()),
        "low": float(low[0]),
        "high": float(high[0]),
        "median": float(np.median(mppc[alive])),
        "features": len(mppc),
        "dead": int((~alive).sum()),
    }


def write_comparison(
    comparison: Comparison,
    a: ModelSide,
    b: ModelSide,
    documents: np.ndarray,
    settings: Statistics,
    table: Path,
    summary: Path,
) -> None:
    """Compare, and write table and summary, which names the sides. `documents` [T] tells each token's document."""
    if comparison.setting == "shuffled":
        b = shuffled(b, settings.shuffle_seed)
    columns, means = compare(a, b, documents, settings)
    both = means["both"]
    log.info(
        "%s and %s, %s: mean MPPC %.4f [%.4f, %.4f]",
        a.model, b.model, comparison.setting, both["mean"], both["low"], both["high"],
    )  # fmt: skip
    write_table(table, columns)
    write_json(summary, {**comparison.model_dump(mode="json"), "confidence": settings.confidence, **means})
