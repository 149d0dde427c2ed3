"""The tables of a comparison; docs/alignment.md describes them.

A folder: features.parquet (a row a feature), partners.parquet (a row a feature and rank), layers.parquet (a row a pair
of layers), tokens.parquet (mean MPPC on prefixes), replicates.parquet (a row a resample), summary.json.
"""

import hashlib
from pathlib import Path

import numpy as np

from universality.alignment.blocks import read_blocks
from universality.alignment.bootstrap import centred_interval, normal_interval
from universality.alignment.gather import Direction, Nearest, gather, nearest
from universality.alignment.resampling import DIRECTIONS, Resampled, estimates, resample
from universality.alignment.settings import Comparison, Matching, Statistics
from universality.alignment.sides import ModelSide
from universality.alignment.token_order import TokenOrder
from universality.errors import StudyError
from universality.runtime import log
from universality.storage import read_table, replacing, write_json, write_table


def write_comparison(
    comparison: Comparison, a: ModelSide, b: ModelSide, parts: list[Path], order: TokenOrder, matching: Matching,
    statistics: Statistics, out: Path,
) -> None:  # fmt: skip
    found, frequency = read_blocks(parts, a, b)
    directions = gather(found, a, b, order.half, frequency, matching, statistics)
    for side, direction in zip((a, b), directions, strict=True):
        if np.isnan(direction.mppc).all():
            raise StudyError(f"alignment of {a.model} with {b.model}: every feature of {side.model} is dead")
    closest = nearest(found)
    del found
    resampled = resample(a, b, directions, closest, order, matching, statistics)
    summary = summarise(a, b, directions, resampled, statistics)
    summary |= {**comparison.model_dump(mode="json"), "confidence": statistics.confidence}
    summary["resamples"] = _identity(order, statistics)
    summary |= {"n_tokens": order.n_tokens, "n_documents": order.n_documents, "n_groups": len(order.groups) - 1}
    mean = summary["both"]
    log.info(
        "%s and %s, %s: mean MPPC %.4f [%.4f, %.4f], held out %.4f, null %.4f",
        a.model, b.model, comparison.setting, mean["mean"], mean["low"], mean["high"],
        mean["statistics"]["heldout_mean"]["value"], mean["statistics"]["null_mean"]["value"],
    )  # fmt: skip
    with replacing(out) as folder:
        folder.mkdir()
        write_table(folder / "features.parquet", features_table(a, b, directions, resampled))
        write_table(folder / "partners.parquet", partners_table(a, b, directions))
        write_table(
            folder / "layers.parquet", layers_table(a, b, directions, closest, resampled, statistics.confidence)
        )
        write_table(folder / "tokens.parquet", tokens_table(directions, order, resampled, statistics.confidence))
        write_table(folder / "unmatched.parquet", unmatched_table(folder / "features.parquet", statistics))
        write_table(folder / "replicates.parquet", replicates_table(resampled))
        write_json(folder / "summary.json", summary)


def summarise(a, b, directions: tuple[Direction, Direction], resampled: Resampled, settings: Statistics) -> dict:
    """For each direction and both together: what there is, and each statistic with its interval."""
    parts = [estimates(d, settings) for d in directions]
    summary: dict = {}
    for name, members in (("a_to_b", (0,)), ("b_to_a", (1,)), ("both", (0, 1))):
        r = np.concatenate([directions[k].mppc for k in members])
        values = {}
        for statistic in parts[0]:
            numerator, denominator = (sum(parts[k][statistic][place] for k in members) for place in (0, 1))
            values[statistic] = _with_interval(
                numerator / denominator if denominator else np.nan, resampled.ratio(name, statistic), settings
            )
        excess = resampled.ratio(name, "mean") - resampled.ratio(name, "null_mean")
        values["above_null"] = _with_interval(_minus(values["mean"], values["null_mean"]), excess, settings)
        mean = values["mean"]
        summary[name] = {
            "mean": mean["value"],
            "low": mean["low"],
            "high": mean["high"],
            "median": float(np.nanmedian(r)),
            "features": len(r),
            "dead": int(np.isnan(r).sum()),
            "statistics": values,
        }
    for k, (name, models) in enumerate(zip(DIRECTIONS, ((a, b), (b, a)), strict=True)):
        depth = depth_correlation(directions[k], models[1], *resampled.depth[name], settings)
        summary[name] |= {"model": models[0].model, "best_model": models[1].model, "depth_correlation": depth}
    return summary


