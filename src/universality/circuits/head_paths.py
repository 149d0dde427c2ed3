"""Path patching of heads and MLPs by the structure of attention models, in place of a run of the model for each path.

What makes it quick, with the same result (path_patching.py says what is measured):

- Metrics are read at the last position. Where everything that mixes positions is frozen, nothing but the last position
  of the sender and of the MLPs after it counts, so a direct path to the logits is a few MLPs at one position. All
  senders go upwards together, each joining in its layer.
- What is before a patch stays clean: a total path begins in its sender's layer and at the first position that changes;
  keys and values of earlier positions are the clean run's. Its last layer needs queries of the last position alone.
- A sender's direct path to the inputs of a layer serves all receivers there, and goes on to the layers above.

Models of other families, and `fast=False`, take the plain way.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch

from universality.circuits.component import Component
from universality.circuits.metrics import measure
from universality.circuits.path_patching import PATHS, Donor, Effect, PatchingBatch, Path, Paths, Places, mlps
from universality.circuits.tasks.base import Task
from universality.models.block_parts import Before, BlockParts
from universality.models.language_model import LanguageModel

_TOKENS = 4096
"""Tokens of stacked sequences that are run at once: enough for matrix products, and not more memory than needed."""
_UNEMBEDDED = 256
"""Rows that are unembedded at once."""


class Change(NamedTuple):
    """What patched senders of one layer change at once, each of them in a copy of the batch.

    `values` [N, S, L, D] is added to the output of attention ("attn") or of the MLP ("mlp"); it is zero before the
    position `first` [S].
    """

    after: str
    values: torch.Tensor
    first: torch.Tensor


class HeadPaths(PatchingBatch):
    """A PatchingBatch whose paths of heads and MLPs are quick to follow in models of attention and MLPs.

    Effects come in another order than the plain way's. Through receivers, the streams of all senders below are held at
    once: senders x S x L x D floats.
    """

    def __init__(self, model: LanguageModel, task: Task, corruption: str, donor: Donor = "corrupted"):
        self._structured = None if model.family.parts is None else BlockParts(model, model.family.parts)
        super().__init__(model, task, corruption, donor)
        differs = self.put_in != task.clean
        first = torch.where(differs.any(1), differs.int().argmax(1), task.clean.shape[1] - 1)
        self._first = first.to(model.device)
        """The first position at which anything can change."""

    @property
    def _parts(self) -> BlockParts:
        assert self._structured is not None
        return self._structured

    def further_sites(self) -> list[str]:
        if self._structured is None:
            return []
        streams = [f"resid_{point}.{layer}" for point in ("pre", "mid", "post") for layer in range(self.model.n_layers)]
        return streams + [f"attn.{layer}.{site}" for site in "qkv" for layer in range(self.model.n_layers)]

    def to_logits(self, *, positions: Places = None, paths: Paths = PATHS, fast: bool = True) -> Iterator[Effect]:
        if not fast or self._structured is None:
            return super().to_logits(positions=positions, paths=paths)
        return self._fast_to_logits(self._heads(), "attn", positions, paths)

    def mlp_to_logits(self, *, positions: Places = None, paths: Paths = PATHS, fast: bool = True) -> Iterator[Effect]:
        if not fast or self._structured is None:
            return super().mlp_to_logits(positions=positions, paths=paths)
        return self._fast_to_logits([[mlp] for mlp in mlps(self.model)], "mlp", positions, paths)

    def to_receiver(
        self, receiver: Component, inputs: Sequence[str] | None = None, *, fast: bool = True
    ) -> Iterator[Effect]:
        return self.to_receivers([receiver], inputs, fast=fast)

    def to_receivers(
        self, receivers: Sequence[Component], inputs: Sequence[str] | None = None, *, fast: bool = True
    ) -> Iterator[Effect]:
        """`to_receiver` of several, which share what leads to their inputs; in the order of their layers."""
        ordered = sorted(receivers, key=lambda receiver: receiver.layer)
        if fast and self._structured is not None:
            yield from self._fast_to_receivers(ordered, inputs)
            return
        for receiver in ordered:
            yield from super().to_receiver(receiver, inputs)

    # To the logits

    def _fast_to_logits(
        self, senders: list[list[Component]], after: str, positions: Places, paths: Paths
    ) -> Iterator[Effect]:
        """`senders` by layer."""
        for place, at in self.places(positions):
            at_last = []
            for layer in range(self.model.n_layers):
                change = self._change(layer, after, at)
                at_last.append(change.values[:, :, -1:].clone())  # not a view: of the rest nothing is to be kept
                if "total" in paths:
                    yield from self._effects(senders[layer], "total", self._total(layer, change), place)
            if "direct" in paths:
                *_, last = self._upwards(after, at_last)
                everyone = [sender for layer in senders for sender in layer]
                yield from self._effects(everyone, "direct", last[:, :, 0], place)

    def _effects(
        self, senders: list[Component], path: Path, resid: torch.Tensor, place: str | None
    ) -> Iterator[Effect]:
        """Of resid_post [N, S, D] of the last layer at the last position."""
        for sender, values in zip(senders, self._measured(resid), strict=True):
            yield Effect(sender, None, path, values, place)

    @property
    def _length(self) -> int:
        return self.task.clean.shape[1]

    def _heads(self) -> list[list[Component]]:
        """All heads, by layer."""
        return [list(heads) for _, heads in groupby(self.components, key=lambda head: head.layer)]

    def _change(self, layer: int, after: str, at: torch.Tensor | None = None) -> Change:
        """Of all heads of a layer, or of its MLP, at all positions or at one [S]."""
        site = f"attn.{layer}.z" if after == "attn" else f"mlp.{layer}.out"
        difference = self.corrupted[site] - self.clean[site]
        first = self._first
        if at is not None:
            here = torch.arange(self._length, device=at.device) == at[:, None]
            difference = difference * here.view(*here.shape, *[1] * (difference.ndim - 2))
            first = at
        values = self._parts.written(layer, difference) if after == "attn" else difference[None]
        return Change(after, values, first)

    def _upwards(self, after: str, changes: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The residual stream on direct paths [N, S, L', D], where N are the senders of the layers below: resid_pre of
        every layer that has a change [n, S, L', D], of the last L' positions, then resid_post of the last of them.
        """
        stream = None
        for layer, values in enumerate(changes):
            places = slice(self._length - values.shape[2], None)
            pre, attended = (self.clean[site][:, places] for site in (f"resid_pre.{layer}", f"attn.{layer}.out"))
            if stream is None:
                stream = pre.new_empty(0, *pre.shape)
            yield stream
            stream = torch.cat([stream, pre.expand_as(values)])
            mid = stream + attended
            if after == "attn":
                mid[-len(values) :] += values
            stream = mid + self._parts.mlp(layer, stream, mid)
            if after == "mlp":
                stream[-len(values) :] += values
        assert stream is not None
        yield stream

    def _total(self, layer: int, change: Change) -> torch.Tensor:
        """The last position of the last resid_post [N, S, D] when everything after a change is recomputed."""
        last = self._length - 1
        first = change.first if layer < self.model.n_layers - 1 else torch.full_like(change.first, last)
        found = torch.empty_like(change.values[:, :, -1])
        for start in first.unique().tolist():
            rows = (first == start).nonzero()[:, 0]
            values = change.values[:, rows, start:]
            size = max(1, _TOKENS // (len(rows) * (last + 1 - start)))
            parts = [self._onwards(layer, change.after, part, rows, start) for part in values.split(size)]
            found[:, rows] = torch.cat(parts)
        return found

    def _onwards(self, layer: int, after: str, values: torch.Tensor, rows: torch.Tensor, start: int) -> torch.Tensor:
        """[n, s, D] for changes [n, s, L - start, D] of the sequences `rows` [s]."""
        n, s = values.shape[:2]
        if after == "mlp" or self._parts.parallel(layer):
            stream = self.clean[f"resid_post.{layer}"][rows, start:] + values
        else:
            mid = self.clean[f"resid_mid.{layer}"][rows, start:] + values
            stream = mid + self._parts.mlp(layer, mid, mid)
        stream = stream.flatten(0, 1)
        for above in range(layer + 1, self.model.n_layers):
            attended, _ = self._parts.attend(above, stream, self._before(above, rows, start, n))
            if above == self.model.n_layers - 1:
                stream, attended = stream[:, -1:], attended[:, -1:]
            mid = stream + attended
            stream = mid + self._parts.mlp(above, stream, mid)
        return stream[:, -1].unflatten(0, (n, s))

    def _before(self, layer: int, rows: torch.Tensor | slice, start: int, copies: int) -> Before:
        k, v = (self.clean[f"attn.{layer}.{site}"][rows, :start].repeat(copies, 1, 1, 1) for site in "kv")
        return Before(k, v)

    def _measured(self, resid: torch.Tensor) -> torch.Tensor:
        """Patched minus clean metrics [N, S, metrics] of resid_post [N, S, D] at the last position."""
        size = max(1, _UNEMBEDDED // resid.shape[1])
        logits = (self.model.unembed(part) for part in resid.split(size))
        return torch.stack([measure(one, self.task) - self.clean_metrics for part in logits for one in part])

    # Through receivers

    def _fast_to_receivers(self, ordered: list[Component], inputs: Sequence[str] | None) -> Iterator[Effect]:
        ordered = [receiver for receiver in ordered if receiver.layer > 0]
        if not ordered:
            return
        of_layer = {layer: list(group) for layer, group in groupby(ordered, key=lambda receiver: receiver.layer)}
        start = int(self._first.min())
        changes = (self._change(layer, "attn").values[:, :, start:] for layer in range(max(of_layer)))
        for layer, stream in enumerate(self._upwards("attn", changes)):
            below = [head for heads in self._heads()[:layer] for head in heads]
            size = max(1, _TOKENS // (stream.shape[1] * stream.shape[2]))
            for first in range(0, len(below) if layer in of_layer else 0, size):
                part = slice(first, first + size)
                read = self._read(layer, stream[part], start)
                for receiver in of_layer[layer]:
                    yield from self._through(receiver, read, below[part], start, inputs)

    def _through(
        self,
        receiver: Component,
        read: dict[str, torch.Tensor],
        senders: list[Component],
        start: int,
        inputs: Sequence[str] | None,
    ) -> Iterator[Effect]:
        for name, entries in self.input_choices(receiver, inputs).items():
            sites = {entry.site.split(".")[-1] for entry in entries}
            change = self._received(receiver, {site: read[site] for site in sites}, len(senders), start)
            found = self._measured(self._total(receiver.layer, change))
            for sender, values in zip(senders, found, strict=True):
                yield Effect(sender, receiver, "direct", values, None, name)

    def _read(self, layer: int, stream: torch.Tensor, start: int) -> dict[str, torch.Tensor]:
        """q [n, S, L - start, H, d], k and v [n, S, L, H_kv, d] of a layer that reads a stream [n, S, L - start, D]."""
        sites = [f"attn.{layer}.{site}" for site in "qkv"]
        before = self._before(layer, slice(None), start, len(stream))
        _, read = self._parts.attend(layer, stream.flatten(0, 1), before, capture=sites)
        return {site[-1]: value.unflatten(0, stream.shape[:2]) for site, value in read.items()}

    def _received(self, receiver: Component, read: dict[str, torch.Tensor], n: int, start: int) -> Change:
        """What `n` senders change by what a head reads, and all that share its keys and values if these are read."""
        assert receiver.head is not None
        layer = receiver.layer
        if layer == self.model.n_layers - 1:  # of the last layer only the last position is looked at
            start, read = self._length - 1, {site: x if site != "q" else x[:, :, -1:] for site, x in read.items()}
        clean = {site: self.clean[f"attn.{layer}.{site}"] for site in "qkvz"}
        shared = clean["q"].shape[2] // clean["k"].shape[2]
        of_group = receiver.head // shared
        group = slice(of_group * shared, (of_group + 1) * shared)
        q = clean["q"][:, start:, group].repeat(n, 1, 1, 1)
        if "q" in read:
            q[:, :, receiver.head - group.start] = read["q"][..., receiver.head, :].flatten(0, 1)
        k, v = (
            (read[site] if site in read else clean[site].expand(n, *clean[site].shape))[..., of_group, :].flatten(0, 1)
            for site in "kv"
        )
        k, v = (x[:, :, None].expand(-1, -1, shared, -1) for x in (k, v))
        z = self._parts.mix(layer, q, k, v).unflatten(0, (n, -1))
        written = self._parts.written(layer, z - clean["z"][:, start:, group], group.start).sum(0)
        values = written.new_zeros(n, len(clean["z"]), self._length, self.model.d_model)
        values[:, :, start:] = written
        return Change("attn", values, self._first)
