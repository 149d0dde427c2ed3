"""Which features are active at which rows, in compressed rows, and the same by feature."""

from functools import cached_property
from typing import NamedTuple

import numpy as np
import scipy.sparse
import torch


class ByFeature(NamedTuple):
    """`starts` [F + 1]: where each feature's entries begin; `rows` [n] of the entries, ascending within a feature;
    `order` [n]: the entry of the pattern that stands there."""

    starts: np.ndarray
    rows: np.ndarray
    order: np.ndarray


class Pattern:
    """Entries of a sparse [B, F] matrix, row by row and in a row by feature: `starts` [B + 1] int64, `features` [n]."""

    def __init__(self, starts: np.ndarray, features: np.ndarray, n_features: int):
        self.starts, self.features, self.n_features = starts, features, n_features

    @property
    def n_rows(self) -> int:
        return len(self.starts) - 1

    def __len__(self) -> int:
        return len(self.features)

    @cached_property
    def index(self) -> torch.Tensor:
        """`features` as a tensor [n] that indexes others."""
        return torch.from_numpy(self.features).long()

    @cached_property
    def by_feature(self) -> ByFeature:
        by_row = scipy.sparse.csr_array((np.arange(len(self)), self.features, self.starts), shape=self.shape)
        by_column = by_row.tocsc()  # a stable counting sort
        return ByFeature(by_column.indptr.astype(np.int64), by_column.indices, by_column.data)

    @property
    def shape(self) -> tuple[int, int]:
        return self.n_rows, self.n_features

    def where(self, kept: np.ndarray) -> "Pattern":
        """The entries that `kept` [n] is true for."""
        before = np.concatenate([[0], np.cumsum(kept)])
        return Pattern(before[self.starts], self.features[kept], self.n_features)

    @classmethod
    def stacked(cls, parts: list["Pattern"]) -> "Pattern":
        """The rows of all parts, one part after the other."""
        if len(parts) == 1:
            return parts[0]
        ends = np.cumsum([0, *(len(part) for part in parts)])
        starts = [part.starts[1:] + end for part, end in zip(parts, ends, strict=False)]
        return cls(np.concatenate([[0], *starts]), np.concatenate([p.features for p in parts]), parts[0].n_features)