def _identity(order: TokenOrder, settings: Statistics) -> str:
    """Comparisons with the same have the same tokens in the same groups, and draw the same resamples."""
    drawn = f"{settings.bootstrap_seed} {settings.bootstrap_samples}".encode()
    return hashlib.sha256(order.rows.tobytes() + order.groups.tobytes() + drawn).hexdigest()


def _minus(one: dict, other: dict) -> float:
    return np.nan if one["value"] is None or other["value"] is None else one["value"] - other["value"]


def _with_interval(value: float, replicates: np.ndarray, settings: Statistics) -> dict:
    low, high = centred_interval(value, replicates[:, None], settings.confidence)
    numbers = {"value": float(value), "low": float(low[0]), "high": float(high[0])}
    return {name: None if np.isnan(x) else x for name, x in numbers.items()}


def depth_correlation(
    direction: Direction, other: ModelSide, sampled: np.ndarray, best_layers: np.ndarray, settings: Statistics
) -> dict | None:
    """Spearman correlation of a live feature's layer with its best partner's; None where only one layer is compared.

    Its interval is of resamples of the documents: in each, the best partner of the features `sampled` is sought anew
    among those kept, in layers `best_layers` [R, features]; the interval is moved to where the estimate is its mean.
    """
    live = ~np.isnan(direction.mppc)
    own, own_place = np.unique(direction.layer, return_inverse=True)
    shape = len(own), len(other.numbers)
    table = _counts(own_place[live], direction.best.layer[live, 0], shape)
    if min((table.sum(axis=1) > 0).sum(), (table.sum(axis=0) > 0).sum()) < 2:
        return None
    value = _spearman(table)
    replicates = np.array([_spearman(_counts(own_place[sampled], places, shape)) for places in best_layers])
    low, high = centred_interval(value, replicates[:, None], settings.confidence)
    return {"value": float(value), "low": float(low[0]), "high": float(high[0])}


