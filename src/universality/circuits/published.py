"""Published values beside those measured here: the same rows of circuits' tables, looked up."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from universality.circuits.columns import ENDS
from universality.circuits.settings import Published
from universality.errors import StudyError
from universality.runtime import log
from universality.storage import read_table, write_table


def write_published(published: Sequence[Published], circuits: Sequence[Path], out: Path) -> None:
    """A row for each value: `what`, `task`, `model`, `column`, `published`, `measured` with `low` and `high`; the
    model's `accuracy` here, and whether it `passes`. `measured` is missing where the tables have no such row, since the
    model fails the task or its strongest receiver is another. Prints the table.

    Raises StudyError if no folder is of an entry's task and model, and where an entry means several rows.
    """
    folders = {(folder.parent.name, folder.name): folder for folder in circuits}
    rows = [row for number, one in enumerate(published) for row in _rows(one, folders, f"circuits.published[{number}]")]
    write_table(out, pa.Table.from_pandas(pd.DataFrame(rows), preserve_index=False))
    _print(rows)


def _rows(one: Published, folders: dict[tuple[str, str], Path], where: str) -> list[dict]:
    if (one.task, one.model) not in folders:
        raise StudyError(f"{where}: no circuit of {one.model} on {one.task} is given")
    table = read_table(folders[one.task, one.model] / f"{one.table}.parquet").to_pandas()
    chosen = table
    for column, wanted in one.where.items():
        chosen = chosen[chosen[column].isna() if wanted is None else chosen[column] == wanted]
    if len(chosen) > 1:
        raise StudyError(f"{where}.where: means {len(chosen)} rows of {one.table}.parquet; it must mean one")
    if chosen.empty:
        log.info("%s: %s: not measured here", where, one.what)
    common = {"what": one.what, "task": one.task, "model": one.model}
    measured = chosen.iloc[0] if len(chosen) else None
    whole = read_table(folders[one.task, one.model] / "paths.parquet", ["accuracy", "passes"]).to_pandas().iloc[0]
    rows = []
    for column, value in one.values.items():
        found = [float("nan") if measured is None else float(measured.get(f"{column}{end}", "nan")) for end in ENDS]
        row = common | {"column": column, "published": value}
        rows.append(row | dict(zip(("measured", "low", "high"), found, strict=True)) | whole.to_dict())
    return rows


def _print(rows: list[dict]) -> None:
    table = Table("what", "model", "value", "published", "measured", "interval", title="Published and measured")
    for row in rows:
        is_measured = row["measured"] == row["measured"]
        ends = f"{row['low']:.4g} to {row['high']:.4g}" if is_measured else ""
        measured = f"{row['measured']:.4g}" if is_measured else "-" if row["passes"] else "fails the task"
        table.add_row(row["what"], row["model"], row["column"], f"{row['published']:g}", measured, ends)
    Console(width=120).print(table)
