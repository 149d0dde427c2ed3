"""Fill a shard of the activation store: run a model over a part of the sample and keep the values of its sites."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from universality.activations.settings import CacheSettings
from universality.corpus.tokens import TokenSequences, read_tokens
from universality.errors import StudyError
from universality.models.language_model import LanguageModel
from universality.models.loading import load_model
from universality.runtime import progress
from universality.storage import replacing, sha256, write_json

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def sample_rows(sequences: TokenSequences, split: str, shard: int, settings: CacheSettings) -> np.ndarray:
    """Indices of the shard's sequences. Raises StudyError if the split has fewer sequences than asked for."""
    available = len(sequences.tokens)
    size = settings.shard_sequences
    if (shard + 1) * size > available:
        raise StudyError(
            f"activations.{split}_sequences: shard {shard} would need sequences up to {(shard + 1) * size}, more than "
            f"the {available} that the {split} split has"
        )
    order = np.random.default_rng(settings.sample_seed).permutation(available)
    return order[shard * size : (shard + 1) * size]


def sites_to_cache(model: LanguageModel, split: str, layers: list[int]) -> list[str]:
    """The residual stream after each block; on held-out documents also the neurons, for the neuron baseline."""
    sites = [f"resid_post.{layer}" for layer in layers]
    if split == "evaluation":
        sites += [site for layer in layers for site in model.family.in_layer(model.family.neurons, layer)]
    return sites


def cache_shard(
    model_folder: Path,
    layers: list[int],
    tokens_folder: Path,
    split: str,
    shard: int,
    settings: CacheSettings,
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
