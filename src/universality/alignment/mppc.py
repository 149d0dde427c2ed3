"""Max pairwise Pearson correlation (MPPC; Wang et al. 2024, arXiv 2410.06672): for feature i of A,

    mppc_i = max over all layers and features j of B of  r_ij
    r_ij   = (sum_t x_ti y_tj - T mean_i mean_j) / (T sd_i sd_j)        over the same T tokens

signed, in float64. A feature that never varies is dead: its correlation is undefined, it gets NaN and matches nothing.

`best_matches` costs one addition for each pair of features active at the same token: for each feature of A, walk the
tokens where it fires, add into one row of F_B sums, reduce the row to its maximum. The row covers pairs that never fire
together too, so the maximum is exact. `best_matches_reference` is the dense product, tested equal.
"""

from typing import NamedTuple

import numba
import numpy as np
import scipy.sparse


class Matches(NamedTuple):
    """For each feature of A: the best correlation (float64, NaN if dead) and the feature of B it is with, or -1."""

    mppc: np.ndarray
    partner: np.ndarray


def moments(codes: scipy.sparse.csr_array) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (population) of each column [F] in float64; the deviation of a constant is 0."""
    n_tokens = codes.shape[0]
    wide = codes.astype(np.float64)
    mean = np.asarray(wide.sum(axis=0)).ravel() / n_tokens
    # Centred: sum (x - mean)^2 over the stored entries, plus mean^2 for each entry that is zero. No cancellation.
    columns = wide.indices
    deviations = np.bincount(columns, weights=(wide.data - mean[columns]) ** 2, minlength=codes.shape[1])
    zeros = n_tokens - np.bincount(columns, minlength=codes.shape[1])
    variance = (deviations + zeros * mean**2) / n_tokens
    sd = np.sqrt(variance)
    sd[sd <= 1e-12 * np.abs(mean)] = 0.0
    return mean, sd


def best_matches(a: scipy.sparse.csr_array, b: scipy.sparse.csr_array) -> Matches:
    """Best partner in b [T, F_B] for each feature of a [T, F_A]; both sparse, rows are the same tokens."""
    a_columns = a.tocsc()
    mean_a, sd_a = moments(a)
    mean_b, sd_b = moments(b)
    mppc = np.full(a.shape[1], np.nan)
    partner = np.full(a.shape[1], -1, dtype=np.int32)
    _best_matches(
        a_columns.indptr.astype(np.int64), a_columns.indices, a_columns.data.astype(np.float64), mean_a, sd_a,
        b.indptr.astype(np.int64), b.indices, b.data.astype(np.float64), mean_b, sd_b,
        a.shape[0], mppc, partner,
    )  # fmt: skip
    return Matches(mppc, partner)


@numba.njit(parallel=True, cache=True, error_model="numpy")
def _best_matches(
    a_start, a_token, a_value, mean_a, sd_a, b_start, b_feature, b_value, mean_b, sd_b, n_tokens, mppc, partner
):
    n_b = mean_b.shape[0]
    for i in numba.prange(mean_a.shape[0]):
        if sd_a[i] == 0.0:
            continue
        sums = np.zeros(n_b)
        for entry in range(a_start[i], a_start[i + 1]):
            value, token = a_value[entry], a_token[entry]
            for other in range(b_start[token], b_start[token + 1]):
                sums[b_feature[other]] += value * b_value[other]
        best, where = -2.0, -1
        for j in range(n_b):
            if sd_b[j] > 0.0:
                r = (sums[j] / n_tokens - mean_a[i] * mean_b[j]) / (sd_a[i] * sd_b[j])
                r = max(-1.0, min(1.0, r))  # rounding
                if r > best:
                    best, where = r, j
        if where >= 0:
            mppc[i], partner[i] = best, where


def best_matches_reference(a: np.ndarray, b: np.ndarray) -> Matches:
    """The same by one dense product of standardised columns, float64; a [T, F_A], b [T, F_B]."""
    r = _standardised(a).T @ _standardised(b) / len(a)
    return best_of_correlations(r)


def best_of_correlations(r: np.ndarray) -> Matches:
    """Reduce a correlation matrix [F_A, F_B], NaN where undefined, to each row's best."""
    usable = ~np.isnan(r)
    filled = np.where(usable, r, -np.inf)
    alive = usable.any(axis=1)
    return Matches(
        np.where(alive, filled.max(axis=1), np.nan), np.where(alive, filled.argmax(axis=1), -1).astype(np.int32)
    )


def _standardised(x: np.ndarray) -> np.ndarray:
    centred = x.astype(np.float64) - x.mean(axis=0, dtype=np.float64)
    sd = np.sqrt((centred**2).mean(axis=0))
    sd[sd <= 1e-12 * np.abs(x).max(axis=0)] = np.nan
    return centred / sd


def best_over_layers(per_layer: list[Matches]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mppc, place, feature) of the best over the layers of B; ties go to the first. Dead: NaN, -1, -1."""
    mppc = np.stack([m.mppc for m in per_layer])
    place = np.where(np.isnan(mppc), -np.inf, mppc).argmax(axis=0).astype(np.int32)
    rows = np.arange(mppc.shape[1])
    feature = np.stack([m.partner for m in per_layer])[place, rows]
    return mppc[place, rows], np.where(feature < 0, -1, place).astype(np.int32), feature
