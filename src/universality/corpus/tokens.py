"""Token sequences of a fixed length, with the document that every token came from."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from universality.storage import read_json, read_tensors

NO_DOCUMENT = -1  # marks end-of-text tokens, which belong to no document


class TokenSequences(NamedTuple):
    """`tokens` [S, L] int32; `documents` [S, L] int32, a row of documents.parquet or NO_DOCUMENT."""

    tokens: np.ndarray
    documents: np.ndarray
    tokenizer: str
    vocab_size: int
    end_of_text: int


def read_tokens(folder: Path, split: str) -> TokenSequences:
    meta = read_json(folder / "meta.json")
    tensors = read_tensors(folder / f"{split}.safetensors")
    return TokenSequences(
        tensors["tokens"], tensors["documents"], meta["tokenizer"], meta["vocab_size"], meta["end_of_text"]
    )
