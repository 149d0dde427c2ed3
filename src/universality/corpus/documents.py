"""The documents of a study: read from the source, cleaned of doubles, split into train and evaluation."""

import hashlib
from pathlib import Path

import pyarrow as pa

from universality.corpus.settings import DocumentsSettings
from universality.corpus.sources import Document, read_documents
from universality.errors import StudyError
from universality.runtime import log, progress_of_unknown_length
from universality.storage import write_table

TRAIN, EVALUATION = "train", "evaluation"


def collect_documents(settings: DocumentsSettings) -> pa.Table:
    """A table (id, source, split, characters, text), in the source's order. Equal texts are kept once, the first.

    A document's split depends on its id and the seed alone, so that a grown corpus keeps its old split.
    """
    rows: dict[str, list] = {name: [] for name in ("id", "source", "split", "characters", "text")}
    seen: set[bytes] = set()
    ids: set[str] = set()
    dropped = 0
    for document in progress_of_unknown_length(read_documents(settings.source), "documents"):
        digest = hashlib.sha256(_as_bytes(document)).digest()
        if len(document.text) < settings.min_characters or digest in seen:
            dropped += 1
            continue
        seen.add(digest)
        identifier = _unique(document.id, ids)
        split = _split_of(identifier, settings)
        for name, value in zip(
            rows, (identifier, document.source, split, len(document.text), document.text), strict=True
        ):
            rows[name].append(value)
    for split in (TRAIN, EVALUATION):
        if split not in rows["split"]:
            raise StudyError(
                f"corpus.documents: no {split} document: {len(rows['id'])} documents kept, {dropped} dropped as doubles"
                f" or shorter than min_characters={settings.min_characters}; a study needs at least one of each split"
            )
    log.info("%d documents, %d characters; %d dropped", len(rows["id"]), sum(rows["characters"]), dropped)
    return pa.table(rows)


def write_documents(settings: DocumentsSettings, out: Path) -> None:
    write_table(out, collect_documents(settings))


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
