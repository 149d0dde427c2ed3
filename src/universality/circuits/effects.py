"""Every effect that is measured of a model on a task, prompt by prompt: which paths, by the model's family."""

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from universality.circuits.component import Component
from universality.circuits.head_paths import HeadPaths
from universality.circuits.metrics import measure
from universality.circuits.path_patching import SHUFFLED, Effect, PatchingBatch, Place, with_shuffled_clean
from universality.circuits.settings import Measuring
from universality.circuits.ssm_fast import ssm_patching
from universality.circuits.ssm_paths import ANYWHERE, KINDS
from universality.circuits.tasks.base import Task
from universality.models.language_model import LanguageModel
from universality.runtime import progress


class Row(NamedTuple):
    """A path: its receiver (None: the logits), by which of its inputs (None: all), and where the sender is patched
    (None: everywhere)."""

    sender: Component
    receiver: Component | None
    input: str | None
    path: str
    position: str | None


Effects = dict[Row, np.ndarray]
"""Patched minus clean metrics of each prompt [S, metrics]."""


def whole_runs(model: LanguageModel, task: Task, settings: Measuring) -> dict[str, np.ndarray]:
    """Metrics [S, metrics] of the clean prompts, under "clean", and of every corruption's."""
    found: dict[str, list[torch.Tensor]] = defaultdict(list)
    with torch.inference_mode():
        for batch in task.batches(settings.batch_size):
            for name, prompts in {"clean": batch.clean, **batch.corrupted}.items():
                found[name].append(measure(model.run_to_last(prompts).logits, batch))
    return {name: joined(parts) for name, parts in found.items()}


def to_logits(model: LanguageModel, task: Task, corruption: str, settings: Measuring) -> Effects:
    """The direct and total path of every sender to the logits."""
    return _over_batches(model, task, corruption, settings, _to_logits, "paths to the logits")


def to_logits_by_chance(model: LanguageModel, task: Task, settings: Measuring) -> Effects:
    """The same where what is put in comes from another clean prompt."""
    shuffled = with_shuffled_clean(task, settings.null_seed)
    return _over_batches(model, shuffled, SHUFFLED, settings, _to_logits, "paths with other prompts' values")


def through(model: LanguageModel, task: Task, corruption: str, receiver: Component, settings: Measuring) -> Effects:
    """The path of every earlier sender through a receiver."""

    def paths(model: LanguageModel, batch: Task, corruption: str) -> Iterator[Effect]:
        kind = HeadPaths if model.family.parts is not None else PatchingBatch
        return kind(model, batch, corruption).to_receiver(receiver)

    return _over_batches(model, task, corruption, settings, paths, f"paths through {receiver.name}")


def at_places(model: LanguageModel, task: Task, corruption: str, settings: Measuring) -> Effects:
    """The total path to the logits of what is patched at one place: each that the task names, the one after it, and the
    last. Heads and MLPs; of Mamba and Mamba-2 delta, B and C; of other families what each part of a block writes."""
    places = places_of(task)

    def paths(model: LanguageModel, batch: Task, corruption: str) -> Iterator[Effect]:
        if model.family.parts is not None:
            heads = HeadPaths(model, batch, corruption)
            yield from heads.to_logits(positions=places, paths=("total",))
            yield from heads.mlp_to_logits(positions=places, paths=("total",))
        elif model.family.mixers == ("mamba.out",):
            for place in places:
                end = batch.positions | {"last": torch.full_like(batch.answer, batch.clean.shape[1] - 1)}
                patching = ssm_patching(model, batch._replace(positions=end), corruption, place.anchor)
                for effect in patching.to_logits(ANYWHERE, where=place.offset, paths=("total",)):
                    yield effect._replace(position=place.name)
        else:
            yield from PatchingBatch(model, batch, corruption).outputs_to_logits(positions=places, paths=("total",))

    return _over_batches(model, task, corruption, settings, paths, "paths from one place")


def places_of(task: Task) -> list[Place]:
    """Where things happen: each place that the task names and the one after it, if it is in every prompt and has no
    other name, then the last."""
    end = task.clean.shape[1] - 1
    named = {"last": torch.full_like(task.answer, end)} | task.positions
    found = [Place(name) for name, at in task.positions.items() if (at < end).all()]
    for name, at in task.positions.items():
        known = any(torch.equal(at + 1, other) for other in named.values())
        if (at + 1 < end).all() and not known:
            found.append(Place(name, 1))
    return [*found, Place("last")]


def _to_logits(model: LanguageModel, batch: Task, corruption: str) -> Iterator[Effect]:
    if model.family.parts is not None:
        heads = HeadPaths(model, batch, corruption)
        yield from heads.to_logits()
        yield from heads.mlp_to_logits()
    elif model.family.mixers == ("mamba.out",):
        place = next(iter(batch.positions))
        yield from ssm_patching(model, batch, corruption, place).to_logits(KINDS)
        yield from PatchingBatch(model, batch, corruption).outputs_to_logits()
    else:
        plain = PatchingBatch(model, batch, corruption)
        yield from plain.to_logits()
        yield from (e for e in plain.outputs_to_logits() if e.sender not in plain.components)


def _over_batches(model: LanguageModel, task: Task, corruption: str, settings: Measuring, paths, what: str) -> Effects:
    found: dict[Row, list[torch.Tensor]] = defaultdict(list)
    for batch in progress(task.batches(settings.batch_size), f"{task.name}, {corruption}: {what}, batches"):
        with torch.inference_mode():
            for effect in paths(model, batch, corruption):
                row = Row(effect.sender, effect.receiver, effect.input, effect.path, effect.position)
                found[row].append(effect.values)
    return {row: joined(parts) for row, parts in found.items()}


def joined(parts: list[torch.Tensor]) -> np.ndarray:
    return torch.cat(parts).double().cpu().numpy()
