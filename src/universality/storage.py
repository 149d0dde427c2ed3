"""Reading and writing of every file of a study: nothing half-written ever bears its final name.

A writer fills a temporary sibling, flushes it to the disk and renames it; readers turn every way a file can be bad into
one line that names it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import safetensors.numpy

from universality.errors import StudyError

_FULL = 2**16  # bytes left on a disk that counts as full


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a temporary sibling of `path`, a file or a folder the caller makes; rename it to `path` on success.

    Raises StudyError naming `path` when the file system refuses (no space, read-only, not permitted).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)  # what a killed job may have left
        yield temporary
        _flush(temporary)
        if temporary.is_dir():
            _remove(path)
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise StudyError(f"{path}: cannot be written: {_reason(error)}") from error
    except Exception as error:
        # Libraries report a full disk in exceptions of many kinds.
        if not isinstance(error, StudyError) and shutil.disk_usage(path.parent).free < _FULL:
            raise StudyError(f"{path}: cannot be written: No space left on device") from error
        raise
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


def write_json(path: Path | str, value: object) -> None:
    """Write `value` with sorted keys, so that equal values give equal bytes."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf8")


def read_json(path: Path | str) -> dict:
    try:
        return json.loads(Path(path).read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise StudyError(f"{path}: not a readable JSON file: {_reason(error)}") from error


def write_table(path: Path | str, columns: dict[str, object] | pa.Table, rows_together: int | None = None) -> None:
    """Write a parquet file; `columns` maps names to equally long sequences or arrays. Of a table that is sorted, few
    `rows_together` let `read_table` pass the others over."""
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", row_group_size=rows_together)


def read_table(path: Path | str, columns: list[str] | None = None, where: tuple[str, int] | None = None) -> pa.Table:
    """Read a parquet file whole, `columns` of it, or the rows in which a column has a value."""
    filters = [(where[0], "=", where[1])] if where else None
    try:
        return pq.read_table(path, columns=columns, filters=filters, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise StudyError(f"{path}: not a readable parquet file (truncated or foreign?): {_reason(error)}") from error


def write_tensors(path: Path | str, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    with replacing(path) as temporary:
        safetensors.numpy.save_file(tensors, temporary, metadata)


def read_tensors(path: Path | str) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise StudyError(f"{path}: not a readable safetensors file: {_reason(error)}") from error


def sha256(path: Path | str) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def check_writable(folder: Path) -> None:
    """Raises StudyError if `folder` cannot be made or nothing can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StudyError(f"{folder}: not a folder that can be written to: {_reason(error)}") from None
