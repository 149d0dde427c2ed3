"""Documents as fixed-length token sequences.

The documents of a split are laid end to end, an end-of-text token after each, and cut every L - 1 tokens; each piece is
led by an end-of-text token, which serves as the beginning-of-sequence token. A short rest at the end is dropped.
"""

from pathlib import Path

import numpy as np

from universality.corpus.documents import EVALUATION, TRAIN
from universality.corpus.tokenizer import identity, load_tokenizer
from universality.corpus.tokens import NO_DOCUMENT
from universality.errors import StudyError
from universality.runtime import log
from universality.storage import read_table, replacing, write_json, write_tensors

_BATCH = 1000


def pack(encoded: list[list[int]], rows: list[int], length: int, end_of_text: int) -> tuple[np.ndarray, np.ndarray]:
    """Lay documents end to end and cut them; returns (tokens [S, L], documents [S, L]) int32."""
    stream = np.concatenate([np.array([*ids, end_of_text], dtype=np.int32) for ids in encoded])
    lengths = [len(ids) for ids in encoded]
    owners = np.full(len(stream), NO_DOCUMENT, dtype=np.int32)
    start = 0
    for row, n in zip(rows, lengths, strict=True):
        owners[start : start + n] = row
        start += n + 1
    n_sequences = len(stream) // (length - 1)
    cut = slice(0, n_sequences * (length - 1))
    tokens = np.full((n_sequences, length), end_of_text, dtype=np.int32)
    documents = np.full((n_sequences, length), NO_DOCUMENT, dtype=np.int32)
    tokens[:, 1:] = stream[cut].reshape(n_sequences, length - 1)
    documents[:, 1:] = owners[cut].reshape(n_sequences, length - 1)
    return tokens, documents


def write_tokens(documents: Path, tokenizer_folder: Path, length: int, out: Path) -> None:
    """Tokenize both splits into the folder `out`. Raises StudyError if a split is shorter than one sequence."""
    tokenizer = load_tokenizer(tokenizer_folder)
    table = read_table(documents, ["split", "text"]).to_pydict()
    end_of_text = tokenizer.eos_token_id
    with replacing(out) as folder:
        folder.mkdir()
        for split in (TRAIN, EVALUATION):
            rows = [row for row, s in enumerate(table["split"]) if s == split]
            encoded: list[list[int]] = []
            for start in range(0, len(rows), _BATCH):
                texts = [table["text"][row] for row in rows[start : start + _BATCH]]
                # A literal "<|endoftext|>" in a text is text, not the control token.
                encoded += tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)[
                    "input_ids"
                ]
            tokens, owners = pack(encoded, rows, length, end_of_text)
            if len(tokens) == 0:
                raise StudyError(
                    f"corpus.sequence_length: {length} is longer than the whole {split} split "
                    f"({sum(map(len, encoded))} tokens); add documents or shorten the sequences"
                )
            log.info("%s: %d sequences of %d tokens", split, *tokens.shape)
            write_tensors(folder / f"{split}.safetensors", {"tokens": tokens, "documents": owners})
        write_json(
            folder / "meta.json",
            {
                "tokenizer": identity(tokenizer),
                "vocab_size": len(tokenizer),
                "sequence_length": length,
                "end_of_text": end_of_text,
            },
        )
