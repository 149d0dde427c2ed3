"""Shuffled batches of activations for training, the same whether they come from the store or from a running model."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing

import torch

from universality.activations.prefetch import prefetch
from universality.activations.shuffle import shuffled_epochs
from universality.activations.statistics import Statistics, statistics
from universality.activations.store import ActivationStore
from universality.errors import StudyError

_STATISTICS_ROWS = 1024  # rows a block of the sequential pass; part of what the sums' last digits depend on
_GATHER_BYTES = 2**26
_INDEX_BYTES = 64  # a row, while a gather is in the making
_WAITING = 1  # groups of rows that wait to be cut into batches
IN_MEMORY = _WAITING + 2  # with the one that is made and the one that is cut


class ActivationBatches(ABC):
    """Rows [n_rows, d_in], epoch after epoch, each epoch in another random order.

    Every row comes once an epoch. A batch may hold the end of one epoch and the beginning of the next: no rest is left
    out. The sequence of batches depends on (seed, batch_size) alone, a stream's on the size of its buffer too; a step
    depends on nothing before it.
    """

    model: str
    site: str
    d_in: int
    n_rows: int

    @property
    @abstractmethod
    def parts(self) -> list["SiteBatches"]:
        """The sites whose values lie side by side in a row."""

    @abstractmethod
    def batches(self, batch_size: int, seed: int, start_step: int = 0) -> Generator[torch.Tensor, None, None]:
        """Endless batches [batch_size, d_in], float32, from step `start_step` on.

        The next rows are made by a thread in the background, which ends when the generator is closed; its errors are
        raised here.
        """

    @abstractmethod
    def identity(self) -> str:
        """Tells the rows apart from all others; equal for equal rows."""


class SiteBatches(ActivationBatches):
    """The rows of one site of one model."""

    @property
    def parts(self) -> list["SiteBatches"]:
        return [self]

    def batches(self, batch_size: int, seed: int, start_step: int = 0) -> Generator[torch.Tensor, None, None]:
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


class StoredBatches(SiteBatches):
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

    def identity(self) -> str:
        return " ".join(self._store.value_checksums)

    def _groups(self, seed: int, first: int) -> Iterator[torch.Tensor]:
        buffers = itertools.cycle([self._store.buffer(self._gather_rows) for _ in range(IN_MEMORY)])
        for rows in shuffled_epochs(self.n_rows, seed, first, self._gather_rows):
            yield self._store.gather(rows, next(buffers))


class JoinedBatches(ActivationBatches):
    """The rows of several sites side by side: the same tokens of one model, or of models that share a tokenizer.

    Raises StudyError if there are not as many rows of each; what else makes rows the same, such as `check_aligned` for
    stores, is to be checked before.
    """

    def __init__(self, parts: list[SiteBatches]):
        self._parts = parts
        self.model, self.site = (" + ".join(getattr(part, name) for part in parts) for name in ("model", "site"))
        self.d_in, self.n_rows = sum(part.d_in for part in parts), parts[0].n_rows
        for part in parts:
            if part.n_rows != self.n_rows:
                raise StudyError(
                    f"{part.model} {part.site} has {part.n_rows} rows, {parts[0].model} {parts[0].site} {self.n_rows}; "
                    "make both from the same sample"
                )

    @property
    def parts(self) -> list[SiteBatches]:
        return self._parts

    def batches(self, batch_size: int, seed: int, start_step: int = 0) -> Generator[torch.Tensor, None, None]:
        with ExitStack() as stack:
            sources = [stack.enter_context(closing(part.batches(batch_size, seed, start_step))) for part in self._parts]
            while True:
                yield torch.cat([next(source) for source in sources], dim=1)

    def identity(self) -> str:
        return " + ".join(part.identity() for part in self._parts)


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
