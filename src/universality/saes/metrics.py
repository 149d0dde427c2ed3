"""The table of all dictionaries' metrics: a row a dictionary and site. saes.evaluation defines the columns."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from universality.errors import StudyError
from universality.storage import read_json, write_table

FREQUENCY_BINS = np.arange(-6, 0, 0.5)
"""Lower ends of the bins of log10 firing frequency, each half a decade wide."""


def _floats(*names: str) -> list[tuple[str, pa.DataType]]:
    return [(name, pa.float64()) for name in names]


def _interval(name: str) -> list[tuple[str, pa.DataType]]:
    return _floats(name, f"{name}_low", f"{name}_high")


SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("model", "site", "variant")),
        ("seed", pa.int64()),
        ("layer", pa.int32()),
        ("kind", pa.string()),
        *((name, pa.int64()) for name in ("d_sae", "live", "tokens", "predictions")),
        *_interval("L0"),
        *_interval("explained_variance"),
        *_floats("mse", "dead", "dense", "shrinkage", "norm_ratio"),
        *_floats("ce_clean", "ce_spliced", "ce_zero", "ce_mean"),
        *_interval("loss_recovered"),
        *_floats("loss_recovered_from_mean"),
        *_interval("kl"),
        *((name, pa.int64()) for name in ("shared", "exclusive")),
        ("frequency_bins", pa.list_(pa.float64())),
        ("frequency_counts", pa.list_(pa.int64())),
    ]
)


def gather(evaluations: list[Path], out: Path) -> None:
    """Write the rows of all evaluations in one table, by model, variant, seed, layer, site.

    Raises StudyError naming a file that is no evaluation, or whose rows have other columns.
    """
    rows = []
    for path in evaluations:
        found = read_json(path)
        its_rows = found.get("rows") if isinstance(found, dict) else None
        if not its_rows or any(row.keys() != set(SCHEMA.names) for row in its_rows):
            raise StudyError(f"{path}: is no evaluation with the columns {', '.join(SCHEMA.names)}; remake it")
        rows += its_rows
    rows.sort(key=_place)
    write_table(out, pa.Table.from_pylist(rows, schema=SCHEMA))


def _place(row: dict) -> tuple:
    """Sites in no layer, such as embed, come first."""
    return row["model"], row["variant"], row["seed"], -1 if row["layer"] is None else row["layer"], row["site"]


def frequency_counts(frequency: np.ndarray) -> list[int]:
    """How many features are in each of `FREQUENCY_BINS`, by the share of tokens [F] at which each fires; dead ones are
    in none, rarer ones than the first bin begins with in the first."""
    live = frequency[frequency > 0]
    places = np.clip(np.searchsorted(FREQUENCY_BINS, np.log10(live), side="right") - 1, 0, None)
    return np.bincount(places, minlength=len(FREQUENCY_BINS)).tolist()
