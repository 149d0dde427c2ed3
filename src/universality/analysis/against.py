"""Are better-matched features simpler? Rank correlations of measures with MPPC, other things held equal.

Spearman's correlation of a measure with MPPC, and the partial one: both ranked, the ranks' means within the feature's
layer and the part linear in the rank of firing frequency taken off, and the residuals correlated (partial rank
correlation; Conover & Iman 1981, The American Statistician 35, rank transformation).

Two intervals: over features, which are drawn with replacement; and over documents, where features stay and MPPC is
that of resampled documents with the partner held fixed, moved to where the estimate is the resamples' mean.
"""

from typing import NamedTuple

import numpy as np
import scipy.sparse
from scipy.stats import rankdata

from universality.alignment.bootstrap import centred_interval

_RESAMPLES = 64  # of documents, whose ranks are in memory at a time


class Correlation(NamedTuple):
    """A rank correlation, the ends of its interval over features and of that over documents, NaN where there are no
    resamples of these, and how many features it is over."""

    value: float
    low: float
    high: float
    low_documents: float
    high_documents: float
    n: int


class Resampling(NamedTuple):
    samples: int
    seed: int
    confidence: float


def rank_correlation(
    x: np.ndarray, y: np.ndarray, resampling: Resampling, replicates: np.ndarray | None = None
) -> Correlation:
    """Spearman's, over features [F] where both are defined; `replicates` [R, F]: y of resampled documents."""
    return _correlation(x, y, None, np.zeros(len(x)), resampling, replicates)


def partial_rank_correlation(
    x: np.ndarray,
    y: np.ndarray,
    frequency: np.ndarray,
    layer: np.ndarray,
    resampling: Resampling,
    replicates: np.ndarray | None = None,
) -> Correlation:
    """The same with firing frequency and layer held equal."""
    return _correlation(x, y, frequency, layer, resampling, replicates)


def _correlation(
    x: np.ndarray,
    y: np.ndarray,
    frequency: np.ndarray | None,
    layer: np.ndarray,
    resampling: Resampling,
    replicates: np.ndarray | None,
) -> Correlation:
    defined = np.isfinite(x) & np.isfinite(y)
    x, y, layer = x[defined], y[defined], layer[defined]
    frequency = None if frequency is None else frequency[defined]
    if len(x) < len(np.unique(layer)) + 4:
        return Correlation(np.nan, np.nan, np.nan, np.nan, np.nan, len(x))
    value = float(_of(x, y[None], frequency, layer)[0])
    rng = np.random.default_rng(resampling.seed)
    draws = (rng.integers(0, len(x), len(x)) for _ in range(resampling.samples))
    drawn = np.array([_of(x[i], y[None, i], None if frequency is None else frequency[i], layer[i])[0] for i in draws])
    tail = (1 - resampling.confidence) / 2
    low, high = np.nanquantile(drawn, [tail, 1 - tail]) if np.isfinite(drawn).any() else (np.nan, np.nan)
    ends = np.nan, np.nan
    if replicates is not None:
        moved = np.concatenate(
            [
                _of(x, replicates[k : k + _RESAMPLES, defined], frequency, layer)
                for k in range(0, len(replicates), _RESAMPLES)
            ]
        )
        first, last = centred_interval(value, moved[:, None], resampling.confidence)
        ends = float(first[0]), float(last[0])
    return Correlation(value, float(low), float(high), ends[0], ends[1], len(x))


def _of(x: np.ndarray, ys: np.ndarray, frequency: np.ndarray | None, layer: np.ndarray) -> np.ndarray:
    """Of x [F] with each of ys [R, F], what is held equal taken off their ranks; undefined values rank lowest, as
    features that do not vary in a resample are matched by nothing."""
    _, number = np.unique(layer, return_inverse=True)
    members = scipy.sparse.csr_array((np.ones(len(x)), (np.arange(len(x)), number)))  # [F, layers]
    by = None if frequency is None else _off(rankdata(frequency)[None], members, None)
    a = _off(rankdata(x)[None], members, by)
    b = _off(rankdata(np.nan_to_num(ys, nan=-1.0), axis=1), members, by)
    scale = np.linalg.norm(a) * np.linalg.norm(b, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 1e-9 * len(x), (b @ a[0]) / scale, np.nan)


def _off(ranks: np.ndarray, members: scipy.sparse.csr_array, by: np.ndarray | None) -> np.ndarray:
    """Ranks [R, F] less their layer's mean, and less the part along `by` [1, F], which is centred likewise."""
    means = (ranks @ members) / members.sum(axis=0)
    centred = ranks - means @ members.T
    if by is None or not by.any():
        return centred
    return centred - np.outer(centred @ by[0] / (by[0] @ by[0]), by[0])
