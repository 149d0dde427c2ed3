"""The induction circuit of any model as a small graph, found by path patching, and how alike two such graphs are.

Roles, of components whose effect is at least `min_share` of the whole one and significant:

    inducer   brings the answer to the last position: a head, a state, RWKV's time mix. Its effect there is measured
              under replace_B, and must be there under replace_A too: what copies B wherever it stands is no inducer.
              What a component has only from inducers below it is subtracted; what is left is its own
    mover     tells an inducer which token came before: the sender whose path through the inducer's inputs has an effect
              under replace_A. A state-space layer or RWKV's time mix may be its own, by convolution or token shift
    output    hands on what inducers below it have brought: MLPs, mixers, and heads at the last position, by the effect
              under replace_B of what they make of it

Shares are mean effect / mean(corrupted - clean) on logit_diff, 1 for all of it; what works against the answer has a
negative share and no role. A mover's share is summed over inducers. Shares do not add up to 1 across roles, since an
effect goes through several, nor within one where there are redundant components.

Tests are one-sided t-tests over prompts, corrected by Benjamini-Hochberg over all that is compared at one step (every
component, or every path). Intervals resample prompts, effect and whole together; the selection is not resampled, so
that the share of what just passed is a little too high.

Edges: mover -> inducer by each input, inducer -> output and inducer -> logits along the stream alone, every other mixer
and MLP frozen (induction_paths.py). inducer -> output goes on from there with everything recomputed.
"""

from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from universality.circuits.component import Component
from universality.circuits.faithfulness import draws, interval
from universality.circuits.induction_paths import (
    Way,
    carried,
    inherited,
    inputs_of,
    is_below,
    moved,
    onwards,
    over_batches,
    ways_into,
    whole_runs,
    written_at_last,
)
from universality.circuits.roles import Edge, InductionGraph, Node, Role, Share
from universality.circuits.statistics import p_value, significant
from universality.circuits.tasks.base import Task
from universality.circuits.tasks.induction import CORRUPTIONS
from universality.errors import StudyError
from universality.models.language_model import LanguageModel

ANSWER, PLACE = CORRUPTIONS
Key = TypeVar("Key", bound=Hashable)
Effects = dict[Key, np.ndarray]
"""Of each prompt [S]."""


class Criteria(NamedTuple):
    """What has a role, and how intervals are drawn."""

    bootstrap_seed: int
    min_share: float = 0.1
    min_accuracy: float = 0.5
    alpha: float = 0.05
    """Of wrong findings among those of one step."""
    bootstrap_samples: int = 1000
    confidence: float = 0.95


def induction_graph(model: LanguageModel, task: Task, criteria: Criteria, batch_size: int = 16) -> InductionGraph:
    """Raises StudyError for a task of one prompt or without replace_A and replace_B, and for impossible criteria."""
    _check(task, criteria)
    return _Search(model, task, criteria, batch_size).graph()


def _check(task: Task, criteria: Criteria) -> None:
    for name in CORRUPTIONS:
        if name not in task.corrupted:
            raise StudyError(f"corruption {name!r}: task {task.name} has {', '.join(task.corrupted)}")
    if len(task.clean) < 2:
        raise StudyError(f"task {task.name}: {len(task.clean)} prompt; a test over prompts needs at least 2")
    for key in ("min_share", "alpha", "confidence"):
        value = getattr(criteria, key)
        if not 0 < value < 1:
            raise StudyError(f"{key}: {value} is not between 0 and 1")
    if not 0 <= criteria.min_accuracy <= 1:
        raise StudyError(f"min_accuracy: {criteria.min_accuracy} is not within 0 .. 1")
    if criteria.bootstrap_samples < 1:
        raise StudyError(f"bootstrap_samples: {criteria.bootstrap_samples} is not at least 1")


