"""Edges of a model's graph: attributed (EAP, EAP-IG) and patched.

The residual stream is a sum of what writers added: embedding, heads, MLPs, state-space and RWKV mixers. A reader takes
in the stream at one place, and an edge u -> v is the share of u in it:

    reader                                  reads at
    attn.L.{q, k, v}, by head               resid_pre.L; k and v by the heads that share them
    mamba.L.{conv_in, gate}                 resid_pre.L; Mamba-2 also reads its step size there, mamba.L.delta
    rwkv.L.{r, k, v}                        resid_pre.L
    mlp.L.out                               resid_mid.L, or resid_pre.L in a parallel block
    logits                                  the last layer's resid_post

With g_v the gradient of the metric in the reader's input, the rest of the stream held still,

    score(u -> v) = (u' - u) . g_v          [S] for every edge, summed over positions

(EAP: Syed et al. 2023, arXiv 2310.10348; EAP-IG: Hanna et al. 2024, arXiv 2403.17806, with g_v the mean over the path
in attribution.py). g_v is exact: the gradient in the reader's own value is pulled back through norm, projection and
rotary embedding to the stream. u' - u is what changes in the stream, for a head through its rows of the output
projection.

Every use of a writer is some reader's, so at one gradient the scores of u's edges sum to u's score as a node. The one
exception is RWKV's embedding, which is normed before it enters the stream: as a writer it is what enters.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch

from universality.circuits.attribution import DIFFERENTIABLE, WRITERS, Values, along_path, check, components
from universality.circuits.component import LOGITS, Component
from universality.circuits.tasks.base import Task
from universality.models.language_model import LanguageModel
from universality.models.taps import Edit
from universality.runtime import progress


@dataclass(frozen=True)
class Graph:
    """U writers in the order in which they write, R readers in the order in which they read."""

    writers: list[Component]
    readers: list[Component]
    places: list[str]
    """The site of the stream at which each reader reads."""
    before: list[int]
    """How many of the writers have written by then: the first so many."""
    head_maps: dict[int, torch.Tensor]
    """layer -> what each head's values become in the stream [H, d_head, D]."""

    @property
    def exists(self) -> torch.Tensor:
        """Which edges there are [U, R]."""
        return torch.arange(len(self.writers))[:, None] < torch.tensor(self.before)[None, :]

    @property
    def sites(self) -> list[str]:
        """What has to be known of a run: readers' and writers' values and the stream."""
        inner = [c.site for c in (*self.writers, *self.readers) if c not in (LOGITS, Component("embed"))]
        outs = [f"attn.{layer}.out" for layer in self.head_maps]
        return list(dict.fromkeys([*inner, *outs, *self.places, "resid_pre.0", "resid_mid.0"]))


class EdgeAttribution(NamedTuple):
    """`scores` [S, U, R]: estimated effects of patching one edge, in units of the metric; 0 where there is none."""

    graph: Graph
    scores: torch.Tensor


def graph_of(model: LanguageModel) -> Graph:
    """The model's writers and readers."""
    writers = components(model, WRITERS)
    head_maps, mlp_place = _probe(model)
    readers: list[Component] = []
    places: list[str] = []
    before: list[int] = []
    for layer in range(model.n_layers):
        earlier = sum(writer.layer < layer for writer in writers)
        found = [(reader, f"resid_pre.{layer}", earlier) for reader in _inputs(model, layer)]
        if mlp_place is not None:
            mixed = sum(w.layer <= layer and w.site != f"mlp.{layer}.out" for w in writers)
            by_then = mixed if mlp_place == "resid_mid" else earlier
            found.append((Component(f"mlp.{layer}.out"), f"{mlp_place}.{layer}", by_then))
        for reader, place, count in found:
            readers.append(reader)
            places.append(place)
            before.append(count)
    last = f"resid_post.{model.n_layers - 1}"
    return Graph(writers, [*readers, LOGITS], [*places, last], [*before, len(writers)], head_maps)


def _inputs(model: LanguageModel, layer: int) -> list[Component]:
    """The readers of a layer's mixers."""
    kinds = ("attn.q", "attn.k", "attn.v")
    found = [c for c in components(model, kinds, embed=False) if c.layer == layer]
    found += [Component(f"rwkv.{layer}.{kind}") for kind in ("r", "k", "v")]
    found += [Component(f"mamba.{layer}.{kind}") for kind in ("conv_in", "gate")]
    if len(model.sites.get(f"mamba.{layer}.ssm_in", ())) == 4:  # heads: the step size is projected from the stream
        found.append(Component(f"mamba.{layer}.delta"))
    return [c for c in found if c.site in model.sites]


