"""How well dictionaries do on held-out documents.

Over all stored rows x of the site that is reconstructed, x_hat from a dictionary (a transcoder's x is its target, a
crosscoder's each of its sites in turn):

    L0                  features active at a token, mean
    explained_variance  1 - sum |x - x_hat|^2 / sum |x - mean|^2                   about the mean, not about zero
    mse                 mean (x - x_hat)^2 over tokens and dimensions
    dead, dense         shares of features that fire at no token, at more than a tenth of them; live: how many do fire
    frequency_counts    live features by log10 of the share of tokens at which each fires, in bins from frequency_bins
    shrinkage           gamma = E |x_hat|^2 / E [x_hat . x]: x_hat / gamma is the nearest to x; below 1, x_hat is too
                        short (the relative reconstruction bias of Rajamanoharan et al. 2024, arXiv 2404.16014)
    norm_ratio          E |x_hat| / E |x|

From runs of the model with the site replaced at kept tokens, in nats a prediction (saes.splicing):

    ce_clean, ce_spliced, ce_zero, ce_mean   cross entropy with x, x_hat, 0, the mean of x
    loss_recovered                           (ce_zero - ce_spliced) / (ce_zero - ce_clean)
    loss_recovered_from_mean                 (ce_mean - ce_spliced) / (ce_mean - ce_clean)
                                             (they mean little where there is little to recover: a model not trained)
    kl                                       KL(clean || spliced)

Of crosscoders, by the share of a feature's decoder norm that is of the site (saes.crosscoder):

    shared, exclusive   live features with a share of 0.3 to 0.7; with more than 0.9

X_low and X_high are percentile intervals of X by bootstrap over documents (alignment.bootstrap): sums within each
document are resampled, with them the mean that variance is about; the mean that the site is replaced by is fixed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from universality.activations.cache import row_shape
from universality.activations.sample import Sample, read_sample
from universality.activations.sites import layer_of
from universality.activations.store import ActivationStore
from universality.alignment.bootstrap import document_index, percentile_interval, resample_weights
from universality.errors import StudyError
from universality.models.language_model import LanguageModel
from universality.models.loading import load_model
from universality.runtime import log, progress
from universality.saes.crosscoder import Crosscoder
from universality.saes.metrics import FREQUENCY_BINS, frequency_counts
from universality.saes.placement import Evaluated, Placed, Source, open_stores, place
from universality.saes.settings import EvaluationRun, EvaluationSettings
from universality.saes.splicing import Losses, measure_losses, predicting_documents
from universality.storage import write_json, write_table

_DENSE = 0.1  # share of tokens
_SHARED = (0.3, 0.7)  # shares of a feature's decoder norm
_EXCLUSIVE = 0.9


def evaluate(
    wanted: list[Evaluated],
    shards: list[Path],
    model_folders: list[Path],
    tokens: Path,
    settings: EvaluationSettings,
    run: EvaluationRun,
    out: Path,
) -> None:
    """Write the metrics of all dictionaries to `out`, {"rows": a row a dictionary and site that it reconstructs}; for a
    crosscoder, which is to be the only one, a table of its features to {out without .json}.features.parquet too.

    Raises StudyError if dictionaries, shards, models and sample do not fit each other.
    """
    placed = [place(one) for one in wanted]
    if len(placed) > 1 and any(one.kind == "crosscoder" for one in placed):
        raise StudyError("saes evaluate: a crosscoder is evaluated alone, since its features have a table of their own")
    stores = open_stores(placed, shards)
    sample = read_sample(tokens, "evaluation", settings.sequences, run.sample_seed)
    for source, store in stores.items():
        _check_sample(sample, store, source, tokens, run.sample_seed)
    models = _load_models(placed, model_folders, run)
    stored = [StoredSums.over(one, stores, settings.rows) for one in placed]
    means = {source: sums.mean() for one in stored for source, sums in zip(one.placed.writes, one.sites, strict=True)}
    losses = measure_losses(models, sample, placed, means, settings.batch_size)
    documents = predicting_documents(sample)
    rows = []
    for sums, its_losses in zip(stored, losses, strict=True):
        for row, of_site in zip(sums.rows(settings), its_losses, strict=True):
            row |= _loss_metrics(of_site, documents, settings)
            log.info(
                "%s: L0 %.1f, explained variance %.3f, KL %.3g, dead %.3f",
                sums.placed.evaluated.folder, *(row[k] for k in ("L0", "explained_variance", "kl", "dead")),
            )  # fmt: skip
            rows.append(row)
    if placed[0].kind == "crosscoder":
        write_table(out.with_suffix(".features.parquet"), _feature_columns(stored[0]))
    write_json(out, {"rows": rows})


def _check_sample(sample: Sample, store: ActivationStore, source: Source, tokens: Path, seed: int) -> None:
    if not np.array_equal(sample.rows().tokens, store.rows().tokens[: sample.n_rows]):
        raise StudyError(
            f"{tokens}: its first {len(sample.tokens)} evaluation sequences by sample_seed={seed} are not those that "
            f"the shards of {source[0]}:{source[1]} begin with"
        )


def _load_models(placed: list[Placed], folders: list[Path], run: EvaluationRun) -> dict[str, LanguageModel]:
    """By name, those that are sources, each with sites of the dictionaries' widths."""
    by_name = {folder.name: folder for folder in folders}
    models: dict[str, LanguageModel] = {}
    for one in placed:
        for model, site in one.evaluated.sources:
            if model not in by_name:
                raise StudyError(f"--model: no folder of the model {model!r} was given")
            if model not in models:
                models[model] = load_model(by_name[model], run.products, run.device)
            where = str(by_name[model])
            one.check_width((model, site), int(np.prod(row_shape(models[model], where, site))), where)
    return models


