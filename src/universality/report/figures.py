"""The figures, each a function from results to an SVG text that is the same for the same results."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from universality.report.results import Comparison, Results, depth_map
from universality.report.style import MARKERS, STYLE, svg

SETTING_COLOURS = {
    "cross_architecture": "#0b6e99",
    "sae_seed": "#2a9d5c",
    "model_seed": "#8ab17d",
    "untrained": "#9a9a9a",
    "frozen_decoder": "#c9ada7",
    "neurons": "#b08968",
    "residual": "#d8c3a5",
    "pca": "#c98b5e",
    "any": "#6c757d",
}
ABLATED = ("well", "badly", "random", "well - badly")
"""Groups of features, and the difference of the first two, as results name them."""


def _colour(comparison: Comparison) -> str:
    return SETTING_COLOURS[comparison.summary["setting"]]


def mppc_distributions(results: Results) -> str:
    """Share of features above each correlation, for every comparison; beside it the means with their intervals."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=[1.3, 1])
        names = sorted(results.comparisons, key=lambda n: -results.comparisons[n].summary["both"]["mean"])
        shades: dict[str, int] = {}
        for place, name in enumerate(names):
            comparison = results.comparisons[name]
            values = np.sort(comparison.table.mppc.dropna())
            setting = comparison.summary["setting"]
            style = ("-", "--", ":", "-.")[shades.setdefault(setting, 0) % 4]
            shades[setting] += 1
            left.plot(values, 1 - np.arange(len(values)) / len(values), style, color=_colour(comparison), label=name)
            both = comparison.summary["both"]
            bar = np.maximum([[both["mean"] - both["low"]], [both["high"] - both["mean"]]], 0)
            right.errorbar(both["mean"], place, xerr=bar, fmt="o", color=_colour(comparison), capsize=3)
            right.annotate(
                f"{both['mean']:.3f}", (both["mean"], place), (0, 7), textcoords="offset points", ha="center"
            )
        left.set(xlabel="max pairwise Pearson correlation", ylabel="share of features above", ylim=(0, 1))
        left.legend(frameon=False, fontsize=8, loc="upper right")
        right.set(yticks=range(len(names)), yticklabels=names, xlabel="mean MPPC", xlim=(0, 1.02))
        right.invert_yaxis()
        return svg(figure)


def depth_maps(results: Results) -> str:
    """For each cross-architecture comparison and direction: in which layer a layer's best matches lie."""
    cross = {n: c for n, c in results.comparisons.items() if c.summary["setting"] == "cross_architecture"}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(len(cross), 2, figsize=(9, 3.8 * len(cross)), squeeze=False)
        for row, (name, comparison) in zip(axes, cross.items(), strict=True):
            for axis, direction in zip(row, ("a_to_b", "b_to_a"), strict=True):
                models = comparison.summary[direction]
                _depth_map(axis, comparison.table, models["model"], models["best_model"])
                axis.set_title(name, fontsize=10)
        return svg(figure)


def _depth_map(axis, table: pd.DataFrame, model: str, other: str) -> None:
    share, layers, best_layers = depth_map(table, model)
    labels = f"layer of {other} with the best match", f"layer of {model}"
    _cells(axis, share, (layers, best_layers), labels)


def space_maps(results: Results) -> str:
    """For each comparison of whole layers: debiased CKA of each layer of one side with each of the other."""
    with plt.rc_context(STYLE):
        n = len(results.spaces)
        figure, axes = plt.subplots(1, n, figsize=(4.6 * n, 3.8), squeeze=False)
        for axis, (name, table) in zip(axes[0], results.spaces.items(), strict=True):
            rows = table[table.measure == "cka_debiased"].pivot(index="layer", columns="other_layer", values="value")
            models = (results.comparisons[name].summary[side]["model"] for side in ("b", "a"))
            labels = tuple(f"layer of {model}" for model in models)
            _cells(axis, rows.to_numpy(), (list(rows.index), list(rows.columns)), labels)
            axis.set_title(name, fontsize=10)
        return svg(figure)


def _cells(axis, values: np.ndarray, ticks: tuple[list[int], list[int]], labels: tuple[str, ...]) -> None:
    """Values in [0, 1] by layer (rows) and layer (columns); the number in each cell where there are few."""
    axis.spines[:].set_visible(False)
    axis.imshow(values, cmap="Blues", vmin=0, vmax=1, origin="lower", aspect="auto")
    rows, columns = ticks
    axis.set(
        xlabel=labels[0],
        ylabel=labels[1],
        xticks=range(len(columns)),
        xticklabels=columns,
        yticks=range(len(rows)),
        yticklabels=rows,
    )
    if values.size <= 64:
        for i, j in np.ndindex(values.shape):
            shade = "white" if values[i, j] > 0.5 else "black"
            axis.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", color=shade, fontsize=8)


