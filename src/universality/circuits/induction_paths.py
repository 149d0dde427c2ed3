"""Paths of the induction circuit, batch by batch: what induction_graph.py makes a model's graph of.

All effects are patched minus clean logit_diff [S] of one batch under one corruption (path_patching.py says how a path
is patched). Three kinds of path:

    carried     what a component that looks back (a head, the state that the last position reads, RWKV's time mix)
                brings to the last position: exchanged there alone, all after it recomputed
    from there  onwards at the last position: to the logits along the stream alone, every other mixer and MLP frozen;
                or into one later component, whose output is then put into a clean run
    moved       what reaches an inducer's inputs at other positions, from components below it (MLPs in between
                recompute), or by the inducer's own look back: a convolution's earlier taps, RWKV's token shift
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from universality.circuits.columns import METRICS
from universality.circuits.component import LOGITS, Component
from universality.circuits.head_paths import HeadPaths
from universality.circuits.metrics import measure
from universality.circuits.path_patching import Place, receiver_inputs, replace, senders
from universality.circuits.ssm_fast import ssm_patching
from universality.circuits.tasks.base import Task
from universality.models.language_model import LanguageModel
from universality.models.taps import Edit

Key = TypeVar("Key")
_METRIC = METRICS.index("logit_diff")
_LAST = [Place("last")]


class Way(NamedTuple):
    """From a source to a target: by which of its inputs, None: all of them."""

    source: Component
    target: Component
    by: str | None


def over_batches(
    task: Task, size: int, effects: Callable[[Task], Iterable[tuple[Key, torch.Tensor]]]
) -> dict[Key, np.ndarray]:
    """`effects` of all prompts [S], in double precision; the keys must be those of every batch."""
    parts: dict[Key, list[torch.Tensor]] = {}
    with torch.inference_mode():
        for batch in task.batches(size):
            for key, values in effects(batch):
                parts.setdefault(key, []).append(values)
    return {key: torch.cat(values).double().cpu().numpy() for key, values in parts.items()}


def whole_runs(model: LanguageModel, corruptions: Sequence[str], batch: Task) -> Iterator[tuple[str, torch.Tensor]]:
    """ "top1" of the clean prompts, and by how much each corruption changes the metric."""
    clean = measure(model.run_to_last(batch.clean).logits, batch)
    yield "top1", clean[:, METRICS.index("top1")]
    for name in corruptions:
        yield name, (measure(model.run_to_last(batch.corrupted[name]).logits, batch) - clean)[:, _METRIC]


def carried(model: LanguageModel, corruption: str, batch: Task) -> Iterator[tuple[Component, torch.Tensor]]:
    """Of every component that looks back."""
    if model.family.recurrence is not None:
        for effect in ssm_patching(model, batch, corruption).state_to_logits(["total"]):
            yield effect.sender, effect.values[:, _METRIC]
    if "attn.0.z" in model.sites or "rwkv.0.out" in model.sites:
        for effect in HeadPaths(model, batch, corruption).to_logits(positions=_LAST, paths=["total"]):
            if effect.sender.site.startswith(("attn", "rwkv")):
                yield effect.sender, effect.values[:, _METRIC]


def written_at_last(model: LanguageModel, corruption: str, batch: Task) -> Iterator[tuple[Component, torch.Tensor]]:
    """The total effect of what MLPs, and mixers other than attention, write at the last position, exchanged there."""
    paths = HeadPaths(model, batch, corruption)
    if model.family.parts is not None:
        effects = paths.mlp_to_logits(positions=_LAST, paths=["total"])
    else:
        effects = paths.outputs_to_logits(positions=_LAST, paths=["total"])
    return ((e.sender, e.values[:, _METRIC]) for e in effects if not e.sender.site.startswith("attn"))


def is_below(source: Component, target: Component) -> bool:
    """Can what the source writes at a position reach the target there?"""
    same = source.layer == target.layer and target.site.startswith("mlp") and not source.site.startswith("mlp")
    return source.layer < target.layer or same


def inherited(
    model: LanguageModel, corruption: str, sources: Sequence[Component], targets: Iterable[Component], batch: Task
) -> Iterator[tuple[Component, torch.Tensor]]:
    """Of each target the effect of what it makes at the last position where all sources below it are exchanged there;
    nothing of targets with no source below.
    """
    paths = _LastPosition(model, batch, corruption)
    for target in targets:
        below = [source for source in sources if is_below(source, target)]
        if below:
            yield target, paths.into(target, paths.exchanged(below))


def onwards(
    model: LanguageModel, corruption: str, sources: Sequence[Component], targets: Sequence[Component], batch: Task
) -> Iterator[tuple[Way, torch.Tensor]]:
    """From each source alone along the stream: to the logits, and into each target above it."""
    paths = _LastPosition(model, batch, corruption)
    for source in sources:
        alone = paths.alone(source)
        yield Way(source, LOGITS, "stream"), paths.effect(alone)
        for target in targets:
            if is_below(source, target):
                freed = {site: edit for site, edit in alone.items() if site != target.site}
                yield Way(source, target, "stream"), paths.into(target, freed)


class _Paths(HeadPaths):
    """Patched runs of one batch."""

    def effect(self, edits: dict[str, Edit]) -> torch.Tensor:
        logits = self.model.run_to_last(self.task.clean, edits=edits).logits
        return (measure(logits, self.task) - self.clean_metrics)[:, _METRIC]


class _LastPosition(_Paths):
    """Components exchanged at the last position alone."""

    @property
    def last(self) -> torch.Tensor:
        """[S]."""
        return torch.full((len(self.task.clean),), self.task.clean.shape[1] - 1, device=self.model.device)

    def put(self, component: Component, value: torch.Tensor) -> Edit:
        """A state at the last position has no other."""
        return replace(component, value, None if "@" in component.site else self.last)

    def exchanged(self, components: Iterable[Component]) -> dict[str, Edit]:
        """Edits that put in the corrupted values of all these."""
        edits: dict[str, Edit] = {}
        for component in components:
            edit = self.put(component, self.corrupted[component.site])
            earlier = edits.get(component.site)
            edits[component.site] = edit if earlier is None else partial(_both, earlier, edit)
        return edits

    def alone(self, source: Component) -> dict[str, Edit]:
        """The source exchanged, all other mixers and all MLPs at their clean outputs."""
        mlps = (f"mlp.{layer}.out" for layer in range(self.model.n_layers))
        frozen = {site: replace(Component(site), self.clean[site]) for site in mlps if site in self.model.sites}
        return frozen | self._sender_alone(source, None if "@" in source.site else self.last)

    def into(self, target: Component, edits: dict[str, Edit]) -> torch.Tensor:
        """The effect of what the target makes at the last position in a run with these edits."""
        seen = self.model.run(self.task.clean, capture=[target.site], edits=edits, logits=False).captured
        return self.effect({target.site: self.put(target, seen[target.site])})


def _both(first: Edit, second: Edit, value: torch.Tensor) -> torch.Tensor:
    return second(first(value))


def moved(
    model: LanguageModel, corruption: str, ways: Sequence[Way], batch: Task
) -> Iterator[tuple[Way, torch.Tensor]]:
    """Each of the ways from a mover through an inducer's input or inputs to the logits."""
    paths = _Movers(model, batch, corruption)
    states = [way for way in ways if "@" in way.target.site]
    yield from paths.through_taps(states)
    own = [way for way in ways if way.target.site.startswith("rwkv") and way.source == way.target]
    yield from paths.through_shift(own)
    others = set(ways) - set(states) - set(own)
    targets = list(dict.fromkeys(way.target for way in ways if way in others))
    inputs = list(dict.fromkeys(way.by for way in ways if way in others and way.by is not None))
    for effect in paths.to_receivers(targets, inputs) if targets else ():
        assert effect.receiver is not None
        way = Way(effect.sender, effect.receiver, effect.input)
        if way in others:
            yield way, effect.values[:, _METRIC]


