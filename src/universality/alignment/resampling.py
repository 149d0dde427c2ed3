"""Means and shares of a comparison in every resample of the documents.

Partners, p-value limits and matchings are those of all tokens; each pair's correlation is computed anew. A statistic is
a numerator over a denominator, both summed layer by layer in one order, so that no split of the work changes a byte.
"""

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from universality.alignment.bootstrap import centred_interval, resample_weights
from universality.alignment.gather import Direction
from universality.alignment.layers import Layer
from universality.alignment.pairs import resampled_pairs
from universality.alignment.settings import Matching, Statistics
from universality.alignment.sides import ModelSide
from universality.alignment.token_order import TokenOrder, rotations
from universality.runtime import progress

_HELD = 4  # layers of side a that are in memory at a time


class Resampled(NamedTuple):
    """`sums`: (direction, statistic) -> (numerators, denominators) [R]; `low`, `high`: direction -> of each feature's
    MPPC."""

    sums: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]
    low: dict[str, np.ndarray]
    high: dict[str, np.ndarray]

    def ratio(self, direction: str, statistic: str) -> np.ndarray:
        """A statistic [R]; of "both", over the features of both sides."""
        names = ("a_to_b", "b_to_a") if direction == "both" else (direction,)
        parts = [self.sums[name, statistic] for name in names if (name, statistic) in self.sums]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.sum([p[0] for p in parts], axis=0) / np.sum([p[1] for p in parts], axis=0)


def estimates(direction: Direction, settings: Statistics) -> dict[str, tuple[float, float]]:
    """Statistic -> (numerator, denominator) on all tokens."""
    r, best = direction.mppc, direction.best
    live = ~np.isnan(r)
    n, f = live.sum(), direction.frequency
    heldout, null = best.heldout_r[~np.isnan(best.heldout_r)], best.null_r[~np.isnan(best.null_r)]
    return {
        "mean": (r[live].sum(), n),
        "heldout_mean": (heldout.sum(), len(heldout)),
        "null_mean": (null.sum(), len(null)),
        "weighted_mean": ((r * f)[live].sum(), f[live].sum()),
        "share_matched": (direction.found.sum(), n),
        "share_mutual": ((direction.found & direction.mutual).sum(), n),
        **{f"share_{t}": ((r[live] >= t).sum(), n) for t in settings.thresholds},
        **{f"one_to_one_{t}": (np.nansum(direction.assigned_r >= t), n) for t in settings.thresholds},
    }


def resample(
    a: ModelSide, b: ModelSide, directions: tuple[Direction, Direction], order: TokenOrder, matching: Matching,
    settings: Statistics,
) -> Resampled:  # fmt: skip
    """Every layer of b is read once for each few layers of a."""
    weights = resample_weights(len(order.groups) - 1, settings.bootstrap_samples, settings.bootstrap_seed)
    rotated = rotations(order, matching.rotations, matching.null_seed)
    low, high = ([np.full(len(d.layer), np.nan) for d in directions] for _ in range(2))
    parts: dict[tuple, dict[str, list]] = {}
    steps = [(a.numbers[k : k + _HELD], y) for k in range(0, len(a.numbers), _HELD) for y in b.numbers]
    held: dict[int, Layer] = {}
    for some, y in progress(steps, f"{a.model} and {b.model}, resampling"):
        if list(held) != some:
            held = {x: a.load(x, order) for x in some}
        layer_b = b.load(y, order)
        for x, layer_a in held.items():
            place = (a.numbers.index(x), b.numbers.index(y))
            for side, (own, other) in enumerate(((layer_a, layer_b), (layer_b, layer_a))):
                one = _Pair(directions, side, (x, y)[side], place[1 - side], own, other, order, weights, settings)
                parts[side, place] = one.sums(rotated, low[side], high[side])
    sums: dict = {}
    for key in sorted(parts):
        for statistic, (numerator, denominator) in parts[key].items():
            name = ("a_to_b", "b_to_a")[key[0]], statistic
            before = sums.get(name, (0.0, 0.0))
            sums[name] = before[0] + numerator, before[1] + denominator
    names = ("a_to_b", "b_to_a")
    return Resampled(sums, dict(zip(names, low, strict=True)), dict(zip(names, high, strict=True)))


