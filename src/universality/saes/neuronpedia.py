"""Dashboards of features in the format that SAEDashboard writes and Neuronpedia reads: batch-0.json, batch-1.json, ...

A file is {model_id, layer, sae_set, features}. A feature has its density, a histogram of its activations where it is
active, the logits it raises and lowers with a histogram of all, and contexts: where it is most active (bin_min and
bin_contains -1, bin_max its largest activation), then, from the highest interval down, from each interval of its
activations. `bin_contains` is the share of all tokens that an interval holds, both ends included: tokens where the
feature is not active are in the lowest. The contexts of an interval are evenly spaced in the order of activation.

A feature's effect on the logits is W_dec @ W_U.T: the final norm, and what comes between the site and it, are left out.
A context is within its sequence; end-of-text tokens, which have no row, are not in it. Numbers have 4 digits.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import torch

from universality.activations.format import TokenRows
from universality.activations.store import ActivationStore
from universality.corpus.tokenizer import identity, load_tokenizer
from universality.errors import StudyError
from universality.models.loading import load_model
from universality.runtime import progress
from universality.saes.base import SAE
from universality.saes.neuronpedia_settings import NeuronpediaSettings
from universality.storage import replacing

_DIGITS = 4


class Described(NamedTuple):
    """What features are shown by: their site, the rows they were encoded at, the token strings [V], and W_U [V, D].

    Rows of W_U beyond the tokenizer's vocabulary, which pad it, are left out.
    """

    site: str
    rows: TokenRows
    strings: list[str]
    unembedding: torch.Tensor


def described(store: ActivationStore, tokenizer_folder: Path, model_folder: Path) -> Described:
    """Raises StudyError naming the folder that cannot be read, or if the tokenizer is not the one of the store."""
    tokenizer = load_tokenizer(tokenizer_folder)
    if identity(tokenizer) != store.tokenizer:
        raise StudyError(
            f"{tokenizer_folder}: is not the tokenizer of --activations: {identity(tokenizer)}, not {store.tokenizer}"
        )
    strings = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    unembedding = load_model(model_folder).hf.get_output_embeddings().weight.detach()
    return Described(store.site, store.rows(), strings, unembedding)


def write_dashboards(
    sae: SAE, codes: scipy.sparse.csr_array, by: Described, settings: NeuronpediaSettings, out: Path
) -> None:
    """Write a folder, from the dictionary's codes [T, F] at the rows.

    Raises StudyError if the dictionary, its codes, the rows and the model do not fit each other.
    """
    by = by._replace(unembedding=by.unembedding[: len(by.strings)])
    _check(sae, codes, by)
    head = {"model_id": settings.model_id, "layer": _layer(by.site), "sae_set": settings.sae_set}
    contexts = _Contexts(by.rows, by.strings, settings)
    by_feature = codes.tocsc()
    starts = range(0, sae.d_sae, settings.features_per_file)
    with replacing(out) as folder:
        folder.mkdir()
        for number, start in enumerate(progress(starts, f"{out} files", len(starts))):
            some = range(start, min(start + settings.features_per_file, sae.d_sae))
            features = list(_features(some, sae, by_feature, by, contexts, settings))
            text = json.dumps(head | {"features": features}, separators=(",", ":"), allow_nan=False)
            (folder / f"batch-{number}.json").write_text(text, encoding="utf8")


def _check(sae: SAE, codes: scipy.sparse.csr_array, by: Described) -> None:
    n_tokens, d_sae = codes.shape
    if d_sae != sae.d_sae:
        raise StudyError(f"--features: has codes of {d_sae} features, but the dictionary has {sae.d_sae}")
    if n_tokens != len(by.rows.tokens):
        raise StudyError(
            f"--features: has codes of {n_tokens} tokens, but --activations have {len(by.rows.tokens)} rows"
        )
    if by.unembedding.shape[1] != sae.d_out:
        raise StudyError(
            f"--model: its residual stream has width {by.unembedding.shape[1]}, but the dictionary writes {sae.d_out}"
        )
    if by.rows.tokens.max() >= len(by.strings):
        raise StudyError(
            f"--tokenizer: has {len(by.strings)} tokens, but --activations has token {by.rows.tokens.max()}"
        )


def _layer(site: str) -> int:
    """Its number in the site's name: 3 of resid_post.3 and of mlp.3.out."""
    part = site.split(".")[1] if "." in site else ""
    if not part.isdecimal():
        raise StudyError(f"--activations: the site {site!r} is in no layer, and Neuronpedia files features by layer")
    return int(part)


