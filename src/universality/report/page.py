"""The page: one HTML file that opens from disk and needs nothing else."""

from importlib.resources import files
from pathlib import Path

import jinja2

from universality.report import figures, kinds
from universality.report.results import MATCHED, Inputs, Results, metrics, read_results
from universality.report.settings import ReportSettings
from universality.storage import replacing, write_json

SETTING_NAMES = {
    "cross_architecture": "across architectures",
    "sae_seed": "skyline: same model, other SAE seed",
    "model_seed": "skyline: other model seed",
    "untrained": "control: untrained models",
    "frozen_decoder": "control: SAEs with frozen random decoders",
    "neurons": "baseline: neurons",
    "residual": "baseline: axes of the residual stream",
    "pca": "baseline: principal components",
    "any": "two sides",
}


def build_report(settings: ReportSettings, inputs: Inputs, metrics_file: Path, out: Path) -> None:
    results = read_results(inputs)
    measured = metrics(results)
    page = render(settings.title, results, measured)
    with replacing(out) as folder:
        folder.mkdir()
        (folder / "index.html").write_text(page, encoding="utf8")
    write_json(metrics_file, measured)


def render(title: str, results: Results, measured: dict) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string((files("universality.report") / "page.html.j2").read_text(encoding="utf8"))
    order = sorted(measured["alignment"], key=lambda name: -measured["alignment"][name]["mean"])
    summaries = {name: c.summary for name, c in results.comparisons.items()}
    return template.render(
        title=title,
        metrics=measured,
        comparisons=[(name, measured["alignment"][name], summaries[name]) for name in order],
        setting_names=SETTING_NAMES,
        matched=MATCHED,
        ablated_groups=figures.ABLATED,
        figures=_figures(results),
        verdicts=_verdicts(results),
        own_features=[(name, side, *_listed(one)) for (name, side), one in results.kinds.idiosyncratic.items()],
    )


def _figures(results: Results) -> dict[str, str]:
    """Name -> SVG; a figure whose results the study does not have is left out."""
    settings = {c.summary["setting"] for c in results.comparisons.values()}
    drawn = {"mppc": figures.mppc_distributions(results)}
    if results.of_circuits("paths"):
        drawn["circuits"] = figures.circuit_effects(results)
    drawn |= {"saes": figures.sae_quality(results), "frequency": figures.firing_frequency(results)}
    if results.spaces:
        drawn["spaces"] = figures.space_maps(results)
    if "cross_architecture" in settings:
        drawn["depth"] = figures.depth_maps(results)
    if results.of_circuits("off_by_one"):
        drawn["off_by_one"] = figures.off_by_one_profiles(results)
    if results.ablation:
        drawn["ablation"] = figures.ablation_effects(results)
    if results.kinds.similarity:
        drawn["bins"] = kinds.binned_mppc(results.kinds)
        drawn["partial"] = kinds.partial_correlations(results.kinds)
    if results.training:
        drawn["training"] = figures.training_curves(results)
    if results.crosscoders:
        drawn["crosscoders"] = figures.norm_shares(results)
    return drawn


def _listed(one: kinds.Idiosyncratic) -> tuple[list, dict[int, list]]:
    """Features as rows, and by their rank their contexts."""
    contexts = (
        {rank: list(rows.itertuples()) for rank, rows in one.contexts.groupby("rank")} if len(one.contexts) else {}
    )
    return list(one.features.itertuples()), contexts


def _verdicts(results: Results) -> list[str]:
    """What the intervals say of each cross-architecture comparison against its own null, in words."""
    return [
        _verdict(name, c.summary["both"]["statistics"])
        for name, c in results.comparisons.items()
        if c.summary["setting"] == "cross_architecture"
    ]


def _verdict(name: str, statistics: dict) -> str:
    mean, null, above = (statistics[key] for key in ("mean", "null_mean", "above_null"))
    if any(part["low"] is None for part in (mean, null, above)):
        return f"{name}: no null could be computed"
    relation = "above" if above["low"] > 0 else "below" if above["high"] < 0 else "not told apart from"
    return (
        f"{name}: mean MPPC {mean['value']:.3f} is {relation} its null, {null['value']:.3f}; the difference is "
        f"{above['value']:.3f} [{above['low']:.3f}, {above['high']:.3f}]"
    )
