"""All results of a study, read back from its files, and the metrics drawn from them."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from universality.report.kinds import Kinds, kinds_metrics, read_kinds
from universality.storage import read_json, read_table

MATCHED = 0.7
"""Correlation from which on a feature counts as matched, as cosines do in Paulo & Belrose (arXiv 2501.16615)."""
INDUCTION = "induction"
"""The task whose circuits are drawn."""
QUALITY = ["L0", "explained_variance", "loss_recovered", "kl", "dead", "dense", "shrinkage"]
"""What is told of a dictionary."""


class Comparison(NamedTuple):
    """One comparison's features (a row each), its means, and the features of one side only."""

    table: pd.DataFrame
    summary: dict
    unmatched: pd.DataFrame


class Results(NamedTuple):
    """`training`: model -> curves, of the models trained here; `sae_quality`: a row a dictionary and site;
    `crosscoders`: name -> features; `decoders`: comparison -> shares matched by decoder; `spaces`: comparison ->
    measures of whole layers; `circuits`: (task, model, kind of table) -> table; `similarity`: task -> how alike the
    models' circuits are; `published`: published values beside measured ones, empty if the study has none;
    `ablation`: (comparison, side) -> effects of ablating features; `kinds`: what kind of features are shared."""

    training: dict[str, pd.DataFrame]
    sae_quality: pd.DataFrame
    crosscoders: dict[str, pd.DataFrame]
    comparisons: dict[str, Comparison]
    decoders: dict[str, pd.DataFrame]
    spaces: dict[str, pd.DataFrame]
    circuits: dict[tuple[str, str, str], pd.DataFrame]
    similarity: dict[str, pd.DataFrame]
    published: pd.DataFrame
    ablation: dict[tuple[str, str], pd.DataFrame]
    kinds: Kinds

    def of_circuits(self, kind: str, task: str = INDUCTION) -> dict[str, pd.DataFrame]:
        """Model -> table of a kind, of the models that do the task."""
        found = {model: table for (t, model, k), table in self.circuits.items() if (t, k) == (task, kind)}
        return {model: table for model, table in found.items() if len(table) and table.passes.iloc[0]}


class Inputs(NamedTuple):
    """Files and folders of a study's results; `saes` is the table of all dictionaries."""

    models: list[Path]
    saes: Path
    crosscoders: list[Path]
    alignment: list[Path]
    decoders: list[Path]
    spaces: list[Path]
    circuits: list[Path]
    similarity: list[Path]
    published: Path | None
    ablation: list[Path]
    kinds: list[Path]
    idiosyncratic: list[Path]


def read_results(inputs: Inputs) -> Results:
    training = {p.name: _frame(p / "training.parquet") for p in inputs.models if (p / "training.parquet").exists()}
    features = {p.name.removesuffix(".features.parquet"): _frame(p) for p in inputs.crosscoders}
    comparisons = {
        p.name: Comparison(
            _frame(p / "features.parquet"), read_json(p / "summary.json"), _frame(p / "unmatched.parquet")
        )
        for p in inputs.alignment
    }
    shares = {p.stem.removesuffix("_shares"): _frame(p) for p in inputs.decoders}
    whole = {p.stem: _frame(p) for p in inputs.spaces}
    alike = {p.stem: _frame(p) for p in inputs.similarity}
    tables = {
        (folder.parent.name, folder.name, path.stem): _frame(path)
        for folder in inputs.circuits
        for path in sorted(folder.glob("*.parquet"))
    }
    published = _frame(inputs.published) if inputs.published else pd.DataFrame()
    ablated = {(folder.parent.name, folder.name): _frame(folder / "effects.parquet") for folder in inputs.ablation}
    kinds = read_kinds(inputs.kinds, inputs.idiosyncratic)
    return Results(
        training, _frame(inputs.saes), features, comparisons, shares, whole, tables, alike, published, ablated, kinds
    )


def _frame(path: Path) -> pd.DataFrame:
    return read_table(path).to_pandas()


def depth_map(table: pd.DataFrame, model: str) -> tuple[np.ndarray, list[int], list[int]]:
    """(share [layers, best layers], layers, best layers): where the best matches of each layer's live features lie."""
    rows = table[(table.model == model) & ~table.dead]
    counts = pd.crosstab(rows.layer, rows.best_layer, normalize="index")
    layers, others = (
        sorted(table.layer[is_model].unique()) for is_model in (table.model == model, table.model != model)
    )
    counts = counts.reindex(index=layers, columns=others or layers, fill_value=0.0)
    return counts.to_numpy(), [int(n) for n in counts.index], [int(n) for n in counts.columns]


