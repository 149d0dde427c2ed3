"""Groups of features to ablate that differ in how well another model matches them, and in little else.

Of each layer's live features the best matched (upper quantile of MPPC) are paired with the worst matched (lower
quantile), since features that fire often, or write much, matter more whoever shares them. With f a feature's frequency
and n = mean |code| * |W_dec|, the norm that zero ablation removes from a token on average, a pair may differ by at most
the caliper in each of

    log f / sd(log f),    log n / sd(log n)                          sd: over the layer's live features

Matching is one to one, without replacement; as many pairs as possible, then the least sum of Euclidean distances
(optimal matching within a caliper: Rosenbaum 2010, Design of Observational Studies, ch. 8), on the graph of each
feature's nearest neighbours. The reference of a pair is any other live feature within the caliper of the well matched
one, or the nearest if there is none. What remains unequal is told as standardised mean differences (Austin 2009).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.spatial import KDTree

from universality.ablation.settings import FeatureAblationSettings
from universality.alignment.assignment import one_to_one
from universality.errors import StudyError
from universality.features.codes import Codes
from universality.runtime import log
from universality.saes.base import SAE

GROUPS = ("well", "badly", "random")
_COLUMNS = ("layer", "feature", "mppc", "dead")
_NEIGHBOURS = 64  # of each feature, among which its partner is sought


class FeatureStatistics(NamedTuple):
    """Of each feature [F], float64, over all tokens: share where it fires, mean code, mean |code| * |W_dec|."""

    frequency: np.ndarray
    mean: np.ndarray
    norm: np.ndarray


def feature_statistics(codes: Codes, sae: SAE) -> FeatureStatistics:
    """Raises StudyError if the codes are not of as many features. The norm is on the scale that the SAE encodes."""
    tokens, d_sae = codes.by_token.shape
    if d_sae != sae.d_sae:
        raise StudyError(f"codes: are of {d_sae} features, the SAE has {sae.d_sae}")
    features, values = codes.by_token.indices, codes.by_token.data.astype(np.float64)
    fired = np.bincount(features[values != 0], minlength=d_sae)
    total, size = (np.bincount(features, v, minlength=d_sae) for v in (values, np.abs(values)))
    return FeatureStatistics(fired / tokens, total / tokens, size / tokens * sae.W_dec.double().norm(dim=1).numpy())


def choose_groups(
    features: pd.DataFrame, statistics: Mapping[int, FeatureStatistics], settings: FeatureAblationSettings
) -> pd.DataFrame:
    """All pairs with their references: a row a feature with `layer`, `rank` of its pair (0: the first to be taken),
    `group`, `feature`, `mppc`, `frequency`, `norm`, and how many features of the layer are `live`.

    `features`: one side of a comparison's features.parquet; `statistics` of the layers to choose in. Raises StudyError
    if columns, layers or features are missing or stand there twice, and where no two features of any layer make a pair.
    """
    missing = [name for name in _COLUMNS if name not in features]
    if missing:
        raise StudyError(f"features: lack the column {missing[0]!r}; needed: {', '.join(_COLUMNS)}")
    if features.duplicated(["layer", "feature"]).any():
        raise StudyError("features: some stand there twice; give those of one direction alone")
    parts = []
    for layer in sorted(statistics):
        table = features[features.layer == layer]
        if len(table) != len(statistics[layer].frequency) or table.feature.max() >= len(table):
            raise StudyError(
                f"features: layer {layer} has {len(table)} rows, its codes {len(statistics[layer].frequency)} features"
            )
        parts.append(_of_layer(layer, table, statistics[layer], settings))
    if not parts:
        raise StudyError("statistics: are of no layer; nothing can be chosen")
    members = pd.concat(parts, ignore_index=True)
    if members.empty:
        raise StudyError(
            f"features: in no layer two make a pair; raise quantile {settings.quantile} or caliper {settings.caliper}"
        )
    return members


def _of_layer(
    layer: int, table: pd.DataFrame, statistics: FeatureStatistics, settings: FeatureAblationSettings
) -> pd.DataFrame:
    feature = table.feature.to_numpy()
    frequency, norm = statistics.frequency[feature], statistics.norm[feature]
    mppc = table.mppc.to_numpy()
    live = np.flatnonzero(~table.dead.to_numpy().astype(bool) & np.isfinite(mppc) & (frequency > 0) & (norm > 0))
    live = live[np.lexsort((feature[live], mppc[live]))]
    count = int(settings.quantile * len(live))
    points = _standardised(np.log(np.stack([frequency[live], norm[live]], 1)))
    badly, well = np.arange(count), np.arange(len(live) - count, len(live))
    partner = pair(points[well], points[badly], settings.caliper)
    well, badly = well[partner >= 0], badly[partner[partner >= 0]]
    if not len(well):
        log.info("layer %d: of %d live features no two make a pair", layer, len(live))
        return pd.DataFrame()
    rng = np.random.default_rng([settings.group_seed, layer])
    removed = np.log(norm[live])
    order = (
        np.argsort(-removed[well] - removed[badly], kind="stable")
        if settings.order == "norm"
        else rng.permutation(len(well))
    )
    well, badly = well[order], badly[order]
    chosen = dict(zip(GROUPS, (well, badly, _references(points, well, badly, settings.caliper, rng)), strict=True))
    of_group = [
        pd.DataFrame(
            {
                "layer": layer,
                "rank": np.arange(len(well)),
                "group": group,
                "feature": feature[rows],
                "mppc": mppc[rows],
                "frequency": frequency[rows],
                "norm": norm[rows],
                "live": len(live),
            }
        )
        for group, rows in ((group, live[places]) for group, places in chosen.items())
    ]
    return pd.concat(of_group, ignore_index=True)


def _standardised(values: np.ndarray) -> np.ndarray:
    """In standard deviations of each column, those without any as they are."""
    spread = values.std(0) if len(values) else np.ones(values.shape[1])
    return values / np.where(spread > 0, spread, 1)


def pair(a: np.ndarray, b: np.ndarray, caliper: float) -> np.ndarray:
    """Partner [A] of each of a [A, D] in b [B, D], or -1: pairs differ by at most `caliper` in every column; as many as
    possible, and of all such pairings that of the least summed distance."""
    if not len(a) or not len(b):
        return np.full(len(a), -1)
    edges = np.concatenate([_near(a, b, caliper), _near(b, a, caliper)[:, ::-1]])
    distance = np.linalg.norm(a[edges[:, 0]] - b[edges[:, 1]], axis=1)
    # No sum of distances outweighs one more pair.
    weight = len(a) + 1 - distance / (caliper * a.shape[1] ** 0.5)
    return one_to_one(edges[:, 0], edges[:, 1], weight, len(a), len(b))


def _near(a: np.ndarray, b: np.ndarray, caliper: float) -> np.ndarray:
    """(row of a, row of b) [E, 2] of each of a's nearest neighbours within the caliper."""
    count = min(_NEIGHBOURS, len(b))
    bound = np.nextafter(caliper, np.inf)  # neighbours are nearer than the bound
    _, found = KDTree(b).query(a, k=np.arange(1, count + 1), p=np.inf, distance_upper_bound=bound)
    rows, ranks = np.nonzero(found < len(b))
    return np.stack([rows, found[rows, ranks]], 1)


