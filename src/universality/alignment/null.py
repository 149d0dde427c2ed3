"""Is a feature's best correlation more than chance gives the best of as many candidates?

The null is made by rotating the tokens of one side by whole documents: what remains is each feature's own distribution
and its run of values within a document, what goes is the text that both read. A feature's maximum is compared with null
maxima of features that fire about as often, since rare features reach high correlations by chance.
"""

import numba
import numpy as np
import scipy.stats

from universality.kernels.compiled import njit


def p_values(r: np.ndarray, frequency: np.ndarray, null_r: np.ndarray, null_frequency: np.ndarray, neighbours: int):
    """p [n] of maxima `r` [n]: (1 + how many of the null maxima are no smaller) / (1 + how many there are), among those
    of the `neighbours` features nearest in frequency [Phipson & Smyth 2010, eq. 2]. NaN where r is.

    `null_r` [K, n']: maxima under each rotation, `null_frequency` [n'].
    """
    nulls, rank = _windows(frequency, null_r, null_frequency, neighbours)
    p = np.full(len(r), np.nan)
    if nulls.size:
        _count(r, rank, nulls, p)
    return p


def critical(
    level: float, frequency: np.ndarray, null_r: np.ndarray, null_frequency: np.ndarray, neighbours: int
) -> np.ndarray:
    """The smallest maximum [n] whose p-value is at most `level`, in limits of what each feature is compared with."""
    nulls, rank = _windows(frequency, null_r, null_frequency, neighbours)
    allowed = int(np.floor(level * (1 + nulls.shape[1]) + 1e-9)) - 1
    if not nulls.size or allowed < 0:
        return np.full(len(frequency), np.inf)
    ordered = -np.sort(-nulls, axis=1)
    # One more null as large would be too many: r must exceed the largest that is not allowed.
    return np.nextafter(ordered[:, allowed], np.inf)[rank] if allowed < nulls.shape[1] else np.full(len(rank), -1.0)


def significant(p: np.ndarray, rate: float) -> tuple[np.ndarray, float]:
    """(whether each is found at this false discovery rate [Benjamini & Hochberg 1995], the largest p that is; 0 if
    none)."""
    live = ~np.isnan(p)
    found = np.zeros(len(p), bool)
    if live.any():
        found[live] = scipy.stats.false_discovery_control(p[live]) <= rate
    return found, float(p[found].max()) if found.any() else 0.0


def _windows(frequency, null_r, null_frequency, neighbours) -> tuple[np.ndarray, np.ndarray]:
    """Null maxima [windows, K * neighbours] of runs of features by frequency, and the window [n] that each of
    `frequency` is compared with: the one that is centred on it."""
    live = ~np.isnan(null_r).any(axis=0)
    order = np.argsort(null_frequency[live], kind="stable")
    nulls, sorted_frequency = null_r[:, live][:, order], null_frequency[live][order]
    width = min(neighbours, len(order))
    if not width:
        return np.empty((1, 0)), np.zeros(len(frequency), dtype=np.int64)
    step = max(width // 10, 1)  # windows overlap; one for each feature would be as many times larger
    starts = np.unique(np.append(np.arange(0, len(order) - width + 1, step), len(order) - width))
    windows = np.stack([nulls[:, start : start + width].ravel() for start in starts])
    place = np.searchsorted(sorted_frequency, frequency, side="left")
    place = (place + np.searchsorted(sorted_frequency, frequency, side="right")) / 2
    centres = starts + width / 2
    return windows, np.abs(centres[None] - place[:, None]).argmin(axis=1) if len(starts) < 64 else _nearest(
        centres, place
    )


def _nearest(centres: np.ndarray, place: np.ndarray) -> np.ndarray:
    right = np.clip(np.searchsorted(centres, place), 1, len(centres) - 1)
    return np.where(place - centres[right - 1] <= centres[right] - place, right - 1, right)


@njit(parallel=True)
def _count(r, window, nulls, p):
    for i in numba.prange(len(r)):
        if not np.isnan(r[i]):
            above = 0
            for null in nulls[window[i]]:
                above += null >= r[i]
            p[i] = (1 + above) / (1 + nulls.shape[1])