def ways_into(model: LanguageModel, inducer: Component) -> list[Way]:
    """From every possible mover, through all inputs of the inducer: heads, state-space outputs and both mixes of RWKV
    in lower layers; then its own layer, if that can look back before it reads.
    """
    kinds = ("z", "y") if "rwkv.0.out" not in model.sites else ("out",)
    below = [c for c in senders(model) if c.layer < inducer.layer and c.site.split(".")[-1] in kinds]
    module = inducer.site.split(".")[0]
    own = {"mamba": [Component(f"mamba.{inducer.layer}.y")], "rwkv": [inducer]}.get(module, [])
    return [Way(source, inducer, None) for source in below + own]


def inputs_of(model: LanguageModel, way: Way) -> list[Way]:
    """The same way by each input apart: q, k, v; k, v of RWKV; or a convolution's tap so many positions back."""
    if "@" not in way.target.site:
        entries = receiver_inputs(model, way.target)
        return [way._replace(by=entry.site.split(".")[-1]) for entry in entries]
    taps = model.sites[_taps(way.target)][2]
    assert isinstance(taps, int)
    return [way._replace(by=_BACK.format(back)) for back in range(int(is_own(way)), taps)]


def is_own(way: Way) -> bool:
    """Does the inducer's layer itself look back?"""
    return way.source.layer == way.target.layer


