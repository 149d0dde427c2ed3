"""A feature and its partners on the text: the tokens where it is most active, and what its partners do there."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse
from rich.console import Console
from rich.table import Table
from rich.text import Text

from universality.activations.format import TokenRows
from universality.activations.store import ActivationStore
from universality.alignment.settings import Comparison
from universality.config import load_study
from universality.corpus.tokenizer import load_tokenizer
from universality.errors import StudyError
from universality.features.codes import read_codes
from universality.plan import FeatureSet, Plan
from universality.storage import read_table

_BEFORE, _AFTER = 8, 3  # tokens of context


class Named(NamedTuple):
    """A feature of one side, "a" or "b"."""

    side: str
    layer: int
    feature: int


def parse_feature(text: str) -> Named:
    """From SIDE:LAYER:FEATURE, such as a:3:120."""
    parts = text.split(":")
    if len(parts) != 3 or parts[0] not in ("a", "b") or not all(part.isdigit() for part in parts[1:]):
        raise StudyError(f"FEATURE: {text!r} is not SIDE:LAYER:FEATURE with side a or b, such as a:3:120")
    return Named(parts[0], int(parts[1]), int(parts[2]))


def show(study_file: Path, name: str, feature: Named, n_contexts: int, console: Console) -> None:
    """Print the partners, then top contexts of the feature and of its best partner, with both values at each."""
    plan = Plan(load_study(study_file))
    comparisons = plan.study.alignment.comparisons
    if name not in comparisons:
        raise StudyError(f"COMPARISON: {name!r} is not in alignment.comparisons: {', '.join(comparisons)}")
    comparison = comparisons[name]
    if not comparison.of_saes:
        raise StudyError(f"{name}: not of SAEs alone; other values are not kept as codes, which show reads")
    direction = "a_to_b" if feature.side == "a" else "b_to_a"
    folder = study_file.parent / "results" / "alignment" / name
    partners = read_table(folder / "partners.parquet").to_pandas()
    found = partners[(partners.direction == direction) & (partners.layer == feature.layer)]
    found = found[found.feature == feature.feature].sort_values("rank")
    if found.empty:
        raise StudyError(
            f"{name}: feature {feature.layer}:{feature.feature} of side {feature.side} is dead or not there"
        )
    console.print(
        f"{name}: partners of {_side(comparison, feature.side)} {feature.layer}:{feature.feature}", soft_wrap=True
    )
    table = Table()
    for column in ("rank", "layer", "feature", "r"):
        table.add_column(column, justify="right")
    for row in found.itertuples():
        table.add_row(str(row.rank), str(row.partner_layer), str(row.partner_feature), f"{row.r:.3f}")
    console.print(table)
    best = found.iloc[0]
    partner = Named("b" if feature.side == "a" else "a", int(best.partner_layer), int(best.partner_feature))
    for one, other in ((feature, partner), (partner, feature)):
        console.print(f"top contexts of {_side(comparison, one.side)} {one.layer}:{one.feature}", soft_wrap=True)
        console.print(_contexts(study_file.parent, plan, comparison, one, other, n_contexts))


def _side(comparison: Comparison, side: str) -> str:
    chosen = getattr(comparison, side)
    return f"{chosen.model}/{chosen.variant}/seed_{chosen.seed}"


def _values(root: Path, comparison: Comparison, feature: Named) -> scipy.sparse.csc_array:
    """The feature's column of its codes [T, 1]."""
    chosen = getattr(comparison, feature.side)
    features = FeatureSet(chosen.model, chosen.variant, chosen.seed, feature.layer)
    codes = read_codes(root / "results" / "features" / comparison.corpus / features.path).by_token
    return codes[:, [feature.feature]].tocsc()


def _contexts(root: Path, plan: Plan, comparison: Comparison, one: Named, other: Named, n: int) -> Table:
    """The `n` tokens where `one` is most active, no two of one sequence, and the value of `other` there."""
    own, across = (_values(root, comparison, feature) for feature in (one, other))
    model = getattr(comparison, one.side).model
    shards = [root / path for path in plan.row_shards(model, comparison.corpus)]
    rows = ActivationStore(shards).rows()
    tokenizer = load_tokenizer(root / plan.tokenizer_of(model))
    same_tokens = plan.tokens_of(model) == plan.tokens_of(getattr(comparison, other.side).model)
    table = Table()
    for column in ("its value", "the other's"):
        table.add_column(column, justify="right")
    table.add_column("context")
    sequence = np.cumsum(np.diff(rows.positions, prepend=rows.positions[0] + 1) <= 0)
    taken: set[int] = set()
    for place in np.argsort(-own.data, kind="stable"):
        token = own.indices[place]
        if sequence[token] in taken:
            continue
        taken.add(int(sequence[token]))
        beside = f"{across[token, 0]:.2f}" if same_tokens else "other tokens"
        table.add_row(f"{own.data[place]:.2f}", beside, _window(tokenizer, rows, sequence, token))
        if len(taken) == n:
            break
    return table


def _window(tokenizer, rows: TokenRows, sequence: np.ndarray, token: int) -> Text:
    """The token, marked, between its neighbours of the same document and sequence."""
    text = Text()
    for place in range(max(token - _BEFORE, 0), min(token + _AFTER + 1, len(rows.tokens))):
        if sequence[place] == sequence[token] and rows.documents[place] == rows.documents[token]:
            piece = tokenizer.decode([int(rows.tokens[place])]).replace("\n", "\\n")
            text.append(piece, style="bold reverse" if place == token else "")
    return text