def circuit_effects(results: Results) -> str:
    """Every sender's direct effect on the logit difference, by model and corruption, with intervals."""
    corruptions = ["replace_B", "replace_A"]
    with plt.rc_context(STYLE):
        tables = results.of_circuits("paths")
        n_models = len(tables)
        figure, axes = plt.subplots(n_models, 2, figsize=(11, 3.4 * n_models), squeeze=False)
        for row, (model, table) in zip(axes, tables.items(), strict=True):
            receivers = [r for r in table.receiver.dropna().unique() if r != "logits"]
            for axis, corruption in zip(row, corruptions, strict=True):
                rows = table[(table.corruption == corruption) & (table.path == "direct") & table.input.isna()]
                _effect_bars(axis, rows[rows.receiver == "logits"], "#0b6e99", "to the logits", -0.2)
                for receiver in receivers:
                    through = rows[rows.receiver == receiver].set_index("sender")
                    order = rows[rows.receiver == "logits"].sender
                    aligned = through.reindex(order).reset_index()
                    _effect_bars(axis, aligned, "#e07a5f", f"through {receiver}", 0.2)
                axis.axhline(0, color="black", linewidth=0.6)
                axis.set(title=f"{model}, {corruption}", ylabel="change of logit(B) - logit(B')")
                axis.legend(frameon=False, fontsize=8)
        return svg(figure)


def _effect_bars(axis, rows: pd.DataFrame, colour: str, label: str, shift: float) -> None:
    place = np.arange(len(rows))
    low, high = rows.logit_diff - rows.logit_diff_low, rows.logit_diff_high - rows.logit_diff
    error = np.maximum(np.array([low, high], dtype=float), 0)
    axis.bar(place + shift, rows.logit_diff, 0.4, yerr=error, color=colour, label=label, error_kw={"linewidth": 0.8})
    axis.set_xticks(place, rows.sender, rotation=90, fontsize=7)


def off_by_one_profiles(results: Results) -> str:
    """Effect of exchanging what one position writes, at each offset from B, a line a layer."""
    with plt.rc_context(STYLE):
        tables = results.of_circuits("off_by_one")
        n_models = len(tables)
        figure, axes = plt.subplots(1, n_models, figsize=(5.5 * n_models, 3.8), squeeze=False)
        for axis, (model, table) in zip(axes[0], tables.items(), strict=True):
            for number, (layer, rows) in enumerate(table.sort_values("offset").groupby("layer")):
                error = np.array([rows.logit_diff - rows.logit_diff_low, rows.logit_diff_high - rows.logit_diff])
                axis.errorbar(
                    rows.offset, rows.logit_diff, yerr=np.maximum(error, 0), marker="o", capsize=2,
                    color=plt.get_cmap("viridis")(number / max(1, table.layer.nunique() - 1)), label=f"layer {layer}",
                )  # fmt: skip
            axis.axhline(0, color="black", linewidth=0.6)
            axis.set(title=model, xlabel="position of the write, counted from B", xticks=sorted(table.offset.unique()))
            axis.set_ylabel("change of logit(B) - logit(B')")
            axis.legend(frameon=False, fontsize=8)
        return svg(figure)


def ablation_effects(results: Results) -> str:
    """For each comparison and side: effects on the loss and on tasks, by how many features of each group were set to
    their means."""
    with plt.rc_context(STYLE):
        panels = {
            (comparison, table.model.iloc[0], what): rows
            for (comparison, _), table in results.ablation.items()
            for what, rows in _ablated(table).groupby("what", sort=False)
        }
        columns = max(sum(key[:2] == other[:2] for other in panels) for key in panels)
        sides = list(dict.fromkeys(key[:2] for key in panels))
        figure, axes = plt.subplots(len(sides), columns, figsize=(2.6 * columns, 2.6 * len(sides)), squeeze=False)
        for row, side in zip(axes, sides, strict=True):
            own = {what: rows for (*of, what), rows in panels.items() if tuple(of) == side}
            for axis in row[len(own) :]:
                axis.set_axis_off()
            for axis, (what, rows) in zip(row, own.items(), strict=False):
                _group_lines(axis, rows)
                axis.set_title(f"{side[1]}: {what}", fontsize=9)
                axis.set_xlabel("features ablated", fontsize=8)
        axes[0][0].set_ylabel("effect", fontsize=8)
        axes[0][0].legend(frameon=False, fontsize=7)
        return svg(figure)


