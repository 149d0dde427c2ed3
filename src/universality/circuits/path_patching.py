"""Path patching (Wang et al. 2022, arXiv 2211.00593, section 3.1; Goldowsky-Dill et al. 2023, arXiv 2304.05969).

To measure a path sender -> receiver -> logits on a clean and a corrupted sequence:

1. Run both and keep the output of every mixing component (attention heads; Mamba's mixers).
2. Run the clean sequence with the sender's output from the corrupted run and every other mixing component frozen at its
   clean output. MLPs, which act on one position, are recomputed. If the receiver is the logits, measure them: done.
3. Else take the receiver's input from that run, and run the clean sequence with that input and nothing frozen.

Beside this direct path, `total` patches the sender alone and lets everything after it recompute.

Receivers are heads (their queries, keys and values), Mamba's convolution inputs (mamba.L.conv_in, from which the
state is written; the gate is left at its clean value) and RWKV's keys and values.

Senders are heads (attn.L.z, one head) for attention; for Mamba the state that the last position reads
(mamba.L.state@-1), the state-space output at every position (mamba.L.y) and the whole mixer (mamba.L.out); for RWKV the
outputs of both its mixes. A hybrid has the senders of both its kinds.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from universality.circuits.metrics import measure
from universality.circuits.tasks.base import Task
from universality.models.language_model import LanguageModel
from universality.models.taps import Edit


class Component(NamedTuple):
    """A site, or one head of it."""

    site: str
    head: int | None = None

    @property
    def layer(self) -> int:
        return int(self.site.split(".")[1])

    @property
    def name(self) -> str:
        module, _, kind = self.site.split("@")[0].split(".")
        if self.head is not None:
            return f"L{self.layer}H{self.head}"
        return f"L{self.layer} {kind if module != 'mlp' else 'mlp'}"


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


def replace(component: Component, value: torch.Tensor) -> Edit:
    """An edit that puts `value`, of the whole site, in; of one head only if the component is a head."""
    if component.head is None:
        return lambda current: value

    def edit(current: torch.Tensor) -> torch.Tensor:
        current = current.clone()
        current[:, :, component.head] = value[:, :, component.head]
        return current

    return edit


class Effect(NamedTuple):
    """Patched minus clean metrics of one path, for each sequence of a batch [S, metrics]."""

    sender: Component
    receiver: Component | None
    path: str
    values: torch.Tensor
    offset: int | None = None
    """Where one position of the sender is exchanged, counted from a place of the task;"""
    tap: int | None = None
    """of a convolution, which tap;"""
    channel: int | None = None
    """of a state, which channel or head."""


class PatchingBatch:
    """One batch of the task with one corruption: clean and corrupted values, and patched runs over them."""

    def __init__(self, model: LanguageModel, task: Task, corruption: str):
        self.model, self.task = model, task
        self.components = senders(model)
        self.frozen_sites = mixing_sites(model)
        sites = {c.site for c in self.components} | set(self.frozen_sites)
        clean = model.run(task.clean, capture=sites)
        self.clean = clean.captured
        self.clean_metrics = measure(clean.logits[:, -1], task)
        self.corrupted = model.run(task.corrupted[corruption], capture=sites).captured

    def to_logits(self) -> Iterator[Effect]:
        """Every sender's direct and total path to the logits."""
        for sender in self.components:
            total = self.model.run(self.task.clean, edits={sender.site: replace(sender, self.corrupted[sender.site])})
            yield self._effect(sender, None, "total", total.logits)
            direct = self.model.run(self.task.clean, edits=self._sender_alone(sender))
            yield self._effect(sender, None, "direct", direct.logits)

    def to_receiver(self, receiver: Component) -> Iterator[Effect]:
        """Every sender of an earlier layer, through the receiver's input, to the logits."""
        entries = receiver_inputs(self.model, receiver)
        for sender in self.components:
            if sender.layer >= receiver.layer:
                continue
            sites = [entry.site for entry in entries]
            seen = self.model.run(self.task.clean, capture=sites, edits=self._sender_alone(sender)).captured
            run = self.model.run(self.task.clean, edits={e.site: replace(e, seen[e.site]) for e in entries})
            yield self._effect(sender, receiver, "direct", run.logits)

    def _sender_alone(self, sender: Component) -> dict[str, Edit]:
        """Everything that mixes positions frozen at its clean output, the sender at its corrupted one."""
        edits = {site: replace(Component(site), self.clean[site]) for site in self.frozen_sites}
        patch = replace(sender, self.corrupted[sender.site])
        if sender.site in edits:
            clean = self.clean[sender.site]
            edits[sender.site] = lambda current: patch(clean)
        else:  # inside a mixer: let that one mixer pass on what the sender changed
            del edits[f"mamba.{sender.layer}.out"]
            edits[sender.site] = patch
        return edits

    def _effect(self, sender: Component, receiver: Component | None, path: str, logits: torch.Tensor) -> Effect:
        return Effect(sender, receiver, path, measure(logits[:, -1], self.task) - self.clean_metrics)
