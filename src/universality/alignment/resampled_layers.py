"""What one layer of a side and one of the other add to every resampled mean and share."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from universality.alignment.bootstrap import centred_interval, resample_weights
from universality.alignment.gather import Direction
from universality.alignment.layers import Layer
from universality.alignment.pairs import correlations, group_sums, influence, summed_influence
from universality.alignment.settings import Statistics
from universality.alignment.token_order import TokenOrder

_PAIRS = 512  # pairs of features whose sums are held at a time
Ratio = tuple[np.ndarray, np.ndarray]
"""Numerator and denominator [R]."""


class Added(NamedTuple):
    """`sums`: statistic -> (numerator, denominator) [R]. `layer` [G]: how the sum, over the layer's features, of the
    largest correlation within the other layer moves with each group of documents; `prefixes`: the same of the sum of
    MPPC on each prefix."""

    sums: dict[str, Ratio]
    layer: np.ndarray
    prefixes: list[np.ndarray]


class Asked(NamedTuple):
    """Pairs that something is asked of: features, by their place in the direction, and partners by number."""

    features: np.ndarray
    partners: np.ndarray


class Resampling:
    """What all pairs of layers of a direction have in common.

    `low`, `high` [n]: of each feature's MPPC, filled as pairs come. `depth_of`: places of the features of which the
    best of their partners is sought anew in each resample; `depth_r` [R, features, partners]: correlations with them.
    """

    def __init__(self, directions: tuple[Direction, Direction], side: int, order: TokenOrder, settings: Statistics):
        self.direction, self.across = directions[side], directions[1 - side]
        self.order, self.settings = order, settings
        self.sizes = np.diff(order.groups).astype(np.float64)
        self.weights = resample_weights(len(self.sizes), settings.bootstrap_samples, settings.bootstrap_seed)
        ends = np.searchsorted(order.groups[1:], order.cuts, side="right")
        self.prefix_ends = [int(end) for end in ends]  # a group that a prefix ends in is left out
        self.low, self.high = (np.full(len(self.direction.layer), np.nan) for _ in range(2))
        live = np.flatnonzero(~np.isnan(self.direction.mppc))
        size = min(settings.depth_features, len(live))
        drawn = np.random.default_rng([settings.bootstrap_seed, side]).choice(live, size, replace=False)
        self.depth_of = np.sort(drawn)
        shape = (settings.bootstrap_samples, size, self.direction.best.r.shape[1])
        self.depth_r = np.full(shape, -np.inf, dtype=np.float32)

    def best_layers(self) -> np.ndarray:
        """Place of the layer of the best partner of each of `depth_of` in each resample [R, features]."""
        best = self.depth_r.argmax(axis=2)
        return np.take_along_axis(self.direction.best.layer[self.depth_of][None], best[..., None], axis=2)[..., 0]

    def add(
        self, own: np.ndarray, other: int, layers: tuple[Layer, Layer], within: np.ndarray, rotations: np.ndarray
    ) -> Added:
        """`own`: places of a layer's features; `other`: place of the other layer; `layers`: both; `within` [own]: the
        best partner of each in that layer."""
        asked = self._asked(own, other, within)
        counts = _Counts(len(self.weights))
        each = {name: one for name, one in asked.items() if name not in ("layer", "heldout")}
        for sums, rows in _chunks(each, self.direction, layers, self.order):
            self._count(sums, rows, asked, counts)
            self._seek_depths(sums, rows, asked)
        n, first = len(self.sizes), self.order.first_measured_group
        held = np.zeros(n)
        held[first:] = self._moves(asked["heldout"], layers, 0, [(first, n)])[0]
        self._linear(counts, "heldout_mean", self.direction.best.heldout_r[asked["heldout"].features], held)
        self._null(own, other, layers, rotations, counts)
        self._alone(counts, own, other)
        [layer] = self._moves(asked["layer"], layers, 0, [(0, n)])
        return Added(counts.sums, layer, self._moves(asked["plain"], layers, 0, [(0, end) for end in self.prefix_ends]))

    def _moves(
        self, asked: Asked, layers: tuple[Layer, Layer], rotation: int, ranges: list[tuple[int, int]]
    ) -> list[np.ndarray]:
        """How the sum of the pairs' correlations, on the groups of each range, moves with each group."""
        pairs = self.direction.feature[asked.features].astype(np.int64), asked.partners.astype(np.int64)
        return summed_influence(*layers, *pairs, self.order, rotation, ranges)

    def _asked(self, own: np.ndarray, other: int, within: np.ndarray) -> dict[str, Asked]:
        d, best = self.direction, self.direction.best
        has_best = ~np.isnan(d.mppc[own]) & (within >= 0)
        plain = own[best.layer[own, 0] == other]
        heldout = own[(best.chosen_layer[own] == other) & ~np.isnan(best.heldout_r[own])]
        matched = own[~np.isnan(d.mppc[own]) & (d.assigned[own] >= 0)]
        matched = matched[self.across.layer[d.assigned[matched]] == np.unique(self.across.layer)[other]]
        asked = {
            "layer": Asked(own[has_best], within[has_best]),
            "plain": Asked(plain, best.partner[plain, 0]),
            "heldout": Asked(heldout, best.chosen[heldout]),
            "assigned": Asked(matched, self.across.feature[d.assigned[matched]]),
        }
        sampled = self.depth_of[np.isin(self.depth_of, own)]
        for rank in range(best.r.shape[1]):
            there = sampled[(best.layer[sampled, rank] == other) & (best.partner[sampled, rank] >= 0)]
            asked[f"depth {rank}"] = Asked(there, best.partner[there, rank])
        return asked

    def _count(self, sums: np.ndarray, rows: dict[str, tuple], asked: dict[str, Asked], counts: "_Counts") -> None:
        """What needs every pair's own correlation in every resample."""
        columns = np.unique(np.concatenate([rows[name][1] for name in ("plain", "assigned")]))
        r = correlations(sums[:, :, columns], self.sizes, self.weights)

        def of(name: str) -> tuple[np.ndarray, np.ndarray]:
            which, column = rows[name]
            return asked[name].features[which], r[:, np.searchsorted(columns, column)]

        self._count_plain(*of("plain"), counts)
        features, r_assigned = of("assigned")
        for t in self.settings.thresholds:
            counts.add(f"one_to_one_{t}", (np.nan_to_num(r_assigned) >= t).sum(axis=1), len(features))

    def _seek_depths(self, sums: np.ndarray, rows: dict[str, tuple], asked: dict[str, Asked]) -> None:
        """Correlations with every partner kept, to first order."""
        best = self.direction.best
        for rank in range(best.r.shape[1]):
            which, columns = rows[f"depth {rank}"]
            features = asked[f"depth {rank}"].features[which]
            moved = (self.weights - 1) @ influence(sums[:, :, columns], self.sizes)
            self.depth_r[:, np.searchsorted(self.depth_of, features), rank] = best.r[features, rank] + moved

    def _count_plain(self, features: np.ndarray, r: np.ndarray, counts: "_Counts") -> None:
        d = self.direction
        self.low[features], self.high[features] = centred_interval(d.mppc[features], r, self.settings.confidence)
        live = ~np.isnan(r)
        n, filled = live.sum(axis=1), np.where(live, r, 0.0)
        above = live & (filled >= d.critical[features])
        counts.add("mean", filled.sum(axis=1), n)
        counts.add("weighted_mean", filled @ d.frequency[features], live @ d.frequency[features])
        counts.add("share_matched", above.sum(axis=1), n)
        counts.add("share_mutual", (above & d.mutual[features]).sum(axis=1), n)
        for t in self.settings.thresholds:
            counts.add(f"share_{t}", (filled >= t).sum(axis=1), n)

    def _null(self, own: np.ndarray, other: int, layers, rotations: np.ndarray, counts: "_Counts") -> None:
        null_of, best = self.direction.null_of, self.direction.best
        here = np.isin(null_of, own)
        for k, rotation in enumerate(rotations):
            places = np.flatnonzero(here & (best.null_layer[k] == other) & ~np.isnan(best.null_r[k]))
            asked = Asked(null_of[places], best.null_partner[k, places])
            [moves] = self._moves(asked, layers, int(rotation), [(0, len(self.sizes))])
            self._linear(counts, "null_mean", best.null_r[k, places], moves)

    def _linear(self, counts: "_Counts", statistic: str, r: np.ndarray, moves: np.ndarray) -> None:
        """A mean of correlations r, to first order in how often groups are drawn."""
        counts.add(statistic, r.sum() + (self.weights - 1) @ moves, len(r))

    def _alone(self, counts: "_Counts", own: np.ndarray, other: int) -> None:
        """Live features without a one-to-one partner count too, once."""
        d = self.direction
        live = own[~np.isnan(d.mppc[own])]
        alone = int((d.assigned[live] < 0).sum()) if other == 0 else 0
        for t in self.settings.thresholds:
            counts.add(f"one_to_one_{t}", 0.0, alone)


