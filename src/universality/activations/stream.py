"""Batches for training straight from the model, for when the disk is short: the model runs instead of the store.

Each training then pays for a forward pass over all that it is trained on. Sequences come in an order drawn from (seed,
epoch); a buffer is filled with the rows of as many of them as fit, shuffled whole, drawn from (seed, epoch, number of
the buffer), and emptied before it is filled anew.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers

from universality.activations.batches import SiteBatches
from universality.activations.cache import capture, kept_values, row_shape
from universality.activations.format import ENCODINGS
from universality.activations.sample import read_sample
from universality.activations.settings import StreamSettings
from universality.activations.statistics import Statistics, statistics
from universality.models.loading import load_model
from universality.storage import sha256


class StreamedBatches(SiteBatches):
    """The rows that the store of train activations would have, rounded as it would round them.

    Four buffers of `buffer_rows` rows in stored dtype at most are in memory at a time, beside the model.
    Raises StudyError naming the model if it has no such site or a value is not finite.
    """

    def __init__(self, model_folder: Path, tokens_folder: Path, site: str, settings: StreamSettings):
        self.model, self.site = model_folder.name, site
        self._where = str(model_folder)
        files = [path for folder in (model_folder, tokens_folder) for path in sorted(folder.glob("*.*"))]
        made_from = [site, settings.canonical(), transformers.__version__, *(sha256(path) for path in files)]
        self._identity = " ".join(made_from)
        self._model = load_model(model_folder, settings.products, settings.device)
        self.d_in = torch.Size(row_shape(self._model, self._where, site)).numel()
        self._sample = read_sample(tokens_folder, "train", settings.sequences, settings.sample_seed)
        self.n_rows = self._sample.n_rows
        self._batch_size, self._dtype = settings.batch_size, ENCODINGS[settings.dtype].torch
        length = self._sample.tokens.shape[1]
        self._buffer_sequences = max(1, settings.buffer_rows // (length - 1))  # the first token is never a row

    def statistics(self) -> Statistics:
        """Of the first sequences of the sample, as many as fill a buffer; the sample itself is in random order."""
        chosen = np.arange(min(self._buffer_sequences, len(self._sample.tokens)))
        return statistics(values.float() for values in self._values(chosen))

    def identity(self) -> str:
        return self._identity

    def _groups(self, seed: int, first: int) -> Iterator[torch.Tensor]:
        epoch, skipped = divmod(first, self.n_rows)
        while True:
            yield from self._epoch(seed, epoch, skipped)
            epoch, skipped = epoch + 1, 0

    def _epoch(self, seed: int, epoch: int, skipped: int) -> Iterator[torch.Tensor]:
        """One epoch's rows without the first `skipped`; buffers that are skipped whole cost nothing."""
        n_rows = self._sample.kept.sum(axis=1)
        order = np.random.default_rng([seed, epoch, 0]).permutation(len(n_rows))
        for number, start in enumerate(range(0, len(order), self._buffer_sequences), 1):
            chosen = order[start : start + self._buffer_sequences]
            size = int(n_rows[chosen].sum())
            if skipped < size:
                places = torch.from_numpy(np.random.default_rng([seed, epoch, number]).permutation(size))
                yield self._filled(chosen, places)[skipped:]
            skipped = max(0, skipped - size)

    def _filled(self, chosen: np.ndarray, places: torch.Tensor) -> torch.Tensor:
        """The rows of the chosen sequences, row r at `places[r]`."""
        buffer = torch.empty(len(places), self.d_in, dtype=self._dtype)
        start = 0
        for values in self._values(chosen):
            buffer[places[start : start + len(values)]] = values
            start += len(values)
        return buffer

    def _values(self, chosen: np.ndarray) -> Iterator[torch.Tensor]:
        for start in range(0, len(chosen), self._batch_size):
            part = self._sample.part(chosen[start : start + self._batch_size])
            value = capture(self._model, part.tokens, [self.site])[self.site]
            yield kept_values(self._where, self.site, value, part.kept, self._dtype).flatten(1)