def metrics(results: Results) -> dict:
    """Everything that a reader would compare between two runs, as plain numbers."""
    return {
        "models": {name: _last_point(curves) for name, curves in results.training.items()},
        "saes": _sae_metrics(results.sae_quality),
        "crosscoders": _crosscoder_metrics(results),
        "alignment": {name: _alignment_metrics(c) for name, c in results.comparisons.items()},
        "decoders": {name: _decoder_metrics(table) for name, table in results.decoders.items()},
        "spaces": {name: _space_metrics(table) for name, table in results.spaces.items()},
        "circuits": _defined(_circuit_metrics(results)),
        "circuit_similarity": {t: _defined(table.to_dict("records")) for t, table in results.similarity.items()},
        "published": _defined(results.published.to_dict("records")),
        "ablation": _defined(_ablation_metrics(results)),
        "analysis": _defined(kinds_metrics(results.kinds)),
    }


def _defined(value):
    """None for every number that is undefined, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _defined(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_defined(one) for one in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def _last_point(curves: pd.DataFrame) -> dict:
    last = {name: float(value) for name, value in curves.iloc[-1].items()}
    return last | {"step": int(last["step"])}


def _sae_metrics(quality: pd.DataFrame) -> dict:
    """SAEs and transcoders, means over layers."""
    rows = quality[quality.kind != "crosscoder"]
    means = rows.groupby(["model", "variant", "seed"])[QUALITY].mean()
    return {f"{model}/{variant}/seed_{seed}": _plain(row) for (model, variant, seed), row in means.iterrows()}


def _crosscoder_metrics(results: Results) -> dict:
    """Crosscoders, at each of their sites: which of the live features are shared, and exclusive to it, as shares; what
    MPPC says of the SAE features there."""
    found: dict[str, dict] = {}
    rows = results.sae_quality[results.sae_quality.kind == "crosscoder"]
    for row in rows.itertuples():
        live = max(row.live, 1)
        counted = {"shared": row.shared / live, "exclusive": row.exclusive / live}
        counted["matched"] = _matched(results, row, set(rows[rows.variant == row.variant].model))
        found.setdefault(row.variant, {})[f"{row.model}:{row.site}"] = counted | _plain(row)
    return found


def _matched(results: Results, row, models: set[str]) -> dict[str, float]:
    """Comparison across architectures of the crosscoder's models -> share of the live SAE features of the row's layer
    that have a partner of at least MATCHED in the other model."""
    shares = {}
    for name, comparison in results.comparisons.items():
        table = comparison.table
        features = table[(table.model == row.model) & (table.layer == row.layer) & ~table.dead]
        compared = comparison.summary["setting"] == "cross_architecture" and set(table.model) == models
        if compared and len(features):
            shares[name] = float((features.mppc >= MATCHED).mean())
    return shares


def _plain(row) -> dict:
    """None for what is undefined."""
    values = {name: float(getattr(row, name)) for name in QUALITY}
    return {name: None if np.isnan(value) else value for name, value in values.items()}


def _alignment_metrics(comparison: Comparison) -> dict:
    summary = comparison.summary
    kept = ["model", "best_model", "mean", "low", "high", "median", "features", "dead", "depth_correlation"]
    kept.append("statistics")
    directions = {
        d: {key: summary[d][key] for key in kept} | {"unmatched": int((comparison.unmatched.direction == d).sum())}
        for d in ("a_to_b", "b_to_a")
    }
    both = {key: summary["both"][key] for key in ("mean", "low", "high", "median", "statistics")}
    return {"setting": summary["setting"], **both, **directions}


def _decoder_metrics(shares: pd.DataFrame) -> dict:
    """Direction -> statistic -> share of all layers' live features, with interval."""
    whole = shares[shares.layer == -1]
    return {
        direction: {r.statistic: {"value": r.share, "low": r.low, "high": r.high} for r in rows.itertuples()}
        for direction, rows in whole.groupby("direction")
    }


