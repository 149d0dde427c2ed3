"""Max pairwise Pearson correlation (MPPC; Wang et al. 2024, arXiv 2410.06672): for feature i of A,

    mppc_i = max over all layers and features j of B of  r_ij
    r_ij   = (sum_t x_ti y_tj / T - mean_i mean_j) / (sd_i sd_j)        over the same T tokens

signed, in float64. A feature that never varies is dead: its correlation is undefined, it gets NaN and matches nothing.

`match_sparse` costs one multiplication and addition for each pair of entries at one token. For each feature of A it
walks the tokens where it fires and adds into one row of F_B sums; then the row gives the feature's best partners and is
offered to each feature of B, so that both directions come from one pass. The row covers pairs that never fire together
too: maxima are over all. As tokens come document after document, the row is also looked at after each prefix of them,
and the sums over the second half are the difference of two looks. Beside the codes it holds a row for each thread and
the best partners so far.
"""

from typing import NamedTuple

import numba
import numpy as np

from universality.alignment.layers import Moments, SparseLayer
from universality.alignment.token_order import TokenOrder
from universality.alignment.top import Found
from universality.kernels.compiled import njit
from universality.kernels.prefetch import prefetch, prefetch_once

_AHEAD = 1  # tokens of a feature whose entries are asked for before they are used,
_FAR = 8  # and where these begin, without which they cannot be asked for in time
_ROWS = 4  # rows that are looked at together, while what belongs to a block of columns is in the nearest cache
_BLOCK = 64  # sums looked at together: a block without a new best is passed over by vector instructions


class Drawn(NamedTuple):
    """Features of each side that the null is computed for, and the rotations [K] of the other side."""

    a: np.ndarray
    b: np.ndarray
    rotations: np.ndarray


def match_sparse(
    a: SparseLayer, b: SparseLayer, order: TokenOrder, m: int, drawn: Drawn, workers: int | None = None
) -> tuple[Found, Found]:
    """The `m` best partners in b of each feature of a, and in a of each of b. Any number of workers (by default one a
    thread) gives the same bytes."""
    n_prefixes, workers = len(order.cuts) - 1, workers or numba.get_num_threads()
    rows = _nothing((a.n_features,), m, n_prefixes)
    columns = _nothing((workers, _whole_blocks(b.n_features)), m, n_prefixes)
    sizes = np.diff(order.segments(), axis=1)
    (scale_a, offset_a), scales_b = scales(a.moments), [_padded(x) for x in scales(b.moments)]
    scales_a = scale_a / sizes, offset_a
    _match(
        a.feature_starts, a.tokens, a.feature_values, *scales_a, b.token_starts, b.features, b.token_values, *scales_b,
        order.cuts, order.half, *rows, *columns,
    )  # fmt: skip
    nulls = [null_sparse(x, y, order, chosen, drawn.rotations) for x, y, chosen in ((a, b, drawn.a), (b, a, drawn.b))]
    return _found(*rows, *nulls[0]), _found(*_over_workers(b.n_features, order.half, *columns), *nulls[1])


