"""Read the activation store: the values of one site of one model, mapped from shards on disk and checked as they are
read. Row t is the same token at every site and in every model of one tokenizer; end-of-text tokens are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from universality.activations.format import (
    ENCODINGS,
    MANIFEST,
    ROWS,
    VALUES,
    TokenRows,
    check_block,
    map_values,
    read_manifest,
)
from universality.errors import StudyError
from universality.storage import read_tensors, sha256

if TYPE_CHECKING:
    import torch  # only where values are read: comparing codes, which needs rows alone, does without

_SHARED = (
    "model",
    "site",
    "split",
    "sample_seed",
    "tokenizer",
    "products",
    "device",
    "dtype",
)  # the same in all of a store
_GATHERED = 1024  # rows copied at a time, beside those returned


class _Shard:
    """One opened shard; a block of its values is checked when something of it is first read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.values = map_values(folder, self.manifest)
        self._unchecked = np.ones(len(self.manifest.block_crc32), dtype=bool)
        path = folder / ROWS
        if not path.is_file() or sha256(path) != self.manifest.sha256[ROWS]:
            raise StudyError(f"{path}: is missing or not the file that its manifest describes; remake the shard")

    def check(self, blocks: np.ndarray) -> None:
        for block in blocks[self._unchecked[blocks]]:
            check_block(self.folder, self.manifest, self.values, int(block))
            self._unchecked[block] = False


