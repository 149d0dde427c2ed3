"""The plain definition, by numpy on dense float64 arrays."""

import numpy as np


def correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """numpy.corrcoef of columns of x [T, F_A] with columns of y [T, F_B]; NaN where one does not vary."""
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.corrcoef(x.T.astype(np.float64), y.T.astype(np.float64))[: x.shape[1], x.shape[1] :]
    r[np.ptp(x, axis=0) == 0] = np.nan
    r[:, np.ptp(y, axis=0) == 0] = np.nan
    return r


def top(r: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
    """(values, columns) of the m largest in each row, descending, NaN and -1 where there are fewer."""
    filled = np.where(np.isnan(r), -np.inf, r)
    columns = np.argsort(-filled, axis=1, kind="stable")[:, :m]
    values = np.take_along_axis(filled, columns, axis=1)
    return np.where(np.isneginf(values), np.nan, values), np.where(np.isneginf(values), -1, columns)