def _space_metrics(table: pd.DataFrame) -> dict:
    """Measure -> mean over the layers of a of the value with the most alike layer of b, and of the null there."""
    found = {}
    for measure, rows in table.groupby("measure"):
        best = rows.loc[rows.groupby("layer").value.idxmax()]
        found[measure] = {name: float(best[name].mean()) for name in ("value", "null")}
    return found


def _circuit_metrics(results: Results) -> dict:
    """Task -> model -> accuracy and, if the model does the task, what its tables say in short."""
    found: dict[str, dict] = {}
    for (task, model, kind), table in results.circuits.items():
        one = found.setdefault(task, {}).setdefault(model, {})
        if kind == "paths":
            one |= _path_metrics(table)
        elif len(table) and kind == "off_by_one":
            one["off_by_one"] = _off_by_one_metrics(table)
        elif len(table) and kind == "mixing":
            whole = table[table.layer.isna()]
            one["cuts"] = {r.ways or "none": _interval(r, "top1") for r in whole.itertuples()}
        elif len(table) and kind == "curves":
            rows = table[table["size"].isna() | table.curve.str.contains("measured|largest")]
            one["attribution"] = {r.curve: {"mean": r.value, "low": r.low, "high": r.high} for r in rows.itertuples()}
    return found


def _path_metrics(table: pd.DataFrame) -> dict:
    clean = table[table.path == "clean"].iloc[0]
    measured = {
        "accuracy": float(clean.accuracy),
        "passes": bool(clean.passes),
        "clean": {m: _interval(clean, m) for m in ("logit_diff", "log_prob", "prob", "logit")},
    }
    paths = table[(table.receiver == "logits") & (table.path == "direct")]
    if len(paths):
        strongest: dict[str, dict] = {}
        for (corruption, kind), rows in paths.groupby(["corruption", paths.sender.map(_kind)]):
            row = rows.loc[rows.logit_diff.abs().idxmax()]
            strongest.setdefault(corruption, {})[kind] = {"sender": row.sender, **_interval(row, "logit_diff")}
        default = table[table.path == "direct"].corruption.iloc[0]
        sure = paths.matters.astype("boolean").fillna(False) & paths.above_null.astype("boolean").fillna(False)
        rows = paths[(paths.corruption == default) & sure]
        measured["strongest_direct"] = strongest
        measured["above_null"] = {r.sender: _interval(r, "logit_diff") | {"share": r.share} for r in rows.itertuples()}
    return measured


def _kind(sender: str) -> str:
    """What kind of sender "L2H0", "L1 y" or "L1 state" is; kinds contain each other, so each has its strongest."""
    return sender.split(" ")[1] if " " in sender else "head"


def _off_by_one_metrics(table: pd.DataFrame) -> dict:
    """Of the layer with the largest effect: effects by offset, their shares of its whole, and the mean offset."""
    rows = table[table.strongest].sort_values("offset")
    first = rows.iloc[0]
    effects = {str(r.offset): _interval(r, "logit_diff") for r in rows.itertuples()}
    found = {"layer": int(first.layer), "offsets": effects}
    if not np.isnan(first.mean_offset):
        found["shares"] = {str(r.offset): _interval(r, "share") for r in rows.itertuples()}
        found["mean_offset"] = _interval(first, "mean_offset")
    return found


def _interval(row, metric: str) -> dict:
    return {part: float(getattr(row, name)) for part, name in _parts(metric).items()}


def _parts(metric: str) -> dict[str, str]:
    return {"mean": metric, "low": f"{metric}_low", "high": f"{metric}_high"}


def _ablation_metrics(results: Results) -> dict:
    """Comparison -> side -> its model, and of the loss and each task the value and the effects of each group of the
    largest size, ablated to their means."""
    found: dict[str, dict] = {}
    for (comparison, side), table in results.ablation.items():
        one = {"model": table.model.iloc[0], "what": {}}
        for what, rows in table[table.metric.isin(["cross_entropy", "logit_diff"])].groupby("what", sort=False):
            clean = rows[rows.group == "none"].iloc[0]
            effects = rows[(rows.kind == "mean") & (rows["size"] == rows["size"].max())]
            measured = {"clean": clean.value, "accuracy": clean.accuracy, "passes": bool(clean.passes)}
            measured["features"] = int(effects.features.max()) if len(effects) else 0
            measured["groups"] = {
                r.group: {"value": r.value, "low": r.low, "high": r.high} for r in effects.itertuples()
            }
            one["what"][what] = measured
        found.setdefault(comparison, {})[side] = one
    return found
