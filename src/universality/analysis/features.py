"""The tables of one SAE's features: contexts.parquet and measures.parquet; docs/analysis.md describes them."""

from pathlib import Path

import numpy as np
import scipy.sparse
import torch

from universality.activations.format import TokenRows
from universality.alignment.token_order import order_by_document
from universality.analysis.context_needed import context_needed
from universality.analysis.contexts import WINDOW, Contexts, find_contexts
from universality.analysis.held_out import HeldOut
from universality.analysis.logits import logit_effects
from universality.analysis.ngrams import predictability
from universality.analysis.scores import complexity, monosemanticity
from universality.analysis.settings import FeaturesJob, TruncationSettings
from universality.analysis.statistics import feature_measures
from universality.analysis.text import grams, preceding
from universality.models.language_model import LanguageModel
from universality.runtime import log
from universality.saes.base import SAE
from universality.storage import replacing, write_table

_PROMOTED = 8  # tokens that are told of a decoder direction
_HALVES_SEED = 0  # which documents n-grams are learned from
_ROWS_TOGETHER = 8192  # of contexts, which are sorted by feature
_RANDOM_WINDOWS = 2000  # of any features, that top contexts are set against


def write_features(job: FeaturesJob, held: HeldOut, sae: SAE, model: LanguageModel, out: Path) -> None:
    """Of all features of an SAE of resid_post, on the tokens that its codes are of."""
    settings, site = job.contexts, f"resid_post.{job.layer}"
    found = find_contexts(held.codes, held.rows, settings.top, settings.quantiles, settings.random, settings.seed)
    needed = _needed(found, held, sae, model, site, job.truncation)
    log.info("%d contexts of %d features; context needed, of %d", len(found.row), sae.d_sae, np.isfinite(needed).sum())
    columns = measured(held.codes, held.rows, found, needed, sae.W_dec, model.promoting())
    with replacing(out) as folder:
        folder.mkdir()
        write_table(folder / "contexts.parquet", found._asdict(), _ROWS_TOGETHER)
        write_table(folder / "measures.parquet", columns)


def measured(
    codes: scipy.sparse.csc_array,
    rows: TokenRows,
    contexts: Contexts,
    needed: np.ndarray,
    W_dec: torch.Tensor,
    promoting: torch.Tensor,
) -> dict[str, object]:
    """Columns of a row a feature: all measures; `needed` [F] is NaN where it was not measured."""
    order = order_by_document(rows.documents, [], 2, _HALVES_SEED)
    half = np.zeros(len(rows.tokens), dtype=bool)
    half[order.rows[order.cuts[order.half] :]] = True
    of_codes = feature_measures(codes, rows.tokens, rows.positions, order)
    r2 = predictability(codes, grams(rows, 3), half)
    logits = logit_effects(W_dec.float(), promoting, _PROMOTED)
    longest = int(rows.positions.max())
    score = complexity(needed, r2, of_codes.token_entropy, longest, len(promoting))
    return {
        "feature": np.arange(codes.shape[1], dtype=np.int32),
        "dead": of_codes.frequency == 0,
        **of_codes._asdict(),
        **{f"r2_{n}": r2[n - 1] for n in (1, 2, 3)},
        "peakedness": np.where(of_codes.frequency > 0, logits.peakedness, np.nan),
        "promoted": list(logits.tokens.astype(np.int32)),
        "context_needed": needed,
        "complexity": score.score,
        "full_complexity": score.full,
        "monosemanticity": _monosemanticity(contexts, rows, codes.shape[1]),
    }


def _windows(rows: TokenRows, places: np.ndarray) -> np.ndarray:
    """The tokens up to each place [n, WINDOW], its own last; -1 where there is none."""
    return np.stack([preceding(rows, n)[places] for n in reversed(range(WINDOW))], axis=1)


def _monosemanticity(contexts: Contexts, rows: TokenRows, n_features: int) -> np.ndarray:
    top = contexts.kind == "top"
    others = contexts.row[~top]
    others = others[np.linspace(0, len(others) - 1, min(len(others), _RANDOM_WINDOWS)).astype(int)]
    if not len(others):
        return np.full(n_features, np.nan)
    return monosemanticity(contexts.feature[top], _windows(rows, contexts.row[top]), _windows(rows, others), n_features)


def _needed(
    contexts: Contexts, held: HeldOut, sae: SAE, model: LanguageModel, site: str, settings: TruncationSettings
) -> np.ndarray:
    """Context needed [F], the median over a feature's contexts; NaN for features that were not drawn."""
    live = np.unique(contexts.feature)
    drawn = np.random.default_rng(settings.seed).permutation(live)[: settings.features]
    is_top = (contexts.kind == "top") & (contexts.rank < settings.contexts)
    chosen = np.flatnonzero(is_top & np.isin(contexts.feature, drawn))
    texts = [held.text_before(row) for row in contexts.row[chosen]]

    @torch.inference_mode()
    def activation(tokens: torch.Tensor, features: np.ndarray) -> np.ndarray:
        x = model.run(tokens, capture=[site], logits=False).captured[site][:, -1]
        pattern, values = sae.encode_sparse(x.float().cpu())
        found = scipy.sparse.csr_array((values.numpy(), pattern.features, pattern.starts), shape=pattern.shape)
        return np.asarray(found[np.arange(len(features)), features]).ravel()

    needed = context_needed(texts, contexts.feature[chosen], activation, held.end_of_text, settings.batch_size)
    found = np.full(sae.d_sae, np.nan)
    for feature in drawn:
        of_feature = needed[contexts.feature[chosen] == feature]
        if np.isfinite(of_feature).any():
            found[feature] = np.nanmedian(of_feature)
    return found
