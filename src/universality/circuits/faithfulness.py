"""Does a circuit that attribution names do the work? Circuits are run, and scores are set against measured effects.

A circuit C is the n components or edges with the largest absolute mean score. Everything else takes the value it has in
the corrupted run; the prompt's own embedding is always there. With m the metric's mean over prompts and M the model,

    faithfulness(n) = (m(C) - m(corrupted)) / (m(clean) - m(corrupted))
    completeness(n) = (m(M without C) - m(corrupted)) / (m(clean) - m(corrupted))

The first is 1 where the circuit does all that the model does (Hanna et al. 2024, arXiv 2403.17806: normalised
faithfulness); it leaves [0, 1] where what is left out works against the rest. The second corrupts the circuit alone: 0
where nothing outside it does its work too (Wang et al. 2022, arXiv 2211.00593, section 4: completeness, of the whole
circuit). Both are undefined, nan, where clean and corrupted prompts have the same mean. `area` is a curve's mean height
over the grid, by trapezoids on a linear axis of n.

At n = 0 a circuit of edges is the corrupted run. One of components is the corrupted run but for what the embedding at
the last position itself tells the logits: nothing where prompts end alike. Scores and circuits of the same prompts
agree better than those of others: rank on one half and run the other.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, groupby, pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from scipy.stats import rankdata

from universality.circuits.attribution import WRITERS, check, components
from universality.circuits.columns import METRICS
from universality.circuits.component import Component
from universality.circuits.edges import EdgePatching, Graph
from universality.circuits.metrics import measure
from universality.circuits.path_patching import replace
from universality.circuits.tasks.base import Task
from universality.errors import StudyError
from universality.models.language_model import LanguageModel
from universality.models.taps import Edit
from universality.runtime import progress

Item = TypeVar("Item")


class Curve(NamedTuple):
    """Metrics of each prompt: of circuits [S, sizes], of the model without them, of whole runs [S]."""

    sizes: tuple[int, ...]
    circuit: np.ndarray
    without: np.ndarray
    clean: np.ndarray
    corrupted: np.ndarray


class Estimate(NamedTuple):
    """A value with the ends of its interval, all of one shape."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def node_curve(
    model: LanguageModel,
    task: Task,
    corruption: str,
    scores: torch.Tensor,
    sizes: Sequence[int],
    metric: str = "logit_diff",
    batch_size: int = 16,
) -> Curve:
    """Circuits of what writes to the stream. `scores` [N] are those of `components(model, WRITERS, embed=False)`.

    Raises StudyError for sizes that do not ascend within 0 .. N, scores of another shape and unknown names.
    """
    nodes = components(model, WRITERS, embed=False)
    sites = list(dict.fromkeys(node.site for node in nodes))
    circuits = _circuits(scores, torch.ones(len(nodes), dtype=torch.bool), sizes)

    def runner(batch: Task) -> Callable[[torch.Tensor], torch.Tensor]:
        corrupted = model.run(batch.corrupted[corruption], capture=sites, logits=False).captured
        return lambda keep: model.run_to_last(batch.clean, edits=_cut(nodes, keep, corrupted)).logits

    return _curve(model, task, corruption, tuple(sizes), circuits, metric, batch_size, runner, "components")


def edge_curve(
    model: LanguageModel,
    graph: Graph,
    task: Task,
    corruption: str,
    scores: torch.Tensor,
    sizes: Sequence[int],
    metric: str = "logit_diff",
    batch_size: int = 4,
) -> Curve:
    """Circuits of edges. `scores` [U, R] are those of the graph's; sizes are within 0 .. the number of edges there are.

    A run costs as much as one of `batch_size` times the readers of a layer. Raises StudyError as `node_curve`.
    """
    circuits = _circuits(scores, graph.exists, sizes)

    def runner(batch: Task) -> Callable[[torch.Tensor], torch.Tensor]:
        return EdgePatching(model, graph, batch, corruption).logits

    return _curve(model, task, corruption, tuple(sizes), circuits, metric, batch_size, runner, "edges")


