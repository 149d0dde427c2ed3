"""Cached activations: the values of named sites on a sample of sequences, in shards aligned across models.

A shard is a folder: `{site}.safetensors` with `values` [T, ...], one file a site; `tokens.safetensors` with, for
each row, `tokens`, `documents` (a row of documents.parquet) and `positions` [T]; `manifest.json` with the checksum of
every file and the tokenizer's identity. End-of-text tokens are left out; row t is the same token in every model.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file

from universality.activations.settings import ActivationsSettings
from universality.corpus.tokens import TokenSequences, read_tokens
from universality.errors import StudyError
from universality.models.language_model import LanguageModel, load_model
from universality.runtime import progress
from universality.storage import read_json, read_tensors, replacing, sha256, write_json

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TokenRows(NamedTuple):
    """Per cached row [T]: token id, row of documents.parquet, position in its sequence."""

    tokens: np.ndarray
    documents: np.ndarray
    positions: np.ndarray


def sample_rows(sequences: TokenSequences, split: str, shard: int, settings: ActivationsSettings) -> np.ndarray:
    """Indices of the shard's sequences. Raises StudyError if the split has fewer sequences than asked for."""
    wanted = settings.train_sequences if split == "train" else settings.evaluation_sequences
    available = len(sequences.tokens)
    if wanted > available:
        raise StudyError(
            f"activations.{split}_sequences: {wanted} is more than the {available} sequences the {split} split has"
        )
    order = np.random.default_rng(settings.sample_seed).permutation(available)[:wanted]
    return order[shard * settings.shard_sequences : (shard + 1) * settings.shard_sequences]


def sites_to_cache(model: LanguageModel, split: str, layers: list[int]) -> list[str]:
    """The residual stream after each block; on held-out documents also the neurons, for the neuron baseline."""
    sites = [f"resid_post.{layer}" for layer in layers]
    if split == "evaluation":
        sites += [site for layer in layers for site in model.family.neuron_sites(layer)]
    return sites


def cache_shard(
    model_folder: Path,
    layers: list[int],
    tokens_folder: Path,
    split: str,
    shard: int,
    settings: ActivationsSettings,
    out: Path,
) -> None:
    """Run the model over one shard of the sample and write the values of its sites.

    Raises StudyError naming the model if a value is not finite.
    """
    model = load_model(model_folder)
    sequences = read_tokens(tokens_folder, split)
    rows = sample_rows(sequences, split, shard, settings)
    tokens, documents = sequences.tokens[rows], sequences.documents[rows]
    kept = tokens != sequences.end_of_text
    sites = sites_to_cache(model, split, layers)
    values: dict[str, list[torch.Tensor]] = {site: [] for site in sites}
    starts = range(0, len(rows), settings.batch_size)
    for start in progress(starts, f"{model_folder.name} {split} shard {shard}, batches"):
        part = slice(start, start + settings.batch_size)
        with torch.inference_mode():
            captured = model.run(torch.from_numpy(tokens[part].astype(np.int64)), capture=sites).captured
        mask = torch.from_numpy(kept[part])
        for site in sites:
            value = captured[site][mask]
            if not torch.isfinite(value).all():
                raise StudyError(f"{model_folder}: {site} has values that are not finite")
            values[site].append(value.to(_DTYPES[settings.dtype]))
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    with replacing(out) as folder:
        folder.mkdir()
        for site in sites:
            save_file({"values": torch.cat(values[site])}, folder / f"{site}.safetensors")
        described = {"tokens": tokens, "documents": documents, "positions": positions}
        arrays = {name: torch.from_numpy(np.ascontiguousarray(a[kept])) for name, a in described.items()}
        save_file(arrays, folder / "tokens.safetensors")
        files = sorted(p.name for p in folder.iterdir())
        manifest = {
            "checksums": {name: sha256(folder / name) for name in files},
            "tokenizer": sequences.tokenizer,
            "rows": int(kept.sum()),
        }
        write_json(folder / "manifest.json", manifest)


def read_site(shards: list[Path], site: str) -> torch.Tensor:
    """The site's values over all shards [T, ...], float32. Raises StudyError naming a damaged or missing shard."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    parts = []
    for shard in shards:
        manifest, path = _manifest(shard), shard / f"{site}.safetensors"
        if site not in sites_in(shard):
            raise StudyError(f"{shard}: holds no site {site!r}; it holds {', '.join(sites_in(shard))}")
        try:
            values = load_file(path)["values"]
        except (OSError, SafetensorError, KeyError) as error:
            raise StudyError(f"{path}: truncated or damaged: {error}") from None
        if len(values) != manifest["rows"]:
            raise StudyError(f"{path}: has {len(values)} rows where the shard's manifest says {manifest['rows']}")
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
