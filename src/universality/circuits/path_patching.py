"""Path patching (Wang et al. 2022, arXiv 2211.00593, section 3.1; Goldowsky-Dill et al. 2023, arXiv 2304.05969).

To measure a path sender -> receiver -> logits on a clean and a corrupted sequence:

1. Run both and keep the output of every mixing component (attention heads; Mamba's mixers).
2. Run the clean sequence with the sender's output from the corrupted run and every other mixing component frozen at its
   clean output. MLPs, which act on one position, are recomputed. If the receiver is the logits, measure them: done.
3. Else take the receiver's input from that run, and run the clean sequence with that input and nothing frozen.

Beside this direct path, `total` patches the sender alone and lets everything after it recompute.

Receivers are heads (their queries, keys and values), Mamba's convolution inputs (mamba.L.conv_in, from which the
state is written; the gate is left at its clean value) and RWKV's keys and values. What a receiver reads by several
inputs is patched all together (input None) and each apart.

Senders are heads (attn.L.z, one head) for attention; for Mamba the state that the last position reads
(mamba.L.state@-1), the state-space output at every position (mamba.L.y) and the whole mixer (mamba.L.out); for RWKV the
outputs of both its mixes. A hybrid has the senders of both its kinds. MLPs, and the output of every part of a block as
a whole, are senders too where they are asked for. A sender is patched at all positions or, of each sequence, at one.

The value put in is that of the corrupted sequence or, as a null, that of another clean one.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch

from universality.circuits.component import Component
from universality.circuits.metrics import measure
from universality.circuits.tasks.base import Task
from universality.errors import StudyError
from universality.models.language_model import LanguageModel
from universality.models.taps import Edit

Path = Literal["direct", "total"]
Paths = Sequence[Path]
PATHS: Paths = ("total", "direct")
Donor = Literal["corrupted", "shuffled_clean"]
SHUFFLED: Donor = "shuffled_clean"


def with_shuffled_clean(task: Task, seed: int) -> Task:
    """The task with one more corruption, "shuffled_clean": every prompt's is another clean prompt.

    The order is a derangement drawn from `seed` over the whole task, so make it before the task is cut into batches.
    Raises StudyError if there is one prompt only.
    """
    if len(task.clean) < 2:
        raise StudyError(f"task {task.name}: {len(task.clean)} prompt; a shuffle of clean prompts needs at least 2")
    circle = torch.from_numpy(np.random.default_rng(seed).permutation(len(task.clean)))
    shuffled = torch.empty_like(task.clean)
    shuffled[circle] = task.clean[circle.roll(1)]  # one circle through all: nobody gets his own
    return task._replace(corrupted=task.corrupted | {SHUFFLED: shuffled})


class Place(NamedTuple):
    """A position of each sequence: so many tokens from one of the task's places, or from its "last" position."""

    anchor: str
    offset: int = 0

    @property
    def name(self) -> str:
        return f"{self.anchor}{self.offset:+d}" if self.offset else self.anchor

    def of(self, task: Task) -> torch.Tensor:
        """[S]. Raises StudyError for a place that the task does not have or that is outside a sequence."""
        length = task.clean.shape[1]
        anchors = {"last": torch.full((len(task.clean),), length - 1)} | task.positions
        if self.anchor not in anchors:
            raise StudyError(f"place {self.name!r}: task {task.name} has {', '.join(anchors)}")
        places = anchors[self.anchor] + self.offset
        outside = places[(places < 0) | (places >= length)]
        if len(outside):
            raise StudyError(f"place {self.name!r}: is position {int(outside[0])} in a sequence of {length} tokens")
        return places


Places = Sequence[Place] | None
"""Where senders are patched, one place at a time; None: at all positions together."""


def senders(model: LanguageModel) -> list[Component]:
    found: list[Component] = []
    layers = range(model.n_layers)
    for mixer in model.family.mixers:
        module, kind = mixer.split(".")
        if mixer == "attn.z":
            found += [Component(f"attn.{layer}.z", head) for layer in layers for head in range(_heads(model, "z"))]
        else:
            kinds = ("state@-1", "y", kind) if module == "mamba" else (kind,)
            found += [Component(f"{module}.{layer}.{kind}") for kind in kinds for layer in layers]
    return found


