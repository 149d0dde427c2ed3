"""The tables of one side of a comparison: which features are ablated, how equal the groups are, what they do."""

from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pyarrow as pa

from universality.ablation.effects import ablation_columns
from universality.ablation.groups import balance, choose_groups, feature_statistics
from universality.ablation.settings import AblationJob
from universality.activations.sample import read_sample
from universality.circuits.tasks.base import Task
from universality.circuits.tasks.make import make
from universality.corpus.tokens import read_tokens
from universality.features.codes import read_codes
from universality.models.loading import load_model
from universality.saes.load import load_sae
from universality.storage import read_table, replacing, write_table


class Folders(NamedTuple):
    """Of a model, and by layer of its SAEs and their codes."""

    model: Path
    saes: dict[int, Path]
    codes: dict[int, Path]


def write_ablation(
    job: AblationJob, folders: Folders, comparison: Path, tokens: Path, tokenizer: Path, out: Path
) -> None:
    """groups.parquet, balance.parquet and effects.parquet in a folder; docs/circuits.md describes them.

    Raises StudyError if SAEs, codes and comparison do not fit each other, or no features make a pair.
    """
    saes = {layer: load_sae(folder) for layer, folder in folders.saes.items()}
    statistics = {layer: feature_statistics(read_codes(folder), saes[layer]) for layer, folder in folders.codes.items()}
    table = read_table(comparison / "features.parquet").to_pandas()
    direction = "a_to_b" if job.side == "a" else "b_to_a"
    members = choose_groups(table[table.direction == direction], statistics, job.features)
    sample = read_sample(tokens, job.corpus, job.sequences, job.run.sample_seed)
    columns = ablation_columns(
        folders.model.name,
        load_model(folders.model, job.run.products, job.run.device),
        saes,
        statistics,
        members,
        sample,
        _tasks(job, tokens, tokenizer),
        read_tokens(tokens, job.corpus).end_of_text,
        job.features,
        job.measuring.min_accuracy,
    )
    tables = {"groups": members, "balance": balance(members, job.features.sizes), "effects": pd.DataFrame(columns)}
    with replacing(out) as folder:
        folder.mkdir()
        for name, frame in tables.items():
            write_table(folder / f"{name}.parquet", pa.Table.from_pandas(frame, preserve_index=False))


def _tasks(job: AblationJob, tokens: Path, tokenizer: Path) -> list[Task]:
    """The same prompts as those of the circuits."""
    sequences, measuring = read_tokens(tokens, "evaluation"), job.measuring
    return [
        make(task, measuring.samples, sequences, tokenizer, measuring.task_seed, key=f"circuits.tasks.{name}")._replace(
            name=name
        )
        for name, task in job.tasks.items()
    ]