def _features(
    some: range,
    sae: SAE,
    by_feature: scipy.sparse.csc_array,
    by: Described,
    contexts: "_Contexts",
    settings: NeuronpediaSettings,
) -> Iterator[dict[str, Any]]:
    effects = sae.W_dec[some.start : some.stop] @ by.unembedding.T
    k = min(settings.logits, effects.shape[1])
    raised, lowered = torch.topk(effects, k), torch.topk(effects, k, largest=False)
    for place, feature in enumerate(some):
        entries = slice(by_feature.indptr[feature], by_feature.indptr[feature + 1])
        rows, values = by_feature.indices[entries], by_feature.data[entries]
        frequency, logits = _histogram(values, settings.bars), _histogram(effects[place].numpy(), settings.bars)
        yield {
            "feature_index": feature,
            "frac_nonzero": len(rows) / by_feature.shape[0],
            "freq_hist_data_bar_heights": frequency[0],
            "freq_hist_data_bar_values": frequency[1],
            "logits_hist_data_bar_heights": logits[0],
            "logits_hist_data_bar_values": logits[1],
            "neg_str": [by.strings[token] for token in lowered.indices[place].tolist()],
            "neg_values": _rounded(lowered.values[place].numpy()).tolist(),
            "pos_str": [by.strings[token] for token in raised.indices[place].tolist()],
            "pos_values": _rounded(raised.values[place].numpy()).tolist(),
            "activations": contexts.of_feature(rows, values),
        }


class _Contexts:
    """Windows of rows around rows, within a document and a sequence."""

    def __init__(self, rows: TokenRows, strings: list[str], settings: NeuronpediaSettings):
        self._settings = settings
        self._strings = [strings[token] for token in rows.tokens.tolist()]
        other_sequence = np.diff(rows.positions, prepend=rows.positions[0]) <= 0
        other_document = np.diff(rows.documents, prepend=rows.documents[0]) != 0
        begins = np.flatnonzero(other_sequence | other_document | (np.arange(len(rows.positions)) == 0))
        ends = np.append(begins[1:], len(rows.positions))
        at = np.arange(len(rows.positions))
        sequence = np.searchsorted(begins, at, side="right") - 1
        self._starts = np.maximum(begins[sequence], at - settings.reach)
        self._stops = np.minimum(ends[sequence], at + settings.reach + 1)
        self._activation = np.zeros(len(at))

    def of_feature(self, rows: np.ndarray, values: np.ndarray) -> list[dict[str, Any]]:
        """The contexts of a feature that is active at `rows` [n], by `values` [n]."""
        if not len(rows):
            return []
        self._activation[rows] = _rounded(values)
        order = np.argsort(-values, kind="stable")
        largest = float(values[order[0]])
        shown = [self._context(row, -1, largest, -1) for row in rows[order[: self._settings.top]]]
        edges = np.linspace(0, largest, self._settings.bins + 1)
        # Descending, so that from an edge on everything is below it.
        above = np.searchsorted(-values[order], -edges, side="left")
        at_least = np.searchsorted(-values[order], -edges, side="right")
        for low in reversed(range(self._settings.bins)):
            inside = order[above[low + 1] : at_least[low]]
            idle = len(self._starts) - len(rows) if low == 0 else 0
            share = (len(inside) + idle) / len(self._starts)
            spaced = np.linspace(0, len(inside) - 1, min(self._settings.per_bin, len(inside))).round().astype(int)
            shown += [self._context(row, edges[low], edges[low + 1], share) for row in rows[inside[spaced]]]
        self._activation[rows] = 0
        return shown

    def _context(self, row: int, low: float, high: float, share: float) -> dict[str, Any]:
        start, stop = int(self._starts[row]), int(self._stops[row])
        return {
            "tokens": self._strings[start:stop],
            "values": self._activation[start:stop].tolist(),
            "bin_min": float(low),
            "bin_max": float(high),
            "bin_contains": float(share),
            "qualifying_token_index": int(row) - start,
        }


def _histogram(values: np.ndarray, bars: int) -> tuple[list[int], list[float]]:
    """How many values each of equally wide bars holds, and the bars' centres; nothing of no values."""
    if not len(values):
        return [], []
    heights, edges = np.histogram(values.astype(np.float64), bars)  # float32 may have no room for that many bars
    return heights.tolist(), _rounded((edges[:-1] + edges[1:]) / 2).tolist()


def _rounded(values: np.ndarray) -> np.ndarray:
    """To _DIGITS significant digits, float64."""
    values = values.astype(np.float64)
    size = np.abs(values)
    scale = 10.0 ** (_DIGITS - 1 - np.floor(np.log10(size, out=np.zeros_like(size), where=size > 0)))
    return np.round(values * scale) / scale
