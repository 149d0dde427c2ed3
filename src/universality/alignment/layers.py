"""One layer of one side of a comparison: what its features do at each token, and their moments.

Columns are shifted by a constant where their mean exceeds their spread, which changes no correlation: products of large
means would cancel in sum(xy) - T mean(x) mean(y). What is left has means of at most one standard deviation, so that
float64 sums lose nothing that matters.
"""

from typing import NamedTuple, Protocol, TypeAlias

import numba
import numpy as np
import scipy.sparse

from universality.alignment.token_order import TokenOrder
from universality.kernels.compiled import njit

_CHUNKS = 16  # of the entries, summed apart and then together: the same sums on any number of threads
_CONSTANT = 1e-12  # of the largest value: a column that varies less is constant up to rounding


class Moments(NamedTuple):
    """Mean and population standard deviation [S, F], float64, of each feature in each of S segments of the tokens; NaN
    deviation where it is constant, that is dead."""

    mean: np.ndarray
    sd: np.ndarray


class SparseLayer(NamedTuple):
    """Codes in both orders, by place in the token order. By feature: entries of feature i at
    starts[i]:starts[i + 1] of `tokens`, `values`, ascending; by token likewise. `frequency` [F]: share of tokens where
    it is not zero; `moments`: of the order's segments."""

    n_tokens: int
    feature_starts: np.ndarray
    tokens: np.ndarray
    feature_values: np.ndarray
    token_starts: np.ndarray
    features: np.ndarray
    token_values: np.ndarray
    frequency: np.ndarray
    moments: Moments

    @property
    def n_features(self) -> int:
        return len(self.frequency)

    def by_feature(self) -> "SparseLayer":
        """Without the order by token, 6 bytes of 14 an entry: sums over pairs of sparse features do without it."""
        none = {name: getattr(self, name)[:0].copy() for name in ("token_starts", "features", "token_values")}
        return self._replace(**none)

    def block(self, start: int, stop: int, columns: np.ndarray) -> np.ndarray:
        """Values [stop - start, len(columns)] as a dense array, float64."""
        low, high = self.token_starts[start], self.token_starts[stop]
        rows = scipy.sparse.csr_array(
            (
                self.token_values[low:high],
                self.features[low:high].astype(np.int32),
                self.token_starts[start : stop + 1] - low,
            ),
            shape=(stop - start, self.n_features),
        )
        return rows[:, columns].toarray().astype(np.float64)


class Dense(Protocol):
    """A layer whose values are dense: read block by block, never held whole."""

    n_tokens: int
    n_features: int
    frequency: np.ndarray
    moments: Moments

    def block(self, start: int, stop: int, columns: np.ndarray) -> np.ndarray:
        """Values [stop - start, len(columns)] at places of the token order, float64, less the whole sample's mean."""


Layer: TypeAlias = SparseLayer | Dense


def sparse_layer(codes: scipy.sparse.csr_array, order: TokenOrder) -> SparseLayer:
    """From codes by token [T, F], rows in the store's order; any finite values, zero where there is no entry."""
    n_tokens, n_features = codes.shape
    firing, sums, squares = _column_sums(codes.indices, codes.data, n_features)
    # mean > sd exactly if mean^2 T^2 > T sum(x^2) - sum^2; where it is close to equal, either will do.
    codes = _centred(codes, np.flatnonzero(2 * sums**2 > n_tokens * squares))
    kind = np.uint16 if n_features <= 2**16 else np.uint32
    source = codes.indptr.astype(np.int64)
    token_starts = np.concatenate([[0], np.cumsum(np.diff(source)[order.rows])])
    features, token_values = np.empty(codes.nnz, kind), np.empty(codes.nnz, np.float32)
    _copy_rows(source, codes.indices, codes.data, order.rows, token_starts, features, token_values)
    del codes  # if nothing else holds them, before as much is needed again
    feature_starts = np.zeros(n_features + 1, np.int64)
    tokens, feature_values = np.empty(len(features), np.int32), np.empty(len(features), np.float32)
    ranges = np.linspace(0, n_features, numba.get_num_threads() + 1).astype(np.int64)
    _transpose(token_starts, features, token_values, ranges, feature_starts, tokens, feature_values)
    moments = _sparse_moments(feature_starts, tokens, feature_values, order.segments())
    return SparseLayer(
        n_tokens, feature_starts, tokens, feature_values, token_starts, features, token_values,
        firing / n_tokens, moments,
    )  # fmt: skip


