"""How alike the circuits of two models are, from their graphs alone."""

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from scipy.stats import wasserstein_distance

from universality.circuits.roles import ROLES, InductionGraph, Node, graph_of_dict
from universality.storage import read_json, write_table


class Similarity(NamedTuple):
    """`score` is the mean of the other two; all are within [0, 1]."""

    score: float
    depths: float
    edges: float


def similarity(a: InductionGraph, b: InductionGraph) -> Similarity | None:
    """How alike two models' circuits are; None if one has none, since there is nothing to be like.

    `depths`: for each role that both have, 1 - the Wasserstein distance of the relative depths of its components,
    weighted by their shares, each side's to sum 1; 0 for a role that one alone has. The mean over roles weights each by
    the larger of its two total shares.

    `edges`: shares are summed by kind (Edge.kind); the sum over kinds of the smaller sum, over that of the larger.

    Both are 1 for a graph with itself, and symmetric. Inputs (q, k, v, taps) are not compared, for families have
    different ones. Chance is not 0: two depths drawn uniformly are 1/3 apart in the mean, which makes `depths` 2/3. In
    a model of few layers depths are coarse, and in one of a single layer 0. A component just below `min_share` in one
    model and just above it in the other counts as missing; intervals tell which are near.
    """
    if not a.having("inducer") or not b.having("inducer"):
        return None
    weights, alike = [], []
    for role in ROLES:
        sides = [[node for node in graph.nodes if node.role == role] for graph in (a, b)]
        weights.append(max(sum(node.share.value for node in nodes) for nodes in sides))
        alike.append(1 - _distance(*sides) if all(sides) else 0.0)
    depths = float(np.average(alike, weights=weights))
    kinds = [_by_kind(graph) for graph in (a, b)]
    sums = [[by_kind.get(kind, 0.0) for by_kind in kinds] for kind in sorted(kinds[0] | kinds[1])]
    larger = sum(map(max, sums))
    edges = sum(map(min, sums)) / larger if larger else 1.0  # neither has any: nodes are all there is
    return Similarity((depths + edges) / 2, depths, edges)


def _distance(a: list[Node], b: list[Node]) -> float:
    depths = ([node.depth for node in side] for side in (a, b))
    shares = ([node.share.value for node in side] for side in (a, b))
    return float(wasserstein_distance(*depths, *shares))


def _by_kind(graph: InductionGraph) -> dict[str, float]:
    found: dict[str, float] = {}
    for edge in graph.edges:
        found[edge.kind] = found.get(edge.kind, 0.0) + edge.share.value
    return found


def write_similarity(graphs: list[Path], out: Path) -> None:
    """A row for each two models of a task: how alike their graphs are; missing where one has none."""
    read = {path.parent.name: graph_of_dict(read_json(path)) for path in graphs}
    rows = [(a, b, similarity(read[a], read[b])) for a, b in itertools.combinations(read, 2)]
    columns = {"model": [a for a, _, _ in rows], "other": [b for _, b, _ in rows]}
    table = {name: pa.array(values, pa.string()) for name, values in columns.items()}
    for name in Similarity._fields:
        values = [None if found is None else getattr(found, name) for _, _, found in rows]
        table[name] = pa.array(values, pa.float64())
    write_table(out, pa.table(table))