def mlps(model: LanguageModel) -> list[Component]:
    """Raises StudyError if the model has none."""
    if "mlp.0.out" not in model.sites:
        raise StudyError(f"{model.family.name} has no MLPs to patch")
    return [Component(f"mlp.{layer}.out") for layer in range(model.n_layers)]


def outputs(model: LanguageModel) -> list[Component]:
    """What each part of each block adds to the residual stream."""
    sites = [f"{kind}.{n}.out" for n in range(model.n_layers) for kind in ("attn", "mamba", "rwkv", "mlp")]
    return [Component(site) for site in sites if site in model.sites]


def _heads(model: LanguageModel, site: str) -> int:
    heads = model.sites[f"attn.0.{site}"][2]
    assert isinstance(heads, int)
    return heads


def mixing_sites(model: LanguageModel) -> list[str]:
    """The sites that are frozen on a direct path: all through which one position reaches another."""
    return [site for layer in range(model.n_layers) for site in model.family.in_layer(model.family.mixers, layer)]


def receiver_inputs(model: LanguageModel, receiver: Component) -> list[Component]:
    """Where a receiver takes in what senders wrote. Heads that share keys and values have them changed together."""
    module, layer, _ = receiver.site.split(".")
    if receiver.head is not None:
        shared = receiver.head * _heads(model, "k") // _heads(model, "q")
        heads = {"q": receiver.head, "k": shared, "v": shared}
        return [Component(f"attn.{layer}.{site}", head) for site, head in heads.items()]
    return [Component(f"rwkv.{layer}.{site}") for site in ("k", "v")] if module == "rwkv" else [receiver]


def replace(component: Component, value: torch.Tensor, at: torch.Tensor | None = None) -> Edit:
    """An edit that puts `value`, of the whole site, in: only the component's head, if it is one, and only position `at`
    [S] of each sequence, if given.
    """
    if component.head is None and at is None:
        return lambda current: value
    rows = slice(None) if at is None else torch.arange(len(value))
    where: tuple = (rows, slice(None) if at is None else at)
    if component.head is not None:
        where = (*where, component.head)

    def edit(current: torch.Tensor) -> torch.Tensor:
        current = current.clone()
        current[where] = value[where]
        return current

    return edit


class Effect(NamedTuple):
    """Patched minus clean metrics of one path, for each sequence of a batch [S, metrics]."""

    sender: Component
    receiver: Component | None
    path: str
    values: torch.Tensor
    position: str | None = None
    """Where the sender was patched, None: everywhere."""
    input: str | None = None
    """By which of the receiver's inputs, None: all of them."""
    offset: int | None = None
    """Where one position of the sender is exchanged, counted from a place of the task;"""
    tap: int | None = None
    """of a convolution, which tap;"""
    channel: int | None = None
    """of a state, which channel or head."""


