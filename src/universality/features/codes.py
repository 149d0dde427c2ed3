"""Sparse codes of the held-out tokens of a corpus: what fired, where and how strongly.

A folder: codes.parquet (token, feature, value), sorted by token, then feature; summary.json with n_tokens, d_sae.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import scipy.sparse

from universality.errors import StudyError
from universality.storage import read_json, read_table


class Codes(NamedTuple):
    """`by_token` [T, F], CSR: the codes of one SAE on the tokens of a corpus."""

    by_token: scipy.sparse.csr_array
    summary: dict


def _column(folder: Path, name: str) -> np.ndarray:
    column = read_table(folder / "codes.parquet", [name]).column(name).to_numpy()
    pa.default_memory_pool().release_unused()
    return column


def read_codes(folder: Path) -> Codes:
    """Raises StudyError naming the file if the codes are truncated or do not fit their summary."""
    summary = read_json(folder / "summary.json")
    shape = (summary["n_tokens"], summary["d_sae"])
    # A column at a time, and nothing kept of how it was read: codes are the largest thing that comparisons hold.
    token = _column(folder, "token")
    last_token = token.max(initial=0)
    indptr = np.searchsorted(token, np.arange(shape[0] + 1))
    del token
    feature, value = (_column(folder, name) for name in ("feature", "value"))
    if len(feature) and (last_token >= shape[0] or feature.max() >= shape[1]):
        raise StudyError(f"{folder}: codes.parquet has tokens or features beyond those of summary.json, {shape}")
    return Codes(scipy.sparse.csr_array((value, feature, indptr), shape=shape), summary)
