"""The page: one HTML file that opens from disk and needs nothing else."""

from importlib.resources import files
from pathlib import Path

import jinja2

from universality.report import figures
from universality.report.results import MATCHED, Results, metrics, read_results
from universality.report.settings import ReportSettings
from universality.storage import replacing, write_json

SETTING_NAMES = {
    "cross_architecture": "across architectures",
    "sae_seed": "skyline: same model, other SAE seed",
    "model_seed": "skyline: other model seed",
    "neurons": "baseline: neurons",
    "shuffled": "null: tokens of one side shuffled",
}


def build_report(
    settings: ReportSettings,
    models: list[Path],
    saes: Path,
    crosscoders: list[Path],
    alignment: list[Path],
    circuits: list[Path],
    metrics_file: Path,
    out: Path,
) -> None:
    results = read_results(models, saes, crosscoders, alignment, circuits)
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
        figures=_figures(results),
        verdicts=_verdicts(results),
    )


def _figures(results: Results) -> dict[str, str]:
    """Name -> SVG; a figure whose results the study does not have is left out."""
    settings = {c.summary["setting"] for c in results.comparisons.values()}
    drawn = {"mppc": figures.mppc_distributions(results), "circuits": figures.circuit_effects(results)}
    drawn |= {"saes": figures.sae_quality(results), "frequency": figures.firing_frequency(results)}
    if "cross_architecture" in settings:
        drawn["depth"] = figures.depth_maps(results)
    if results.off_by_one:
        drawn["off_by_one"] = figures.off_by_one_profiles(results)
    if results.training:
        drawn["training"] = figures.training_curves(results)
    if results.crosscoders:
        drawn["crosscoders"] = figures.norm_shares(results)
    return drawn


def _verdicts(results: Results) -> list[str]:
    """What the intervals say of each cross-architecture comparison against the null of the same two sides, in words."""
    lines = []
    for name, cross in results.comparisons.items():
        for null_name, null in results.comparisons.items():
            same_sides = all(cross.summary[side] == null.summary[side] for side in ("a", "b"))
            settings = (cross.summary["setting"], null.summary["setting"])
            if settings == ("cross_architecture", "shuffled") and same_sides:
                lines.append(_verdict(name, cross.summary["both"], null_name, null.summary["both"]))
    return lines


def _verdict(name: str, mean: dict, null_name: str, null: dict) -> str:
    if mean["low"] > null["high"]:
        relation = "above; the intervals do not overlap"
    elif mean["high"] < null["low"]:
        relation = "below; the intervals do not overlap"
    else:
        relation = "not told apart; the intervals overlap"
    return f"{name} ({mean['mean']:.3f}) against {null_name} ({null['mean']:.3f}): {relation}"
