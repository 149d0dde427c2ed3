"""Path patching within Mamba and Mamba-2 for less than two passes: the effects of ssm_paths.py, where they arise.

An exchange that the last position alone sees touches one position of every later layer. So one clean and one corrupted
pass, run as one up to where their tokens part, keep what the last position takes in, and all patched variants go
through the later layers together, one position each: rows grow as layers are patched. What a position writes adds up in
a linear state, so the change of the last state follows from the positions that are exchanged, without a scan of the
sequence for each.

delta, B and C exchanged before the last position change what later positions put out. Their direct effects need only
the last state; their total effects run on, at all positions, from the layer that is patched.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import torch
import torch.nn.functional as F

from universality.circuits.component import Component
from universality.circuits.metrics import measure
from universality.circuits.path_patching import Effect
from universality.circuits.ssm_paths import (
    AT_LAST,
    KINDS,
    PATHS,
    THROUGH,
    WRITING,
    PlainSsmPatching,
    SsmPaths,
    Through,
    Where,
    checked,
    exchanged,
)
from universality.circuits.tasks.base import Task
from universality.models.language_model import LanguageModel
from universality.models.last_positions import last_positions
from universality.models.recurrences import Recurrence
from universality.models.single_step import STEPS
from universality.models.taps import Taps

_ROWS = 1024
"""Variants times sequences that go through a layer at once,"""
_LOGIT_ROWS = 256
"""and through the unembedding."""


def ssm_patching(model: LanguageModel, task: Task, corruption: str, place: str = "B") -> SsmPaths:
    """The quick form where a family has one."""
    kind = SsmPatching if model.family.name in STEPS else PlainSsmPatching
    return kind(model, task, corruption, place)


class SsmPatching(SsmPaths):
    """See SsmPaths; without gradients."""

    def __init__(self, model: LanguageModel, task: Task, corruption: str, place: str = "B"):
        """At most two passes. Raises StudyError, beside what SsmPaths does, for a family without single steps."""
        super().__init__(model, task, corruption, place)
        self.clean, self.corrupted = last_positions(model, task.clean, self.corrupted_tokens)
        self.clean_metrics = measure(model.unembed(self.clean.final), task)

    def to_logits(
        self, kinds: Iterable[str] = KINDS, where: Where = "all", paths: Collection[str] = PATHS
    ) -> Iterator[Effect]:
        paths = checked(paths, PATHS, "path")
        for kind in checked(kinds, KINDS, "sender"):
            at_last = kind in AT_LAST or where == "last" or self.mask(where)[:, :-1].sum() == 0
            at_end = [self._finished(n, *self._last_output(kind, where, n, at_last)) for n in self.layers]
            found = {}
            if "direct" in paths:
                changes = [end - self._finished(n, self.clean.y[n]) for n, end in enumerate(at_end)]
                found["direct"] = self._effects(self.clean.final + torch.cat(changes))
            if "total" in paths and at_last:
                found["total"] = self._tail(at_end)
            elif "total" in paths:
                found["total"] = self._effects(torch.stack([self._resumed(kind, where, n) for n in self.layers]))
            for layer in self.layers:
                for path in paths:
                    yield Effect(Component(f"mamba.{layer}.{kind}"), None, path, found[path][layer])

    def conv_taps(self, offsets: Sequence[int], through: Through = "u") -> Iterator[Effect]:
        checked([through], THROUGH, "through")
        found = iter(self._tail([self._by_taps(layer, offsets, through) for layer in self.layers]))
        n_taps = self.clean.steps[0].weight.shape[1]
        for layer in self.layers:
            sender, receiver = Component(f"mamba.{layer}.conv_taps"), Component(f"mamba.{layer}.state@-1")
            for offset in offsets:
                for tap in range(n_taps):
                    yield Effect(sender, receiver, "total", next(found), offset=offset, tap=tap)

    def writes(self, offsets: Sequence[int]) -> Iterator[Effect]:
        patched = [self._with_state_changed(layer, self.change_of_writes(layer, offsets)) for layer in self.layers]
        found = iter(self._tail(patched))
        for layer in self.layers:
            for offset in offsets:
                yield Effect(Component(f"mamba.{layer}.writes@-1"), None, "total", next(found), offset=offset)

    def write_channels(self, layer: int, offset: int) -> Iterator[Effect]:
        step, inputs, y = self.clean.steps[layer], self.clean.inputs[layer], self.clean.y[layer]
        changed = step.read(inputs, self.clean.state(layer) + self.change_of_writes(layer, [offset]))
        channels = torch.arange(y.shape[2], device=y.device)
        for part in channels.split(max(1, _ROWS // y.shape[1])):
            alone = channels == part[:, None]  # [P, E]
            variants = torch.where(alone.reshape(len(part), 1, -1, *[1] * (y.ndim - 3)), changed, y)
            patched = [y.new_zeros(0, *self.clean.final.shape)] * len(self.layers)
            patched[layer] = self._finished(layer, variants)
            for channel, values in zip(part.tolist(), self._tail(patched), strict=True):
                yield Effect(
                    Component(f"mamba.{layer}.writes@-1"), None, "total", values, offset=offset, channel=channel
                )

    def change_of_writes(self, layer: int, offsets: Sequence[int]) -> torch.Tensor:
        """Of the last state, if the position at each offset writes what it writes in the corrupted run:
        [offsets, S, *state]."""
        places = torch.stack([self.positions(offset) for offset in offsets], 1)
        clean, corrupted = (self._recurrence(layer, run) for run in self._whole)
        change = corrupted.at(places).write() - clean.at(places).write()
        return (clean.decay_at(places) * change).transpose(0, 1)

    def _last_output(
        self, kind: str, where: Where, layer: int, at_last: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """y [1, S, *y] and, if not the clean one, gate at the last position, a sender exchanged."""
        step, clean, corrupted = self.clean.steps[layer], self.clean.inputs[layer], self.corrupted.inputs[layer]
        if kind == "state@-1":
            return step.read(clean, self.corrupted.state(layer)), None
        if kind == "y":
            return self.corrupted.y[layer], None
        if kind == "gate":
            return self.clean.y[layer], corrupted.gate
        if kind == "skip":
            return self.clean.y[layer] + (step.skip(corrupted.u) - step.skip(clean.u)), None
        if at_last:
            return step.output(clean._replace(**{kind: getattr(corrupted, kind)}), self.clean.before[layer]), None
        recurrence = self._with_exchanged(kind, where, layer)
        state = recurrence.scan(0, self.length, None)[1]
        return recurrence.read(state, self.length - 1)[None], None

    def _finished(self, layer: int, y: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        """The last position's stream after a layer [P, S, D], from its y [P, S, *y] and gate (None: the clean one)."""
        hidden = self.clean.hidden[layer].expand(len(y), -1, -1)
        return self.clean.steps[layer].finish(hidden, y, self.clean.inputs[layer].gate if gate is None else gate)

    def _with_state_changed(self, layer: int, change: torch.Tensor) -> torch.Tensor:
        """The last position's stream after a layer [P, S, D] whose last state is changed by `change` [P, S, *state]."""
        y = self.clean.steps[layer].read(self.clean.inputs[layer], self.clean.state(layer) + change)
        return self._finished(layer, y)

    def _tail(self, patched: list[torch.Tensor]) -> torch.Tensor:
        """Effects [variants, S, metrics] of streams after each layer [P, S, D], in the order of the layers."""
        rows = patched[0]
        for layer in self.layers[1:]:
            if len(rows):
                parts = rows.split(max(1, _ROWS // rows.shape[1]))
                rows = torch.cat([self.clean.step(layer, part) for part in parts])
            rows = torch.cat([rows, patched[layer]])
        return self._effects(rows)

    def _effects(self, final: torch.Tensor) -> torch.Tensor:
        """Patched minus clean metrics [P, S, metrics] of the stream after the last block [P, S, D]."""
        found = []
        for part in final.split(max(1, _LOGIT_ROWS // final.shape[1])):
            each = {name: getattr(self.task, name).repeat(len(part)) for name in ("answer", "distractor")}
            metrics = measure(self.model.unembed(part.flatten(0, 1)), self.task._replace(**each))
            found.append(metrics.unflatten(0, part.shape[:2]) - self.clean_metrics)
        return torch.cat(found)

    def _by_taps(self, layer: int, offsets: Sequence[int], through: Through) -> torch.Tensor:
        """The last position's stream after a layer, if one tap alone adds to the position at one offset what it adds
        in the corrupted run: [offsets * K, S, D]."""
        clean = self._recurrence(layer, self._whole[0])
        places = torch.stack([self.positions(offset) for offset in offsets], 1)
        decays = clean.decay_at(places)
        found = []
        for n in range(len(offsets)):
            change = self._change_by_taps(layer, clean, places[:, n], decays[:, n : n + 1], through)
            found.append(self._with_state_changed(layer, change.transpose(0, 1)))
        return torch.cat(found)

    def _change_by_taps(self, layer: int, clean: Recurrence, at: torch.Tensor, decay: torch.Tensor, through: Through):
        """Of the last state, for each tap alone at one position of each sequence [S]: [S, K, *state]."""
        step = self.clean.steps[layer]
        before, after = (self._taps_at(layer, run, at) for run in self._whole)
        mixed = F.silu(before.sum(1, keepdim=True) + step.bias + (after - before))  # [S, K, C], a variant a tap
        selected = step.selected(mixed)
        one = clean.at(at[:, None])
        names = ("u",) if through == "u" else ("u", "delta", "B")
        values = {name: selected[name] for name in names if name in selected}
        change = decay * (replace(one, **values).write() - one.write())
        if "delta" in values:  # the position also lets through more or less of what was written before it
            earlier = torch.arange(self.length, device=at.device) < at[:, None]
            until = replace(clean, delta=exchanged(earlier, clean.delta, torch.zeros_like(clean.delta)))
            state = until.scan(0, self.length, None)[1][:, None]  # steps of 0 leave it as it was before the position
            change = change + decay * (clean.shrink(values["delta"]) - clean.shrink(one.delta)) * state
        return change

    def _taps_at(self, layer: int, run: dict[str, torch.Tensor], at: torch.Tensor) -> torch.Tensor:
        """What each tap of the convolution adds at one position of each sequence [S, K, C]."""
        weight = self.clean.steps[layer].weight  # [C, K]
        taps = weight.shape[1]
        padded = F.pad(run[f"mamba.{layer}.conv_in"], (0, 0, taps - 1, 0))
        window = at[:, None] + torch.arange(taps, device=at.device)
        return padded[torch.arange(len(at), device=at.device)[:, None], window] * weight.T

    @cached_property
    def _whole(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """All positions of both runs, by two passes more: for writes, and for delta, B, C before the last position."""
        sites = [f"mamba.{layer}.{kind}" for layer in self.layers for kind in ("conv_in", *WRITING)]
        more = [site for n in self.layers for site in (f"mamba.{n}.gate", f"resid_pre.{n}")]
        clean = self.model.run(self.task.clean, capture=sites + more, logits=False).captured
        return clean, self.model.run(self.corrupted_tokens, capture=sites, logits=False).captured

    def _recurrence(self, layer: int, run: dict[str, torch.Tensor]) -> Recurrence:
        return self.clean.steps[layer].recurrence(*(run[f"mamba.{layer}.{kind}"] for kind in WRITING))

    def _with_exchanged(self, kind: str, where: Where, layer: int) -> Recurrence:
        clean, corrupted = (self._recurrence(layer, run) for run in self._whole)
        value = exchanged(self.mask(where), getattr(corrupted, kind), getattr(clean, kind))
        return replace(clean, **{kind: value})

    def _resumed(self, kind: str, where: Where, layer: int) -> torch.Tensor:
        """The last position's stream after the last block [S, D]: all positions run on from a layer patched."""
        clean = self._whole[0]
        y = self._with_exchanged(kind, where, layer).scan(0, self.length, None)[0]
        hidden = self.clean.steps[layer].finish(clean[f"resid_pre.{layer}"], y, clean[f"mamba.{layer}.gate"])
        for later in self.layers[layer + 1 :]:
            hidden = self.model.family.forward(self.model.blocks[later], hidden, Taps(), later, {})
        return hidden[:, -1]
