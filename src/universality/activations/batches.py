"""Shuffled batches of activations for training, the same whether they come from the store or from a running model."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from contextlib import closing

import torch

from universality.activations.prefetch import prefetch
from universality.activations.shuffle import shuffled_epochs
from universality.activations.statistics import Statistics, statistics
from universality.activations.store import ActivationStore

_STATISTICS_ROWS = 1024  # rows a block of the sequential pass; part of what the sums' last digits depend on
_GATHER_BYTES = 2**26
_INDEX_BYTES = 64  # a row, while a gather is in the making
_WAITING = 1  # groups of rows that wait to be cut into batches
IN_MEMORY = _WAITING + 2  # with the one that is made and the one that is cut


class ActivationBatches(ABC):
    """Rows [n_rows, d_in] of one site of one model, epoch after epoch, each epoch in another random order.

    Every row comes once an epoch. A batch may hold the end of one epoch and the beginning of the next: no rest is left
    out. The sequence of batches depends on (seed, batch_size) alone, a stream's on the size of its buffer too; a step
    depends on nothing before it.
    """

    model: str
    site: str
    d_in: int
    n_rows: int

    def batches(self, batch_size: int, seed: int, start_step: int = 0) -> Generator[torch.Tensor, None, None]:
        """Endless batches [batch_size, d_in], float32, from step `start_step` on.

        The next rows are made by a thread in the background, which ends when the generator is closed; its errors are
        raised here.
        """
        with closing(prefetch(self._groups(seed, start_step * batch_size), _WAITING)) as groups:
            yield from _cut(groups, batch_size)

    @abstractmethod
    def statistics(self) -> Statistics:
        """Of the rows, or of a stretch of them, in a fixed order; each source tells which."""

    @abstractmethod
    def _groups(self, seed: int, first: int) -> Iterator[torch.Tensor]:
        """All rows from position `first` of the sequence on, some at a time [n, d_in], of any float dtype.

        A group may be overwritten once `IN_MEMORY` - 1 others came after it.
        """


class StoredBatches(ActivationBatches):
    """From the store, shuffled whole: each epoch is one permutation of all rows, drawn from (seed, epoch).

    Rows are gathered `gather_bytes` worth at a time, which spans many batches, by sweeps forward over the shards. At
    most three gathers are in memory at a time (one made, one waiting, one cut into batches), beside two batches: with
    the default, 192 MiB and two batches, whatever the size of the store. The gather size does not change the batches.
    """

    def __init__(self, store: ActivationStore, gather_bytes: int = _GATHER_BYTES):
        self.model, self.site, self.d_in, self.n_rows = store.model, store.site, store.d_in, store.n_rows
        self._store = store
        fitting = gather_bytes // (store.row_bytes + _INDEX_BYTES)
        self._gather_rows = max(1, min(fitting, store.n_rows))

    def statistics(self) -> Statistics:
        """Of all rows, in the order of the store."""
        return statistics(self._store.blocks(_STATISTICS_ROWS))

    def _groups(self, seed: int, first: int) -> Iterator[torch.Tensor]:
        buffers = itertools.cycle([self._store.buffer(self._gather_rows) for _ in range(IN_MEMORY)])
        for rows in shuffled_epochs(self.n_rows, seed, first, self._gather_rows):
            yield self._store.gather(rows, next(buffers))


def _cut(groups: Iterator[torch.Tensor], batch_size: int) -> Generator[torch.Tensor, None, None]:
    """Batches [batch_size, d], float32, of rows that come in groups of any size."""
    parts: list[torch.Tensor] = []
    missing = batch_size
    for group in groups:
        start = 0
        while len(group) - start >= missing:
            part = group[start : start + missing]
            # A copy either way: the group's memory is used again.
            batch = torch.cat([*parts, part]).float() if parts else part.to(torch.float32, copy=True)
            start += missing
            parts, missing = [], batch_size
            yield batch
            del batch  # or it would live on while the next is made
        if start < len(group):
            parts.append(group[start:].clone())
            missing -= len(parts[-1])
        del group
