"""Run a circuit task over all its samples and tabulate mean effects with intervals, a row an effect."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from universality.circuits.metrics import METRICS
from universality.circuits.off_by_one import profile
from universality.circuits.path_patching import Component, PatchingBatch
from universality.circuits.settings import CircuitsSettings
from universality.circuits.tasks.base import Task
from universality.circuits.tasks.induction import CORRUPTIONS, make_task
from universality.corpus.tokens import read_tokens
from universality.errors import StudyError
from universality.models.language_model import LanguageModel
from universality.models.loading import load_model
from universality.runtime import log, progress
from universality.storage import write_table

Row = tuple  # what identifies an effect


def induction_table(model_folder: Path, tokens_folder: Path, settings: CircuitsSettings, out: Path) -> None:
    """Paths of every sender to the logits, and through the strongest sender found, under every corruption."""
    model, task = _prepare(model_folder, tokens_folder, settings)
    effects = _over_batches(model, task, settings, PatchingBatch.to_logits, "paths to the logits")
    receiver = _strongest_receiver(effects)
    effects |= _over_batches(
        model, task, settings, lambda batch: batch.to_receiver(receiver, ()), f"paths to {receiver.name}"
    )
    columns = ("corruption", "sender", "layer", "head", "receiver", "path")
    _write(effects, columns, model_folder.name, settings, out)


def off_by_one_table(model_folder: Path, tokens_folder: Path, settings: CircuitsSettings, out: Path) -> None:
    """The off-by-one profile of every layer. Raises StudyError if the model has no state-space layers."""
    model, task = _prepare(model_folder, tokens_folder, settings)
    if model.family.recurrence is None:
        raise StudyError(
            f"{model_folder}: the off-by-one profile needs state-space layers; {model.family.name} has none"
        )
    effects: dict[Row, list[torch.Tensor]] = defaultdict(list)
    for batch in progress(task.batches(settings.batch_size), "off-by-one batches"):
        with torch.inference_mode():
            for sender, offset, values in profile(model, batch, "replace_B", kinds=["mamba"]):
                effects["replace_B", sender.layer, offset].append(values)
    _write(effects, ("corruption", "layer", "offset"), model_folder.name, settings, out)


def _prepare(model_folder: Path, tokens_folder: Path, settings: CircuitsSettings) -> tuple[LanguageModel, Task]:
    sequences = read_tokens(tokens_folder, "evaluation")
    trained_length = sequences.tokens.shape[1]
    if settings.sequence_length > trained_length:
        raise StudyError(
            f"circuits.sequence_length: {settings.sequence_length} is more than corpus.sequence_length={trained_length}"
        )
    task = make_task(
        settings.samples, settings.sequence_length, sequences.vocab_size, sequences.end_of_text, settings.task_seed
    )
    return load_model(model_folder), task


def _over_batches(
    model: LanguageModel, task: Task, settings: CircuitsSettings, paths: Callable, what: str
) -> dict[Row, list[torch.Tensor]]:
    effects: dict[Row, list[torch.Tensor]] = defaultdict(list)
    work = [(corruption, batch) for corruption in CORRUPTIONS for batch in task.batches(settings.batch_size)]
    for corruption, batch in progress(work, f"{what}, batches"):
        with torch.inference_mode():
            patching = PatchingBatch(model, batch, corruption)
            effects[corruption, None, None, None, None, "clean"].append(patching.clean_metrics)
            for sender, receiver, path, values, *_ in paths(patching):
                name = "logits" if receiver is None else receiver.name
                effects[corruption, sender.name, sender.layer, sender.head, name, path].append(values)
    return effects


def _strongest_receiver(effects: dict[Row, list[torch.Tensor]]) -> Component:
    """The head that moves logit_diff most on the direct path when B is replaced; for Mamba, the convolution input of
    the layer whose state does; for RWKV, the time mix that does.
    """

    def strength(row: Row) -> float:
        return abs(float(torch.cat(effects[row])[:, 0].mean()))

    direct = [row for row in effects if row[0] == "replace_B" and row[5] == "direct"]
    within = [row for row in direct if row[3] is not None or row[1].endswith(" state")]
    _, name, layer, head, _, _ = max(within or [row for row in direct if row[1].endswith(" out")], key=strength)
    if head is not None:
        return Component(f"attn.{layer}.z", head)
    return Component(f"mamba.{layer}.conv_in" if name.endswith(" state") else f"rwkv.{layer}.out")


def _write(
    effects: dict[Row, list[torch.Tensor]], names: tuple, model: str, settings: CircuitsSettings, out: Path
) -> None:
    rng = np.random.default_rng(settings.bootstrap_seed)
    draws = rng.integers(0, settings.samples, size=(settings.bootstrap_samples, settings.samples))
    tail = (1 - settings.confidence) / 2
    columns: dict[str, list] = defaultdict(list)
    for row, parts in effects.items():
        values = torch.cat(parts).double().numpy()
        low, high = np.quantile(values[draws].mean(axis=1), [tail, 1 - tail], axis=0)
        columns["model"].append(model)
        for name, value in zip(names, row, strict=True):
            columns[name].append(value)
        for i, metric in enumerate(METRICS):
            columns[metric].append(values[:, i].mean())
            columns[f"{metric}_low"].append(low[i])
            columns[f"{metric}_high"].append(high[i])
    log.info("%s: %d effects", model, len(columns["model"]))
    # Mamba's senders have no head; the column is of one type all the same, so that tables can be joined.
    integers = {"layer", "head", "offset"}
    arrays = {n: pa.array(values, pa.int32() if n in integers else None) for n, values in columns.items()}
    write_table(out, arrays)
