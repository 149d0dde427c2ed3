"""Which token sequences activations are computed on, and which tokens of them are rows of the store."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from universality.activations.format import TokenRows
from universality.corpus.tokens import read_tokens
from universality.errors import StudyError


class Sample(NamedTuple):
    """`tokens`, `documents` [S, L] int32, `kept` [S, L]: all but end-of-text tokens; the tokenizer's identity."""

    tokens: np.ndarray
    documents: np.ndarray
    kept: np.ndarray
    tokenizer: str

    def part(self, sequences: slice | np.ndarray) -> "Sample":
        return Sample(self.tokens[sequences], self.documents[sequences], self.kept[sequences], self.tokenizer)

    @property
    def n_rows(self) -> int:
        return int(self.kept.sum())

    def rows(self) -> TokenRows:
        """The kept tokens of all sequences, one after the other."""
        positions = np.broadcast_to(np.arange(self.tokens.shape[1], dtype=np.int32), self.tokens.shape)
        return TokenRows(self.tokens[self.kept], self.documents[self.kept], positions[self.kept])


def read_sample(tokens_folder: Path, split: str, n_sequences: int, seed: int) -> Sample:
    """The first `n_sequences` of the split in the random order that `seed` draws.

    Raises StudyError if the split has fewer.
    """
    sequences = read_tokens(tokens_folder, split)
    available = len(sequences.tokens)
    if n_sequences > available:
        raise StudyError(
            f"activations.{split}_sequences: {n_sequences} sequences are asked for, more than the {available} that the "
            f"{split} split has"
        )
    order = np.random.default_rng(seed).permutation(available)[:n_sequences]
    tokens = sequences.tokens[order]
    return Sample(tokens, sequences.documents[order], tokens != sequences.end_of_text, sequences.tokenizer)