class SiteSums:
    """Of one site and its reconstruction, in float64: sums over the rows of each document and over all rows.

    `rows_of` [G]: rows of each document. Rows enter as differences from `pivot` [d], near their mean, so that the
    variance's terms do not cancel.
    """

    def __init__(self, rows_of: np.ndarray, pivot: torch.Tensor):
        self._rows_of, self._pivot = rows_of, pivot
        self._error, self._spread = (torch.zeros(len(rows_of), dtype=torch.float64) for _ in range(2))
        self._offset = torch.zeros(len(rows_of), len(pivot), dtype=torch.float64)
        self._energy, self._product, self._norm, self._norm_hat = 0.0, 0.0, 0.0, 0.0

    def add(self, documents: torch.Tensor, x: torch.Tensor, x_hat: torch.Tensor) -> None:
        """Rows [n, d] of these documents [n]."""
        x, x_hat = x.double(), x_hat.double()
        offset = x - self._pivot
        self._error.index_add_(0, documents, (x - x_hat).square().sum(1))
        self._spread.index_add_(0, documents, offset.square().sum(1))
        self._offset.index_add_(0, documents, offset)
        self._energy += float(x_hat.square().sum())
        self._product += float((x_hat * x).sum())
        self._norm += float(x.norm(dim=1).sum())
        self._norm_hat += float(x_hat.norm(dim=1).sum())

    def mean(self) -> torch.Tensor:
        """Of x [d], float32."""
        return (self._pivot + self._offset.sum(0) / self._rows_of.sum()).float()

    def explained_variance(self, weights: np.ndarray) -> np.ndarray:
        """[R], with the documents weighted by each row of `weights` [R, G]."""
        error, spread, offset = (weights @ sums.numpy() for sums in (self._error, self._spread, self._offset))
        return 1 - _ratio(error, spread - np.square(offset).sum(1) / (weights @ self._rows_of))

    def whole(self) -> dict[str, float]:
        """The metrics without an interval. A reconstruction that is zero throughout has shrinkage 0, the limit of ever
        shorter ones."""
        return {
            "mse": float(self._error.sum() / (self._rows_of.sum() * len(self._pivot))),
            "shrinkage": self._energy / self._product if self._product else 0.0,
            "norm_ratio": self._norm_hat / self._norm,
        }


