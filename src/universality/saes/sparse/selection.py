"""Find the active features in pre-activations [B, F] without sorting them.

Positive floats are ordered as the integers of the same bits are, and only positive pre-activations can be active: the
kernels work on int16 (bfloat16) or int32 (float32) views, of which one vector instruction compares many. What they
select does not depend on the number of threads; of equal values the one of the lowest (row, feature) comes first.

    top_of_rows    the k largest positive of each row (TopK)
    above          all positive ones above a threshold, one for each feature (ReLU, JumpReLU)
    top_of_batch   the k * B largest positive of the batch (BatchTopK)
"""

from collections.abc import Callable, Iterable

import numba
import numpy as np
import torch

from universality.kernels.compiled import njit
from universality.kernels.elementary import FASTMATH
from universality.saes.sparse.pattern import Pattern

_ROWS = 16  # a task
_COLUMNS = 256  # running maxima, or counts, of a row
_COUNTED = 2**22  # features that 16-bit counters in so many columns can count
_SAMPLED = 2**20  # pre-activations from which a batch's threshold is guessed
_MARGINS = (1.5, 6.0, float("inf"))  # candidates of a batch, as multiples of those that are kept

Selected = tuple[Pattern, torch.Tensor]
"""The pattern and the pre-activations [n] of its entries, in their own dtype."""


def top_of_rows(pre: torch.Tensor, k: int) -> Selected:
    """The k largest positive pre-activations of each row of `pre` [B, F]; fewer where fewer are positive."""
    bits = _bits(pre)
    n_rows, n_features = bits.shape
    k = min(k, n_features)
    features, values = np.empty((n_rows, k), np.int32), np.empty((n_rows, k), bits.dtype)
    counts = np.empty(n_rows, np.int64)
    _top_of_rows(bits, k, features, values, counts)
    starts = np.concatenate([[0], np.cumsum(counts)])
    if starts[-1] == n_rows * k:
        return Pattern(starts, features.reshape(-1), n_features), _floats(values.reshape(-1), pre.dtype)
    filled = np.arange(k) < counts[:, None]
    return Pattern(starts, features[filled], n_features), _floats(values[filled], pre.dtype)


def above(pre: torch.Tensor, threshold: torch.Tensor | float = 0.0) -> Selected:
    """All positive pre-activations of `pre` [B, F] above `threshold`, a number or one for each feature [F]."""
    bits = _bits(pre)
    n_rows, n_features = bits.shape
    thresholds = torch.as_tensor(threshold, dtype=torch.float32).clamp_min(0).expand(n_features).contiguous()
    rounded = thresholds.to(pre.dtype)
    # Down, so that what is above the one is above the other; a positive number's neighbour has the next integer's bits.
    low = (_bits(rounded) - (rounded.float() > thresholds).numpy()).astype(bits.dtype)
    counts = np.empty(n_rows, np.int64)
    (_count_above if n_features <= _COUNTED else _count_above_many)(bits, low, counts)
    starts = np.concatenate([[0], np.cumsum(counts)])
    features, values = np.empty(starts[-1], np.int32), np.empty(starts[-1], bits.dtype)
    _fill_above(bits, low, starts, features, values)
    return Pattern(starts, features, n_features), _floats(values, pre.dtype)


def top_of_batch(chunks: Callable[[], Iterable[torch.Tensor]], k: int, n_rows: int) -> Selected:
    """The k * n_rows largest positive pre-activations of all rows together; `chunks` gives the rows, anew at each call.

    A threshold guessed from the first rows leaves somewhat more candidates than that; if it left fewer, it is lowered.
    """
    n = k * n_rows
    parts: list[Selected] = []
    for margin in _MARGINS:
        parts, low = [], 0.0
        for pre in chunks():
            if not parts:
                low = _value_at_rank(pre, margin * k)
            parts.append(above(pre, low))
        if sum(len(values) for _, values in parts) >= n or low == 0:
            break
    pattern, values = Pattern.stacked([part for part, _ in parts]), torch.cat([values for _, values in parts])
    if len(values) <= n:
        return pattern, values
    bits = _bits(values)
    cut = np.partition(bits, len(bits) - n)[len(bits) - n]
    kept = bits > cut
    kept[np.flatnonzero(bits == cut)[: n - int(kept.sum())]] = True
    return pattern.where(kept), values[torch.from_numpy(kept)]


