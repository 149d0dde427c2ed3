"""One SAE's codes beside the held-out text that they are of."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse
from transformers import PreTrainedTokenizerFast

from universality.activations.format import TokenRows
from universality.activations.sample import Sample, read_sample
from universality.analysis.settings import Held
from universality.corpus.tokens import read_tokens
from universality.errors import StudyError
from universality.features.codes import read_codes

_BEFORE, _AFTER = 16, 4  # tokens that are shown around a feature's own


class Marked(NamedTuple):
    """A context as text: `before`, the token's own text, `after`."""

    before: str
    token: str
    after: str

    @property
    def with_marks(self) -> str:
        return f"{self.before}<<{self.token}>>{self.after}"

    @property
    def plain(self) -> str:
        return f"{self.before}{self.token}{self.after}"


@dataclass(frozen=True)
class HeldText:
    """`rows` are those of the `sample`."""

    sample: Sample
    rows: TokenRows
    end_of_text: int

    def sequences(self, rows: np.ndarray) -> np.ndarray:
        """Which sequence of the sample each row is of."""
        return np.searchsorted(np.cumsum(self.sample.kept.sum(axis=1)), rows, side="right")

    def text_before(self, row: int) -> np.ndarray:
        """Tokens from the beginning of the row's text in its sequence up to its own."""
        first = row
        while first > 0 and self.rows.positions[first] - self.rows.positions[first - 1] == 1:
            first -= 1
        return self.rows.tokens[first : row + 1]

    def window(self, row: int) -> range:
        """Rows around this one that are of its text, as many as are shown."""
        last = row + 1
        while last <= min(row + _AFTER, len(self.rows.tokens) - 1):
            if self.rows.positions[last] - self.rows.positions[last - 1] != 1:
                break
            last += 1
        return range(max(row - _BEFORE, row + 1 - len(self.text_before(row))), last)

    def marked(self, row: int, tokenizer: PreTrainedTokenizerFast, at: int | None = None) -> Marked:
        """The window around a row as text, with that row's token marked or, if given, another one's."""
        window, at = self.window(row), row if at is None else at
        parts = (window.start, at), (at, at + 1), (at + 1, window.stop)
        return Marked(*(tokenizer.decode(self.rows.tokens[low:high].tolist()) for low, high in parts))


@dataclass(frozen=True)
class HeldOut(HeldText):
    """`codes` [T, F], by feature, of the rows."""

    codes: scipy.sparse.csc_array


def read_text(tokens: Path, held: Held) -> HeldText:
    sample = read_sample(tokens, held.corpus, held.sequences, held.run.sample_seed)
    return HeldText(sample, sample.rows(), read_tokens(tokens, held.corpus).end_of_text)


def read_held_out(codes: Path, tokens: Path, held: Held) -> HeldOut:
    """Raises StudyError if the codes are not of as many tokens as the sample has."""
    text = read_text(tokens, held)
    by_token = read_codes(codes).by_token
    if by_token.shape[0] != len(text.rows.tokens):
        raise StudyError(
            f"{codes}: codes of {by_token.shape[0]} tokens, but {tokens} has {len(text.rows.tokens)} in "
            f"{held.sequences} sequences of {held.corpus}"
        )
    return HeldOut(text.sample, text.rows, text.end_of_text, scipy.sparse.csc_array(by_token))
