"""Correlations of neurons, which are dense and too many for memory: everything is a sum over blocks of tokens."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse

from universality.activations.sites import layer_of
from universality.activations.store import ActivationStore, stores_by_site
from universality.alignment.bootstrap import DocumentSums, centred_sums
from universality.errors import StudyError

_ROWS = 4096  # tokens a block


class Moments(NamedTuple):
    """Of each neuron [F], float64: mean, standard deviation (population; NaN if constant), share of tokens not zero."""

    mean: np.ndarray
    sd: np.ndarray
    frequency: np.ndarray


class Neurons:
    """The neurons of one layer on the evaluation tokens [T, F]: its inner sites side by side."""

    def __init__(self, sites: list[ActivationStore]):
        self._sites = sites
        self.shape = (sites[0].n_rows, sum(site.d_in for site in sites))

    def blocks(self) -> Iterator[np.ndarray]:
        """Values [<= 4096, F], float64."""
        for parts in zip(*(site.blocks(_ROWS) for site in self._sites), strict=True):
            yield np.concatenate([part.flatten(1).numpy() for part in parts], axis=1, dtype=np.float64)

    @cached_property
    def moments(self) -> Moments:
        """In one pass, blocks merged as in activations.statistics."""
        n, mean, deviations, fired = 0, np.zeros(self.shape[1]), np.zeros(self.shape[1]), np.zeros(self.shape[1])
        for block in self.blocks():
            n_new = n + len(block)
            block_mean = block.mean(axis=0)
            delta = block_mean - mean
            deviations += ((block - block_mean) ** 2).sum(axis=0) + delta**2 * (n * len(block) / n_new)
            mean = mean + delta * (len(block) / n_new)
            fired += (block != 0).sum(axis=0)
            n = n_new
        sd = np.sqrt(deviations / n)
        sd[sd <= 1e-12 * np.abs(mean)] = np.nan
        return Moments(mean, sd, fired / n)


def read_neurons(model: str, layers: list[int], shards: list[Path]) -> list[Neurons]:
    """The neurons of each layer, from evaluation shards of all the layers' inner sites."""
    stores = stores_by_site(shards, model=model, split="evaluation")
    for site, store in stores.items():
        if store.row_checksums != next(iter(stores.values())).row_checksums:
            raise StudyError(f"{model}: the shards of {site} hold other tokens than those of {next(iter(stores))}")
    by_layer = [[store for site, store in stores.items() if layer_of(site) == layer] for layer in layers]
    for layer, found in zip(layers, by_layer, strict=True):
        if not found:
            raise StudyError(f"no shard of {model} holds neurons of layer {layer}; given are {', '.join(stores)}")
    return [Neurons(found) for found in by_layer]


def correlations(x: Neurons, y: Neurons) -> np.ndarray:
    """Pearson correlations [F_x, F_y] over the same tokens; NaN where a neuron is constant."""
    total = np.zeros((x.shape[1], y.shape[1]))
    for a, b in zip(x.blocks(), y.blocks(), strict=True):
        total += ((a - x.moments.mean) / x.moments.sd).T @ ((b - y.moments.mean) / y.moments.sd)
    return total / x.shape[0]


def pair_sums(
    index: scipy.sparse.csr_array, x: Neurons, y: Neurons, x_columns: np.ndarray, y_columns: np.ndarray
) -> DocumentSums:
    """Per-document sums of pairs (x_columns[i] of x, y_columns[i] of y); `index` [G, T] tells tokens' documents."""
    by_token = index.tocsc()
    total, start = None, 0
    for a, b in zip(x.blocks(), y.blocks(), strict=True):
        part = by_token[:, start : start + len(a)]
        a = a[:, x_columns] - x.moments.mean[x_columns]
        b = b[:, y_columns] - y.moments.mean[y_columns]
        sums = centred_sums(part, a, b)
        total = sums if total is None else DocumentSums(*(s + t for s, t in zip(total, sums, strict=True)))
        start += len(a)
    assert total is not None
    return total
