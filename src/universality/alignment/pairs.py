"""Correlations of given pairs of features in every resample of the documents, from sums over each group of them."""

import numba
import numpy as np

from universality.alignment.dense import rotated_block
from universality.alignment.layers import Layer, SparseLayer
from universality.alignment.token_order import TokenOrder
from universality.kernels.compiled import njit

_CONSTANT = 1e-12  # of the mean square: a feature that varies less does not vary
_TOGETHER = 64  # pairs that one thread looks at, one after the other
_DENSE = 512  # pairs whose sums are held at a time


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
    moves = np.zeros(sums.shape[1:])
    _influences(np.ascontiguousarray(sums.transpose(2, 0, 1)), sizes, moves.T)
    return moves


@njit(parallel=True)
def _influences(sums, sizes, moves):
    for pair in numba.prange(len(sums)):
        _add_influence(sums[pair], sizes, moves[pair])


@njit()
def _add_influence(sums, sizes, moves):
    """Of one pair, sums [5, G], added to moves [G]."""
    n_groups, n = len(moves), sizes.sum()
    if n == 0:
        return
    x, y, xx, yy, xy = 0.0, 0.0, 0.0, 0.0, 0.0
    for g in range(n_groups):
        x += sums[0, g]
        y += sums[1, g]
        xx += sums[2, g]
        yy += sums[3, g]
        xy += sums[4, g]
    mx, my = x / n, y / n
    vx, vy = xx / n - mx * mx, yy / n - my * my
    if not (vx > _CONSTANT * xx / n and vy > _CONSTANT * yy / n):
        return
    scale = np.sqrt(vx * vy)
    half_r = (xy / n - mx * my) / scale / 2
    for g in range(n_groups):
        gx, gy, size = sums[0, g], sums[1, g], sizes[g]
        product = (sums[4, g] - mx * gy - my * gx + size * mx * my) / scale
        square_x = (sums[2, g] - 2 * mx * gx + size * mx * mx) / vx
        square_y = (sums[3, g] - 2 * my * gy + size * my * my) / vy
        moves[g] += (product - half_r * (square_x + square_y)) / n


def summed_influence(
    x: Layer, y: Layer, i: np.ndarray, j: np.ndarray, order: TokenOrder, rotation: int, ranges: list[tuple[int, int]]
) -> list[np.ndarray]:
    """`influence`, summed over the pairs, on the tokens of the groups of each range (first, last) alone: [last - first]
    each. Sums of sparse pairs stay in the cache of a core."""
    sizes = np.diff(order.groups).astype(np.float64)
    bounds = np.array(ranges, dtype=np.int64).reshape(-1, 2)
    if isinstance(x, SparseLayer) and isinstance(y, SparseLayer):
        parts = np.zeros((-(-len(i) // _TOGETHER), len(ranges), len(sizes)))
        _sparse_influence(
            i, j, x.feature_starts, x.tokens, x.feature_values, y.feature_starts, y.tokens, y.feature_values,
            order.groups, order.n_tokens, rotation, bounds, sizes, parts,
        )  # fmt: skip
        return [part[: last - first] for part, (first, last) in zip(parts.sum(axis=0), ranges, strict=True)]
    found = [np.zeros(last - first) for first, last in ranges]
    for start in range(0, len(i), _DENSE):
        some = slice(start, start + _DENSE)
        sums = group_sums(x, y, i[some], j[some], order, rotation)
        for total, (first, last) in zip(found, ranges, strict=True):
            total += influence(sums[:, first:last], sizes[first:last]).sum(axis=1)
    return found


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


@njit(parallel=True)
def _sparse_sums(i, j, x_starts, x_tokens, x_values, y_starts, y_tokens, y_values, groups, n_tokens, rotation, sums):
    for pair in numba.prange(len(i)):
        x, y = slice(x_starts[i[pair]], x_starts[i[pair] + 1]), slice(y_starts[j[pair]], y_starts[j[pair] + 1])
        _add_sums(x_tokens[x], x_values[x], y_tokens[y], y_values[y], groups, n_tokens, rotation, sums[:, :, pair])


@njit(parallel=True)
def _sparse_influence(
    i, j, x_starts, x_tokens, x_values, y_starts, y_tokens, y_values, groups, n_tokens, rotation, bounds, sizes, parts
):
    """A part for each few neighbouring pairs, so that their sum is the same on any number of threads."""
    for part in numba.prange(len(parts)):
        sums = np.empty((5, len(groups) - 1))
        for pair in range(part * _TOGETHER, min((part + 1) * _TOGETHER, len(i))):
            sums[:] = 0.0
            x, y = slice(x_starts[i[pair]], x_starts[i[pair] + 1]), slice(y_starts[j[pair]], y_starts[j[pair] + 1])
            _add_sums(x_tokens[x], x_values[x], y_tokens[y], y_values[y], groups, n_tokens, rotation, sums)
            for k in range(len(bounds)):
                first, last = bounds[k]
                _add_influence(sums[:, first:last], sizes[first:last], parts[part, k, : last - first])


@njit()
def _add_sums(x_tokens, x_values, y_tokens, y_values, groups, n_tokens, rotation, sums):
    """Of one pair [5, G]. A rotation puts y's entries from it on first, those before it after them."""
    _add_own(x_tokens, x_values, 0, groups, sums[0], sums[2])
    first = np.searchsorted(y_tokens, rotation)
    for low, high, shift in ((first, len(y_tokens), -rotation), (0, first, n_tokens - rotation)):
        tokens, values = y_tokens[low:high], y_values[low:high]
        _add_own(tokens, values, shift, groups, sums[1], sums[3])
        _add_products(x_tokens, x_values, tokens, values, shift, groups, sums[4])


@njit()
def _add_own(tokens, values, shift, groups, totals, squares):
    """Values of one feature and their squares, each group's in turn held in registers."""
    group = 0
    total, square = totals[0], squares[0]
    for entry in range(len(tokens)):
        place = tokens[entry] + shift
        if groups[group + 1] <= place:
            totals[group], squares[group] = total, square
            while groups[group + 1] <= place:
                group += 1
            total, square = totals[group], squares[group]
        value = np.float64(values[entry])
        total += value
        square += value * value
    totals[group], squares[group] = total, square


@njit()
def _add_products(x_tokens, x_values, y_tokens, y_values, shift, groups, products):
    """Where both are: which of the two entries at hand is passed over is computed rather than branched on, as no branch
    predictor would know."""
    x, y, group = 0, 0, 0
    while x < len(x_tokens) and y < len(y_tokens):
        place_x, place_y = np.int64(x_tokens[x]), y_tokens[y] + shift
        if place_x == place_y:
            while groups[group + 1] <= place_x:
                group += 1
            products[group] += np.float64(x_values[x]) * np.float64(y_values[y])
        x += int(place_x <= place_y)
        y += int(place_y <= place_x)
