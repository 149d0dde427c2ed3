"""Which token sequences activations are computed on, and which tokens of them are rows of the store.

Tokenizers cut the same documents into other sequences, of which samples draw some. Of models with different tokenizers,
only text that is in the samples of both can be compared: all of it where the samples are all sequences there are.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from universality.activations.format import TokenRows
from universality.corpus.settings import TRAIN
from universality.corpus.tokens import OF_TOKENS, read_tokens
from universality.errors import StudyError


class Sample(NamedTuple):
    """`tokens`, `documents`, `starts`, `ends` [S, L] int32 as in TokenSequences, `kept` [S, L]: all but end-of-text
    tokens; the tokenizer's identity."""

    tokens: np.ndarray
    documents: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    kept: np.ndarray
    tokenizer: str

    def part(self, sequences: slice | np.ndarray) -> "Sample":
        arrays = {name: array[sequences] for name, array in self._asdict().items() if name != "tokenizer"}
        return self._replace(**arrays)

    @property
    def n_rows(self) -> int:
        return int(self.kept.sum())

    def rows(self) -> TokenRows:
        """The kept tokens of all sequences, one after the other."""
        positions = np.broadcast_to(np.arange(self.tokens.shape[1], dtype=np.int32), self.tokens.shape)
        of_tokens = (self.tokens, self.documents, positions, self.starts, self.ends)
        return TokenRows(*(array[self.kept] for array in of_tokens))


def read_sample(tokens_folder: Path, split: str, n_sequences: int, seed: int) -> Sample:
    """The first `n_sequences` of the split in the random order that `seed` draws.

    Raises StudyError if the split has fewer.
    """
    sequences = read_tokens(tokens_folder, split)
    available = len(sequences.tokens)
    if n_sequences > available:
        key = "train_sequences" if split == TRAIN else "evaluation_sequences"
        raise StudyError(
            f"activations.{key}: {n_sequences} sequences are asked for, more than the {available} that the "
            f"{split} split has"
        )
    order = np.random.default_rng(seed).permutation(available)[:n_sequences]
    drawn = {name: getattr(sequences, name)[order] for name in OF_TOKENS}
    return Sample(**drawn, kept=drawn["tokens"] != sequences.end_of_text, tokenizer=sequences.tokenizer)
