"""Path patching within state-space layers (Mamba, Mamba-2, the Mamba half of Falcon-H1).

Clean and corrupted sequences are run; a value of the clean run is exchanged for that of the corrupted one, and what the
last position says is measured. `total` lets everything after it recompute; `direct` freezes the outputs of all other
mixers at their clean values, so that the residual stream alone carries the change (see path_patching.py).

    senders   state@-1 (the state that the last position reads), y, gate, skip: at the last position
              delta, B, C: at every position, at the last one, or at one offset from a place of the task
    taps      what one tap of a short convolution adds to one position -> what that position writes -> the last state
    writes    what one position writes into the last state, of all channels (heads) together or of each alone

The last two change nothing but the state that the last position of that layer reads. Each exchange starts from the
clean run, never from one already exchanged. A write is decayed as in the clean run from the position that wrote it on.

`PlainSsmPatching` runs the whole model with edits for every effect; ssm_fast.py has the same interface at a fraction of
the cost.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

import torch

from universality.circuits.component import Component
from universality.circuits.metrics import measure
from universality.circuits.path_patching import Effect, mixing_sites, replace
from universality.circuits.tasks.base import Task
from universality.errors import StudyError
from universality.models.language_model import LanguageModel
from universality.models.recurrences import Recurrence
from universality.models.taps import Edit

AT_LAST = ("state@-1", "y", "gate", "skip")
ANYWHERE = ("delta", "B", "C")
KINDS = AT_LAST + ANYWHERE
PATHS = ("direct", "total")
Where = Literal["all", "last"] | int
"""Positions at which delta, B, C are exchanged; an integer is an offset from the place."""
Through = Literal["u", "all"]
THROUGH: tuple[Through, ...] = ("u", "all")
"""What a convolution's tap changes of a write: u alone; or all that follows from it: for Mamba delta and B too, with
delta how much of the state before is kept; for Mamba-2, whose convolution passes u, B and C side by side, B too."""
WRITING = ("ssm_in", "delta", "B", "C")


class SsmPaths(ABC):
    """One batch of a task with one corruption. Offsets are counted from `place`, a name of task.positions."""

    def __init__(self, model: LanguageModel, task: Task, corruption: str, place: str = "B"):
        """Raises StudyError for a model without state-space layers, or a task without that corruption or place."""
        if model.family.recurrence is None:
            raise StudyError(f"{model.family.name}: has no state-space layers to patch")
        for what, name, known in (("corruption", corruption, task.corrupted), ("place", place, task.positions)):
            if name not in known:
                raise StudyError(f"{what} {name!r}: the task {task.name} has {', '.join(known)}")
        self.model, self.task, self.place = model, task, place
        self.length = task.clean.shape[1]
        self.layers = range(model.n_layers)
        self.corrupted_tokens = task.corrupted[corruption]

    @abstractmethod
    def to_logits(
        self, kinds: Iterable[str] = KINDS, where: Where = "all", paths: Collection[str] = PATHS
    ) -> Iterator[Effect]:
        """Effect of each kind of sender of every layer, by each of `paths`; `where` is about delta, B and C."""

    @abstractmethod
    def conv_taps(self, offsets: Sequence[int], through: Through = "u") -> Iterator[Effect]:
        """Total effect, through the last state, of each tap at each offset of every layer. Tap k of K at position p
        reads position p - (K - 1) + k."""

    @abstractmethod
    def writes(self, offsets: Sequence[int]) -> Iterator[Effect]:
        """Total effect of the write at each offset of every layer."""

    @abstractmethod
    def write_channels(self, layer: int, offset: int) -> Iterator[Effect]:
        """Total effect of the write at one offset, of each channel (Mamba) or head (Mamba-2) of a layer alone."""

    def state_to_logits(self, paths: Collection[str] = PATHS) -> Iterator[Effect]:
        """Effect of the state that the last position reads, of every layer."""
        return self.to_logits(("state@-1",), paths=paths)

    def positions(self, offset: int) -> torch.Tensor:
        """Of each sequence [S]. Raises StudyError for one outside the sequence."""
        found = self.task.positions[self.place] + offset
        outside = (found < 0) | (found >= self.length)
        if outside.any():
            at = int(found[outside][0])
            raise StudyError(f"offset {offset} from {self.place}: {at} is no position of {self.length} tokens")
        return found.to(self.model.device)

    def mask(self, where: Where) -> torch.Tensor:
        """Which positions are exchanged [S, L]."""
        shape = self.task.clean.shape
        if where == "all":
            return torch.ones(shape, dtype=torch.bool, device=self.model.device)
        last = torch.full(shape[:1], self.length - 1, device=self.model.device)
        at = last if where == "last" else self.positions(where)
        return torch.arange(self.length, device=self.model.device) == at[:, None]


def checked(names: Iterable[str], known: tuple[str, ...], what: str) -> list[str]:
    """Raises StudyError for a name that is not known."""
    names = list(names)
    for name in names:
        if name not in known:
            raise StudyError(f"{what} {name!r}: no such {what}; allowed: {', '.join(known)}")
    return names


def exchanged(mask: torch.Tensor, corrupted: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """`clean` [S, L, ...], `corrupted` where the mask [S, L] is true."""
    return torch.where(mask.reshape(*mask.shape, *[1] * (clean.ndim - 2)), corrupted, clean)


class PlainSsmPatching(SsmPaths):
    """Every effect by a run of the whole model or two."""

    def __init__(self, model: LanguageModel, task: Task, corruption: str, place: str = "B"):
        super().__init__(model, task, corruption, place)
        self.frozen_sites = mixing_sites(model)
        inner = [f"mamba.{layer}.{kind}" for layer in self.layers for kind in (*KINDS, "ssm_in")]
        clean = model.run_to_last(task.clean, capture={*inner, *self.frozen_sites})
        self.clean = clean.captured
        self.clean_metrics = measure(clean.logits, task)
        self.corrupted = model.run(self.corrupted_tokens, capture=inner, logits=False).captured

    def to_logits(
        self, kinds: Iterable[str] = KINDS, where: Where = "all", paths: Collection[str] = PATHS
    ) -> Iterator[Effect]:
        for kind in checked(kinds, KINDS, "sender"):
            mask = self.mask("last" if kind in AT_LAST else where)
            for layer in self.layers:
                sender = Component(f"mamba.{layer}.{kind}")
                clean, corrupted = self.clean[sender.site], self.corrupted[sender.site]
                value = corrupted if kind == "state@-1" else exchanged(mask, corrupted, clean)
                alone = {sender.site: replace(sender, value)}
                for path in checked(paths, PATHS, "path"):
                    frozen = self._frozen(layer) if path == "direct" else {}
                    yield Effect(sender, None, path, self._effect(frozen | alone))

    def conv_taps(self, offsets: Sequence[int], through: Through = "u") -> Iterator[Effect]:
        rows = torch.arange(len(self.task.clean))
        checked([through], THROUGH, "through")
        for layer in self.layers:
            name = f"mamba.{layer}"
            sender, receiver = Component(f"{name}.conv_taps"), Component(f"{name}.state@-1")
            held = self._held(f"{name}.{kind}" for kind in ANYWHERE)
            clean, corrupted = (
                self.model.run(tokens, capture=[sender.site], logits=False).captured[sender.site]
                for tokens in (self.task.clean, self.corrupted_tokens)
            )
            for offset in offsets:
                at = self.positions(offset)
                for tap in range(clean.shape[2]):
                    taps = clean.clone()
                    taps[rows, at, tap] = corrupted[rows, at, tap]
                    edits = {sender.site: replace(sender, taps)} | (held if through == "u" else {})
                    state = self.model.run(self.task.clean, capture=[receiver.site], edits=edits, logits=False)
                    values = self._effect({receiver.site: replace(receiver, state.captured[receiver.site])})
                    yield Effect(sender, receiver, "total", values, offset=offset, tap=tap)

    def writes(self, offsets: Sequence[int]) -> Iterator[Effect]:
        for layer in self.layers:
            change = self._change_of_writes(layer)
            for offset in offsets:
                values = self._effect({f"mamba.{layer}.state@-1": partial(torch.add, self._at(change, offset))})
                yield Effect(Component(f"mamba.{layer}.writes@-1"), None, "total", values, offset=offset)

    def write_channels(self, layer: int, offset: int) -> Iterator[Effect]:
        change = self._at(self._change_of_writes(layer), offset)
        for channel in range(change.shape[1]):
            one = torch.zeros_like(change)
            one[:, channel] = change[:, channel]
            values = self._effect({f"mamba.{layer}.state@-1": partial(torch.add, one)})
            yield Effect(Component(f"mamba.{layer}.writes@-1"), None, "total", values, offset=offset, channel=channel)

    def _change_of_writes(self, layer: int) -> torch.Tensor:
        """By how much the last state changes if a position writes what it writes in the corrupted run: [S, L, *state].

        The decay is the clean run's, from that position on."""
        before, after = (self._recurrence(layer, run) for run in (self.clean, self.corrupted))
        last = torch.full((len(self.task.clean),), self.length - 1, device=self.model.device)
        return before.decay(last) * (after.write() - before.write())

    def _recurrence(self, layer: int, captured: dict[str, torch.Tensor]) -> Recurrence:
        assert self.model.family.recurrence is not None
        return self.model.family.recurrence(self.model.blocks[layer], layer, captured)

    def _at(self, values: torch.Tensor, offset: int) -> torch.Tensor:
        return values[torch.arange(len(values)), self.positions(offset)]

    def _frozen(self, layer: int) -> dict[str, Edit]:
        """All that mixes positions at its clean value, but for the mixer of one layer."""
        return self._held(site for site in self.frozen_sites if site != f"mamba.{layer}.out")

    def _held(self, sites: Iterable[str]) -> dict[str, Edit]:
        return {site: replace(Component(site), self.clean[site]) for site in sites}

    def _effect(self, edits: Mapping[str, Edit]) -> torch.Tensor:
        return measure(self.model.run_to_last(self.task.clean, edits=edits).logits, self.task) - self.clean_metrics
