"""Token sequences of a fixed length, with the document that every token came from and its place there."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from universality.errors import StudyError
from universality.storage import read_json, read_tensors

NO_DOCUMENT = -1  # marks end-of-text tokens, which belong to no document and stand nowhere in one

OF_TOKENS = ("tokens", "documents", "starts", "ends")
"""What is known of each token, a tensor each."""


class TokenSequences(NamedTuple):
    """`tokens` [S, L] int32; `documents` [S, L] int32, a row of documents.parquet or NO_DOCUMENT.

    `starts`, `ends` [S, L] int32: token t is of the characters text[starts:ends] of its document, NO_DOCUMENT for none.
    A token that is a part of a character, as byte-level tokenizers have them, has the whole of it.
    """

    tokens: np.ndarray
    documents: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    tokenizer: str
    vocab_size: int
    end_of_text: int


def read_tokens(folder: Path, split: str) -> TokenSequences:
    """Raises StudyError naming the file, or the splits that there are."""
    path = folder / f"{split}.safetensors"
    if not path.exists():
        known = ", ".join(sorted(other.stem for other in folder.glob("*.safetensors")))
        raise StudyError(f"{folder}: has no tokens of the split {split!r}; it has {known}")
    tensors = read_tensors(path)
    meta = read_json(folder / "meta.json")
    fields: dict = {name: tensors[name] for name in OF_TOKENS}
    fields |= {name: meta[name] for name in ("tokenizer", "vocab_size", "end_of_text")}
    return TokenSequences(**fields)