def _group_lines(axis, rows: pd.DataFrame) -> None:
    for number, name in enumerate(ABLATED[:3]):
        members = rows[rows.group == name].sort_values("features")
        error = np.maximum([members.value - members.low, members.high - members.value], 0)
        axis.errorbar(
            members.features, members.value, yerr=error, marker="o", capsize=2, color=f"C{number}", label=name
        )
    axis.axhline(0, color="black", linewidth=0.6)


def _ablated(table: pd.DataFrame) -> pd.DataFrame:
    """What is drawn: the loss, and logit differences of tasks that the model does, of features set to their means."""
    return table[table.metric.isin(["cross_entropy", "logit_diff"]) & (table.kind == "mean") & table.passes]


def training_curves(results: Results) -> str:
    """Loss on held-out text and the induction gain over training."""
    panels = [
        ("text_loss", "held-out text (nats/token)"),
        ("induction_gain", "induction gain (nats)"),
        ("induction_top1", "induction top-1"),
    ]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(11, 3.2))
        for model, curves in results.training.items():
            for axis, (column, label) in zip(axes, panels, strict=True):
                axis.plot(curves.step, curves[column], label=model)
                axis.set(xlabel="training step", ylabel=label)
        axes[0].legend(frameon=False, fontsize=8)
        return svg(figure)


def sae_quality(results: Results) -> str:
    """L0 against explained variance and against loss recovered on held-out documents, a point a dictionary and site."""
    quality = results.sae_quality
    variants, models = list(quality.variant.unique()), list(quality.model.unique())
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
        for (model, variant), rows in quality.groupby(["model", "variant"]):
            style = {"marker": MARKERS[models.index(model) % len(MARKERS)], "color": f"C{variants.index(variant)}"}
            for axis, column in zip(axes, ("explained_variance", "loss_recovered"), strict=True):
                axis.errorbar(
                    rows.L0, rows[column], xerr=_error(rows, "L0"), yerr=_error(rows, column),
                    label=f"{model} {variant}", linestyle="none", markersize=4, elinewidth=0.8, **style,
                )  # fmt: skip
        axes[0].set(ylabel="explained variance")
        axes[1].set(ylabel="loss recovered")
        for axis in axes:
            axis.set(xlabel="L0 (active features per token)", xscale="log")
        axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        return svg(figure)


def _error(rows: pd.DataFrame, column: str) -> np.ndarray:
    """How far the interval reaches below and above [2, n]."""
    return np.maximum([rows[column] - rows[f"{column}_low"], rows[f"{column}_high"] - rows[column]], 0)


def firing_frequency(results: Results) -> str:
    """How often live features fire, a line a variant, all of its dictionaries together."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6.5, 3))
        for number, (variant, rows) in enumerate(results.sae_quality.groupby("variant", sort=False)):
            counts = np.sum(rows.frequency_counts.tolist(), axis=0)
            edges = [*rows.frequency_bins.iloc[0], 0.0]
            axis.stairs(counts / max(counts.sum(), 1), edges, color=f"C{number}", label=variant)
        axis.set(xlabel="log10 of the share of tokens that a feature fires at", ylabel="share of live features")
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        return svg(figure)


def norm_shares(results: Results) -> str:
    """For each crosscoder: how many live features have which share of their decoder norm in a site; the last of two
    sites is the first mirrored, and left out."""
    with plt.rc_context(STYLE):
        n_crosscoders = len(results.crosscoders)
        figure, axes = plt.subplots(1, n_crosscoders, figsize=(5.5 * n_crosscoders, 3), squeeze=False)
        for axis, (name, table) in zip(axes[0], results.crosscoders.items(), strict=True):
            live, shares = table[~table.dead], [column for column in table.columns if column.startswith("share ")]
            axis.axvspan(0.3, 0.7, color="#f0f0f0")
            for column in shares[:1] if len(shares) == 2 else shares:
                counts, edges = np.histogram(live[column], bins=40, range=(0, 1))
                axis.stairs(counts, edges, label=column.removeprefix("share "))
            axis.set(title=name, xlabel="share of a feature's decoder norm", ylabel="live features", xlim=(0, 1))
            axis.legend(frameon=False, fontsize=8)
        return svg(figure)
