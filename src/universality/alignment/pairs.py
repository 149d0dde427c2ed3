"""Correlations of given pairs of features in every resample of the documents, from sums over each group of them."""

import numba
import numpy as np

from universality.alignment.dense import rotated_block
from universality.alignment.layers import Layer, SparseLayer
from universality.alignment.token_order import TokenOrder

_CONSTANT = 1e-12  # of the mean square: a feature that varies less does not vary
_TOGETHER = 64  # pairs that one thread looks at together


def correlations(sums: np.ndarray, sizes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Correlation of each pair in each resample [R, pairs], from sums over groups [5, G, pairs] of `sizes` [G] tokens.

    `weights` [R, G]: how often each group is drawn. NaN where a feature does not vary in the resample.
    """
    n = (weights @ sizes)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        sx, sy, sxx, syy, sxy = (weights @ s / n for s in sums)
        vx, vy = sxx - sx * sx, syy - sy * sy
        r = (sxy - sx * sy) / np.sqrt(np.where((vx > _CONSTANT * sxx) & (vy > _CONSTANT * syy), vx * vy, np.nan))
    return np.clip(r, -1, 1)


def influence(sums: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """How each pair's correlation moves with how often a group is drawn, d r / d w_g where all w are 1: [G, pairs].

    It is sum_t (zx zy - r (zx^2 + zy^2) / 2) / n over the group's tokens, z being standard scores [Devlin et al. 1975,
    Biometrika 62, eq. 3.2]. A correlation in a resample is r + sum_g (w_g - 1) times this, to first order. 0 where a
    feature does not vary.
    """
    moves = np.empty(sums.shape[1:])
    _influence(sums, sizes, moves)
    return moves


@numba.njit(parallel=True, cache=True)
def _influence(sums, sizes, moves):
    """Some neighbouring pairs at a time: those of one group lie together in memory."""
    n_groups, n_pairs = moves.shape
    n = sizes.sum()
    for chunk in numba.prange((n_pairs + _TOGETHER - 1) // _TOGETHER):
        low, high = chunk * _TOGETHER, min((chunk + 1) * _TOGETHER, n_pairs)
        total = np.zeros((5, high - low))
        for k in range(5):
            for g in range(n_groups):
                for pair in range(low, high):
                    total[k, pair - low] += sums[k, g, pair]
        mx, my = total[0] / n, total[1] / n
        vx, vy = total[2] / n - mx * mx, total[3] / n - my * my
        varies = (vx > _CONSTANT * total[2] / n) & (vy > _CONSTANT * total[3] / n)
        vx, vy = np.where(varies, vx, 1.0), np.where(varies, vy, 1.0)
        scale = np.sqrt(vx * vy)
        half_r = (total[4] / n - mx * my) / scale / 2
        for g in range(n_groups):
            for pair in range(low, high):
                p = pair - low
                gx, gy, size = sums[0, g, pair], sums[1, g, pair], sizes[g]
                product = (sums[4, g, pair] - mx[p] * gy - my[p] * gx + size * mx[p] * my[p]) / scale[p]
                square_x = (sums[2, g, pair] - 2 * mx[p] * gx + size * mx[p] * mx[p]) / vx[p]
                square_y = (sums[3, g, pair] - 2 * my[p] * gy + size * my[p] * my[p]) / vy[p]
                moves[g, pair] = (product - half_r[p] * (square_x + square_y)) / n if varies[p] else 0.0


def group_sums(x: Layer, y: Layer, i: np.ndarray, j: np.ndarray, order: TokenOrder, rotation: int) -> np.ndarray:
    """Sums [5, G, pairs] of x, y, xx, yy, xy over the tokens of each group. What is summed is less a constant where
    the mean is large, as layers are, so that the sums do not cancel."""
    sums = np.zeros((5, len(order.groups) - 1, len(i)))
    if isinstance(x, SparseLayer) and isinstance(y, SparseLayer):
        _sparse_sums(
            i, j, x.feature_starts, x.tokens, x.feature_values, y.feature_starts, y.tokens, y.feature_values,
            order.groups, order.n_tokens, rotation, sums,
        )  # fmt: skip
        return sums
    first = 0
    while first < len(order.groups) - 1:
        last = max(first + 1, int(np.searchsorted(order.groups, order.groups[first] + 4096)) - 1)
        start, stop = order.groups[first], order.groups[last]
        a, b = x.block(start, stop, i), rotated_block(y, start, stop, j, rotation)
        edges = order.groups[first:last] - start
        for k, value in enumerate((a, b, a * a, b * b, a * b)):
            sums[k, first:last] = np.add.reduceat(value, edges, axis=0)
        first = last
    return sums


@numba.njit(parallel=True, cache=True)
def _sparse_sums(i, j, x_starts, x_tokens, x_values, y_starts, y_tokens, y_values, groups, n_tokens, rotation, sums):
    """Walk both features' entries in the order of x's tokens; y's come from the one that the rotation puts first."""
    for pair in numba.prange(len(i)):
        x, x_stop = x_starts[i[pair]], x_starts[i[pair] + 1]
        low, high = y_starts[j[pair]], y_starts[j[pair] + 1]
        count = high - low
        first = np.searchsorted(y_tokens[low:high], rotation)
        seen, group = 0, 0
        while x < x_stop or seen < count:
            place_x = x_tokens[x] if x < x_stop else n_tokens
            place_y, entry = n_tokens, low
            if seen < count:
                entry = low + (first + seen if first + seen < count else first + seen - count)
                place_y = y_tokens[entry] - rotation
                place_y = place_y + n_tokens if place_y < 0 else place_y
            place = min(place_x, place_y)
            while groups[group + 1] <= place:
                group += 1
            value_x, value_y = 0.0, 0.0
            if place_x == place:
                value_x = np.float64(x_values[x])
                x += 1
            if place_y == place:
                value_y = np.float64(y_values[entry])
                seen += 1
            sums[0, group, pair] += value_x
            sums[1, group, pair] += value_y
            sums[2, group, pair] += value_x * value_x
            sums[3, group, pair] += value_y * value_y
            sums[4, group, pair] += value_x * value_y