def _circuits(scores: torch.Tensor, exists: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """What to keep in each run: the circuit of each size, then all there is but the circuit, of each size."""
    if scores.shape != exists.shape:
        raise StudyError(f"scores: have shape {tuple(scores.shape)}, the circuit's parts have {tuple(exists.shape)}")
    count, ascending = int(exists.sum()), all(a < b for a, b in pairwise(sizes))
    if not sizes or not ascending or sizes[0] < 0 or sizes[-1] > count:
        raise StudyError(f"sizes: {list(sizes)} do not ascend within 0 .. {count}")
    circuits = [_largest(scores, exists, size) for size in sizes]
    return [*circuits, *(exists & ~circuit for circuit in circuits)]


def _curve(
    model: LanguageModel,
    task: Task,
    corruption: str,
    sizes: tuple[int, ...],
    circuits: list[torch.Tensor],
    metric: str,
    batch_size: int,
    runner: Callable[[Task], Callable[[torch.Tensor], torch.Tensor]],
    what: str,
) -> Curve:
    """`runner`: batch -> (what to keep -> logits [S, V])."""
    check(task, corruption, metric, METRICS)
    parts = []
    with torch.inference_mode():
        for batch, kept in _with_runs(
            task.batches(batch_size), circuits, f"{task.name}, {corruption}: circuits of {what}"
        ):
            run = runner(batch)
            whole = (model.run_to_last(prompts).logits for prompts in (batch.clean, batch.corrupted[corruption]))
            parts.append(_metric(chain(whole, map(run, kept)), batch, metric))
    values = torch.cat(parts).double().cpu().numpy()
    circuit, without = np.split(values[:, 2:], 2, axis=1)
    return Curve(sizes, circuit, without, values[:, 0], values[:, 1])


def _with_runs(batches: list[Task], runs: list[Item], what: str) -> Iterator[tuple[Task, Iterator[Item]]]:
    """Every batch with its runs, which count as they are taken."""
    pairs = progress([(n, run) for n in range(len(batches)) for run in runs], f"{what}, runs")
    for n, group in groupby(pairs, key=lambda pair: pair[0]):
        yield batches[n], (run for _, run in group)


def _metric(logits: Iterable[torch.Tensor], batch: Task, metric: str) -> torch.Tensor:
    """Of each run [S, runs]; no more than one run's logits are held."""
    return torch.stack([measure(one, batch)[:, METRICS.index(metric)] for one in logits], 1)


def _largest(scores: torch.Tensor, exists: torch.Tensor, size: int) -> torch.Tensor:
    """Which are the `size` largest by magnitude among those that exist; of equal ones the first."""
    strength = scores.abs().where(exists, -torch.inf).flatten()
    chosen = torch.zeros(strength.shape, dtype=torch.bool)
    chosen[torch.argsort(strength, descending=True, stable=True)[:size]] = True
    return chosen.view(scores.shape)


def _cut(nodes: list[Component], keep: torch.Tensor, corrupted: dict[str, torch.Tensor]) -> dict[str, Edit]:
    """Edits that put the corrupted value in everywhere but at the nodes to keep."""
    cut: dict[str, list[int | None]] = {}
    for node in (node for node, kept in zip(nodes, keep.tolist(), strict=True) if not kept):
        cut.setdefault(node.site, []).append(node.head)

    def edit(site: str, value: torch.Tensor) -> torch.Tensor:
        for head in cut[site]:
            value = replace(Component(site, head), corrupted[site])(value)
        return value

    return {site: partial(edit, site) for site in cut}


def patched_effects(
    model: LanguageModel,
    task: Task,
    corruption: str,
    nodes: Iterable[Component],
    metric: str = "logit_diff",
    batch_size: int = 16,
) -> torch.Tensor:
    """What attribution estimates: patched minus clean [S, nodes], each node alone corrupted, all after it recomputed.

    A run for each node: path patching's total effects, of any site. mamba.L.state@-1 stands for its writes.
    """
    nodes = list(nodes)
    check(task, corruption, metric, METRICS)
    parts = []
    with torch.inference_mode():
        for batch, patched in _with_runs(
            task.batches(batch_size), nodes, f"{task.name}, {corruption}: components patched"
        ):
            sites = list(dict.fromkeys(node.site for node in nodes))
            corrupted = model.run(batch.corrupted[corruption], capture=sites, logits=False).captured
            edits = ({node.site: replace(node, corrupted[node.site])} for node in patched)
            logits = (model.run_to_last(batch.clean, edits=edit).logits for edit in chain([{}], edits))
            values = _metric(logits, batch, metric)
            parts.append(values[:, 1:] - values[:, :1])
    return torch.cat(parts).cpu()


def draws(prompts: int, samples: int, seed: int) -> np.ndarray:
    """Prompts of each bootstrap sample [samples, prompts], for `faithfulness`, `completeness`, `area`, `agreement`."""
    return np.random.default_rng(seed).integers(0, prompts, size=(samples, prompts))


def faithfulness(curve: Curve, drawn: np.ndarray, confidence: float) -> Estimate:
    """Of each size [sizes]; clean and corrupted means are resampled with the circuit's."""
    return interval(_share(curve, curve.circuit, drawn), confidence)


def completeness(curve: Curve, drawn: np.ndarray, confidence: float) -> Estimate:
    """Of each size [sizes]: what is left of the effect without the circuit."""
    return interval(_share(curve, curve.without, drawn), confidence)


def area(curve: Curve, drawn: np.ndarray, confidence: float) -> Estimate:
    """The mean heights of the two curves [2], faithfulness and completeness. Raises StudyError if there is one size."""
    if len(curve.sizes) < 2:
        raise StudyError(f"sizes: {list(curve.sizes)} span no area; at least two are needed")
    both = [np.trapezoid(_share(curve, part, drawn), curve.sizes, axis=1) for part in (curve.circuit, curve.without)]
    return interval(np.stack(both, 1) / (curve.sizes[-1] - curve.sizes[0]), confidence)


def _share(curve: Curve, values: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Of all prompts and then of each sample [1 + samples, sizes]."""
    drawn = np.concatenate([np.arange(len(values))[None, :], drawn])
    mean, clean, corrupted = (x[drawn].mean(1) for x in (values, curve.clean, curve.corrupted))
    gap = np.where(clean == corrupted, np.nan, clean - corrupted)
    return (mean - corrupted[:, None]) / gap[:, None]


def agreement(scores: torch.Tensor, effects: torch.Tensor, k: int, drawn: np.ndarray, confidence: float) -> Estimate:
    """How well scores [S, N] tell measured effects [S, N], both averaged over prompts: [2].

    First Spearman's correlation of the signed means over components, nan where one side is constant; then the share of
    the k largest effects by magnitude that is among the k largest scores. Intervals resample prompts, not components.
    """
    count = scores.shape[1]
    if not 1 <= k <= count:
        raise StudyError(f"k: {k} is not in 1 .. {count}, the number of components")
    drawn = np.concatenate([np.arange(len(scores))[None, :], drawn])
    estimated, measured = (x.double().numpy()[drawn].mean(1) for x in (scores, effects))
    ranks = [rankdata(x, axis=1) for x in (estimated, measured)]
    a, b = (x - x.mean(1, keepdims=True) for x in ranks)
    scale = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    spearman = (a * b).sum(1) / np.where(scale > 0, scale, np.nan)
    top = [np.argsort(-np.abs(x), axis=1, kind="stable")[:, :k] for x in (estimated, measured)]
    shared = (top[0][:, :, None] == top[1][:, None, :]).any(2).mean(1)
    return interval(np.stack([spearman, shared], 1), confidence)


def interval(values: np.ndarray, confidence: float) -> Estimate:
    """The first row with quantiles of the others; samples for which there is no value are left out."""
    tail = (1 - confidence) / 2
    resampled = values[1:]
    defined = ~np.isnan(resampled).all(0)
    ends = np.full((2, values.shape[1]), np.nan)
    ends[:, defined] = np.nanquantile(resampled[:, defined], [tail, 1 - tail], axis=0)
    return Estimate(values[0], *ends)