class StoredSums(NamedTuple):
    """Of one dictionary over all stored rows: rows and active features of each document [G], tokens at which each
    feature fires [F], sums of each site that it reconstructs."""

    placed: Placed
    rows_of: np.ndarray
    active: np.ndarray
    fired: np.ndarray
    sites: list[SiteSums]

    @classmethod
    def over(cls, placed: Placed, stores: dict[Source, ActivationStore], size: int) -> "StoredSums":
        """Encode `size` rows at a time. Raises StudyError if a site is the same at every token."""
        first = stores[placed.writes[0]]
        _, groups = np.unique(first.rows().documents, return_inverse=True)
        rows_of = np.bincount(groups).astype(np.float64)
        pivots = [stores[source].read(0, size).flatten(1).double().mean(0) for source in placed.writes]
        sites = [SiteSums(rows_of, pivot) for pivot in pivots]
        active, fired = np.zeros_like(rows_of), np.zeros(placed.sae.d_sae, dtype=np.int64)
        for start in progress(range(0, first.n_rows, size), f"{placed.evaluated.folder} blocks of rows"):
            values = {
                source: stores[source].read(start, start + size).flatten(1) for source in placed.evaluated.sources
            }
            x = torch.cat([values[source] for source in placed.reads], dim=1)
            pattern, codes = placed.sae.encode_sparse(x)
            x_hat = placed.split(placed.sae.from_codes(x, pattern, codes))
            documents = groups[start : start + size]
            active += np.bincount(documents, np.diff(pattern.starts), len(active))
            fired += np.bincount(pattern.features, minlength=len(fired))
            for source, sums, part in zip(placed.writes, sites, x_hat, strict=True):
                sums.add(torch.from_numpy(documents), values[source], part)
        for (model, site), sums in zip(placed.writes, sites, strict=True):
            if np.isnan(sums.explained_variance(np.ones((1, len(rows_of))))).any():
                raise StudyError(f"{model} {site}: is the same at every token; there is nothing to explain")
        return cls(placed, rows_of, active, fired, sites)

    def frequency(self) -> np.ndarray:
        """Share of tokens [F] at which each feature fires."""
        return self.fired / self.rows_of.sum()

    def rows(self, settings: EvaluationSettings) -> list[dict]:
        """What is known without running the model, of each site."""
        resampled = _Resampled(len(self.rows_of), settings)
        frequency, live = self.frequency(), int((self.fired > 0).sum())
        common = {
            "variant": self.placed.evaluated.variant,
            "seed": self.placed.evaluated.seed,
            "kind": self.placed.kind,
            "d_sae": len(frequency),
            "live": live,
            "tokens": int(self.rows_of.sum()),
            **resampled.interval("L0", lambda weights: weights @ self.active / (weights @ self.rows_of)),
            "dead": 1 - live / len(frequency),
            "dense": float((frequency > _DENSE).mean()),
            "frequency_bins": FREQUENCY_BINS.tolist(),
            "frequency_counts": frequency_counts(frequency),
        }
        rows = []
        for number, ((model, site), sums) in enumerate(zip(self.placed.writes, self.sites, strict=True)):
            explained = resampled.interval("explained_variance", sums.explained_variance)
            where = {"model": model, "site": site, "layer": _layer(site)}
            rows.append(common | where | explained | sums.whole() | self._shared(number))
        return rows

    def _shared(self, number: int) -> dict[str, int | None]:
        """Counts of a crosscoder's features by their shares of the site."""
        if self.placed.kind != "crosscoder":
            return {"shared": None, "exclusive": None}
        share = _site_shares(self.placed)[self.fired > 0, number]
        low, high = _SHARED
        return {
            "shared": int(((share >= low) & (share <= high)).sum()),
            "exclusive": int((share > _EXCLUSIVE).sum()),
        }


class _Resampled:
    """Documents drawn anew, and how a metric varies with that."""

    def __init__(self, n_documents: int, settings: EvaluationSettings):
        self._weights = resample_weights(n_documents, settings.bootstrap_samples, settings.bootstrap_seed)
        self._confidence = settings.confidence

    def interval(self, name: str, of_weights: Callable[[np.ndarray], np.ndarray]) -> dict[str, float]:
        """The metric and its interval, from what it is [R] with documents weighted by each row of weights [R, G]."""
        whole = of_weights(np.ones((1, self._weights.shape[1])))[0]
        low, high = percentile_interval(of_weights(self._weights), self._confidence)
        return {name: float(whole), f"{name}_low": float(low), f"{name}_high": float(high)}


def _loss_metrics(losses: Losses, documents: np.ndarray, settings: EvaluationSettings) -> dict:
    """The share recovered is None where taking the site away changes no prediction."""
    index = document_index(documents)
    n, sums = index.sum(axis=1), Losses(*(index @ column for column in losses))
    resampled = _Resampled(len(n), settings)

    def recovered(weights: np.ndarray) -> np.ndarray:
        clean, spliced, zero = (weights @ column for column in (sums.clean, sums.spliced, sums.zero))
        return _ratio(zero - spliced, zero - clean)

    clean, spliced, zero, mean = (float(column.mean()) for column in losses[:4])
    of_zero = resampled.interval("loss_recovered", recovered)
    return {
        "predictions": len(documents),
        "ce_clean": clean,
        "ce_spliced": spliced,
        "ce_zero": zero,
        "ce_mean": mean,
        **(of_zero if zero != clean else dict.fromkeys(of_zero)),
        "loss_recovered_from_mean": (mean - spliced) / (mean - clean) if mean != clean else None,
        **resampled.interval("kl", lambda weights: weights @ sums.kl / (weights @ n)),
    }


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """NaN where `below` is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below == 0, np.nan, above / below)


def _layer(site: str) -> int | None:
    """None of sites in no layer, such as embed."""
    return layer_of(site) if "." in site else None


def _site_shares(placed: Placed) -> np.ndarray:
    """Of each of a crosscoder's features, the share of its decoder norm that is of every site [F, S]."""
    assert isinstance(placed.sae, Crosscoder)
    norms = placed.sae.site_norms().double().numpy()
    return norms / np.maximum(norms.sum(1, keepdims=True), 1e-30)


def _feature_columns(sums: StoredSums) -> dict:
    """feature, frequency, dead, and "share MODEL:SITE" of every site."""
    shares = _site_shares(sums.placed)
    columns = {
        "feature": np.arange(len(shares), dtype=np.int32),
        "frequency": sums.frequency(),
        "dead": sums.fired == 0,
    }
    return columns | {
        f"share {model}:{site}": shares[:, number] for number, (model, site) in enumerate(sums.placed.writes)
    }
