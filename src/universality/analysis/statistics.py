"""Measures of each feature from its codes alone: what it fires at, where, and with which others.

token_entropy     H = - sum_v w_v log2 w_v, w_v the share of the summed |activation| that falls on token v; bits, 0 (one
                  token) to log2 of the vocabulary. A rare feature's is at most log2 of how often it fires.
position_share    how much of the variance its position in the sequence explains, by means over positions 1, 2, 3-4,
                  5-8, ...: 1 - (1 - eta^2) (T - 1) / (T - bins), eta^2 = variance between bins over variance; at most
                  1, about 0 (also below) where position says nothing.
frequency         the share of tokens at which it fires.
most_alike        the largest Pearson correlation with another feature of the same layer: 1 for a copy.
"""

from typing import NamedTuple

import numba
import numpy as np
import scipy.sparse

from universality.alignment.layers import sparse_layer
from universality.alignment.mppc import Drawn, match_sparse
from universality.alignment.token_order import TokenOrder
from universality.kernels.compiled import njit


class FeatureMeasures(NamedTuple):
    """Each [F], float64; NaN where a feature never fires. `alike`: the feature that `most_alike` is with, or -1."""

    frequency: np.ndarray
    mean_active: np.ndarray
    token_entropy: np.ndarray
    position_share: np.ndarray
    most_alike: np.ndarray
    alike: np.ndarray


def feature_measures(
    codes: scipy.sparse.csc_array, tokens: np.ndarray, positions: np.ndarray, order: TokenOrder
) -> FeatureMeasures:
    """`tokens`, `positions` [T] of the rows of codes [T, F]."""
    n_tokens, _ = codes.shape
    bins = np.ceil(np.log2(np.maximum(positions, 1))).astype(np.int64)
    in_bin = np.bincount(bins)
    entropy, share, mean = _measures(
        codes.indptr, codes.indices, codes.data, tokens.astype(np.int64), bins, in_bin, int(tokens.max()) + 1,
        4 * numba.get_num_threads(),
    )  # fmt: skip
    r, alike = most_alike(codes, order)
    return FeatureMeasures(np.diff(codes.indptr) / n_tokens, mean, entropy, share, r, alike)


def most_alike(codes: scipy.sparse.csc_array, order: TokenOrder) -> tuple[np.ndarray, np.ndarray]:
    """(r, feature) [F]: the largest correlation of each feature with another of the same layer."""
    layer = sparse_layer(codes.tocsr(), order)
    none = np.empty(0, dtype=np.int64)
    found, _ = match_sparse(layer, layer, order, 2, Drawn(none, none, np.empty(0, dtype=np.int64)))
    other = found.partner != np.arange(codes.shape[1])[:, None]
    first = other.argmax(axis=1)  # itself is the best, unless a copy comes before it
    pick = np.arange(len(first)), first
    return found.r[pick], np.where(np.isnan(found.r[pick]), -1, found.partner[pick])


@njit(parallel=True)
def _measures(starts, rows, values, tokens, bins, in_bin, vocabulary, n_chunks):
    n_features, n_tokens, n_bins = len(starts) - 1, len(tokens), len(in_bin)
    entropy, share, mean = (np.full(n_features, np.nan), np.full(n_features, np.nan), np.full(n_features, np.nan))
    n_used = np.int64(0)
    for count in in_bin:
        n_used += np.int64(count > 0)
    for chunk in numba.prange(n_chunks):
        of_token, of_bin = np.zeros(vocabulary), np.zeros(n_bins)
        for feature in range(chunk, n_features, n_chunks):
            low, high = starts[feature], starts[feature + 1]
            if low == high:
                continue
            total, size, squares = 0.0, 0.0, 0.0
            of_bin[:] = 0.0
            for entry in range(low, high):
                value = np.float64(values[entry])
                of_token[tokens[rows[entry]]] += abs(value)
                of_bin[bins[rows[entry]]] += value
                total += value
                size += abs(value)
                squares += value * value
            found = 0.0
            for entry in range(low, high):
                token = tokens[rows[entry]]
                if of_token[token] > 0:
                    w = of_token[token] / size
                    found -= w * np.log2(w)
                    of_token[token] = 0.0
            entropy[feature], mean[feature] = max(found, 0.0), total / (high - low)
            variance = squares - total * total / n_tokens
            between = -total * total / n_tokens
            for b in range(n_bins):
                if in_bin[b] > 0:
                    between += of_bin[b] * of_bin[b] / in_bin[b]
            if variance > 0 and n_tokens > n_used:
                share[feature] = 1 - (1 - between / variance) * (n_tokens - 1) / (n_tokens - n_used)
    return entropy, share, mean