def _probe(model: LanguageModel) -> tuple[dict[int, torch.Tensor], str | None]:
    """What a run on one token tells: each layer's head map, and where MLPs read (None: there are none)."""
    attention = [n for n in range(model.n_layers) if f"attn.{n}.z" in model.sites]
    mlp = "mlp.0.out" in model.sites
    sites = [f"attn.{n}.{kind}" for n in attention for kind in ("z", "out")] + ["resid_mid.0"] + ["mlp.0.out"] * mlp
    with torch.inference_mode(False), torch.enable_grad():
        tokens = torch.zeros(1, 1, dtype=torch.long)
        found = model.run(tokens, sites, {"embed": lambda x: x.clone().requires_grad_()}, logits=False).captured
        unit = torch.eye(model.d_model, device=model.device, dtype=found["resid_mid.0"].dtype)[:, None, None]
        maps = {}
        for n in attention:
            z, out = found[f"attn.{n}.z"], found[f"attn.{n}.out"]
            (rows,) = torch.autograd.grad(out, z, unit, retain_graph=True, is_grads_batched=True)
            maps[n] = rows[:, 0, 0].permute(1, 2, 0)
        if not mlp:
            return maps, None
        (read,) = torch.autograd.grad(found["mlp.0.out"].sum(), found["resid_mid.0"], allow_unused=True)
    return maps, "resid_pre" if read is None else "resid_mid"


def edge_attribution(
    model: LanguageModel, task: Task, corruption: str, metric: str = "logit_diff", steps: int = 1, batch_size: int = 8
) -> EdgeAttribution:
    """Scores of all edges. `steps` = 1 is EAP, more EAP-IG.

    Memory, besides that of two runs over `batch_size` prompts with what their gradients need: every writer's change
    [batch, U, L, D]. Raises StudyError for an unknown corruption, a metric without a gradient, and no steps.
    """
    check(task, corruption, metric, DIFFERENTIABLE, steps)
    graph = graph_of(model)
    batches = progress(task.batches(batch_size), f"{task.name}, {corruption}: edges attributed, batches")
    parts = [_scores(model, graph, batch, corruption, metric, steps) for batch in batches]
    return EdgeAttribution(graph, torch.cat(parts))


def _scores(model: LanguageModel, graph: Graph, task: Task, corruption: str, metric: str, steps: int) -> torch.Tensor:
    fractions = [0.0, *(k / steps for k in range(steps, 0, -1))]  # the two prompts first, then what is between
    runs = along_path(model, task, corruption, metric, graph.sites, fractions)
    _, corrupted = next(runs)
    of_clean, clean = next(runs)
    change = (_written(graph, corrupted) - _written(graph, clean)).flatten(2)
    entered = (corrupted["resid_pre.0"] - clean["resid_pre.0"]).detach().flatten(1)
    del corrupted
    scores = change.new_zeros(*change.shape[:2], len(graph.readers))
    for value, captured in chain([(of_clean, clean)], runs):
        for r, gradient in _entering(graph, value, captured):
            gradient = gradient.flatten(1) / steps
            if graph.places[r] == "resid_pre.0":  # the embedding as it stands there
                scores[:, 0, r] += (entered * gradient).sum(1)
            else:
                scores[:, : graph.before[r], r] += torch.einsum("sux,sx->su", change[:, : graph.before[r]], gradient)
    return scores.cpu()


def _entering(graph: Graph, value: torch.Tensor, captured: Values) -> Iterator[tuple[int, torch.Tensor]]:
    """(reader, gradient of the metric in what it reads [S, L, D])."""
    own = {reader.site: captured[reader.site] for reader in graph.readers if reader != LOGITS}
    last = captured[graph.places[-1]]
    *found, at_logits = torch.autograd.grad(value, [*own.values(), last], retain_graph=True)
    gradients = dict(zip(own, found, strict=True))
    yield len(graph.readers) - 1, at_logits
    for r, (reader, place) in enumerate(zip(graph.readers[:-1], graph.places[:-1], strict=True)):
        gradient = gradients[reader.site]
        if reader.head is not None:
            gradient = gradient * (torch.arange(gradient.shape[2], device=gradient.device) == reader.head)[:, None]
        yield r, torch.autograd.grad(captured[reader.site], captured[place], gradient, retain_graph=True)[0]


