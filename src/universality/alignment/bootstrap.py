"""Intervals by bootstrap over documents (Efron & Tibshirani 1993, ch. 13: percentile intervals of clustered data).

Tokens of one document are not independent, so whole documents are drawn with replacement. The partner of each feature
is held fixed; its correlation is computed anew in every resample from per-document sums. Tokens enter centred by the
full sample's means, so that the sums do not cancel.
"""

from typing import NamedTuple

import numpy as np
import scipy.sparse


class DocumentSums(NamedTuple):
    """Per document: tokens `n` [G]; sums over its tokens of x, y, xx, yy, xy for each matched pair [G, F]."""

    n: np.ndarray
    x: np.ndarray
    y: np.ndarray
    xx: np.ndarray
    yy: np.ndarray
    xy: np.ndarray


def document_index(documents: np.ndarray) -> scipy.sparse.csr_array:
    """Indicator matrix [G, T] of which token belongs to which document."""
    _, group = np.unique(documents, return_inverse=True)
    tokens = np.arange(len(documents))
    return scipy.sparse.csr_array((np.ones(len(documents)), (group, tokens)), shape=(group.max() + 1, len(documents)))


def sparse_sums(index: scipy.sparse.csr_array, x: scipy.sparse.csr_array, y: scipy.sparse.csr_array) -> DocumentSums:
    """Sums for pairs (column f of x, column f of y), both [T, F]."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    n = index.sum(axis=1)
    mean_x, mean_y = (np.asarray(z.sum(axis=0)).ravel() / z.shape[0] for z in (x, y))
    sx, sy, sxx, syy, sxy = ((index @ z).toarray() for z in (x, y, x.multiply(x), y.multiply(y), x.multiply(y)))
    size = n[:, None]
    return DocumentSums(
        n=n,
        x=sx - size * mean_x,
        y=sy - size * mean_y,
        xx=sxx - 2 * mean_x * sx + size * mean_x**2,
        yy=syy - 2 * mean_y * sy + size * mean_y**2,
        xy=sxy - mean_x * sy - mean_y * sx + size * mean_x * mean_y,
    )


def centred_sums(index: scipy.sparse.csr_array, x: np.ndarray, y: np.ndarray) -> DocumentSums:
    """The same for dense columns, of all tokens or a block of them, that were centred by the full sample's means."""
    return DocumentSums(index.sum(axis=1), index @ x, index @ y, index @ (x * x), index @ (y * y), index @ (x * y))


def resample_weights(n_documents: int, samples: int, seed: int) -> np.ndarray:
    """How often each document is drawn in each resample [R, G]."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_documents, np.full(n_documents, 1 / n_documents), size=samples).astype(np.float64)


def resampled_correlations(sums: DocumentSums, weights: np.ndarray) -> np.ndarray:
    """Correlation of each pair in each resample [R, F]; NaN where a feature does not vary in the resample."""
    n = (weights @ sums.n)[:, None]
    x, y, xx, yy, xy = (weights @ s / n for s in sums[1:])
    with np.errstate(divide="ignore", invalid="ignore"):
        r = (xy - x * y) / np.sqrt(np.maximum(xx - x * x, 0) * np.maximum(yy - y * y, 0))
    return np.where(np.isfinite(r), np.clip(r, -1, 1), np.nan)


def percentile_interval(values: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) over the first axis, ignoring NaN; NaN where nothing is left."""
    tail = (1 - confidence) / 2
    empty = np.isnan(values).all(axis=0)
    low, high = np.nanquantile(np.where(empty, 0.0, values), [tail, 1 - tail], axis=0)
    return np.where(empty, np.nan, low), np.where(empty, np.nan, high)