_BACK = "conv {} back"


def _taps(inducer: Component) -> str:
    return f"mamba.{inducer.layer}.conv_taps"


class _Movers(_Paths):
    """Ways from movers to inducers that read through a convolution or a token shift."""

    def through_taps(self, ways: Sequence[Way]) -> Iterator[tuple[Way, torch.Tensor]]:
        sites = {_taps(way.target) for way in ways}
        clean = self.model.run(self.task.clean, capture=sites, logits=False).captured
        own = self._corrupted_alone(sites) if any(map(is_own, ways)) else {}
        by_source: dict[Component, list[Way]] = {}
        for way in ways:
            by_source.setdefault(way.source, []).append(way)
        for source, its_ways in by_source.items():
            below = [way for way in its_ways if not is_own(way)]
            seen = own
            if below:
                wanted = {_taps(way.target) for way in below}
                seen = self.model.run(
                    self.task.clean, capture=wanted, edits=self._sender_alone(source), logits=False
                ).captured
            for way in its_ways:
                values = (own if is_own(way) else seen)[_taps(way.target)]
                yield way, self._effect_of_taps(way, clean[_taps(way.target)], values)

    def through_shift(self, ways: Sequence[Way]) -> Iterator[tuple[Way, torch.Tensor]]:
        """RWKV's keys and values where A is no longer the position's own token, but the one before."""
        sites = {entry.site for way in ways for entry in receiver_inputs(self.model, way.target)}
        own = self._corrupted_alone(sites) if ways else {}
        same = (self.put_in == self.task.clean).to(self.model.device)[..., None]
        for way in ways:
            entries = [e.site for e in receiver_inputs(self.model, way.target) if way.by in (None, e.site[-1])]
            yield way, self.effect({site: partial(_where, same, own[site]) for site in entries})

    def _corrupted_alone(self, sites: Iterable[str]) -> dict[str, torch.Tensor]:
        """Values of sites where the corrupted tokens are seen, but all mixers' outputs are the clean ones."""
        frozen = {site: replace(Component(site), self.clean[site]) for site in self.frozen_sites}
        return self.model.run(self.put_in, capture=sites, edits=frozen, logits=False).captured

    def _effect_of_taps(self, way: Way, clean: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        back = torch.arange(clean.shape[2] - 1, -1, -1, device=clean.device)
        chosen = back >= int(is_own(way)) if way.by is None else back == int(way.by.split()[1])
        value = torch.where(chosen[:, None], seen, clean)
        return self.effect({_taps(way.target): replace(Component(_taps(way.target)), value)})


def _where(chosen: torch.Tensor, value: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
    return torch.where(chosen, value, current)
