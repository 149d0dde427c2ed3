"""The format of a shard, the unit of the activation store: values of one site of one model on part of a sample.

A shard is a folder:
    values.safetensors   `values` [rows, ...], bf16 or fp32
    rows.safetensors     `tokens`, `documents` (rows of documents.parquet), `positions`, `starts`, `ends` [rows] int32
    manifest.json        what the shard is, where in the store it stands, checksums: SHA-256 of each file, and CRC-32 of
                         each block of rows, so that a reader checks what it reads and no more
"""

import json
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from universality.activations.settings import Device, DType, Products, Split
from universality.errors import StudyError
from universality.settings import Positive, Settings, parse
from universality.storage import read_json

if TYPE_CHECKING:
    import torch  # only where values are tensors: comparing codes, which needs rows alone, does without

FORMAT = 2
VALUES, ROWS, MANIFEST = "values.safetensors", "rows.safetensors", "manifest.json"
BLOCK_BYTES = 2**18  # about what a block of rows takes: small to check for one row of it, few to list
_LONGEST_HEADER = 2**16


class Encoding(NamedTuple):
    """A stored dtype: safetensors' name, the name of torch's dtype, and the numpy dtype that holds its bits."""

    name: str
    torch_name: str
    numpy: type

    @property
    def torch(self) -> "torch.dtype":
        import torch

        return getattr(torch, self.torch_name)


ENCODINGS = {"bf16": Encoding("BF16", "bfloat16", np.uint16), "fp32": Encoding("F32", "float32", np.float32)}


class TokenRows(NamedTuple):
    """Per row [T]: token id, row of documents.parquet, position in its sequence, and the characters text[starts:ends]
    of its document that it is of; a part of a character has the whole of it."""

    tokens: np.ndarray
    documents: np.ndarray
    positions: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


class Manifest(Settings):
    """manifest.json."""

    format: int
    model: str
    site: str
    split: Split
    sample_seed: int
    first_row: int = Field(ge=0)
    """Rows of the store before this shard; `first_sequence` likewise."""
    rows: Positive
    first_sequence: int = Field(ge=0)
    sequences: Positive
    shape: list[int]
    """Of `values`."""
    dtype: DType
    tokenizer: str
    products: Products
    product_error: float = Field(ge=0)
    """What rounding the matrix products changes the model's logits by, as a share of their norm."""
    device: Device
    block_rows: Positive
    block_crc32: list[int]
    sha256: dict[str, str]

    @model_validator(mode="after")
    def _fits_itself(self):
        if self.shape[:1] != [self.rows]:
            raise ValueError(f"shape: {self.shape} does not begin with rows={self.rows}")
        n_blocks = -(-self.rows // self.block_rows)
        if len(self.block_crc32) != n_blocks:
            raise ValueError(f"block_crc32: {len(self.block_crc32)} checksums for {n_blocks} blocks of rows")
        missing = {VALUES, ROWS} - self.sha256.keys()
        if missing:
            raise ValueError(f"sha256: lacks {min(missing)}")
        return self

    @property
    def width(self) -> int:
        """Values a row."""
        return int(np.prod(self.shape[1:], dtype=np.int64))

    @property
    def row_bytes(self) -> int:
        return self.width * np.dtype(ENCODINGS[self.dtype].numpy).itemsize


def read_manifest(shard: Path) -> Manifest:
    """Raises StudyError naming the file if it is missing, damaged or of another version of the format."""
    path = shard / MANIFEST
    raw = read_json(path)
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != FORMAT:
        raise StudyError(f"{path}: is of format {found}, not of format {FORMAT}; remake the shard")
    return parse(Manifest, raw, str(path))


def values_header(dtype: str, shape: list[int]) -> bytes:
    """What comes before the values in values.safetensors: 8 bytes of length and JSON, padded to a multiple of 8."""
    encoding = ENCODINGS[dtype]
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(encoding.numpy).itemsize
    described = {"values": {"dtype": encoding.name, "shape": shape, "data_offsets": [0, size]}}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def map_values(shard: Path, manifest: Manifest) -> np.ndarray:
    """The shard's values [rows, width], mapped, not read; bf16 as uint16.

    Raises StudyError naming the file if its header or size is not what the manifest says.
    """
    path = shard / VALUES
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            offset = 8 + int.from_bytes(file.read(8), "little")
            header: Any = json.loads(file.read(min(offset - 8, _LONGEST_HEADER)))["values"]
            found = (header["dtype"], header["shape"])
            start, end = (offset + where for where in header["data_offsets"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{path}: truncated or damaged: {error}") from None
    encoding = ENCODINGS[manifest.dtype]
    if found != (encoding.name, manifest.shape):
        said = f"{encoding.name} {manifest.shape}"
        raise StudyError(f"{path}: holds {found[0]} {found[1]}, its manifest says {said}; remake the shard")
    due = start + manifest.rows * manifest.row_bytes
    if (size, end) != (due, due):
        raise StudyError(f"{path}: truncated or damaged: it has {size} bytes instead of {due}; remake the shard")
    return np.memmap(path, encoding.numpy, mode="r", offset=start, shape=(manifest.rows, manifest.width))


def check_block(shard: Path, manifest: Manifest, values: np.ndarray, block: int) -> None:
    """Raises StudyError naming the file if a block of the mapped values [rows, width] is not what was written."""
    rows = slice(block * manifest.block_rows, (block + 1) * manifest.block_rows)
    if zlib.crc32(values[rows].data) != manifest.block_crc32[block]:
        stop = min(rows.stop, manifest.rows)
        raise StudyError(f"{shard / VALUES}: damaged: rows {rows.start} to {stop - 1} fail their checksum")
