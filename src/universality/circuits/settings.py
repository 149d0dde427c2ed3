"""Settings of the circuits stage."""

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from universality.circuits.columns import COMMON, OFF_BY_ONE, PATHS, TAPS
from universality.circuits.tasks.settings import REPETITIONS, AnyTask
from universality.settings import Fraction, Name, Positive, Seed, Settings

SIMILARITY = "similarity"
"""The folder below results/circuits where tasks' names would stand."""


_TABLES = {"paths": PATHS, "off_by_one": OFF_BY_ONE, "taps": TAPS}


class Measuring(Settings):
    """How many prompts, and what is told of effects on them."""

    task_seed: Seed
    """Draws the prompts of every task."""
    samples: Annotated[int, Field(ge=2)]
    """Prompts a task."""
    batch_size: Positive
    min_accuracy: Annotated[float, Field(ge=0, le=1)]
    """A model that gets fewer of the clean prompts right does not do the task; its circuit is not looked for."""
    null_seed: Seed
    """Draws which other clean prompt a null's values come from."""
    bootstrap_seed: Seed
    bootstrap_samples: Annotated[int, Field(ge=20)]
    confidence: Fraction
    false_discovery_rate: Fraction
    """Over the senders of one kind of path,"""
    min_share: Fraction
    """of which those matter whose effect is at least so much of the whole corruption's."""


class Attributing(Settings):
    steps: Positive
    """1: attribution patching; more: integrated gradients."""
    sizes: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2)]
    """Components of the circuits that are run; those beyond the model's number are left out."""
    edge_sizes: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2)]
    """The same of circuits of edges, a run of which takes the time of many."""
    edge_prompts: Positive
    """Prompts for edges: the task's first."""

    @model_validator(mode="after")
    def _sizes_ascend(self):
        for name in ("sizes", "edge_sizes"):
            sizes = getattr(self, name)
            if any(a >= b for a, b in pairwise(sizes)):
                raise ValueError(f"{name}: {sizes} do not ascend")
        return self


class Published(Settings):
    """Values that someone published of one row of a circuit's table, to stand beside those measured."""

    what: Annotated[str, Field(min_length=1)]
    """In words, for the reader."""
    task: Name
    model: Name
    table: Literal["paths", "off_by_one", "taps"]
    where: Annotated[dict[str, str | int | None], Field(min_length=1)]
    """Column -> value of the row that is meant; null: missing there."""
    values: Annotated[dict[str, float], Field(min_length=1)]
    """Column -> published value."""

    @model_validator(mode="after")
    def _table_has_the_columns(self):
        allowed = (*COMMON, *_TABLES[self.table])
        for column in (*self.where, *self.values):
            if column not in allowed:
                raise ValueError(f"{self.table}.parquet has no column {column!r}; allowed: {', '.join(allowed)}")
        return self


class CircuitsSettings(Settings):
    threads: Positive
    measuring: Measuring
    attribution: Attributing
    tasks: Annotated[dict[Name, AnyTask], Field(min_length=1)]
    published: list[Published]

    @model_validator(mode="after")
    def _names_fit(self):
        if SIMILARITY in self.tasks:
            raise ValueError(f"tasks.{SIMILARITY}: results/circuits has a folder of that name; choose another")
        for number, one in enumerate(self.published):
            if one.task not in self.tasks:
                raise ValueError(f"published[{number}].task: {one.task!r} is not in tasks: {', '.join(self.tasks)}")
            if one.table != "paths" and self.tasks[one.task].kind not in REPETITIONS:
                raise ValueError(f"published[{number}].table: {one.table} is of induction tasks, {one.task} is none")
        return self