class ActivationStore:
    """The values of one site, [n_rows, *shape], over neighbouring shards; opening reads only what describes them.

    `model`, `site`, `split` are what the shards must be of, where given. Raises StudyError naming the file if a shard
    is missing, truncated, of something else than asked or than its neighbour, or if its rows do not follow the
    neighbour's; later, if a block of values that is read fails its checksum.
    """

    def __init__(
        self, shards: list[Path], *, model: str | None = None, site: str | None = None, split: str | None = None
    ):
        self._shards = [_Shard(folder) for folder in shards]
        if not self._shards:
            raise StudyError("no shard of activations was given")
        asked = {"model": model, "site": site, "split": split}
        for key, value in asked.items():
            found = getattr(self._shards[0].manifest, key)
            if value is not None and found != value:
                raise StudyError(f"{shards[0] / MANIFEST}: is of {key} {found!r}, but {value!r} is asked for")
        for left, right in zip(self._shards, self._shards[1:], strict=False):
            _check_neighbours(left, right)
        first = self._shards[0].manifest
        self.model, self.site, self.split, self.tokenizer = first.model, first.site, first.split, first.tokenizer
        self.shape = tuple(first.shape[1:])
        self.d_in, self.row_bytes = first.width, first.row_bytes
        self._encoding = ENCODINGS[first.dtype]
        self._starts = np.cumsum([0, *(shard.manifest.rows for shard in self._shards)])
        self.n_rows = int(self._starts[-1])

    def gather(self, rows: np.ndarray, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """The values [n, d_in] of `rows` [n], in stored dtype and in the order asked for.

        Whatever that order, the disk is read forward. The result lies in `buffer`, if given; memory that was used
        before costs a fraction of new memory. Beside the result this takes 16 bytes a row.
        """
        import torch

        out = self.buffer(len(rows)) if buffer is None else buffer[: len(rows)]
        bits = out.view(torch.uint16).numpy() if self._encoding.numpy is np.uint16 else out.numpy()
        order = np.argsort(rows, kind="stable")
        bounds = np.searchsorted(rows, self._starts, sorter=order)
        if bounds[0] != 0 or bounds[-1] != len(rows):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of a store of {self.n_rows}")
        for shard, start, left, right in zip(self._shards, self._starts, bounds, bounds[1:], strict=False):
            for begin in range(left, right, _GATHERED):
                places = order[begin : min(begin + _GATHERED, right)]
                local = rows[places] - start
                shard.check(np.unique(local // shard.manifest.block_rows))
                bits[places] = shard.values[local]
        return out

    def buffer(self, rows: int) -> torch.Tensor:
        """Memory for gathering `rows` rows [rows, d_in], in stored dtype."""
        import torch

        return torch.empty(rows, self.d_in, dtype=self._encoding.torch)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` [n, *shape], float32."""
        import torch

        start, stop = max(start, 0), min(stop, self.n_rows)
        out = torch.empty(max(stop - start, 0), self.d_in)
        for shard, first, last in zip(self._shards, self._starts, self._starts[1:], strict=False):
            left, right = max(start, int(first)), min(stop, int(last))
            if left >= right:
                continue
            size = shard.manifest.block_rows
            shard.check(np.arange((left - first) // size, (right - first - 1) // size + 1))
            bits = torch.from_numpy(np.array(shard.values[left - first : right - first]))
            out[left - start : right - start] = bits.view(self._encoding.torch)
        return out.unflatten(1, self.shape)

    def blocks(self, rows: int) -> Iterator[torch.Tensor]:
        """All rows in order, `rows` at a time [<= rows, *shape], float32; where shards meet makes no difference."""
        for start in range(0, self.n_rows, rows):
            yield self.read(start, start + rows)

    @property
    def row_checksums(self) -> list[str]:
        """Of each shard's rows.safetensors; stores of the same tokens have the same."""
        return [shard.manifest.sha256[ROWS] for shard in self._shards]

    @property
    def value_checksums(self) -> list[str]:
        """Of each shard's values."""
        return [shard.manifest.sha256[VALUES] for shard in self._shards]

    def rows(self) -> TokenRows:
        """What is known of the token of every row."""
        parts = [read_tensors(shard.folder / ROWS) for shard in self._shards]
        return TokenRows(*(np.concatenate([p[name] for p in parts]) for name in TokenRows._fields))


def _check_neighbours(left: _Shard, right: _Shard) -> None:
    a, b = left.manifest, right.manifest
    path = right.folder / MANIFEST
    for key in _SHARED:
        if getattr(a, key) != getattr(b, key):
            raise StudyError(
                f"{path}: is of {key} {getattr(b, key)!r}, but {left.folder} is of {getattr(a, key)!r}; "
                "shards of one store share it"
            )
    if a.shape[1:] != b.shape[1:]:
        raise StudyError(f"{path}: has rows of shape {b.shape[1:]}, but {left.folder} of {a.shape[1:]}")
    for what, due, found in (
        ("row", a.first_row + a.rows, b.first_row),
        ("sequence", a.first_sequence + a.sequences, b.first_sequence),
    ):
        if due != found:
            kind = "a gap" if found > due else "an overlap"
            raise StudyError(f"{path}: starts at {what} {found}, but {left.folder} ends before {due}: {kind}")


def stores_by_site(shards: list[Path], *, model: str | None = None, split: str | None = None) -> dict:
    """Shards of several sites: site -> its store, in the order in which the sites first come."""
    folders: dict[str, list[Path]] = {}
    for shard in shards:
        folders.setdefault(read_manifest(shard).site, []).append(shard)
    return {site: ActivationStore(part, model=model, site=site, split=split) for site, part in folders.items()}


def check_aligned(a: list[Path], b: list[Path]) -> None:
    """Raises StudyError naming the first pair of shards that do not hold the same tokens of the same tokenizer."""
    for left, right in zip(a, b, strict=False):
        one, two = read_manifest(left), read_manifest(right)
        if one.tokenizer != two.tokenizer:
            raise StudyError(f"{left} and {right}: different tokenizers, {one.tokenizer} and {two.tokenizer}")
        if one.sha256[ROWS] != two.sha256[ROWS]:
            raise StudyError(f"{left} and {right}: different tokens; make both from the same sample")
    if len(a) != len(b):
        raise StudyError(f"{a[0]} and {b[0]}: stores of {len(a)} and {len(b)} shards; make both from the same sample")
