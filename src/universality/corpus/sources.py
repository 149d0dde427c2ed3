"""Where documents come from. Each source is a function from its settings to an iterator of (id, source, text)."""

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from universality.corpus.packages import docstrings, source_code
from universality.corpus.settings import AnySource, Corpus, DocstringsSource, FilesSource, HubSource, SourceCodeSource
from universality.errors import StudyError


class Document(NamedTuple):
    id: str
    source: str
    text: str


_SUFFIXES = (".txt", ".jsonl", ".parquet")


def read_documents(source: AnySource, key: str) -> Iterator[Document]:
    """Every document of the source, in an order that its content decides.

    Raises StudyError naming the file, or the source's `key` in the study.
    """
    if isinstance(source, DocstringsSource | SourceCodeSource):
        harvest = docstrings if isinstance(source, DocstringsSource) else source_code
        for package in source.packages:
            yield from (Document(name, package, text) for name, text in harvest(package, key))
    elif isinstance(source, FilesSource):
        for path in _matching_files(source.paths, key):
            yield from _read_file(path, source.text_field, key)
    else:
        yield from _stream_hub(source)


def local_paths(corpora: list[Corpus]) -> list[str]:
    """The local files that the corpora's sources read, for the workflow to watch."""
    return sorted({path for corpus in corpora for path in _local_paths(corpus.source, corpus.key)})


def _local_paths(source: AnySource, key: str) -> list[str]:
    """None for installed packages and the hub."""
    if isinstance(source, FilesSource):
        return [str(path) for path in _matching_files(source.paths, key)]
    if isinstance(source, HubSource) and Path(source.name).is_dir():
        return sorted(str(path) for path in Path(source.name).rglob("*") if path.is_file())
    return []


def _matching_files(patterns: list[str], key: str) -> list[Path]:
    found: set[Path] = set()
    for pattern in patterns:
        if Path(pattern).is_dir():
            matches = [p for p in Path(pattern).rglob("*") if p.suffix in _SUFFIXES]
        else:
            matches = [Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file()]
        if not matches:
            raise StudyError(f"{key}.paths: {pattern!r} matches no {', '.join(_SUFFIXES)} file")
        for path in matches:
            if path.suffix not in _SUFFIXES:
                raise StudyError(f"{path}: unknown file type {path.suffix!r}; allowed: {', '.join(_SUFFIXES)}")
        found.update(matches)
    return sorted(found)


def _read_file(path: Path, text_field: str, key: str) -> Iterator[Document]:
    reader = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}[path.suffix]
    try:
        for name, text in reader(path, text_field, key):
            yield Document(name, str(path), text)
    except UnicodeDecodeError as error:
        raise StudyError(f"{path}: not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}") from None
    except OSError as error:
        raise StudyError(f"{path}: cannot be read: {error.strerror or error}") from None


def _read_txt(path: Path, text_field: str, key: str):
    yield str(path), path.read_text(encoding="utf8")


def _read_jsonl(path: Path, text_field: str, key: str):
    with open(path, encoding="utf8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise StudyError(f"{path}:{number}: not valid JSON: {error}") from None
            if not isinstance(record, dict) or text_field not in record:
                raise StudyError(f"{path}:{number}: no key {text_field!r} ({key}.text_field)")
            yield f"{path}:{number}", record[text_field]


def _read_parquet(path: Path, text_field: str, key: str):
    try:
        file = pq.ParquetFile(path)
        if text_field not in file.schema_arrow.names:
            allowed = ", ".join(file.schema_arrow.names)
            raise StudyError(f"{path}: no column {text_field!r} ({key}.text_field); it has {allowed}")
        row = 0
        for batch in file.iter_batches(columns=[text_field]):
            for text in batch.column(0).to_pylist():
                yield f"{path}:{row}", text
                row += 1
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise StudyError(f"{path}: not a readable parquet file (truncated or foreign?): {reason}") from None


def _stream_hub(source: HubSource) -> Iterator[Document]:
    import datasets

    name = source.name if source.subset is None else f"{source.name}/{source.subset}"
    try:
        stream = datasets.load_dataset(
            source.name, source.subset, split=source.split, revision=source.revision, streaming=True
        )
        for number, record in enumerate(stream.take(source.max_documents)):
            if source.text_field not in record:
                allowed = ", ".join(record)
                raise StudyError(f"data set {name}: no column {source.text_field!r}; it has {allowed}")
            yield Document(f"{name}:{source.split}:{number}", name, record[source.text_field])
    except StudyError:
        raise
    except Exception as error:  # the library raises many kinds, each with pages of text
        reason = " ".join(str(error).split())[:200]
        raise StudyError(f"data set {name}: cannot be streamed (no network, or no such data set?): {reason}") from None
