"""Write one shard as its values come: only checksums are kept in memory."""

import hashlib
import zlib
from pathlib import Path

import torch

from universality.activations.format import (
    BLOCK_BYTES,
    ENCODINGS,
    FORMAT,
    MANIFEST,
    ROWS,
    VALUES,
    Manifest,
    TokenRows,
    values_header,
)
from universality.activations.settings import DType
from universality.storage import sha256, write_json, write_tensors


class ShardWriter:
    """Fills `folder`, which it makes. `described`: the manifest's fields from model to first_sequence and tokenizer."""

    def __init__(self, folder: Path, described: dict, rows: TokenRows, row_shape: tuple[int, ...], dtype: DType):
        self.folder, self._described, self._rows, self._dtype = folder, described, rows, dtype
        self._shape = [len(rows.tokens), *row_shape]
        folder.mkdir()
        self._file = open(folder / VALUES, "wb", buffering=0)  # noqa: SIM115 - closed by `close`
        header = values_header(dtype, self._shape)
        self._file.write(header)
        self._sha256 = hashlib.sha256(header)
        row_bytes = torch.Size(row_shape).numel() * ENCODINGS[dtype].torch.itemsize
        self._block_rows = max(1, BLOCK_BYTES // row_bytes)
        self._crcs: list[int] = []
        self._header_bytes, self._row_bytes = len(header), row_bytes
        self._left = 0  # bytes that the last block still lacks
        self._block_bytes = self._block_rows * row_bytes

    def write(self, values: torch.Tensor) -> None:
        """Append rows [n, ...] of the shard's dtype."""
        if not values.numel():
            return
        data = memoryview(values.contiguous().view(torch.uint8).numpy()).cast("B")
        self._sha256.update(data)
        written = 0
        while written < len(data):
            written += self._file.write(data[written:])
        while len(data):
            if not self._left:
                self._crcs.append(0)
                self._left = self._block_bytes
            part, data = data[: self._left], data[self._left :]
            self._crcs[-1] = zlib.crc32(part, self._crcs[-1])
            self._left -= len(part)

    def close(self) -> None:
        self._file.close()

    def finish(self) -> None:
        """Write the rows' description and the manifest; all rows must have been written."""
        self.close()
        written, due = (self.folder / VALUES).stat().st_size, self._header_bytes + self._shape[0] * self._row_bytes
        if written != due:
            raise ValueError(f"{self.folder}: {written} bytes were written of {due}")
        write_tensors(self.folder / ROWS, self._rows._asdict())
        manifest = Manifest(
            **self._described,
            format=FORMAT,
            rows=self._shape[0],
            shape=self._shape,
            dtype=self._dtype,
            block_rows=self._block_rows,
            block_crc32=self._crcs,
            sha256={VALUES: self._sha256.hexdigest(), ROWS: sha256(self.folder / ROWS)},
        )
        write_json(self.folder / MANIFEST, manifest.model_dump(mode="json"))