def _whole_blocks(n: int) -> int:
    return -(-n // _BLOCK) * _BLOCK


def _padded(x: np.ndarray) -> np.ndarray:
    """To whole blocks of features, with NaN, which is never larger than anything."""
    return np.pad(x, ((0, 0), (0, _whole_blocks(x.shape[1]) - x.shape[1])), constant_values=np.nan)


def scales(moments: Moments) -> tuple[np.ndarray, np.ndarray]:
    """(1 / sd, mean / sd) [S, F]: r = scale_i scale_j sum / n - offset_i offset_j. NaN for a dead feature."""
    return 1 / moments.sd, moments.mean / moments.sd


def null_sparse(x: SparseLayer, y: SparseLayer, order: TokenOrder, chosen: np.ndarray, rotations: np.ndarray):
    """(r, partner) [K, len(chosen)]: the best partners in y of features `chosen` of x, the tokens of y rotated."""
    r = np.full((len(rotations), len(chosen)), -np.inf)
    partner = np.full(r.shape, -1, dtype=np.int32)
    whole = len(order.cuts) - 1
    scale_x, scale_y = scales(x.moments), [_padded(s) for s in scales(y.moments)]
    for k, rotation in enumerate(rotations):
        _match_rotated(
            chosen, x.feature_starts, x.tokens, x.feature_values, scale_x[0][whole] / x.n_tokens, scale_x[1][whole],
            y.token_starts, y.features, y.token_values, scale_y[0][whole], scale_y[1][whole],
            x.n_tokens, rotation, r[k], partner[k],
        )  # fmt: skip
    return correlation(r), partner


def correlation(r: np.ndarray) -> np.ndarray:
    """NaN where nothing was found; rounding can carry a correlation of 1 beyond it."""
    return np.where(np.isneginf(r), np.nan, np.clip(r, -1, 1))


def _nothing(shape: tuple[int, ...], m: int, n_prefixes: int) -> tuple[np.ndarray, ...]:
    """r, partner, prefix_r, chosen, heldout_r before anything was found."""
    return (
        np.full((*shape, m), -np.inf),
        np.full((*shape, m), -1, dtype=np.int32),
        np.full((*shape[:-1], n_prefixes, shape[-1]), -np.inf),
        np.full(shape, -1, dtype=np.int32),
        np.full(shape, -np.inf),
    )


def _over_workers(n: int, half: int, r, partner, prefix_r, chosen, heldout_r) -> tuple[np.ndarray, ...]:
    """Each worker saw some of the rows; the best of all for each of n columns, ties to the first row."""
    r, partner, prefix_r, chosen, heldout_r = (
        x[..., :n] if x.ndim == 2 or x is prefix_r else x[:, :n] for x in (r, partner, prefix_r, chosen, heldout_r)
    )
    n_workers, _, m = r.shape
    r, partner = (x.transpose(1, 0, 2).reshape(n, n_workers * m) for x in (r, partner))
    best = np.lexsort((partner, -r), axis=1)[:, :m]
    r, partner = (np.take_along_axis(x, best, axis=1) for x in (r, partner))
    winner = np.lexsort((chosen, -prefix_r[:, half]), axis=0)[:1]
    chosen, heldout_r = (np.take_along_axis(x, winner, axis=0)[0] for x in (chosen, heldout_r))
    return r, partner, prefix_r.max(axis=0), chosen, heldout_r


def _found(r, partner, prefix_r, chosen, heldout_r, null_r, null_partner) -> Found:
    return Found(correlation(r), partner, correlation(prefix_r), chosen, correlation(heldout_r), null_r, null_partner)


@njit()
def _add_entries(sums, entry, stop, cut, tokens, values, b_starts, b_features, b_values, n_tokens, rotation):
    """Add what comes with the feature's entries before place `cut`; returns the first entry that is left.

    Entries of a token are of different features: four sums are read before the first is written, so that no addition
    waits for the one before it. Unsigned indices spare the check for negative ones.
    """
    four, line_f, line_v = np.uint64(4), np.uint64(32), np.uint64(16)
    while entry < stop and tokens[entry] < cut:
        later = tokens[min(entry + _FAR, stop - 1)] + rotation
        prefetch(b_starts, np.uint64(later - n_tokens if later >= n_tokens else later))
        later = tokens[min(entry + _AHEAD, stop - 1)] + rotation
        ahead = np.uint64(later - n_tokens if later >= n_tokens else later)
        o, end = np.uint64(b_starts[ahead]), np.uint64(b_starts[ahead + np.uint64(1)])
        while o < end:
            prefetch_once(b_values, o)
            o += line_v
        o = np.uint64(b_starts[ahead])
        while o < end:
            prefetch_once(b_features, o)
            o += line_f
        now = tokens[entry] + rotation
        token = np.uint64(now - n_tokens if now >= n_tokens else now)
        value = np.float64(values[entry])
        o, end = np.uint64(b_starts[token]), np.uint64(b_starts[token + np.uint64(1)])
        while o + four <= end:
            f0, f1 = np.uint64(b_features[o]), np.uint64(b_features[o + np.uint64(1)])
            f2, f3 = np.uint64(b_features[o + np.uint64(2)]), np.uint64(b_features[o + np.uint64(3)])
            s0, s1 = sums[f0] + value * b_values[o], sums[f1] + value * b_values[o + np.uint64(1)]
            s2, s3 = (
                sums[f2] + value * b_values[o + np.uint64(2)],
                sums[f3] + value * b_values[o + np.uint64(3)],
            )
            sums[f0], sums[f1], sums[f2], sums[f3] = s0, s1, s2, s3
            o += four
        while o < end:
            f0 = np.uint64(b_features[o])
            sums[f0] += value * b_values[o]
            o += np.uint64(1)
        entry += 1
    return entry


@njit(parallel=True, error_model="numpy")
def _match(
    a_starts, a_tokens, a_values, a_scale, a_offset, b_starts, b_features, b_values, b_scale, b_offset, cuts, half,
    row_r, row_partner, row_prefix, row_chosen, row_heldout, col_r, col_partner, col_prefix, col_chosen, col_heldout,
):  # fmt: skip
    n_workers, n_b, _ = col_r.shape
    n_a, last = len(a_starts) - 1, len(cuts) - 1
    n_tokens = cuts[last]
    for w in numba.prange(n_workers):
        sums, at_half = np.empty((_ROWS, n_b)), np.empty((_ROWS, n_b))
        won, n_won = np.empty((_ROWS, n_b), np.int64), np.empty(_ROWS, np.int64)  # columns, at the half
        won_elsewhere = np.empty((_ROWS, n_b), np.int64)
        rows, entries = np.empty(_ROWS, np.int64), np.empty(_ROWS, np.int64)
        worst = np.full(n_b, -np.inf)  # the last of each column's m best
        for first in range(w * _ROWS, n_a, n_workers * _ROWS):
            n_rows = 0
            for i in range(first, min(first + _ROWS, n_a)):
                if not np.isnan(a_scale[last, i]):
                    rows[n_rows], entries[n_rows], n_won[n_rows] = i, a_starts[i], 0
                    sums[n_rows] = 0.0
                    n_rows += 1
            for c in range(last + 1):
                for q in range(n_rows):
                    entries[q] = _add_entries(
                        sums[q], entries[q], a_starts[rows[q] + 1], cuts[c], a_tokens, a_values, b_starts, b_features,
                        b_values, n_tokens, 0,
                    )  # fmt: skip
                scale, offset = a_scale[c], a_offset[c]
                if c == last:
                    _keep_best(sums, rows[:n_rows], scale, offset, b_scale[c], b_offset[c], row_r, row_partner, worst,
                               col_r[w], col_partner[w])  # fmt: skip
                    continue
                best, new = _keep_first(sums, rows[:n_rows], scale, offset, b_scale[c], b_offset[c], row_prefix[c],
                                        col_prefix[w, c], won if c == half else won_elsewhere)  # fmt: skip
                if c == half:
                    for q in range(n_rows):
                        at_half[q] = sums[q]
                        row_chosen[rows[q]], n_won[q] = best[q], new[q]
            for q in range(n_rows):
                i = rows[q]
                scale_i, offset_i = a_scale[last + 1, i], a_offset[last + 1, i]
                sums[q] -= at_half[q]  # those of the second half are left
                if row_chosen[i] >= 0:
                    j = row_chosen[i]
                    row_heldout[i] = scale_i * sums[q, j] * b_scale[last + 1, j] - offset_i * b_offset[last + 1, j]
                for k in range(n_won[q]):
                    j = won[q, k]
                    col_chosen[w, j] = i
                    col_heldout[w, j] = scale_i * sums[q, j] * b_scale[last + 1, j] - offset_i * b_offset[last + 1, j]


@njit(error_model="numpy")
def _keep_first(sums, rows, scale, offset, b_scale, b_offset, row_best, col_best, won):
    """On a prefix: each row's largest correlation into row_best and those columns' for which one is the largest so far.

    Returns (partner [rows] or -1, how many columns are listed in `won` [rows, :]). A column that a later row wins too
    is listed for both; the later one holds.
    """
    best, where = np.full(len(rows), -np.inf), np.full(len(rows), -1)
    n_won = np.zeros(len(rows), np.int64)
    for low in range(0, sums.shape[1], _BLOCK):
        for q in range(len(rows)):
            scale_i, offset_i, best_i, new = scale[rows[q]], offset[rows[q]], best[q], np.int64(0)
            for k in range(_BLOCK):
                u = np.uint64(low) + np.uint64(k)
                r = scale_i * sums[q, u] * b_scale[u] - offset_i * b_offset[u]
                new += np.int64(r > best_i) + np.int64(r > col_best[u])
            if new == 0:
                continue
            for j in range(low, low + _BLOCK):
                r = scale_i * sums[q, j] * b_scale[j] - offset_i * b_offset[j]
                if r > best[q]:
                    best[q], where[q] = r, j
                if r > col_best[j]:
                    col_best[j] = r
                    won[q, n_won[q]] = j
                    n_won[q] += 1
    for q in range(len(rows)):
        row_best[rows[q]] = best[q]
    return where, n_won


@njit(error_model="numpy")
def _keep_best(sums, rows, scale, offset, b_scale, b_offset, row_r, row_partner, worst, col_r, col_partner):
    """On all tokens: put the correlations of rows where they belong among the rows' best and each column's."""
    m = row_r.shape[1]
    for low in range(0, sums.shape[1], _BLOCK):
        for q in range(len(rows)):
            i = rows[q]
            scale_i, offset_i, least, new = scale[i], offset[i], row_r[i, m - 1], np.int64(0)
            for k in range(_BLOCK):
                u = np.uint64(low) + np.uint64(k)
                r = scale_i * sums[q, u] * b_scale[u] - offset_i * b_offset[u]
                new += np.int64(r > least) + np.int64(r > worst[u])
            if new == 0:
                continue
            for j in range(low, low + _BLOCK):
                r = scale_i * sums[q, j] * b_scale[j] - offset_i * b_offset[j]
                if r > row_r[i, m - 1]:
                    _insert(r, j, row_r[i], row_partner[i])
                if r > worst[j]:
                    _insert(r, i, col_r[j], col_partner[j])
                    worst[j] = col_r[j, m - 1]


@njit()
def _insert(r, partner, best_r, best_partner):
    """Into a descending list that drops its last; after its equals."""
    place = len(best_r) - 1
    while place > 0 and best_r[place - 1] < r:
        best_r[place], best_partner[place] = best_r[place - 1], best_partner[place - 1]
        place -= 1
    best_r[place], best_partner[place] = r, partner


@njit(parallel=True, error_model="numpy")
def _match_rotated(
    chosen, x_starts, x_tokens, x_values, x_scale, x_offset, y_starts, y_features, y_values, y_scale, y_offset,
    n_tokens, rotation, best_r, best_partner,
):  # fmt: skip
    for place in numba.prange(len(chosen)):
        i = chosen[place]
        if np.isnan(x_scale[i]):
            continue
        sums, won = np.zeros((1, len(y_scale))), np.empty((1, 0), np.int64)
        row, never = np.zeros(1, np.int64), np.full(len(y_scale), np.inf)  # nothing is kept for the columns
        _add_entries(
            sums[0], x_starts[i], x_starts[i + 1], n_tokens, x_tokens, x_values, y_starts, y_features, y_values,
            n_tokens, rotation,
        )  # fmt: skip
        best = best_r[place : place + 1]
        where, _ = _keep_first(sums, row, x_scale[i : i + 1], x_offset[i : i + 1], y_scale, y_offset, best, never, won)
        best_partner[place] = where[0]
