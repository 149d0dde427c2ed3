"""What gradients say of components and edges (attribution.parquet, edges.parquet), and whether circuits of the largest
do the task (curves.parquet)."""

from pathlib import Path

import numpy as np
import torch

from universality.circuits.attribution import WRITERS, Attribution, components, node_attribution
from universality.circuits.circuit import Circuit
from universality.circuits.columns import ENDS
from universality.circuits.edges import EdgeAttribution, edge_attribution
from universality.circuits.faithfulness import (
    Curve,
    agreement,
    area,
    completeness,
    draws,
    edge_curve,
    faithfulness,
    node_curve,
    patched_effects,
)
from universality.circuits.settings import Attributing
from universality.circuits.statistics import interval, shares_drawn

_TOP = 5  # effects of which attribution should name the largest
_SCORES = tuple(f"score{end}" for end in ENDS)
_EDGE = ("corruption", "writer", "layer", "head", "reader", "reader_layer", "reader_head")


def write_attribution(circuit: Circuit, settings: Attributing, folder: Path) -> None:
    """attribution, edges and curves.parquet; without rows of a model that fails the task."""
    nodes: list[dict] = []
    edges: list[dict] = []
    heights: list[dict] = []
    if circuit.passes:
        nodes, heights = _nodes(circuit, settings)
        edges, of_edges = _edges(circuit, settings)
        heights += of_edges
    place = ("corruption", "component", "layer", "head", "position")
    circuit.write(nodes, folder / "attribution.parquet", (*place, *_SCORES))
    circuit.write(edges, folder / "edges.parquet", (*_EDGE, *_SCORES))
    circuit.write(heights, folder / "curves.parquet", ("curve", "size", "value", "low", "high"))


def _nodes(circuit: Circuit, settings: Attributing) -> tuple[list[dict], list[dict]]:
    """A row for each component at all positions together and at each of the task's places; rows of its curves."""
    model, task, corruption, size = circuit.model, circuit.task, circuit.corruption, circuit.settings.batch_size
    found = node_attribution(model, task, corruption, steps=settings.steps, batch_size=size)
    rows = _node_rows(circuit, found, found.total, None)
    for name, place in task.positions.items():
        rows += _node_rows(circuit, found, found.at(place), name)
    writers = components(model, WRITERS, embed=False)
    totals = found.of(writers).total
    sizes = [n for n in settings.sizes if n <= len(writers)]
    curve = node_curve(model, task, corruption, totals.mean(0), sizes, batch_size=size)
    measured = patched_effects(model, task, corruption, writers, batch_size=size)
    heights = _curve_rows(curve, circuit.drawn, circuit.settings.confidence, "")
    return rows, heights + _agreement_rows(circuit, totals, measured)


def _node_rows(circuit: Circuit, found: Attribution, scores: torch.Tensor, position: str | None) -> list[dict]:
    """`scores` [S, components]."""
    return [
        {"corruption": circuit.corruption, "component": c.name, "layer": c.layer, "head": c.head, "position": position}
        | dict(zip(_SCORES, interval(values, circuit.shares, circuit.settings.confidence), strict=True))
        for c, values in zip(found.components, scores.double().numpy().T, strict=True)
    ]


def _edges(circuit: Circuit, settings: Attributing) -> tuple[list[dict], list[dict]]:
    """A row for each edge, and rows of the edges' curves; of the task's first prompts, as many as the settings say."""
    model, corruption, confidence = circuit.model, circuit.corruption, circuit.settings.confidence
    task = circuit.task.part(slice(0, settings.edge_prompts))
    found = edge_attribution(model, task, corruption, steps=settings.steps)
    drawn = draws(len(task.clean), circuit.settings.bootstrap_samples, circuit.settings.bootstrap_seed)
    rows, heights = _edge_rows(found, shares_drawn(drawn), confidence), []
    sizes = [n for n in settings.edge_sizes if n <= len(rows)]
    if len(sizes) > 1:
        curve = edge_curve(model, found.graph, task, corruption, found.scores.double().mean(0), sizes)
        heights = _curve_rows(curve, drawn, confidence, "edges, ")
    used = {"corruption": corruption, "prompts": len(task.clean)}
    return [row | used for row in rows], [row | used for row in heights]


def _edge_rows(found: EdgeAttribution, shares: np.ndarray, confidence: float) -> list[dict]:
    """The largest first."""
    graph = found.graph
    ends = graph.exists.nonzero().tolist()
    scores = interval(found.scores.double().numpy()[:, *graph.exists.numpy().nonzero()], shares, confidence)
    rows = []
    for n in np.argsort(-np.abs(scores[0]), kind="stable"):
        writer, reader = graph.writers[ends[n][0]], graph.readers[ends[n][1]]
        read = {"reader": reader.name, "reader_layer": reader.layer if reader.layer >= 0 else None}
        row = {"writer": writer.name, "layer": writer.layer, "head": writer.head, **read, "reader_head": reader.head}
        rows.append(row | {name: float(x[n]) for name, x in zip(_SCORES, scores, strict=True)})
    return rows


def _curve_rows(curve: Curve, drawn: np.ndarray, confidence: float, of: str) -> list[dict]:
    rows = []
    for name, estimate in (
        ("faithfulness", faithfulness(curve, drawn, confidence)),
        ("completeness", completeness(curve, drawn, confidence)),
    ):
        for size, value, low, high in zip(curve.sizes, estimate.value, estimate.low, estimate.high, strict=True):
            rows.append({"curve": f"{of}{name}", "size": size, "value": value, "low": low, "high": high})
    areas = area(curve, drawn, confidence)
    for k, name in enumerate(("faithfulness, area", "completeness, area")):
        rows.append({"curve": f"{of}{name}", "value": areas.value[k], "low": areas.low[k], "high": areas.high[k]})
    return rows


def _agreement_rows(circuit: Circuit, scores: torch.Tensor, measured: torch.Tensor) -> list[dict]:
    """Estimated against measured effects of what writes to the stream."""
    size = min(_TOP, scores.shape[1])
    found = agreement(scores, measured, size, circuit.drawn, circuit.settings.confidence)
    names = ("rank correlation with measured", scores.shape[1]), ("share of the largest", size)
    return [
        {"curve": name, "size": n, "value": found.value[k], "low": found.low[k], "high": found.high[k]}
        for k, (name, n) in enumerate(names)
    ]
