"""A feature as its tables have it: measures, top contexts, and others from strong to weak."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from universality.analysis.held_out import read_text
from universality.analysis.settings import Held
from universality.config import load_study
from universality.corpus.tokenizer import load_tokenizer
from universality.errors import StudyError
from universality.plan import Plan
from universality.saes.settings import EvaluationRun
from universality.storage import read_table


def show(study_file: Path, place: str, feature: int, n_top: int, console: Console) -> None:
    """`place`: of a set of features below results/analysis/features."""
    plan, results = Plan(load_study(study_file)), study_file.parent / "results"
    known = {codes.path: codes for codes in plan.analysed()}
    if place not in known:
        raise StudyError(f"FEATURES: {place!r} is none of those analysed: {', '.join(known) or 'none'}")
    folder, model = results / "analysis" / "features" / place, known[place].features.model
    tables = {
        name: read_table(folder / f"{name}.parquet", where=("feature", feature)).to_pandas()
        for name in ("measures", "contexts")
    }
    if tables["contexts"].empty:
        raise StudyError(f"FEATURE: {feature} of {place} is dead or not there")
    [measures] = tables["measures"].drop(columns=["feature", "dead", "promoted"]).to_dict("records")
    words = load_tokenizer(study_file.parent / plan.tokenizer_of(model))
    told = (f"{name} {value}" if isinstance(value, int) else f"{name} {value:.4g}" for name, value in measures.items())
    console.print(Text("  ".join(told)), soft_wrap=True)
    promoted = [repr(words.decode([token])) for token in tables["measures"].promoted.iloc[0]]
    console.print(Text(f"promotes {', '.join(promoted)}"), soft_wrap=True)
    cache = plan.study.activations.cache
    run = EvaluationRun(sample_seed=cache.sample_seed, products=cache.products, device=cache.device)
    held = read_text(
        study_file.parent / plan.tokens_of(model),
        Held(corpus=known[place].corpus, sequences=plan.study.activations.evaluation_sequences, run=run),
    )
    contexts = tables["contexts"].sort_values(["kind", "value"], ascending=[False, False])
    table = Table("kind", "value", "context")
    for row in contexts[(contexts.kind != "top") | (contexts["rank"] < n_top)].itertuples():
        marked, text = held.marked(row.row, words), Text()
        for part, style in zip(marked, ("", "bold reverse", ""), strict=True):
            text.append(part.replace("\n", "\\n"), style=style)
        table.add_row(row.kind if row.kind == "top" else f"quantile {row.group}", f"{row.value:.2f}", text)
    console.print(table)