def _written(graph: Graph, captured: Values) -> torch.Tensor:
    """What each writer adds to the stream [S, U, L, D], but for constants, which differences do not see."""
    captured = {site: value.detach() for site, value in captured.items()}
    return torch.stack([written_by(graph, writer, captured) for writer in graph.writers], 1)


def written_by(graph: Graph, writer: Component, values: Values) -> torch.Tensor:
    """[S, L, D] of one writer; of the embedding what is in the stream before layer 0 has added to it."""
    if writer.site == "embed":
        mixed = (values[site] for site in ("attn.0.out", "mamba.0.out", "rwkv.0.out") if site in values)
        return values["resid_mid.0"] - sum(mixed)
    if writer.head is None:
        return values[writer.site]
    return values[writer.site][:, :, writer.head] @ graph.head_maps[writer.layer][writer.head]


class EdgePatching:
    """Runs of a batch in which cut edges carry what they do in the corrupted run, and all others what they do now.

    A reader's input is the stream with u' - u added for every cut edge from a writer u, where u is its value in this
    very run. Readers of one layer have inputs of their own, so each is given a copy of the prompts whose stream is set
    to its input; its value is moved from there into the main copy, whose writers go on. A run costs as many copies as
    a layer has readers, and one more.
    """

    def __init__(self, model: LanguageModel, graph: Graph, task: Task, corruption: str):
        self.model, self.graph, self.task = model, graph, task
        clean = model.run(task.clean, capture=graph.sites, logits=False).captured
        self.corrupted = model.run(task.corrupted[corruption], capture=graph.sites, logits=False).captured
        corrupted_embed, clean_embed = (written_by(graph, graph.writers[0], x) for x in (self.corrupted, clean))
        self.embed = corrupted_embed - clean_embed
        layers = [reader.layer for reader in graph.readers]
        self.copy_of = [1 + layers[:r].count(layer) for r, layer in enumerate(layers[:-1])] + [0]
        """Which copy each reader reads in; the logits are the main one's."""

    def logits(self, keep: torch.Tensor) -> torch.Tensor:
        """Logits [S, V] at the last position, all edges cut but those of `keep` [U, R]."""
        tokens = self.task.clean.repeat(1 + max(self.copy_of), 1)
        run = _CutRun(self, keep.bool())
        return self.model.run_to_last(tokens, edits=run.edits()).logits[: len(self.task.clean)]


class _CutRun:
    """The edits of one run; `change[u]` is u' - u [S, L, D], filled in as writers write."""

    def __init__(self, patching: EdgePatching, keep: torch.Tensor):
        self.graph, self.corrupted, self.keep = patching.graph, patching.corrupted, keep
        self.copy_of = patching.copy_of
        self.change = torch.zeros(len(self.graph.writers), *patching.embed.shape).to(patching.embed)
        self.change[0] = patching.embed

    def edits(self) -> dict[str, Edit]:
        """An edit for each place where the stream is read, and for each reader's and writer's value."""
        components = (*self.graph.readers[:-1], *self.graph.writers[1:])
        found: dict[str, Edit] = {place: partial(self._set_inputs, place) for place in self.graph.places}
        return found | {component.site: partial(self._pass_on, component.site) for component in components}

    def _set_inputs(self, place: str, value: torch.Tensor) -> torch.Tensor:
        copies = value.unflatten(0, (-1, self.change.shape[1])).clone()
        readers = [r for r, at in enumerate(self.graph.places) if at == place]
        stream, into = copies[0].clone(), [self.copy_of[r] for r in readers]
        if place == "resid_pre.0":
            cut = ~self.keep[0, readers].to(stream.device)
            copies[into] = torch.where(cut[:, None, None, None], self.corrupted[place], stream)
        else:
            before = self.graph.before[readers[0]]  # a place is read after the same writers
            cut = (~self.keep[:before, readers]).to(stream)
            copies[into] = stream + torch.tensordot(cut.T, self.change[:before], 1)
        return copies.flatten(0, 1)

    def _pass_on(self, site: str, value: torch.Tensor) -> torch.Tensor:
        copies = value.unflatten(0, (-1, self.change.shape[1])).clone()
        for r, reader in enumerate(self.graph.readers):
            if reader.site == site:
                head = slice(None) if reader.head is None else slice(reader.head, reader.head + 1)
                copies[0, :, :, head] = copies[self.copy_of[r], :, :, head]
        for u, writer in enumerate(self.graph.writers):
            if writer.site == site:
                now = written_by(self.graph, writer, {site: copies[0]})
                self.change[u] = written_by(self.graph, writer, self.corrupted) - now
        return copies.flatten(0, 1)
