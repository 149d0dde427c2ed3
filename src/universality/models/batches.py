"""Training batches: half text, half repeated random segments, from which induction is learned.

A repeated sequence is an end-of-text token, then a segment of random tokens over and over; in some, the copies after
the first are its pairs of tokens in ever new orders. There one token alone tells the next, as where a task asks for
induction; in whole copies all those before it do, and models learn to look for several. Only what the repetition makes
predictable is learned from: all other labels are masked. The batch of a step depends on (seed, step) alone, so that a
training resumed at any step sees what it would have seen.
"""

import numpy as np
import torch

from universality.corpus.tokens import TokenSequences
from universality.models.settings import TrainingSettings

IGNORED = -100  # the label that torch's cross entropy passes over


class Batches:
    def __init__(self, sequences: TokenSequences, settings: TrainingSettings, batch_size: int, seed: int):
        self.sequences, self.settings, self.batch_size, self.seed = sequences, settings, batch_size, seed
        frequency = np.bincount(sequences.tokens.ravel(), minlength=sequences.vocab_size).astype(np.float64)
        frequency[sequences.end_of_text] = 0
        self._cumulative = np.cumsum(frequency / frequency.sum())

    def at(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens, labels) [B, L] int64 of one step; labels[:, t] is the token at t, or IGNORED."""
        rng = np.random.default_rng([self.seed, step])
        size = self.batch_size
        n_repeats = round(size * self.settings.repeat_fraction)
        repeats, labels = self._repeats(n_repeats, rng)
        rows = rng.integers(0, len(self.sequences.tokens), size - n_repeats)
        text = self.sequences.tokens[rows].astype(np.int64)
        tokens = np.concatenate([repeats, text])
        return torch.from_numpy(tokens), torch.from_numpy(np.concatenate([labels, text]))

    def _repeats(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        length, vocab_size = self.sequences.tokens.shape[1], self.sequences.vocab_size
        longest = (length - 1) // 2
        segment = rng.integers(min(self.settings.min_segment, longest), longest + 1, size=(n, 1))
        frequent = np.searchsorted(self._cumulative, rng.random((n, longest)), side="right")
        uniform = random_tokens(rng, (n, longest), vocab_size, self.sequences.end_of_text)
        pool = np.where(rng.random((n, 1)) < self.settings.uniform_fraction, uniform, frequent)
        place = np.arange(length - 1)[None, :]
        source, known = place % segment, place > segment
        for row in np.flatnonzero(rng.random(n) < self.settings.shuffled_fraction):
            source[row], known[row] = _in_pairs(rng, int(segment[row, 0]), length - 1)
        tokens = np.full((n, length), self.sequences.end_of_text, dtype=np.int64)
        tokens[:, 1:] = np.take_along_axis(pool, source, axis=1)
        labels = np.full((n, length), IGNORED, dtype=np.int64)
        labels[:, 1:] = np.where(known, tokens[:, 1:], IGNORED)
        return tokens, labels


def _in_pairs(rng: np.random.Generator, segment: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Where in the segment each of `length` tokens comes from, and whether the token before it tells it: the second of
    each pair. The last token of an odd segment comes once."""
    place, pairs = np.arange(length), segment // 2
    copies = -(-(length - segment) // (2 * pairs))
    orders = rng.permuted(np.tile(np.arange(pairs), (copies, 1)), axis=1)
    later = (2 * orders.reshape(-1, 1) + np.arange(2)).ravel()
    return np.concatenate([place[:segment], later])[:length], (place > segment) & ((place - segment) % 2 == 1)


def random_tokens(rng: np.random.Generator, shape: tuple[int, ...], vocab_size: int, end_of_text: int) -> np.ndarray:
    """Uniform over all tokens but the end-of-text token."""
    drawn = rng.integers(0, vocab_size - 1, size=shape)
    return drawn + (drawn >= end_of_text)
