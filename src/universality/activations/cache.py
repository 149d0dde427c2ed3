"""Fill shards of the activation store: run a model over a part of the sample, keeping the values of all its sites."""

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import torch

from universality.activations.format import ENCODINGS
from universality.activations.sample import Sample, read_sample
from universality.activations.settings import ShardSettings
from universality.activations.writer import ShardWriter
from universality.errors import StudyError
from universality.models.language_model import LanguageModel
from universality.models.loading import load_model
from universality.runtime import progress
from universality.storage import replacing


def capture(model: LanguageModel, tokens: np.ndarray, sites: list[str]) -> dict[str, torch.Tensor]:
    """Values [B, L, ...] of the sites on `tokens` [B, L], without logits."""
    with torch.inference_mode():
        return model.run(torch.from_numpy(tokens.astype(np.int64)), capture=sites, logits=False).captured


def row_shape(model: LanguageModel, where: str, site: str) -> tuple[int, ...]:
    """Shape of the site's value at one token. Raises StudyError naming the model, `where`, if it has no such site."""
    shape = model.sites.get(site)
    if shape is None:
        raise StudyError(f"{where}: has no site {site!r}; it has {', '.join(model.sites)}")
    sizes = tuple(size for size in shape if isinstance(size, int))
    if shape != ("B", "L", *sizes):
        raise StudyError(f"{where}: {site} has shape {shape}, not one value a token, and cannot be cached")
    return sizes


def kept_values(where: str, site: str, value: torch.Tensor, kept: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Rows [n, ...] of `value` [B, L, ...] at kept tokens [B, L], rounded to `dtype`.

    Raises StudyError naming the model, `where`, if a value is not finite.
    """
    rows = value.flatten(0, 1)[torch.from_numpy(np.flatnonzero(kept))].to(dtype).cpu()
    # One sum finds nearly all in one pass; only if it is not finite, which large values can cause too, look at each.
    if not torch.isfinite(rows.sum(dtype=torch.float32)) and not torch.isfinite(rows).all():
        raise StudyError(f"{where}: {site} has values that are not finite")
    return rows


def cache_shard(
    model_folder: Path,
    sites: list[str],
    tokens_folder: Path,
    split: str,
    shard: int,
    settings: ShardSettings,
    out: Path,
) -> None:
    """Run the model once over one shard of the sample; write `out`/{site}/{split}/shard_{shard} for every site.

    Raises StudyError naming the model if it has no such site or a value is not finite.
    """
    size = settings.shard_sequences
    sample = read_sample(tokens_folder, split, (shard + 1) * size, settings.sample_seed)
    model = load_model(model_folder, settings.products, settings.device)
    described = {
        "model": model_folder.name,
        "split": split,
        "sample_seed": settings.sample_seed,
        "first_row": sample.part(slice(0, shard * size)).n_rows,
        "first_sequence": shard * size,
        "sequences": size,
        "tokenizer": sample.tokenizer,
        "products": model.products,
        "product_error": model.product_error,
        "device": settings.device,
    }
    folders = {site: out / site / split / f"shard_{shard}" for site in sites}
    part = sample.part(slice(shard * size, None))
    fill_shards(model, str(model_folder), part, described, settings, folders)


def fill_shards(
    model: LanguageModel,
    where: str,
    sample: Sample,
    described: dict,
    settings: ShardSettings,
    folders: dict[str, Path],
) -> None:
    """Write one shard folder a site, at most two batches of values in memory: one computed, one written meanwhile."""
    sites = list(folders)
    shapes = {site: row_shape(model, where, site) for site in sites}
    dtype, rows = ENCODINGS[settings.dtype].torch, sample.rows()
    if not len(rows.tokens):
        raise StudyError(f"{where} {described['split']}: the sample's sequences hold nothing but end-of-text tokens")
    with ExitStack() as stack, ThreadPoolExecutor(1, "shard-writer") as background:
        writers = {}
        for site, folder in folders.items():
            temporary = stack.enter_context(replacing(folder))
            writer = ShardWriter(temporary, {**described, "site": site}, rows, shapes[site], settings.dtype)
            writers[site] = stack.enter_context(closing(writer))

        def write(captured: dict[str, torch.Tensor], kept: np.ndarray) -> None:
            for site, writer in writers.items():
                writer.write(kept_values(where, site, captured.pop(site), kept, dtype))

        writing: Future | None = None
        starts = range(0, len(sample.tokens), settings.batch_size)
        for start in progress(starts, f"{where} {described['split']} from {described['first_sequence']}, batches"):
            batch = slice(start, start + settings.batch_size)
            captured = capture(model, sample.tokens[batch], sites)
            if writing is not None:
                writing.result()
            writing = background.submit(write, captured, sample.kept[batch])
            del captured
        if writing is not None:
            writing.result()
        for writer in writers.values():
            writer.finish()