def _references(
    points: np.ndarray, well: np.ndarray, badly: np.ndarray, caliper: float, rng: np.random.Generator
) -> np.ndarray:
    """One [n] for each of `well`, of those in neither group, each at most once. With quantiles of at most a third
    there are enough."""
    free = np.ones(len(points), dtype=bool)
    free[well], free[badly] = False, False
    found = []
    for place in well:
        distance = np.where(free, np.abs(points - points[place]).max(1), np.inf)
        within = np.flatnonzero(distance <= caliper)
        found.append(rng.choice(within) if len(within) else distance.argmin())
        free[found[-1]] = False
    return np.array(found)


def group(members: pd.DataFrame, name: str, size: int | float) -> dict[int, np.ndarray]:
    """The features of one group by layer, of so many of the pairs that `choose_groups` found, or of that share of the
    layer's live features; all pairs, where there are not as many."""
    chosen = members[members.group == name]
    return {
        int(layer): part.sort_values("rank").feature.to_numpy()[: _count(part, size)]
        for layer, part in chosen.groupby("layer")
    }


def balance(members: pd.DataFrame, sizes: Sequence[int | float]) -> pd.DataFrame:
    """How equal the groups are: a row a layer, size and group, with `n` features, their means of `mppc`, `frequency`
    and `norm`, and `frequency_smd`, `norm_smd`: mean less that of the well matched, of the logarithms, by the root of
    the mean of both variances; NaN for a single feature."""
    rows = []
    for layer, of_layer in members.groupby("layer"):
        for size in sizes:
            parts = {name: part[part["rank"] < _count(part, size)] for name, part in of_layer.groupby("group")}
            for name in GROUPS:
                row = {"layer": layer, "size": float(size), "group": name, "n": len(parts[name])}
                row |= {column: parts[name][column].mean() for column in ("mppc", "frequency", "norm")}
                for column in ("frequency", "norm"):
                    row[f"{column}_smd"] = mean_difference(*(np.log(parts[g][column]) for g in (name, "well")))
                rows.append(row)
    return pd.DataFrame(rows)


def mean_difference(a: np.ndarray, b: np.ndarray) -> float:
    """Standardised: (mean a - mean b) / sqrt((var a + var b) / 2); 0 of equal means without variance."""
    a, b = np.asarray(a), np.asarray(b)
    if min(len(a), len(b)) < 2:
        return float("nan")
    difference, spread = a.mean() - b.mean(), np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
    return float(difference / spread) if spread else float(np.copysign(np.inf, difference) if difference else 0.0)


def _count(part: pd.DataFrame, size: int | float) -> int:
    """Features of one group of a layer; a share of at least one."""
    live = int(part.live.iloc[0])
    return min(len(part), size if isinstance(size, int) else max(1, round(size * live)))
