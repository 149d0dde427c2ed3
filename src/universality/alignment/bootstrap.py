"""Intervals by bootstrap over documents (Efron & Tibshirani 1993, ch. 13: percentile intervals of clustered data).

Tokens of one document are not independent, so whole documents are drawn with replacement.
"""

import numpy as np
import scipy.sparse
import scipy.stats


def document_index(documents: np.ndarray) -> scipy.sparse.csr_array:
    """Indicator matrix [G, T] of which token belongs to which document."""
    _, group = np.unique(documents, return_inverse=True)
    tokens = np.arange(len(documents))
    return scipy.sparse.csr_array((np.ones(len(documents)), (group, tokens)), shape=(group.max() + 1, len(documents)))


def resample_weights(n_documents: int, samples: int, seed: int) -> np.ndarray:
    """How often each document is drawn in each resample [R, G]."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_documents, np.full(n_documents, 1 / n_documents), size=samples).astype(np.float64)


def percentile_interval(values: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) over the first axis, ignoring NaN; NaN where nothing is left."""
    tail = (1 - confidence) / 2
    limits, shape = [tail, 1 - tail], values.shape[1:]
    values = values.reshape(len(values), -1)
    holes, empty = np.isnan(values).any(axis=0), np.isnan(values).all(axis=0)
    low, high = np.quantile(np.where(holes, 0.0, values), limits, axis=0)
    if holes.any():  # numpy's quantile beside NaN goes column by column in Python: only where there are some
        low[holes], high[holes] = np.nanquantile(np.where(empty, 0.0, values)[:, holes], limits, axis=0)
        low[empty], high[empty] = np.nan, np.nan
    return low.reshape(shape), high.reshape(shape)


def normal_interval(estimate: float, moves: np.ndarray, confidence: float) -> tuple[float, float]:
    """Of an estimate that moves by moves[g] (to first order) for each further time that group g is drawn: the standard
    deviation of multinomial resamples, infinitely many (infinitesimal jackknife; Efron & Tibshirani 1993, ch. 21).
    Within [-1, 1]; NaN where the estimate is."""
    half = scipy.stats.norm.ppf((1 + confidence) / 2) * np.sqrt(((moves - moves.mean()) ** 2).sum())
    return tuple(np.clip([estimate - half, estimate + half], -1, 1))


def centred_interval(estimate, values: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """The percentile interval moved so that the resamples' mean [...] lies at the estimate: in resamples the partner is
    held fixed, where the estimate had the choice, so that they lie a little to one side of it. Within [-1, 1], as all
    correlations, shares and differences from a null are."""
    with np.errstate(invalid="ignore"):
        counted = np.maximum((~np.isnan(values)).sum(axis=0), 1)
        move = estimate - np.where(np.isnan(values), 0.0, values).sum(axis=0) / counted
    low, high = percentile_interval(values, confidence)
    return np.clip(low + move, -1, 1), np.clip(high + move, -1, 1)
