"""Documents as fixed-length token sequences.

The documents of a split are laid end to end, an end-of-text token after each, and cut every L - 1 tokens; each piece is
led by an end-of-text token, which serves as the beginning-of-sequence token. A short rest at the end is dropped.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from universality.corpus.settings import EVALUATION, TRAIN
from universality.corpus.tokenizer import identity, load_tokenizer
from universality.corpus.tokens import NO_DOCUMENT, OF_TOKENS
from universality.errors import StudyError
from universality.runtime import log
from universality.storage import read_table, replacing, write_json, write_tensors

_BATCH = 1000


class Encoded(NamedTuple):
    """A document's tokens, `ids` [n], and where in its text each lies, `offsets` [n, 2]: its first character and the
    one after its last. int32."""

    ids: np.ndarray
    offsets: np.ndarray


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[Encoded]:
    """The texts without any special token. A literal "<|endoftext|>" in a text is text, not the control token."""
    batch = tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    return [
        Encoded(np.array(ids, dtype=np.int32), np.array(offsets, dtype=np.int32).reshape(-1, 2))
        for ids, offsets in zip(batch["input_ids"], batch["offset_mapping"], strict=True)
    ]


def pack(encoded: list[Encoded], rows: list[int], length: int, end_of_text: int) -> dict[str, np.ndarray]:
    """Lay documents, which are these rows of documents.parquet, end to end and cut them; returns what
    TokenSequences has of each token, [S, L] int32."""
    stream = np.concatenate(
        [_laid_out(*document, row, end_of_text) for document, row in zip(encoded, rows, strict=True)]
    )
    n_sequences = len(stream) // (length - 1)
    packed = np.empty((n_sequences, length, stream.shape[1]), dtype=np.int32)
    packed[:, 0] = _separator(end_of_text)
    packed[:, 1:] = stream[: n_sequences * (length - 1)].reshape(packed[:, 1:].shape)
    return {name: np.ascontiguousarray(packed[..., column]) for column, name in enumerate(OF_TOKENS)}


def _laid_out(ids: np.ndarray, offsets: np.ndarray, row: int, end_of_text: int) -> np.ndarray:
    """(token, document, start, end) of each token and of the end-of-text token after them, [n + 1, 4] int32."""
    laid = np.empty((len(ids) + 1, 4), dtype=np.int32)
    laid[:-1, 0] = ids
    laid[:-1, 1] = row
    laid[:-1, 2:] = offsets
    laid[-1] = _separator(end_of_text)
    return laid


def _separator(end_of_text: int) -> tuple[int, ...]:
    return end_of_text, NO_DOCUMENT, NO_DOCUMENT, NO_DOCUMENT


def write_tokens(documents: Path, tokenizer_folder: Path, length: int, out: Path) -> None:
    """Tokenize every split into the folder `out`. Raises StudyError if a split is shorter than one sequence."""
    tokenizer = load_tokenizer(tokenizer_folder)
    # It adds special tokens, which are not wanted here, and of some tokenizers it cuts white space off the offsets.
    tokenizer.backend_tokenizer.post_processor = None
    table = read_table(documents, ["split", "text"]).to_pydict()
    end_of_text = tokenizer.eos_token_id
    with replacing(out) as folder:
        folder.mkdir()
        for split in dict.fromkeys([TRAIN, EVALUATION, *table["split"]]):
            rows = [row for row, s in enumerate(table["split"]) if s == split]
            encoded: list[Encoded] = []
            for start in range(0, len(rows), _BATCH):
                encoded += encode(tokenizer, [table["text"][row] for row in rows[start : start + _BATCH]])
            packed = pack(encoded, rows, length, end_of_text)
            if len(packed["tokens"]) == 0:
                raise StudyError(
                    f"corpus.sequence_length: {length} is longer than the whole {split} split "
                    f"({sum(len(document.ids) for document in encoded)} tokens); add documents or shorten the sequences"
                )
            log.info("%s: %d sequences of %d tokens", split, *packed["tokens"].shape)
            write_tensors(folder / f"{split}.safetensors", packed)
        write_json(
            folder / "meta.json",
            {
                "tokenizer": identity(tokenizer),
                "vocab_size": len(tokenizer),
                "sequence_length": length,
                "end_of_text": end_of_text,
            },
        )
