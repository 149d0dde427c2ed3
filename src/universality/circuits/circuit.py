"""A model on a task, and how what is measured of it becomes the rows of a table; docs/circuits.md describes them."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from universality.circuits.columns import COMMON, ENDS, METRICS
from universality.circuits.effects import whole_runs
from universality.circuits.faithfulness import draws
from universality.circuits.settings import Measuring
from universality.circuits.statistics import interval, p_value, shares_drawn, significant
from universality.circuits.tasks.base import Task
from universality.models.language_model import LanguageModel
from universality.runtime import log
from universality.storage import write_table

FIRST = METRICS.index("logit_diff")
_INTEGERS = ("layer", "head", "offset", "size", "prompts", "tap", "channel", "reads", "reader_layer", "reader_head")
_FLAGS = ("passes", "matters", "above_null", "strongest")
_NAMES = (
    "model", "task", "corruption", "sender", "receiver", "input", "path", "position", "component", "curve", "ways",
    "through", "writer", "reader",
)  # fmt: skip


class Circuit:
    """A model on a task: whole runs, and whether it does the task at all."""

    def __init__(self, model: LanguageModel, name: str, task: Task, settings: Measuring):
        self.model, self.name, self.task, self.settings = model, name, task, settings
        self.drawn = draws(len(task.clean), settings.bootstrap_samples, settings.bootstrap_seed)
        self.shares = shares_drawn(self.drawn)
        self.whole = whole_runs(model, task, settings)
        self.accuracy = float(self.whole["clean"][:, METRICS.index("top1")].mean())
        self.passes = self.accuracy >= settings.min_accuracy
        """Does the model do the task? If not, no circuit is looked for."""
        if not self.passes:
            log.info("%s fails %s: top-1 %.3f is below %g", name, task.name, self.accuracy, settings.min_accuracy)

    @property
    def corruption(self) -> str:
        """The task's default one."""
        return next(iter(self.task.corrupted))

    def gap(self, corruption: str) -> float:
        """By how much the whole corruption changes the logit difference."""
        return float((self.whole[corruption] - self.whole["clean"])[:, FIRST].mean())

    def described(self, values: np.ndarray) -> dict[str, float]:
        """Means over prompts of metrics [S, metrics], each with low and high."""
        mean, low, high = interval(values, self.shares, self.settings.confidence)
        return {
            f"{metric}{end}": float(x[k])
            for k, metric in enumerate(METRICS)
            for end, x in zip(ENDS, (mean, low, high), strict=True)
        }

    def effect(self, corruption: str, values: np.ndarray) -> dict:
        """Of patched minus clean metrics [S, metrics]: means, share of what the whole corruption does, p-value."""
        gap = self.gap(corruption)
        return {
            "corruption": corruption,
            **self.described(values),
            "share": float(values[:, FIRST].mean()) / gap if gap else np.nan,
            "p_value": p_value(values[:, FIRST]),
        }

    def mark(self, rows: list[dict]) -> None:
        """Which of the rows, senders of one kind of path, matter."""
        found = significant(np.array([row["p_value"] for row in rows]), self.settings.false_discovery_rate)
        for row, is_found in zip(rows, found, strict=True):
            row["matters"] = bool(is_found and abs(row["share"]) >= self.settings.min_share)

    def write(self, rows: list[dict], out: Path, columns: tuple[str, ...]) -> None:
        """Every row also says of which model and task it is, whether the model does it, and how many prompts."""
        log.info("%s, %s: %d rows of %s, top-1 %.3f", self.name, self.task.name, len(rows), out.stem, self.accuracy)
        told = (self.name, self.task.name, self.passes, self.accuracy, len(self.task.clean))
        common = dict(zip(COMMON, told, strict=True))
        table = {}
        for name in (*common, *columns):
            values = [row.get(name, common.get(name)) for row in rows]
            table[name] = pa.array(values, _kind(name), from_pandas=True)
        write_table(out, pa.table(table))


def _kind(column: str) -> pa.DataType:
    if column in _INTEGERS:
        return pa.int32()
    return pa.string() if column in _NAMES else pa.bool_() if column in _FLAGS else pa.float64()