class _Search:
    """One model on one task."""

    def __init__(self, model: LanguageModel, task: Task, criteria: Criteria, batch_size: int):
        self.model, self.task, self.criteria, self.batch_size = model, task, criteria, batch_size
        self.drawn = draws(len(task.clean), criteria.bootstrap_samples, criteria.bootstrap_seed)
        self.whole = self._measured(whole_runs, CORRUPTIONS)

    def graph(self) -> InductionGraph:
        accuracy = float(self.whole["top1"].mean())
        passes = accuracy >= self.criteria.min_accuracy
        graph = InductionGraph(self.model.n_layers, accuracy, passes)
        falls = all(p_value(-self.whole[name], "greater") < self.criteria.alpha for name in CORRUPTIONS)
        if not passes or not falls:  # without a loss there is nothing to have a share of
            return graph
        reaching = self._measured(carried, ANSWER)
        inducers = self._inducers(reaching)
        if not inducers:
            return graph
        movers, into = self._movers(list(inducers))
        outputs = self._outputs(list(inducers), reaching)
        onward = self._kept(self._measured(onwards, ANSWER, list(inducers), list(outputs)), ANSWER)
        nodes = [
            *self._nodes("mover", movers, PLACE),
            *self._nodes("inducer", inducers, ANSWER),
            *self._nodes("output", outputs, ANSWER),
        ]
        edges = [*self._edges(into, PLACE), *self._edges(onward, ANSWER)]
        return graph._replace(nodes=tuple(nodes), edges=tuple(edges))

    def _inducers(self, reaching: Effects[Component]) -> Effects[Component]:
        """Each one's own effect: from the lowest layer up, what is had from inducers below does not count."""
        both = self._kept(reaching, ANSWER).keys() & self._kept(self._measured(carried, PLACE), PLACE).keys()
        found: Effects[Component] = {}
        for layer in sorted({component.layer for component in both}):
            here = {c: effects for c, effects in reaching.items() if c in both and c.layer == layer}
            had = self._measured(inherited, ANSWER, list(found), list(here))
            found |= self._kept({c: effects - had.get(c, 0) for c, effects in here.items()}, ANSWER)
        return found

    def _movers(self, inducers: list[Component]) -> tuple[Effects[Component], Effects[Way]]:
        """Effects through all inputs, and of ways by one input."""
        ways = [way for inducer in inducers for way in ways_into(self.model, inducer)]
        kept = self._kept(self._measured(moved, PLACE, ways), PLACE)
        movers: Effects[Component] = {}
        for way, effects in kept.items():
            movers[way.source] = movers.get(way.source, 0) + effects
        apart = [one for way in kept for one in inputs_of(self.model, way)]
        return movers, self._kept(self._measured(moved, PLACE, apart), PLACE)

    def _outputs(self, inducers: list[Component], reaching: Effects[Component]) -> Effects[Component]:
        """Effects of what each one has from inducers below."""
        heads = {component: effects for component, effects in reaching.items() if component.head is not None}
        later = heads | self._measured(written_at_last, ANSWER)
        later = {c: effects for c, effects in later.items() if any(is_below(inducer, c) for inducer in inducers)}
        able = list(self._kept(later, ANSWER))
        return self._kept(self._measured(inherited, ANSWER, inducers, able), ANSWER)

    def _measured(self, effects: Callable[..., Iterable[tuple[Key, torch.Tensor]]], *values) -> Effects[Key]:
        return over_batches(self.task, self.batch_size, partial(effects, self.model, *values))

    def _kept(self, effects: Effects[Key], corruption: str) -> Effects[Key]:
        """Those with a large and significant share."""
        if not effects:
            return {}
        whole = self.whole[corruption].mean()
        p = np.array([p_value(values * np.sign(whole), "greater") for values in effects.values()])
        return {
            key: values
            for (key, values), sure in zip(effects.items(), significant(p, self.criteria.alpha), strict=True)
            if sure and values.mean() / whole >= self.criteria.min_share
        }

    def _nodes(self, role: Role, effects: Effects[Component], corruption: str) -> list[Node]:
        ordered = sorted(effects, key=lambda c: (c.layer, c.site, -1 if c.head is None else c.head))
        steps = max(1, self.model.n_layers - 1)
        return [Node(c, c.layer / steps, role, self._share(effects[c], corruption)) for c in ordered]

    def _edges(self, effects: Effects[Way], corruption: str) -> list[Edge]:
        edges = [
            Edge(way.source, way.target, way.by, self._share(values, corruption))
            for way, values in effects.items()
            if way.by is not None
        ]
        return sorted(edges, key=lambda e: (e.source.layer, e.source.name, e.target.layer, e.target.name, e.by))

    def _share(self, effects: np.ndarray, corruption: str) -> Share:
        drawn = np.concatenate([np.arange(len(effects))[None, :], self.drawn])
        wholes = self.whole[corruption][drawn].mean(1)
        shares = effects[drawn].mean(1) / np.where(wholes == 0, np.nan, wholes)
        return Share(*(float(end[0]) for end in interval(shares[:, None], self.criteria.confidence)))
