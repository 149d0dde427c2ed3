"""What kind of features are shared: results of the analysis stage, their metrics and figures."""

from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from universality.report.style import MARKERS, STYLE, svg
from universality.storage import read_table

DRAWN = {
    "complexity": "complexity, 0 to 1",
    "monosemanticity": "monosemanticity, 0 to 1",
    "judge_complexity": "complexity, judged 1 to 5",
    "judge_monosemanticity": "monosemanticity, judged 1 to 2",
}
"""Measures whose bins are drawn, and what their axes say."""


class Similarity(NamedTuple):
    """Of one comparison, tables as docs/analysis.md describes them."""

    correlations: pd.DataFrame
    bins: pd.DataFrame
    agreement: pd.DataFrame


class Idiosyncratic(NamedTuple):
    """Features of one side that nothing matches, and their contexts."""

    features: pd.DataFrame
    contexts: pd.DataFrame


class Kinds(NamedTuple):
    """`similarity`: comparison -> its tables; `idiosyncratic`: (comparison, side) -> its features."""

    similarity: dict[str, Similarity]
    idiosyncratic: dict[tuple[str, str], Idiosyncratic]


def read_kinds(similarity: list[Path], idiosyncratic: list[Path]) -> Kinds:
    return Kinds(
        {folder.name: Similarity(*_tables(folder, Similarity._fields)) for folder in similarity},
        {(f.parent.name, f.name): Idiosyncratic(*_tables(f, Idiosyncratic._fields)) for f in idiosyncratic},
    )


def _tables(folder: Path, names: tuple[str, ...]) -> list[pd.DataFrame]:
    return [read_table(folder / f"{name}.parquet").to_pandas() for name in names]


def kinds_metrics(kinds: Kinds) -> dict:
    """Comparison -> direction -> measure -> its rank correlations with MPPC; of features of one side, how many are
    listed and what ablating them does in the middle."""
    found: dict[str, dict] = {}
    for name, tables in kinds.similarity.items():
        for row in tables.correlations.itertuples():
            one = found.setdefault(name, {}).setdefault(row.direction, {"model": row.model, "measures": {}})
            one["measures"].setdefault(row.measure, {})[row.kind] = {key: getattr(row, key) for key in _TOLD}
    own: dict[str, dict] = {}
    for (name, side), listed in kinds.idiosyncratic.items():
        effects = listed.features.effect if len(listed.features) else pd.Series(dtype=float)
        own.setdefault(name, {})[side] = {"listed": len(listed.features), "median_effect": float(effects.median())}
    return {"similarity": found, "idiosyncratic": own}


_TOLD = ("value", "low", "high", "low_documents", "high_documents", "n")


def binned_mppc(kinds: Kinds) -> str:
    """Mean MPPC of features of like complexity, and of like monosemanticity, a line a comparison and side."""
    with plt.rc_context(STYLE):
        tables = {name: s.bins for name, s in kinds.similarity.items()}
        measures = [m for m in DRAWN if any((bins.measure == m).any() for bins in tables.values())]
        figure, axes = plt.subplots(1, len(measures), figsize=(5.5 * len(measures), 4), squeeze=False, sharey=True)
        for axis, measure in zip(axes[0], measures, strict=True):
            for number, (name, bins) in enumerate(tables.items()):
                for direction, rows in bins[bins.measure == measure].groupby("direction"):
                    marker = MARKERS[direction == "b_to_a"]
                    error = np.maximum([rows.mean_mppc - rows.low, rows.high - rows.mean_mppc], 0)
                    axis.errorbar(
                        (rows["from"] + rows["to"]) / 2, rows.mean_mppc, yerr=error, color=f"C{number}", marker=marker,
                        markersize=4, capsize=2, label=f"{name}: {rows.model.iloc[0]}",
                    )  # fmt: skip
            axis.set_xlabel(DRAWN[measure])
        axes[0][0].set_ylabel("mean MPPC")
        axes[0][-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        return svg(figure)


def partial_correlations(kinds: Kinds) -> str:
    """Partial rank correlation of each measure with MPPC, a point a comparison and side, intervals over documents and,
    thin, over features."""
    with plt.rc_context(STYLE):
        rows = pd.concat([s.correlations.assign(comparison=name) for name, s in kinds.similarity.items()])
        rows = rows[rows.kind == "partial"]
        measures = list(dict.fromkeys(rows.measure))
        figure, axis = plt.subplots(figsize=(8, 0.55 * len(measures) + 1))
        series = list(dict.fromkeys(zip(rows.comparison, rows.direction, strict=True)))
        for number, (name, direction) in enumerate(series):
            own = rows[(rows.comparison == name) & (rows.direction == direction)]
            place = [measures.index(m) + 0.7 * ((number + 0.5) / len(series) - 0.5) for m in own.measure]
            colour = f"C{list(kinds.similarity).index(name)}"
            axis.hlines(place, own.low, own.high, color=colour, linewidth=0.6)
            axis.hlines(place, own.low_documents, own.high_documents, color=colour, linewidth=2)
            axis.plot(
                own.value, place, MARKERS[direction == "b_to_a"], color=colour, markersize=4,
                label=f"{name}: {own.model.iloc[0]}",
            )  # fmt: skip
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set_yticks(range(len(measures)), [m.replace("_", " ") for m in measures])
        axis.invert_yaxis()
        axis.set_xlabel("partial rank correlation with MPPC, frequency and layer held equal")
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        return svg(figure)