class _Counts:
    """Numerators and denominators that grow."""

    def __init__(self, resamples: int):
        self._resamples = resamples
        self.sums: dict[str, Ratio] = {}

    def add(self, statistic: str, numerator: np.ndarray | float, denominator: np.ndarray | float) -> None:
        before = self.sums.get(statistic, (np.zeros(self._resamples), np.zeros(self._resamples)))
        self.sums[statistic] = before[0] + numerator, before[1] + denominator


def _chunks(
    asked: dict[str, Asked],
    direction: Direction,
    layers: tuple[Layer, Layer],
    order: TokenOrder,
) -> Iterator[tuple[np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]]]]:
    """(sums over groups [5, G, pairs], name -> (which of those asked, their columns)); a pair that several things are
    asked of is summed once."""
    n_other = layers[1].n_features
    features = {name: direction.feature[one.features].astype(np.int64) for name, one in asked.items()}
    keys = {name: features[name] * n_other + one.partners for name, one in asked.items()}
    pairs = np.unique(np.concatenate(list(keys.values())))
    for start in range(0, len(pairs), _PAIRS):
        part = pairs[start : start + _PAIRS]
        i, j = np.divmod(part, n_other)
        sums = group_sums(*layers, i, j, order, 0)
        which = {name: np.flatnonzero((key >= part[0]) & (key <= part[-1])) for name, key in keys.items()}
        yield sums, {name: (places, np.searchsorted(part, keys[name][places])) for name, places in which.items()}
