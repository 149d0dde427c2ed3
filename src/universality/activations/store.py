"""Cached activations: the values of named sites on a sample of sequences, in shards aligned across models.

A shard is a folder: `{site}.safetensors` with `values` [T, ...], one file a site; `tokens.safetensors` with, for
each row, `tokens`, `documents` (a row of documents.parquet) and `positions` [T]; `manifest.json` with the checksum of
every file and the tokenizer's identity. End-of-text tokens are left out; row t is the same token in every model.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from universality.errors import StudyError
from universality.storage import read_json, read_tensors, sha256


class TokenRows(NamedTuple):
    """Per cached row [T]: token id, row of documents.parquet, position in its sequence."""

    tokens: np.ndarray
    documents: np.ndarray
    positions: np.ndarray


def read_site(shards: list[Path], site: str) -> torch.Tensor:
    """The site's values over all shards [T, ...], float32. Raises StudyError naming a damaged or missing shard."""
    parts = []
    for shard in shards:
        manifest, path = _manifest(shard), shard / f"{site}.safetensors"
        if site not in sites_in(shard):
            raise StudyError(f"{shard}: holds no site {site!r}; it holds {', '.join(sites_in(shard))}")
        try:
            values = load_file(path)["values"]
        except (OSError, SafetensorError, KeyError) as error:
            raise StudyError(f"{path}: truncated or damaged: {error}") from None
        if sha256(path) != manifest["checksums"][path.name]:
            raise StudyError(f"{path}: is not the file that the shard's manifest describes; remake the shard")
        parts.append(values.float())
    return torch.cat(parts)


def sites_in(shard: Path) -> list[str]:
    """The sites a shard holds, sorted."""
    names = [name.removesuffix(".safetensors") for name in _manifest(shard)["checksums"]]
    return sorted(name for name in names if name != "tokens")


def read_rows(shards: list[Path]) -> TokenRows:
    """Token, document and position of every row over all shards."""
    parts = [read_tensors(shard / "tokens.safetensors") for shard in shards]
    return TokenRows(*(np.concatenate([p[name] for p in parts]) for name in TokenRows._fields))


def check_aligned(a: list[Path], b: list[Path]) -> None:
    """Raises StudyError naming the first pair of shards that do not hold the same tokens of the same tokenizer."""
    for left, right in zip(a, b, strict=True):
        one, two = _manifest(left), _manifest(right)
        if one["tokenizer"] != two["tokenizer"]:
            raise StudyError(f"{left} and {right}: different tokenizers, {one['tokenizer']} and {two['tokenizer']}")
        if one["checksums"]["tokens.safetensors"] != two["checksums"]["tokens.safetensors"]:
            raise StudyError(f"{left} and {right}: different tokens; make both from the same sample")


def _manifest(shard: Path) -> dict:
    return read_json(shard / "manifest.json")
