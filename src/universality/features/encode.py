"""Encode cached activations with an SAE, a block of rows at a time; codes are written as they come."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from universality.activations.store import ActivationStore
from universality.errors import StudyError
from universality.features.settings import FeaturesSettings
from universality.runtime import log, progress
from universality.saes.load import load_sae
from universality.storage import replacing, write_json

_SCHEMA = pa.schema([("token", pa.int32()), ("feature", pa.int32()), ("value", pa.float32())])


def encode_store(store: ActivationStore, sae_folder: Path, settings: FeaturesSettings, out: Path) -> None:
    """Write the codes of all rows. Raises StudyError if the SAE does not fit the site."""
    sae = load_sae(sae_folder)
    if store.d_in != sae.d_in:
        raise StudyError(f"{sae_folder}: reads width {sae.d_in}, but {store.site} has width {store.d_in}")
    blocks = progress(
        store.blocks(settings.batch_size), f"{sae_folder} batches", -(-store.n_rows // settings.batch_size)
    )
    start, written = 0, 0
    with replacing(out) as folder:
        folder.mkdir()
        with pq.ParquetWriter(folder / "codes.parquet", _SCHEMA, compression="zstd") as writer:
            for block in blocks:
                pattern, values = sae.encode_sparse(block.flatten(1))
                rows = np.arange(start, start + len(block), dtype=np.int32)
                columns = [np.repeat(rows, np.diff(pattern.starts)), pattern.features, values.numpy()]
                writer.write_table(pa.table(columns, schema=_SCHEMA))
                start, written = start + len(block), written + len(values)
        write_json(folder / "summary.json", {"n_tokens": store.n_rows, "d_sae": sae.d_sae})
    log.info("%s: %d codes of %d tokens", out, written, store.n_rows)
