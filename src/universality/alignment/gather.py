"""A comparison put together from its parts: every feature's partners over all layers, and what follows from them."""

from typing import NamedTuple

import numpy as np

from universality.alignment.assignment import one_to_one
from universality.alignment.null import critical, p_values, significant
from universality.alignment.settings import Matching, Statistics
from universality.alignment.sides import ModelSide, null_features
from universality.alignment.top import Best, Found, put_together


class Direction(NamedTuple):
    """All features of one side, layer after layer, and their partners on the other side.

    `layer`, `feature` [n]: which; `best`: their partners, layers by place; `frequency` [n]; `null_of` [n']: the places
    of the features that the null was computed for; `p`, `found`, `critical` [n]: p-value, whether it is matched at the
    false discovery rate, from which correlation on it would be; `mutual` [n]: whether its best partner's best partner
    is the feature itself; `assigned` [n]: place of its one-to-one partner among the other side's features, or -1;
    `assigned_r` [n].
    """

    layer: np.ndarray
    feature: np.ndarray
    best: Best
    frequency: np.ndarray
    null_of: np.ndarray
    p: np.ndarray
    found: np.ndarray
    critical: np.ndarray
    mutual: np.ndarray
    assigned: np.ndarray
    assigned_r: np.ndarray

    @property
    def mppc(self) -> np.ndarray:
        return self.best.r[:, 0]


class Nearest(NamedTuple):
    """Of each of a layer's features [n] the best partner in one layer of the other side, or -1; their correlation."""

    partner: np.ndarray
    r: np.ndarray


def nearest(found: dict[tuple[str, int, int], Found]) -> dict[tuple[str, int, int], Nearest]:
    """What pairs of layers are asked for later: a small part of what was found, which need not be held for it."""
    return {key: Nearest(one.partner[:, 0].copy(), one.r[:, 0].copy()) for key, one in found.items()}


def gather(
    found: dict[tuple[str, int, int], Found],
    a: ModelSide,
    b: ModelSide,
    half: int,
    frequency: tuple[dict[int, np.ndarray], dict[int, np.ndarray]],
    matching: Matching,
    statistics: Statistics,
) -> tuple[Direction, Direction]:
    """`frequency`: layer -> share of the tokens where each feature fires, of side a, of side b."""
    bests = (
        [put_together([found["a", x, y] for y in b.numbers], half) for x in a.numbers],
        [put_together([found["b", x, y] for x in a.numbers], half) for y in b.numbers],
    )
    both = [_stacked(parts) for parts in bests]
    starts = [np.cumsum([0, *(len(f) for f in fs.values())]) for fs in frequency]
    places = [_places(both[side], starts[1 - side]) for side in (0, 1)]
    partner_of_a, weight = _assign(both, places, [int(s[-1]) for s in starts])
    partner_of_b = np.full(starts[1][-1], -1, dtype=np.int64)
    matched = np.flatnonzero(partner_of_a >= 0)
    partner_of_b[partner_of_a[matched]] = matched
    assigned = (partner_of_a, weight), (partner_of_b, np.where(partner_of_b >= 0, weight[partner_of_b], np.nan))
    directions = []
    for side, model in enumerate((a, b)):
        best, own = both[side], frequency[side]
        firing = np.concatenate(list(own.values()))
        drawn = (null_features(matching, side, number, len(f)) for number, f in own.items())
        null_of = np.concatenate([start + features for start, features in zip(starts[side], drawn, strict=False)])
        null = (best.null_r, firing[null_of], statistics.null_neighbours)
        p = p_values(best.r[:, 0], firing, *null)
        is_found, level = significant(p, statistics.false_discovery_rate)
        back = places[1 - side][places[side][:, 0], 0]
        directions.append(
            Direction(
                np.repeat(np.array(model.numbers, dtype=np.int32), np.diff(starts[side])),
                np.concatenate([np.arange(len(f), dtype=np.int32) for f in own.values()]),
                best, firing, null_of, p, is_found, critical(level, firing, *null),
                (places[side][:, 0] >= 0) & (back == np.arange(len(firing))), *assigned[side],
            )
        )  # fmt: skip
    return directions[0], directions[1]


def _stacked(parts: list[Best]) -> Best:
    """Over the side's own layers."""
    along = {"prefix_r": 1, "null_r": 1, "null_partner": 1, "null_layer": 1}
    return Best(*(np.concatenate([getattr(p, n) for p in parts], axis=along.get(n, 0)) for n in Best._fields))


def _places(best: Best, starts: np.ndarray) -> np.ndarray:
    """Partners [n, m] as places among all features of the other side, or -1."""
    return np.where(best.partner >= 0, starts[best.layer] + best.partner, -1)


def _assign(both: list[Best], places: list[np.ndarray], sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """One-to-one partners [n_a] of side a on the graph of both sides' best partners, and their correlations."""
    edges = []
    for side in (0, 1):
        own, rank = np.nonzero(places[side] >= 0)
        ends = own, places[side][own, rank]
        edges.append((ends[side], ends[1 - side], both[side].r[own, rank]))
    a, b, r = (np.concatenate(x) for x in zip(*edges, strict=True))
    partner = one_to_one(a, b, r, *sizes)
    # Correlations of the edges chosen, looked up by (a, b).
    key, order = a * sizes[1] + b, np.argsort(a * sizes[1] + b, kind="stable")
    matched = np.flatnonzero(partner >= 0)
    weight = np.full(sizes[0], np.nan)
    weight[matched] = r[order][np.searchsorted(key[order], matched * sizes[1] + partner[matched])]
    return partner, weight
