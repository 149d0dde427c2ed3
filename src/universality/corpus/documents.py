"""The documents of a study: read from its sources and cleaned of doubles; the main source's are split into train and
evaluation, those of another corpus are a split of its name."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from universality.corpus.settings import EVALUATION, TRAIN, Corpus, DocumentsSettings
from universality.corpus.sources import Document, read_documents
from universality.errors import StudyError
from universality.runtime import log, progress_of_unknown_length
from universality.storage import write_table


class _Row(NamedTuple):
    """One of documents.parquet."""

    id: str
    source: str
    split: str
    characters: int
    text: str


def collect_documents(settings: DocumentsSettings) -> pa.Table:
    """A table (id, source, split, characters, text), in the order of the corpora and of their sources. Of equal texts
    the first is kept, whichever corpus it is of.

    A document's split depends on its corpus, its id and the seed alone, so that a grown corpus keeps its old split.
    Raises StudyError naming the corpus if no document of it, or of a split, is left.
    """
    collected = _Collected(settings)
    for corpus in settings.corpora:
        collected.add(corpus)
    rows = collected.rows
    log.info("%d documents, %d characters", len(rows), sum(row.characters for row in rows))
    return pa.table({name: [getattr(row, name) for row in rows] for name in _Row._fields})


def write_documents(settings: DocumentsSettings, out: Path) -> None:
    write_table(out, collect_documents(settings))


class _Collected:
    """The documents kept so far, and what tells doubles and repeated ids."""

    def __init__(self, settings: DocumentsSettings):
        self.rows: list[_Row] = []
        self._settings = settings
        self._seen: set[bytes] = set()
        self._ids: set[str] = set()

    def add(self, corpus: Corpus) -> None:
        """All that is new in the corpus. Raises StudyError if a split would have no document."""
        before, dropped = len(self.rows), 0
        for document in progress_of_unknown_length(read_documents(corpus.source, corpus.key), "documents"):
            digest = hashlib.sha256(_as_bytes(document)).digest()
            text = document.text
            if len(text) < self._settings.min_characters or digest in self._seen:
                dropped += 1
                continue
            self._seen.add(digest)
            identifier = _unique(document.id, self._ids)
            split = corpus.split or _split_of(identifier, self._settings)
            self.rows.append(_Row(identifier, document.source, split, len(text), text))
        kept = self.rows[before:]
        for split in [corpus.split] if corpus.split else [TRAIN, EVALUATION]:
            if not any(row.split == split for row in kept):
                raise StudyError(
                    f"{corpus.key}: no {split} document: {len(kept)} documents kept, {dropped} dropped as doubles or "
                    f"shorter than min_characters={self._settings.min_characters}; a study needs at least one of each "
                    "split"
                )
        log.info("%s: %d documents; %d dropped", corpus.key, len(kept), dropped)


def _as_bytes(document: Document) -> bytes:
    if not isinstance(document.text, str):
        raise StudyError(f"{document.id}: holds {type(document.text).__name__}, not text")
    try:
        return document.text.encode()
    except UnicodeEncodeError as error:
        raise StudyError(f"{document.id}: character {error.start} is half of a surrogate pair, not text") from None


def _unique(identifier: str, taken: set[str]) -> str:
    """Overloads and conditional definitions share a dotted name: number the later ones."""
    number, unique = 1, identifier
    while unique in taken:
        number += 1
        unique = f"{identifier}#{number}"
    taken.add(unique)
    return unique


def _split_of(identifier: str, settings: DocumentsSettings) -> str:
    digest = hashlib.sha256(f"{settings.split_seed}:{identifier}".encode()).digest()
    uniform = int.from_bytes(digest[:8], "big") / 2**64
    return EVALUATION if uniform < settings.evaluation_fraction else TRAIN
