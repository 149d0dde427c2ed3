"""Means and shares of a comparison in every resample of the documents.

Partners, p-value limits and matchings are those of all tokens; each pair's correlation is computed anew. A statistic is
a numerator over a denominator, both summed layer by layer in one order, so that no split of the work changes a byte.
Means of held-out partners, of the null, of pairs of layers and of prefixes are moved to first order (pairs.influence).
"""

from typing import NamedTuple

import numpy as np

from universality.alignment.gather import Direction, Nearest
from universality.alignment.resampled_layers import Added, Ratio, Resampling
from universality.alignment.settings import Matching, Statistics
from universality.alignment.sides import ModelSide, pairs_of_layers
from universality.alignment.token_order import TokenOrder, rotations

DIRECTIONS = ("a_to_b", "b_to_a")


class Resampled(NamedTuple):
    """`sums`: (direction, statistic) -> (numerators, denominators) [R]; `low`, `high`: direction -> of each feature's
    MPPC; `layers`: (direction, layer of a, layer of b) -> how the sum of the largest correlations between the two moves
    with each group of documents [G]; `prefixes`: direction -> the same of the sum of MPPC on each prefix; `depth`:
    direction -> (places of features, place of the layer of their best partner in each resample [R, features])."""

    sums: dict[tuple[str, str], Ratio]
    low: dict[str, np.ndarray]
    high: dict[str, np.ndarray]
    layers: dict[tuple[str, int, int], np.ndarray]
    prefixes: dict[str, list[np.ndarray]]
    depth: dict[str, tuple[np.ndarray, np.ndarray]]

    def ratio(self, direction: str, statistic: str) -> np.ndarray:
        """A statistic [R]; of "both", over the features of both sides."""
        names = DIRECTIONS if direction == "both" else (direction,)
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
    a: ModelSide, b: ModelSide, directions: tuple[Direction, Direction], nearest: dict[tuple[str, int, int], Nearest],
    order: TokenOrder, matching: Matching, settings: Statistics,
) -> Resampled:  # fmt: skip
    rotated = rotations(order, matching.rotations, matching.null_seed)
    both = [Resampling(directions, side, order, settings) for side in (0, 1)]
    parts: dict[tuple[int, int, int], Added] = {}
    for x, layer_a, y, layer_b in pairs_of_layers(a, b, order, "resampling"):
        place = (a.numbers.index(x), b.numbers.index(y))
        for side, layers in enumerate(((layer_a, layer_b), (layer_b, layer_a))):
            own = np.flatnonzero(directions[side].layer == (x, y)[side])
            within = nearest["ab"[side], x, y].partner
            parts[side, *place] = both[side].add(own, place[1 - side], layers, within, rotated)
    return _put_together(a, b, both, parts)


def _put_together(a: ModelSide, b: ModelSide, both: list[Resampling], parts: dict[tuple, Added]) -> Resampled:
    sums: dict[tuple[str, str], Ratio] = {}
    prefixes: dict[str, list[np.ndarray]] = {}
    layers: dict[tuple[str, int, int], np.ndarray] = {}
    for side, x, y in sorted(parts):
        name, part = DIRECTIONS[side], parts[side, x, y]
        for statistic, (numerator, denominator) in part.sums.items():
            before = sums.get((name, statistic), (0.0, 0.0))
            sums[name, statistic] = before[0] + numerator, before[1] + denominator
        layers[name, a.numbers[x], b.numbers[y]] = part.layer
        before_prefixes = prefixes.get(name, [np.zeros_like(p) for p in part.prefixes])
        prefixes[name] = [before + added for before, added in zip(before_prefixes, part.prefixes, strict=True)]
    of = dict(zip(DIRECTIONS, both, strict=True))
    return Resampled(
        sums, {n: r.low for n, r in of.items()}, {n: r.high for n, r in of.items()}, layers, prefixes,
        {n: (r.depth_of, r.best_layers()) for n, r in of.items()},
    )  # fmt: skip
