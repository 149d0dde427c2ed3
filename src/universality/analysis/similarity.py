"""The tables of one comparison: what features are beside how well they are matched; docs/analysis.md describes them.

features.parquet (a row a feature that is looked at), correlations.parquet (a row a direction, measure and kind),
bins.parquet (a row a direction, measure and bin), agreement.parquet (a row a direction, offline measure and score of a
language model; empty where none was asked).
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from universality.alignment.bootstrap import centred_interval, resample_weights
from universality.alignment.pairs import correlations, group_sums
from universality.alignment.resampling import DIRECTIONS
from universality.alignment.sides import ModelSide, pairs_of_layers
from universality.alignment.token_order import TokenOrder
from universality.analysis.against import Resampling, partial_rank_correlation, rank_correlation
from universality.analysis.settings import AgainstSettings
from universality.errors import StudyError
from universality.runtime import progress
from universality.storage import read_table, replacing, write_table

MEASURES = (
    "complexity", "full_complexity", "monosemanticity", "context_needed", "token_entropy", "r2_1", "r2_2", "r2_3",
    "position_share", "peakedness", "most_alike",
)  # fmt: skip
"""Those that are set against MPPC, of measures.parquet."""
JUDGED = ("judge_complexity", "judge_monosemanticity", "detection", "fuzzing")
"""And those of a language model, of judged.parquet."""
_AGREEMENT = ["direction", "model", "measure", "score", "value", "low", "high", "n"]
_BINS = 5


def write_similarity(
    sides: tuple[ModelSide, ModelSide],
    order: TokenOrder,
    comparison: Path,
    measures: tuple[Mapping[int, Path], Mapping[int, Path]],
    judged: tuple[Mapping[int, Path], Mapping[int, Path]],
    settings: AgainstSettings,
    out: Path,
) -> None:
    """`measures`: by layer, the folder of `analysis features`, for each side; `judged`: of `analysis judge`, if any."""
    _check_judges([folder for side in judged for folder in side.values()])
    matched = read_table(comparison / "features.parquet").to_pandas()
    tables = [
        _joined(matched[matched.direction == direction], own, of_judge, settings)
        for direction, own, of_judge in zip(DIRECTIONS, measures, judged, strict=True)
    ]
    replicates = resampled_mppc(sides, order, tables, settings)
    resampling = Resampling(settings.bootstrap_samples, settings.bootstrap_seed, settings.confidence)
    rows: dict[str, list[dict]] = {"correlations": [], "bins": [], "agreement": []}
    for direction, side, table, moved in zip(DIRECTIONS, sides, tables, replicates, strict=True):
        common = {"direction": direction, "model": side.model}
        rows["correlations"] += [common | row for row in _correlations(table, moved, resampling)]
        rows["bins"] += [common | row for row in _bins(table, moved, settings.confidence)]
        rows["agreement"] += [common | row for row in _agreement(table, resampling)]
    with replacing(out) as folder:
        folder.mkdir()
        frames = {name: pd.DataFrame(found) for name, found in rows.items()}
        frames["agreement"] = frames["agreement"].reindex(columns=_AGREEMENT)  # where it is empty, too
        for name, frame in {"features": pd.concat(tables, ignore_index=True), **frames}.items():
            write_table(folder / f"{name}.parquet", pa.Table.from_pandas(frame, preserve_index=False))


def _joined(
    matched: pd.DataFrame, measures: Mapping[int, Path], judged: Mapping[int, Path], settings: AgainstSettings
) -> pd.DataFrame:
    """Live features with how they are matched and what they are; of a layer at most as many as are asked for, those of
    which more is known first."""
    tables = []
    for layer, folder in measures.items():
        table = read_table(folder / "measures.parquet").to_pandas()
        table = table[["feature", "frequency", *MEASURES]]
        if layer in judged:
            table = table.merge(_scores(judged[layer]), on="feature", how="left")
        of_layer = matched[(matched.layer == layer) & ~matched.dead]
        kept = of_layer[
            ["direction", "layer", "feature", "mppc", "heldout_mppc", "p_value", "best_layer", "best_feature"]
        ]
        table = kept.merge(table, on="feature")
        known = table[["context_needed", *(name for name in JUDGED if name in table)]].notna().sum(axis=1)
        chance = np.random.default_rng([settings.feature_seed, layer]).permutation(len(table))
        chosen = np.lexsort([chance, -known])[: settings.features]
        tables.append(table.iloc[np.sort(chosen)])
    return pd.concat(tables, ignore_index=True)


def _scores(folder: Path) -> pd.DataFrame:
    table = read_table(folder / "judged.parquet").to_pandas()
    named = {"complexity": "judge_complexity", "monosemanticity": "judge_monosemanticity"}
    return table.rename(columns=named)[["feature", *JUDGED]]


def _check_judges(folders: list[Path]) -> None:
    """Raises StudyError if they are of several judges, which the environment names."""
    judges: dict[str, Path] = {}
    for folder in folders:
        for name in read_table(folder / "judged.parquet", ["judge"])["judge"].unique().to_pylist():
            judges.setdefault(name, folder)
    if len(judges) > 1:
        told = "; ".join(f"{folder}: {name}" for name, folder in judges.items())
        raise StudyError(f"analysis.judge: these were judged by different models, remake one: {told}")


def resampled_mppc(
    sides: tuple[ModelSide, ModelSide], order: TokenOrder, tables: list[pd.DataFrame], settings: AgainstSettings
) -> list[np.ndarray]:
    """Of each side's features [R, features of the table]: their correlation with their best partner in resamples of
    the documents."""
    a, b = sides
    weights = resample_weights(len(order.groups) - 1, settings.bootstrap_samples, settings.bootstrap_seed)
    sizes = np.diff(order.groups)
    found = [np.full((len(weights), len(table)), np.nan) for table in tables]
    for x, of_a, y, of_b in pairs_of_layers(a, b, order, "resampling"):
        for table, values, own, other, layers in (
            (tables[0], found[0], x, y, (of_a, of_b)),
            (tables[1], found[1], y, x, (of_b, of_a)),
        ):
            rows = np.flatnonzero((table.layer == own) & (table.best_layer == other))
            i, j = (table[name].to_numpy()[rows] for name in ("feature", "best_feature"))
            sums = group_sums(layers[0], layers[1], i, j, order, 0)
            values[:, rows] = correlations(sums, sizes, weights)
    return found


def _correlations(table: pd.DataFrame, replicates: np.ndarray, resampling: Resampling) -> list[dict]:
    """A row a measure and kind: spearman, and partial with frequency and layer held equal."""
    mppc, frequency, layer = (table[name].to_numpy(np.float64) for name in ("mppc", "frequency", "layer"))
    rows = []
    for name in progress([name for name in (*MEASURES, *JUDGED) if name in table], "measures against MPPC"):
        x = table[name].to_numpy(np.float64)
        plain = rank_correlation(x, mppc, resampling, replicates)
        partial = partial_rank_correlation(x, mppc, frequency, layer, resampling, replicates)
        rows += [{"measure": name, "kind": k, **c._asdict()} for k, c in (("spearman", plain), ("partial", partial))]
    return rows


def _bins(table: pd.DataFrame, replicates: np.ndarray, confidence: float) -> list[dict]:
    """Mean MPPC of features of like measure, with intervals over documents: a bin a value where there are few values,
    else fifths."""
    rows = []
    for name in (*MEASURES, *JUDGED):
        if name not in table:
            continue
        values = table[name].to_numpy(np.float64)
        for number, members in enumerate(_fifths(values)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # of resamples in which none of the features varies
                moved = np.nanmean(replicates[:, members], axis=1)
            mean = table.mppc.to_numpy()[members].mean()
            low, high = centred_interval(mean, moved[:, None], confidence)
            rows.append(
                {
                    "measure": name, "bin": number, "from": values[members].min(), "to": values[members].max(),
                    "mean_mppc": mean, "low": float(low[0]), "high": float(high[0]), "n": len(members),
                }
            )  # fmt: skip
    return rows


def _fifths(values: np.ndarray) -> list[np.ndarray]:
    """Places of features of like value, in ascending order of it."""
    defined = np.flatnonzero(np.isfinite(values))
    distinct = np.unique(values[defined])
    if len(distinct) <= _BINS:
        return [np.flatnonzero(values == value) for value in distinct]
    edges = np.unique(np.quantile(values[defined], np.linspace(0, 1, _BINS + 1)[1:-1]))
    number = np.searchsorted(edges, values[defined], side="left")
    return [defined[number == k] for k in np.unique(number)]


def _agreement(table: pd.DataFrame, resampling: Resampling) -> list[dict]:
    """Rank correlations of the offline measures with a language model's scores."""
    rows = []
    for name in MEASURES:
        for score in (one for one in JUDGED if one in table):
            found = rank_correlation(table[name].to_numpy(np.float64), table[score].to_numpy(np.float64), resampling)
            rows.append(
                {
                    "measure": name,
                    "score": score,
                    "value": found.value,
                    "low": found.low,
                    "high": found.high,
                    "n": found.n,
                }
            )
    return rows
