"""Are better-matched features simpler? Rank correlations of measures with MPPC, other things held equal.

Spearman's correlation of a measure with MPPC, and the partial one: both ranked, the ranks' means within the feature's
layer and the part linear in the rank of firing frequency taken off, and the residuals correlated (partial rank
correlation; Conover & Iman 1981, The American Statistician 35, rank transformation).

Two intervals: over features, which are drawn with replacement; and over documents, where features stay and MPPC is
that of resampled documents with the partner held fixed, moved to where the estimate is the resamples' mean.
"""

from typing import NamedTuple

import numpy as np
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
    return _correlation(x, y, np.ones((len(x), 1)), resampling, replicates)


def partial_rank_correlation(
    x: np.ndarray,
    y: np.ndarray,
    frequency: np.ndarray,
    layer: np.ndarray,
    resampling: Resampling,
    replicates: np.ndarray | None = None,
) -> Correlation:
    """The same with firing frequency and layer held equal."""
    layers = (layer[:, None] == np.unique(layer)[None]).astype(np.float64)
    held = np.concatenate([layers, rankdata(frequency)[:, None]], axis=1)
    return _correlation(x, y, held, resampling, replicates)


def _correlation(
    x: np.ndarray, y: np.ndarray, held: np.ndarray, resampling: Resampling, replicates: np.ndarray | None
) -> Correlation:
    defined = np.isfinite(x) & np.isfinite(y)
    x, y, held = x[defined], y[defined], held[defined]
    if len(x) < held.shape[1] + 3:
        return Correlation(np.nan, np.nan, np.nan, np.nan, np.nan, len(x))
    value = float(_of(x, y[None], held)[0])
    rng = np.random.default_rng(resampling.seed)
    draws = (rng.integers(0, len(x), len(x)) for _ in range(resampling.samples))
    drawn = np.array([_of(x[i], y[None, i], held[i])[0] for i in draws])
    tail = (1 - resampling.confidence) / 2
    low, high = np.nanquantile(drawn, [tail, 1 - tail]) if np.isfinite(drawn).any() else (np.nan, np.nan)
    ends = np.nan, np.nan
    if replicates is not None:
        moved = np.concatenate(
            [_of(x, replicates[k : k + _RESAMPLES, defined], held) for k in range(0, len(replicates), _RESAMPLES)]
        )
        first, last = centred_interval(value, moved[:, None], resampling.confidence)
        ends = float(first[0]), float(last[0])
    return Correlation(value, float(low), float(high), ends[0], ends[1], len(x))


def _of(x: np.ndarray, ys: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Of x [F] with each of ys [R, F], what is `held` [F, k] taken off their ranks; undefined values rank lowest, as
    features that do not vary in a resample are matched by nothing."""
    basis = _basis(held)
    a = _off(rankdata(x)[None], basis)
    b = _off(rankdata(np.nan_to_num(ys, nan=-1.0), axis=1), basis)
    scale = np.linalg.norm(a) * np.linalg.norm(b, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 1e-9 * len(x), (b @ a[0]) / scale, np.nan)


def _basis(held: np.ndarray) -> np.ndarray:
    """Orthonormal, of the space that the columns span; those that others span, as an empty layer's, are left out."""
    u, s, _ = np.linalg.svd(held, full_matrices=False)
    return u[:, s > 1e-9 * s[0]]


def _off(ranks: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """The ranks [R, F] without their part in the space of the basis [F, k]."""
    return ranks - (ranks @ basis) @ basis.T
