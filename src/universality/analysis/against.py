"""Are better-matched features simpler? Rank correlations of measures with MPPC, other things held equal.

Spearman's correlation of a measure with MPPC, and the partial one: both ranked, the ranks' means within the feature's
layer and the part linear in the rank of log firing frequency taken off, and the residuals correlated (partial rank
correlation; Conover & Iman 1981, The American Statistician 35, rank transformation). Intervals resample features; over
documents, MPPC is replaced by its resamples (`alignment`), features held fixed.
"""

from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata


class Correlation(NamedTuple):
    """A rank correlation with the ends of its interval, and how many features it is over."""

    value: float
    low: float
    high: float
    n: int


def rank_correlation(x: np.ndarray, y: np.ndarray, samples: int, seed: int, confidence: float) -> Correlation:
    """Spearman's, over features [F] where both are defined; interval by bootstrap over these."""
    return _correlation(x, y, np.ones((len(x), 0)), samples, seed, confidence)


def partial_rank_correlation(
    x: np.ndarray, y: np.ndarray, frequency: np.ndarray, layer: np.ndarray, samples: int, seed: int, confidence: float
) -> Correlation:
    """The same with firing frequency and layer held equal."""
    layers = (layer[:, None] == np.unique(layer)[None, 1:]).astype(np.float64)
    with np.errstate(divide="ignore"):
        ranks = rankdata(np.log(frequency))
    return _correlation(x, y, np.concatenate([layers, ranks[:, None]], axis=1), samples, seed, confidence)


def _correlation(
    x: np.ndarray, y: np.ndarray, held: np.ndarray, samples: int, seed: int, confidence: float
) -> Correlation:
    defined = np.isfinite(x) & np.isfinite(y)
    x, y, held = x[defined], y[defined], held[defined]
    if len(x) < held.shape[1] + 3:
        return Correlation(np.nan, np.nan, np.nan, len(x))
    value = _of(x, y, held)
    rng = np.random.default_rng(seed)
    drawn = [_of(x[i], y[i], held[i]) for i in (rng.integers(0, len(x), len(x)) for _ in range(samples))]
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(drawn, [tail, 1 - tail])
    return Correlation(value, float(low), float(high), len(x))


def _of(x: np.ndarray, y: np.ndarray, held: np.ndarray) -> float:
    design = np.concatenate([np.ones((len(x), 1)), held], axis=1)
    ranks = np.stack([rankdata(x), rankdata(y)], axis=1)
    residuals = ranks - design @ np.linalg.lstsq(design, ranks, rcond=None)[0]
    a, b = residuals.T
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 1e-9 * len(x) else float("nan")