def _bits(values: torch.Tensor) -> np.ndarray:
    """Integers of the same bits, which are in the same order where they are positive."""
    return values.view(torch.int16 if values.dtype == torch.bfloat16 else torch.int32).numpy()


def _floats(bits: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(bits).view(dtype)


def _value_at_rank(pre: torch.Tensor, rank: float) -> float:
    """About the value that `rank` pre-activations of a row exceed on average, from some of the rows; 0 or more."""
    sample = _bits(pre[:: max(1, pre.numel() // _SAMPLED)])
    positive = sample[sample > 0]
    place = len(positive) - 1 - rank * len(sample)
    if place < 0:
        return 0.0
    return float(_floats(np.partition(positive, int(place))[int(place) : int(place) + 1], pre.dtype))


@njit(parallel=True, error_model="numpy")
def _top_of_rows(bits, k, features, values, counts):
    """The k-th largest maximum of columns of a row bounds its k-th largest value from below: few exceed that."""
    n_rows, n_features = bits.shape
    width = min(max(_COLUMNS, 2 * k), n_features)
    whole = n_features // width * width
    for task in numba.prange((n_rows + _ROWS - 1) // _ROWS):
        maxima = np.empty(width, bits.dtype)
        found = np.empty(n_features, np.int32)
        for r in range(task * _ROWS, min(n_rows, (task + 1) * _ROWS)):
            row = bits[r]
            maxima[:] = 0
            for start in range(0, whole, width):
                part = row[start : start + width]
                for c in range(width):
                    maxima[c] = max(maxima[c], part[c])
            for c in range(n_features - whole):
                maxima[c] = max(maxima[c], row[whole + c])
            low = maxima.dtype.type(1)
            if width > k:
                low = max(low, np.partition(maxima, width - k)[width - k])
            n = 0
            for c in range(width):
                if maxima[c] >= low:
                    for i in range(c, n_features, width):
                        if row[i] >= low:
                            found[n] = i
                            n += 1
            chosen = np.sort(found[:n])
            candidates = row[chosen]
            counts[r] = min(n, k)
            cut, ties = low, n
            if n > k:
                cut = np.partition(candidates, n - k)[n - k]
                ties = k - np.sum(candidates > cut)
            m = 0
            for i in range(n):
                if candidates[i] > cut or (candidates[i] == cut and ties > 0):
                    ties -= candidates[i] == cut
                    features[r, m], values[r, m] = chosen[i], candidates[i]
                    m += 1


@njit(parallel=True, error_model="numpy")
def _count_above(bits, low, counts):
    n_rows, n_features = bits.shape
    width = min(_COLUMNS, n_features)
    whole = n_features // width * width
    for task in numba.prange((n_rows + _ROWS - 1) // _ROWS):
        columns = np.empty(width, np.int16)
        for r in range(task * _ROWS, min(n_rows, (task + 1) * _ROWS)):
            row = bits[r]
            columns[:] = 0
            for start in range(0, whole, width):
                part, least = row[start : start + width], low[start : start + width]
                for c in range(width):
                    columns[c] += np.int16(part[c] > least[c])
            counts[r] = np.sum(columns) + np.sum(row[whole:] > low[whole:])


@njit(parallel=True, error_model="numpy")
def _count_above_many(bits, low, counts):
    for r in numba.prange(len(bits)):
        counts[r] = np.sum(bits[r] > low)


@njit(parallel=True, fastmath=FASTMATH, error_model="numpy")
def _fill_above(bits, low, starts, features, values):
    n_rows, n_features = bits.shape
    for task in numba.prange((n_rows + _ROWS - 1) // _ROWS):
        found = np.empty(n_features + 1, np.int32)
        for r in range(task * _ROWS, min(n_rows, (task + 1) * _ROWS)):
            row, n = bits[r], 0
            for i in range(n_features):  # no branch: most guesses at one would be wrong
                found[n] = i
                n += row[i] > low[i]
            for i in range(n):
                features[starts[r] + i], values[starts[r] + i] = found[i], row[found[i]]
