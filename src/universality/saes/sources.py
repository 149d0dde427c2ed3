"""What dictionaries are trained on: batches from the store or from running models."""

from pathlib import Path
from typing import TypeAlias

from universality.activations.batches import ActivationBatches, JoinedBatches, SiteBatches, StoredBatches
from universality.activations.format import read_manifest
from universality.activations.settings import StreamSettings
from universality.activations.store import ActivationStore, check_aligned
from universality.errors import StudyError

Source: TypeAlias = tuple[str, str]
"""A model's name and one of its sites."""


def open_batches(
    sources: list[str],
    shards: list[Path],
    stream_models: list[Path],
    tokens: Path | None,
    stream: StreamSettings | None,
) -> ActivationBatches:
    """Batches of the sources, "model:site" each, side by side.

    Raises StudyError if the arguments do not fit together or the sources' rows are not the same tokens.
    """
    named = [parse_source(source) for source in sources]
    if shards and not stream_models and tokens is None and stream is None:
        parts = _stored(named, shards)
    elif stream_models and not shards and tokens is not None and stream is not None:
        parts = _streamed(named, stream_models, tokens, stream)
    else:
        raise StudyError(
            "saes train: needs either --activations, or --stream-model, --tokens and settings with the key `stream`"
        )
    return parts[0] if len(parts) == 1 else JoinedBatches(parts)


def parse_source(source: str) -> Source:
    """Of "model:site"."""
    model, colon, site = source.partition(":")
    if not (model and colon and site):
        raise StudyError(f"--source: {source!r} is not MODEL:SITE, such as neox:resid_post.0")
    return model, site


def shards_by_source(sources: list[Source], shards: list[Path]) -> dict[Source, list[Path]]:
    """The shards of each source. Raises StudyError if there are none of one, or some of something else."""
    found: dict[Source, list[Path]] = {source: [] for source in sources}
    for shard in shards:
        manifest = read_manifest(shard)
        if (manifest.model, manifest.site) not in found:
            known = ", ".join(f"{model}:{site}" for model, site in found)
            raise StudyError(f"{shard}: is of {manifest.model}:{manifest.site}, which is no source: {known}")
        found[manifest.model, manifest.site].append(shard)
    for (model, site), its_shards in found.items():
        if not its_shards:
            raise StudyError(f"--activations: no shard of {model}:{site} was given")
    return found


def _stored(sources: list[Source], shards: list[Path]) -> list[SiteBatches]:
    found = shards_by_source(sources, shards)
    for source in sources:
        check_aligned(found[sources[0]], found[source])
    return [
        StoredBatches(ActivationStore(found[model, site], model=model, site=site, split="train"))
        for model, site in sources
    ]


def _streamed(named: list[Source], folders: list[Path], tokens: Path, stream: StreamSettings) -> list[SiteBatches]:
    from universality.activations.stream import StreamedBatches  # with all that runs a model

    by_name = {folder.name: folder for folder in folders}
    missing = [model for model, _ in named if model not in by_name]
    if missing:
        raise StudyError(f"--stream-model: no folder of the model {missing[0]!r} was given")
    return [StreamedBatches(by_name[model], tokens, site, stream) for model, site in named]