class _Pair:
    """The features of one layer whose partners are in one layer of the other side."""

    def __init__(self, directions, side, layer, other, own_layer, other_layer, order, weights, settings):
        self._direction: Direction = directions[side]
        self._across: Direction = directions[1 - side]
        self._own = np.flatnonzero(self._direction.layer == layer)
        self._other, self._layers = other, (own_layer, other_layer)
        self._order, self._weights, self._settings = order, weights, settings
        self._sums: dict[str, list] = defaultdict(lambda: [0.0, 0.0])

    def sums(self, rotated: np.ndarray, low: np.ndarray, high: np.ndarray) -> dict[str, list]:
        self._plain(low, high)
        self._heldout()
        self._null(rotated)
        self._assigned()
        return dict(self._sums)

    def _add(self, statistic: str, numerator: np.ndarray, denominator: np.ndarray) -> None:
        self._sums[statistic][0] += numerator
        self._sums[statistic][1] += denominator

    def _pairs(self, features, partners, weights, rotation: int = 0):
        numbers = self._direction.feature[features].astype(np.int64)
        return resampled_pairs(*self._layers, numbers, partners.astype(np.int64), self._order, weights, rotation)

    def _plain(self, low: np.ndarray, high: np.ndarray) -> None:
        d = self._direction
        features = self._own[d.best.layer[self._own, 0] == self._other]
        for part, r in self._pairs(features, d.best.partner[features, 0], self._weights):
            these = features[part]
            low[these], high[these] = centred_interval(d.mppc[these], r, self._settings.confidence)
            live = ~np.isnan(r)
            n, filled = live.sum(axis=1), np.where(live, r, 0.0)
            self._add("mean", filled.sum(axis=1), n)
            self._add("weighted_mean", filled @ d.frequency[these], live @ d.frequency[these])
            above = filled >= d.critical[these]
            self._add("share_matched", (above & live).sum(axis=1), n)
            self._add("share_mutual", (above & live & d.mutual[these]).sum(axis=1), n)
            for t in self._settings.thresholds:
                self._add(f"share_{t}", (filled >= t).sum(axis=1), n)

    def _heldout(self) -> None:
        d, first = self._direction, self._order.first_measured_group
        measured = self._weights.copy()
        measured[:, :first] = 0
        features = self._own[(d.best.chosen_layer[self._own] == self._other) & ~np.isnan(d.best.heldout_r[self._own])]
        for _, r in self._pairs(features, d.best.chosen[features], measured):
            self._add("heldout_mean", np.nansum(r, axis=1), (~np.isnan(r)).sum(axis=1))

    def _null(self, rotated: np.ndarray) -> None:
        d = self._direction
        own = np.flatnonzero(np.isin(d.null_of, self._own))
        for k, rotation in enumerate(rotated):
            there = own[d.best.null_layer[k, own] == self._other]
            features, partners = d.null_of[there], d.best.null_partner[k, there]
            for _, r in self._pairs(features, partners, self._weights, int(rotation)):
                self._add("null_mean", np.nansum(r, axis=1), (~np.isnan(r)).sum(axis=1))

    def _assigned(self) -> None:
        d, across = self._direction, self._across
        live = self._own[~np.isnan(d.mppc[self._own])]
        alone = (live[d.assigned[live] < 0]).size if self._other == 0 else 0
        features = live[d.assigned[live] >= 0]
        layers = np.unique(across.layer)
        features = features[across.layer[d.assigned[features]] == layers[self._other]]
        for t in self._settings.thresholds:
            self._add(f"one_to_one_{t}", np.zeros(len(self._weights)), np.full(len(self._weights), float(alone)))
        for _, r in self._pairs(features, across.feature[d.assigned[features]], self._weights):
            for t in self._settings.thresholds:
                self._add(f"one_to_one_{t}", (np.nan_to_num(r) >= t).sum(axis=1), np.full(len(r), float(r.shape[1])))
