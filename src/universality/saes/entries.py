"""Where the codes of a batch may differ from zero, and the arithmetic there: dense or sparse.

A variant writes its activation and its loss once, in these terms. On `DenseEntries` they are plain torch on [B, F]
arrays, differentiated by autograd: the reference, and the quicker way while much is active. On `SparseEntries` they are
the same numbers at the active entries alone, [n] of them, and the kernels of `saes.sparse`.
"""

from abc import ABC, abstractmethod

import torch

from universality.activations.settings import Products
from universality.saes.sparse.pattern import Pattern
from universality.saes.sparse.products import Decode, OfFeature, RowNorms, Rows


def product(left: torch.Tensor, right: torch.Tensor, products: Products) -> torch.Tensor:
    """left @ right, both rounded to bfloat16 first if `products` says so; the result is of left's dtype."""
    if products == "bfloat16":
        return (left.bfloat16() @ right.bfloat16()).to(left.dtype)
    return left @ right


class Entries(ABC):
    """`pre`: pre-activations [n] or [B, F]; `kept`: 1 where an entry may be active, 0 elsewhere; `n_rows`: B."""

    pre: torch.Tensor
    kept: torch.Tensor | float
    n_rows: int

    @abstractmethod
    def of_feature(self, of_feature: torch.Tensor) -> torch.Tensor:
        """Numbers of the features [F], as they combine with `pre`."""

    @abstractmethod
    def decode(self, values: torch.Tensor, W_dec: torch.Tensor) -> torch.Tensor:
        """Codes with these values times W_dec [F, d]: [B, d]."""

    @abstractmethod
    def part(self, values: torch.Tensor, low: int, high: int) -> tuple["Entries", torch.Tensor]:
        """The entries of features `low` to `high` alone, and their values."""

    @abstractmethod
    def firings(self, values: torch.Tensor) -> torch.Tensor:
        """[F] int64: at how many rows each feature has a positive value."""

    @abstractmethod
    def rows(self, weights: torch.Tensor, features: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """The rows [n, d] of a parameter [F, d], or of its transpose, of different features."""

    @abstractmethod
    def row_norms(self, weights: torch.Tensor) -> torch.Tensor:
        """The Euclidean norms [F] of the rows of a parameter [F, d]."""


class DenseEntries(Entries):
    def __init__(self, pre: torch.Tensor, kept: torch.Tensor | float, products: Products):
        self.pre, self.kept, self.n_rows, self._products = pre, kept, len(pre), products

    def of_feature(self, of_feature):
        return of_feature

    def decode(self, values, W_dec):
        return product(values, W_dec, self._products)

    def part(self, values, low, high):
        chosen = torch.zeros(values.shape[1], dtype=torch.bool)
        chosen[low:high] = True
        return self, values * chosen

    def firings(self, values):
        return (values.detach() > 0).sum(0)

    def rows(self, weights, features, transposed=False):
        return (weights.T if transposed else weights)[features]

    def row_norms(self, weights):
        return weights.norm(dim=1)


class SparseEntries(Entries):
    kept = 1.0

    def __init__(self, pre: torch.Tensor, pattern: Pattern):
        self.pre, self.pattern, self.n_rows = pre, pattern, pattern.n_rows

    def of_feature(self, of_feature):
        return OfFeature.apply(of_feature, self.pattern)

    def decode(self, values, W_dec):
        return Decode.apply(values, W_dec, self.pattern)

    def part(self, values, low, high):
        features = self.pattern.features
        chosen = (features >= low) & (features < high)
        places = torch.from_numpy(chosen)
        return SparseEntries(self.pre[places], self.pattern.where(chosen)), values[places]

    def firings(self, values):
        return torch.bincount(self.pattern.index[values.detach() > 0], minlength=self.pattern.n_features)

    def rows(self, weights, features, transposed=False):
        return Rows.apply(weights, features, transposed)

    def row_norms(self, weights):
        return RowNorms.apply(weights)
