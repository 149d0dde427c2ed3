"""Features of one side of a comparison only: complex, well measured, matched by nothing; with what they do.

Of the comparison's unmatched features, those whose MPPC lies low with its whole interval, that fire in enough
documents, those with the largest mean of two percentile ranks, of complexity (up) and of MPPC (down). Each is taken out
of the running model (zero ablation of its code at all tokens, the rest of the stream left as it is) in the sequences of
its top contexts; its effect is the change of cross entropy, nats a prediction, over the predictions made at tokens
where it fires, with an interval over documents.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy.stats import rankdata

from universality.ablation.effects import ablation_edits, measure_loss
from universality.alignment.bootstrap import document_index, percentile_interval, resample_weights
from universality.alignment.resampling import DIRECTIONS
from universality.analysis.held_out import HeldOut, Marked, read_held_out
from universality.analysis.settings import IdiosyncraticJob, IdiosyncraticSettings
from universality.corpus.tokenizer import load_tokenizer
from universality.models.language_model import LanguageModel
from universality.models.loading import load_model
from universality.runtime import progress
from universality.saes.base import SAE
from universality.saes.load import load_sae
from universality.saes.splicing import predicting_documents
from universality.storage import read_table, replacing, write_table

_EFFECT = ["effect", "low", "high", "predictions"]
_CONTEXT = ["rank", "place", "value", *Marked._fields]
_TOLD = ("complexity", "monosemanticity", "context_needed", "frequency")


class Folders(NamedTuple):
    """By layer: of SAEs, of their codes, and of what `analysis features` measured."""

    saes: Mapping[int, Path]
    codes: Mapping[int, Path]
    measures: Mapping[int, Path]


def write_idiosyncratic(
    job: IdiosyncraticJob, folders: Folders, comparison: Path, model: Path, tokens: Path, tokenizer: Path, out: Path
) -> None:
    """features.parquet, a row a feature, the most idiosyncratic first; contexts.parquet, a row a context of each."""
    settings = job.idiosyncratic
    table = _candidates(job, folders, comparison, tokens)
    loaded = load_model(model, job.held.run.products, job.held.run.device)
    words = load_tokenizer(tokenizer)
    effects: dict[int, dict] = {}
    shown = []
    for layer, listed in progress(list(table.groupby("layer")), "layers with features to ablate"):
        held, sae = read_held_out(folders.codes[layer], tokens, job.held), load_sae(folders.saes[layer])
        for row in listed.itertuples():
            rows, values = _top(folders.measures[layer], row.feature, settings.contexts)
            effects[row.rank] = measure_effect(loaded, sae, row, held, rows, settings)
            for place, (at, value) in enumerate(zip(rows, values, strict=True)):
                text = held.marked(at, words)
                shown.append({"rank": row.rank, "place": place, "value": float(value), **text._asdict()})
        del held  # before the next is read
    table["promoted"] = [[words.decode([token]) for token in tokens_of] for tokens_of in table.promoted]
    measured = pd.DataFrame([effects[rank] for rank in table["rank"]], columns=_EFFECT)
    features = pd.concat([table.reset_index(drop=True), measured], axis=1)
    contexts = pd.DataFrame(sorted(shown, key=lambda row: (row["rank"], row["place"])), columns=_CONTEXT)
    with replacing(out) as folder:
        folder.mkdir()
        for name, found in (("features", features), ("contexts", contexts)):
            write_table(folder / f"{name}.parquet", pa.Table.from_pandas(found, preserve_index=False))


def _candidates(job: IdiosyncraticJob, folders: Folders, comparison: Path, tokens: Path) -> pd.DataFrame:
    """The features listed, by their `rank`."""
    own = read_table(comparison / "unmatched.parquet").to_pandas()
    own = own[own.direction == DIRECTIONS["ab".index(job.side)]]
    kept = ["layer", "feature", "mppc", "heldout_mppc", "p_value", "best_layer", "best_feature"]
    tables = []
    for layer, folder in folders.measures.items():
        table = read_table(folder / "measures.parquet").to_pandas()[["feature", "promoted", *_TOLD]]
        table["documents"] = documents_of(read_held_out(folders.codes[layer], tokens, job.held))[table.feature]
        tables.append(own.loc[own.layer == layer, kept].merge(table, on="feature"))
    return most_idiosyncratic(pd.concat(tables, ignore_index=True), job.idiosyncratic)


def most_idiosyncratic(table: pd.DataFrame, settings: IdiosyncraticSettings) -> pd.DataFrame:
    """The features listed, in order; equal ones in the order of the table."""
    table = table[(table.documents >= settings.min_documents) & table.complexity.notna()]
    score = (rankdata(table.complexity) + rankdata(-table.mppc)) / (2 * max(len(table), 1))
    order = np.argsort(-score, kind="stable")[: settings.listed]
    return table.assign(idiosyncrasy=score).iloc[order].assign(rank=np.arange(len(order)))


def documents_of(held: HeldOut) -> np.ndarray:
    """In how many documents each feature fires [F]."""
    _, number = np.unique(held.rows.documents, return_inverse=True)
    pairs = held.codes.copy()  # what follows changes its arrays
    pairs.indices = number[pairs.indices].astype(pairs.indices.dtype)
    pairs.resize((int(number.max()) + 1, pairs.shape[1]))
    pairs.has_sorted_indices = pairs.has_canonical_format = False
    pairs.sum_duplicates()
    return np.diff(pairs.indptr)


def _top(folder: Path, feature: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and values of a feature's top contexts."""
    table = read_table(folder / "contexts.parquet", where=("feature", int(feature))).to_pandas()
    top = table[(table.kind == "top") & (table["rank"] < n)]
    return top.row.to_numpy(), top.value.to_numpy()


def measure_effect(
    model: LanguageModel, sae: SAE, feature, held: HeldOut, rows: np.ndarray, settings: IdiosyncraticSettings
) -> dict[str, float]:
    """`effect` with `low` and `high`, over `predictions`; NaN where the feature fires at the last tokens alone."""
    chosen = np.unique(held.sequences(rows))
    sample = held.sample.part(chosen)
    group = {feature.layer: np.array([feature.feature])}
    ablation = partial(ablation_edits, {feature.layer: sae}, group, None)
    clean, without = (
        measure_loss(model, sample, edits, settings.batch_size)
        for edits in (partial(ablation_edits, {}, {}, None), ablation)
    )
    fires = _fires(held, feature.feature)[chosen][:, :-1][sample.kept[:, :-1]]
    change, documents = (without - clean)[fires], predicting_documents(sample)[fires]
    if not len(change):
        return {"effect": np.nan, "low": np.nan, "high": np.nan, "predictions": 0}
    index = document_index(documents)
    weights = resample_weights(index.shape[0], settings.bootstrap_samples, settings.bootstrap_seed)
    drawn = (weights @ (index @ change)) / (weights @ index.sum(axis=1))
    low, high = percentile_interval(drawn[:, None], settings.confidence)
    return {"effect": change.mean(), "low": float(low[0]), "high": float(high[0]), "predictions": len(change)}


def _fires(held: HeldOut, feature: int) -> np.ndarray:
    """Where a feature fires [S, L]."""
    rows = held.codes.indices[held.codes.indptr[feature] : held.codes.indptr[feature + 1]]
    found = np.zeros(held.sample.tokens.shape, dtype=bool)
    found[held.sequences(rows), held.rows.positions[rows]] = True
    return found
