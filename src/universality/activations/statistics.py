"""What SAE training needs to know of all rows, in one pass in a fixed order."""

from collections.abc import Iterable
from typing import NamedTuple

import torch


class Statistics(NamedTuple):
    """Of rows [T, d]: their number; their mean [d]; the mean of their norms; the sum over dimensions of the variance
    (population). All in float64."""

    n_rows: int
    mean: torch.Tensor
    mean_norm: float
    variance: float


def statistics(blocks: Iterable[torch.Tensor]) -> Statistics:
    """Over all rows of the blocks [n, ...]; there must be one.

    Blocks are merged by Chan et al.'s update (1983, "Algorithms for computing the sample variance"), which does not
    cancel where the mean is large beside the deviations.
    """
    n_rows, norms, deviations = 0, 0.0, 0.0
    mean = torch.zeros(1, dtype=torch.float64)
    for block in blocks:
        x = block.flatten(1).double()
        n_new = n_rows + len(x)
        block_mean = x.mean(0)
        delta = block_mean - mean
        deviations += float((x - block_mean).square().sum())
        deviations += float(delta.square().sum()) * n_rows * len(x) / n_new
        mean = mean + delta * (len(x) / n_new)
        norms += float(x.norm(dim=1).sum())
        n_rows = n_new
    return Statistics(n_rows, mean, norms / n_rows, deviations / n_rows)