@njit(parallel=True)
def _column_sums(features, values, n_features):
    """Of each column [F]: how many values are not 0, their sum, and that of their squares."""
    firing = np.zeros((_CHUNKS, n_features), np.int64)
    sums, squares = np.zeros((_CHUNKS, n_features)), np.zeros((_CHUNKS, n_features))
    for chunk in numba.prange(_CHUNKS):
        for entry in range(chunk * len(values) // _CHUNKS, (chunk + 1) * len(values) // _CHUNKS):
            feature, value = features[entry], np.float64(values[entry])
            firing[chunk, feature] += value != 0
            sums[chunk, feature] += value
            squares[chunk, feature] += value * value
    return firing.sum(axis=0), sums.sum(axis=0), squares.sum(axis=0)


def _centred(codes: scipy.sparse.csr_array, dense: np.ndarray) -> scipy.sparse.csr_array:
    """Take the mean off columns `dense`, those that it exceeds the spread of; each gets an entry at every token."""
    if not len(dense):
        return codes
    n_tokens, n_features = codes.shape
    columns = codes[:, dense].toarray().astype(np.float64)
    columns = (columns - columns.mean(axis=0)).astype(np.float32)
    place = np.zeros(n_features, bool)
    place[dense] = True
    kept = ~place[codes.indices]
    starts = np.concatenate([[0], np.cumsum(kept)])[codes.indptr]
    rest = scipy.sparse.csr_array((codes.data[kept], codes.indices[kept], starts), shape=codes.shape)
    starts = np.arange(n_tokens + 1) * len(dense)
    centred = scipy.sparse.csr_array((columns.ravel(), np.tile(dense, n_tokens), starts), shape=codes.shape)
    return (rest + centred).tocsr()


@njit(parallel=True)
def _copy_rows(source, indices, data, rows, starts, features, values):
    for place in numba.prange(len(rows)):
        old, new = source[rows[place]], starts[place]
        for k in range(starts[place + 1] - new):
            features[new + k] = indices[old + k]
            values[new + k] = data[old + k]


@njit(parallel=True)
def _transpose(starts, features, values, ranges, feature_starts, tokens, by_feature):
    """Counting sort, each of the ranges of features by itself. `feature_starts` is filled in."""
    for part in numba.prange(len(ranges) - 1):
        low, high = ranges[part], ranges[part + 1]
        for entry in range(len(features)):
            if low <= features[entry] < high:
                feature_starts[features[entry] + 1] += 1
    for feature in range(len(feature_starts) - 1):
        feature_starts[feature + 1] += feature_starts[feature]
    for part in numba.prange(len(ranges) - 1):
        low, high = ranges[part], ranges[part + 1]
        free = feature_starts[low:high].copy()  # where each feature's next entry goes
        for token in range(len(starts) - 1):
            for entry in range(starts[token], starts[token + 1]):
                column = np.int64(features[entry])
                if low <= column < high:
                    place = free[column - low]
                    tokens[place] = token
                    by_feature[place] = values[entry]
                    free[column - low] = place + 1


def _sparse_moments(starts: np.ndarray, tokens: np.ndarray, values: np.ndarray, segments: np.ndarray) -> Moments:
    mean, sd = (np.empty((len(segments), len(starts) - 1)) for _ in range(2))
    _moments_by_feature(starts, tokens, values, segments, mean, sd)
    return Moments(mean, sd)


@njit(parallel=True)
def _moments_by_feature(starts, tokens, values, segments, mean, sd):
    """Two passes a segment: deviations from the mean are summed, zeros being -mean each."""
    for i in numba.prange(len(starts) - 1):
        for s in range(len(segments)):
            low = starts[i] + np.searchsorted(tokens[starts[i] : starts[i + 1]], segments[s, 0])
            high = starts[i] + np.searchsorted(tokens[starts[i] : starts[i + 1]], segments[s, 1])
            n = segments[s, 1] - segments[s, 0]
            total, largest = 0.0, 0.0
            for entry in range(low, high):
                total += values[entry]
                largest = max(largest, abs(np.float64(values[entry])))
            average = total / n
            deviations = (n - (high - low)) * average**2
            for entry in range(low, high):
                deviations += (values[entry] - average) ** 2
            mean[s, i] = average
            spread = np.sqrt(deviations / n)
            sd[s, i] = spread if spread > _CONSTANT * largest else np.nan


def constant(sd: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """Deviations with NaN where they are rounding alone."""
    return np.where(sd > _CONSTANT * largest, sd, np.nan)