class PatchingBatch:
    """One batch of the task with one corruption: clean and corrupted values, and patched runs over them.

    With the donor "shuffled_clean" what is put in comes from another clean prompt instead (see `with_shuffled_clean`).
    """

    def __init__(self, model: LanguageModel, task: Task, corruption: str, donor: Donor = "corrupted"):
        self.model, self.task = model, task
        self.components = senders(model)
        self.frozen_sites = mixing_sites(model)
        name = SHUFFLED if donor == SHUFFLED else corruption
        if name not in task.corrupted:
            raise StudyError(f"corruption {name!r}: task {task.name} has {', '.join(task.corrupted)}")
        self.put_in = task.corrupted[name]
        sites = {c.site for c in (*self.components, *outputs(model))} | set(self.frozen_sites)
        last = f"resid_post.{model.n_layers - 1}"
        clean = model.run(task.clean, capture=sites | {last, *self.further_sites()}, logits=False)
        self.clean = clean.captured
        self.clean_metrics = measure(model.unembed(self.clean[last][:, -1]), task)
        self.corrupted = model.run(self.put_in, capture=sites, logits=False).captured

    def further_sites(self) -> Iterable[str]:
        """Sites kept of the clean run, besides those of the senders."""
        return ()

    def to_logits(self, *, positions: Places = None, paths: Paths = PATHS) -> Iterator[Effect]:
        """Every sender's direct and total path to the logits; by position the senders that have positions."""
        return self._to_logits([c for c in self.components if positions is None or "@" not in c.site], positions, paths)

    def mlp_to_logits(self, *, positions: Places = None, paths: Sequence[Path] = PATHS) -> Iterator[Effect]:
        """Every MLP's direct and total path to the logits. Raises StudyError if the model has none."""
        return self._to_logits(mlps(self.model), positions, paths)

    def outputs_to_logits(self, *, positions: Places = None, paths: Sequence[Path] = PATHS) -> Iterator[Effect]:
        """The direct and total path to the logits of what each part of each block adds to the residual stream."""
        return self._to_logits(outputs(self.model), positions, paths)

    def _to_logits(self, components: list[Component], positions: Places, paths: Sequence[Path]) -> Iterator[Effect]:
        for place, at in self.places(positions):
            for sender in components:
                edits: dict[str, Edit] = {sender.site: replace(sender, self.corrupted[sender.site], at)}
                for path in paths:
                    chosen = edits if path == "total" else self._sender_alone(sender, at)
                    yield self._effect(
                        sender, None, path, self.model.run_to_last(self.task.clean, edits=chosen).logits, place
                    )

    def places(self, positions: Places) -> list[tuple[str | None, torch.Tensor | None]]:
        """Name and positions [S] of each place; None, None where there is no choice of positions."""
        if positions is None:
            return [(None, None)]
        return [(place.name, place.of(self.task).to(self.model.device)) for place in positions]

    def to_receiver(self, receiver: Component, inputs: Sequence[str] | None = None) -> Iterator[Effect]:
        """Every sender of an earlier layer, through the receiver's inputs, to the logits: by all together and by each
        of `inputs` ("q", "k", "v"; for RWKV "k", "v") apart, None for every one where there are several.

        Raises StudyError for an input that the receiver does not have.
        """
        choices = self.input_choices(receiver, inputs)
        entries = receiver_inputs(self.model, receiver)
        for sender in self.components:
            if sender.layer >= receiver.layer:
                continue
            sites = [entry.site for entry in entries]
            seen = self.model.run(
                self.task.clean, capture=sites, edits=self._sender_alone(sender), logits=False
            ).captured
            for name, chosen in choices.items():
                run = self.model.run_to_last(self.task.clean, edits={e.site: replace(e, seen[e.site]) for e in chosen})
                yield self._effect(sender, receiver, "direct", run.logits, input=name)

    def input_choices(self, receiver: Component, inputs: Sequence[str] | None) -> dict[str | None, list[Component]]:
        """What is patched of a receiver together: under None all its inputs, and each of `inputs` by name."""
        entries = receiver_inputs(self.model, receiver)
        named = {entry.site.split(".")[-1]: entry for entry in entries} if len(entries) > 1 else {}
        for name in inputs or ():
            if name not in named:
                raise StudyError(f"input {name!r} of {receiver.name}: it has {', '.join(named) or 'one alone'}")
        return {None: entries} | {name: [named[name]] for name in (named if inputs is None else inputs)}

    def _sender_alone(self, sender: Component, at: torch.Tensor | None = None) -> dict[str, Edit]:
        """Everything that mixes positions frozen at its clean output, the sender at its corrupted one."""
        edits = {site: replace(Component(site), self.clean[site]) for site in self.frozen_sites}
        patch = replace(sender, self.corrupted[sender.site], at)
        if sender.site in edits:
            clean = self.clean[sender.site]
            edits[sender.site] = lambda current: patch(clean)
        else:
            edits[sender.site] = patch
            if sender.site.startswith("mamba"):  # inside a mixer: let that one mixer pass on what the sender changed
                del edits[f"mamba.{sender.layer}.out"]
        return edits

    def _effect(
        self,
        sender: Component,
        receiver: Component | None,
        path: str,
        logits: torch.Tensor,
        position: str | None = None,
        input: str | None = None,
    ) -> Effect:
        values = measure(logits, self.task) - self.clean_metrics
        return Effect(sender, receiver, path, values, position, input)