def _counts(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return np.bincount(rows * shape[1] + columns, minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64)


def _spearman(table: np.ndarray) -> float:
    """Of a table of counts: Pearson correlation of mid-ranks."""
    ranks = [np.cumsum(t) - t / 2 for t in (table.sum(axis=1), table.sum(axis=0))]
    n = table.sum()
    x, y = (rank - n / 2 for rank in ranks)
    spread = (table.sum(axis=1) @ x**2) * (table.sum(axis=0) @ y**2)
    return float(x @ table @ y / np.sqrt(spread)) if spread > 0 else np.nan


def features_table(a, b, directions, resampled: Resampled) -> dict:
    tables = []
    for name, d, side, other, across in zip(DIRECTIONS, directions, (a, b), (b, a), directions[::-1], strict=True):
        n = len(d.layer)
        has_partner = d.assigned >= 0
        where = np.where(has_partner, d.assigned, 0)
        null = np.full(n, np.nan)
        null[d.null_of] = np.fmax.reduce(d.best.null_r, axis=0)
        tables.append(
            {
                "model": np.full(n, side.model),
                "layer": d.layer,
                "feature": d.feature,
                "direction": np.full(n, name),
                "best_model": np.full(n, other.model),
                "best_layer": _numbers(other)[d.best.layer[:, 0]],
                "best_feature": d.best.partner[:, 0],
                "mppc": d.mppc,
                "mppc_low": resampled.low[name],
                "mppc_high": resampled.high[name],
                "heldout_layer": _numbers(other)[d.best.chosen_layer],
                "heldout_feature": d.best.chosen,
                "heldout_mppc": d.best.heldout_r,
                "null_mppc": null,
                "p_value": d.p,
                "matched": d.found,
                "mutual": d.mutual,
                "one_to_one_layer": np.where(has_partner, across.layer[where], -1).astype(np.int32),
                "one_to_one_feature": np.where(has_partner, across.feature[where], -1).astype(np.int32),
                "one_to_one_r": d.assigned_r,
                "frequency": d.frequency,
                "dead": np.isnan(d.mppc),
            }
        )
    return {column: np.concatenate([t[column] for t in tables]) for column in tables[0]}


def _numbers(side: ModelSide) -> np.ndarray:
    """Place -> number of the layer; place -1, of no partner, -> -1."""
    return np.array([*side.numbers, -1], dtype=np.int32)


def partners_table(a, b, directions) -> dict:
    tables = []
    for name, d, side, other in zip(DIRECTIONS, directions, (a, b), (b, a), strict=True):
        own, rank = np.nonzero(d.best.partner >= 0)
        tables.append(
            {
                "direction": np.full(len(own), name),
                "model": np.full(len(own), side.model),
                "layer": d.layer[own],
                "feature": d.feature[own],
                "rank": (rank + 1).astype(np.int32),
                "partner_layer": _numbers(other)[d.best.layer[own, rank]],
                "partner_feature": d.best.partner[own, rank],
                "r": d.best.r[own, rank],
            }
        )
    return {column: np.concatenate([t[column] for t in tables]) for column in tables[0]}


def layers_table(a, b, directions, closest: dict[tuple[str, int, int], Nearest], resampled, confidence: float) -> dict:
    """Mean over a layer's live features of the largest correlation in one layer of the other side; where the best of
    all layers lie."""
    rows: dict[str, list] = {
        k: [] for k in ("direction", "layer", "other_layer", "mean_mppc", "low", "high", "share_best", "live")
    }
    for (side, x, y), one in closest.items():
        d, own, other = (directions[0], x, y) if side == "a" else (directions[1], y, x)
        name = DIRECTIONS["ab".index(side)]
        live = ~np.isnan(one.r)
        best = d.best.layer[d.layer == own, 0][live]
        numbers = (b if side == "a" else a).numbers
        mean = one.r[live].mean() if live.any() else np.nan
        interval = normal_interval(mean, resampled.layers[name, x, y] / max(live.sum(), 1), confidence)
        share = (best == numbers.index(other)).mean() if live.any() else np.nan
        values = name, own, other, mean, *interval, share, int(live.sum())
        for column, value in zip(rows.values(), values, strict=True):
            column.append(value)
    return rows


def tokens_table(directions, order: TokenOrder, resampled: Resampled, confidence: float) -> dict:
    """Mean MPPC on prefixes of the documents; intervals hold the partners of all tokens fixed."""
    rows: dict[str, list] = {k: [] for k in ("direction", "tokens", "mean_mppc", "low", "high", "live")}
    for name, d in zip(DIRECTIONS, directions, strict=True):
        for tokens, r, moves in zip(order.cuts, [*d.best.prefix_r, d.mppc], resampled.prefixes[name], strict=True):
            live = ~np.isnan(r)
            mean = float(r[live].mean()) if live.any() else np.nan
            interval = normal_interval(mean, moves / max(live.sum(), 1), confidence)
            values = name, int(tokens), mean, *interval, int(live.sum())
            for column, value in zip(rows.values(), values, strict=True):
                column.append(value)
    return rows


def unmatched_table(features: Path, statistics: Statistics) -> dict:
    """Features that belong to one model only, the least matched first: live ones whose MPPC lies below
    `unmatched_below` with its whole interval; their best match is a poor one."""
    table = read_table(features).to_pandas()
    own = table[~table.dead & (table.mppc_high < statistics.unmatched_below)]
    own = own.sort_values(["direction", "mppc", "layer", "feature"], kind="stable")
    kept = ["direction", "model", "layer", "feature", "frequency", "mppc", "mppc_low", "mppc_high", "heldout_mppc"]
    return {name: own[name].to_numpy() for name in [*kept, "p_value", "best_layer", "best_feature"]}


def replicates_table(resampled: Resampled) -> dict:
    """Every statistic of each direction and of both in every resample; the same row of two comparisons of the same
    documents is the same resample."""
    statistics = sorted({statistic for _, statistic in resampled.sums})
    return {f"{d}.{s}": resampled.ratio(d, s) for d in (*DIRECTIONS, "both") for s in statistics}
