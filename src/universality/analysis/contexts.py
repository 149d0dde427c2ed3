"""Where each feature fires: its top activating contexts and random activating ones, an index into the cached tokens.

A row a context: `feature`, `kind` (`top`, or `quantile`), `group` (0 for top; else which quantile of the feature's
activations, 0 the weakest), `rank`, `row` (of the store), `value`. Top contexts are the strongest of different text:
none whose token and the tokens before it, as many as a window has, stand in the list already, and at most one of a
sequence. Random ones are drawn from the feature's other activations, equally many of each quantile of their values.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np
import scipy.sparse

from universality.activations.format import TokenRows
from universality.analysis.text import preceding
from universality.kernels.compiled import njit

WINDOW = 8
"""Tokens, the feature's own the last, that make two contexts the same text."""


class Contexts(NamedTuple):
    """Columns, sorted by feature, kind, group, rank."""

    feature: np.ndarray
    kind: np.ndarray
    group: np.ndarray
    rank: np.ndarray
    row: np.ndarray
    value: np.ndarray


def find_contexts(
    codes: scipy.sparse.csc_array, rows: TokenRows, n_top: int, n_quantiles: int, n_random: int, seed: int
) -> Contexts:
    """Of all features of codes [T, F]. A feature with fewer activations has as many contexts as there are."""
    hashes = window_hashes(rows)
    sequences = sequence_numbers(rows)
    top = np.full((codes.shape[1], n_top), -1, dtype=np.int64)
    _top_entries(codes.indptr, codes.indices, codes.data, hashes, sequences, top)
    parts = []
    for feature in range(codes.shape[1]):
        low, high = codes.indptr[feature], codes.indptr[feature + 1]
        chosen = top[feature][top[feature] >= 0]
        parts.append((feature, 0, 0, chosen))
        others = np.setdiff1d(np.arange(low, high), chosen, assume_unique=True)
        for group, members in _drawn(others, codes.data, n_quantiles, n_random, [seed, feature]):
            parts.append((feature, 1, group, members))
    sizes = [len(entries) for *_, entries in parts]
    entries = np.concatenate([entries for *_, entries in parts])
    features, kind, groups = (np.repeat([part[k] for part in parts], sizes).astype(np.int32) for k in range(3))
    rank = np.concatenate([np.arange(size) for size in sizes]).astype(np.int32)
    names = np.array(["top", "quantile"])[kind]
    return Contexts(features, names, groups, rank, codes.indices[entries].astype(np.int32), codes.data[entries])


def _drawn(entries: np.ndarray, values: np.ndarray, n_quantiles: int, n: int, seed: Sequence[int]):
    """(quantile, entries) of each quantile that has any, by the entries' values."""
    if not len(entries):
        return
    ordered = entries[np.argsort(values[entries], kind="stable")]
    rng = np.random.default_rng(seed)
    for group, members in enumerate(np.array_split(ordered, n_quantiles)):
        if len(members):
            yield group, np.sort(rng.choice(members, min(n, len(members)), replace=False))


def sequence_numbers(rows: TokenRows) -> np.ndarray:
    """Which sequence each row is of [T]: positions ascend within one."""
    return np.cumsum(np.diff(rows.positions, prepend=rows.positions[:1] + 1) <= 0)


def window_hashes(rows: TokenRows) -> np.ndarray:
    """One number for the text that ends at each row [T], equal for equal text of WINDOW tokens."""
    found = np.zeros(len(rows.tokens), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for n in range(WINDOW):
            found = found * np.uint64(0x9E3779B97F4A7C15) + (preceding(rows, n) + 2).astype(np.uint64)
            found ^= found >> np.uint64(29)
    return found


@njit(parallel=True)
def _top_entries(starts, rows, values, hashes, sequences, top):
    """Fill in each feature's strongest entries, no two of one text or sequence; equal values in the order of rows."""
    n_top = top.shape[1]
    for feature in numba.prange(len(starts) - 1):
        low, high = starts[feature], starts[feature + 1]
        order = np.argsort(-values[low:high], kind="mergesort")
        n_found = 0
        for place in order:
            row = rows[low + place]
            known = False
            for k in range(n_found):
                other = rows[top[feature, k]]
                known |= hashes[other] == hashes[row] or sequences[other] == sequences[row]
            if not known:
                top[feature, n_found] = low + place
                n_found += 1
                if n_found == n_top:
                    break
