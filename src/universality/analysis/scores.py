"""Two scores of each feature, from measures whose weights were fixed before any result was seen.

    full complexity = 0.4 log2(context needed) / log2(longest) + 0.3 (1 - R2_1) + 0.2 (1 - R2_3) + 0.1 entropy / log2(V)

with the terms cut to [0, 1]: 0 for a feature that one token decides, 1 for one that needs the whole context and that no
n-gram predicts. The context needed is measured of some features only, so that there is also the score without its term,
whose weight the others share in proportion, of all.

    monosemanticity = P( sim(top_i, top_j) > sim(top_i, random_k) )

over pairs of a feature's top contexts and pairs of one with one of any features' random contexts, ties counting half:
the area under the ROC curve (Mann-Whitney). sim is the cosine of TF-IDF vectors (Spaerck Jones 1972) of the tokens in a
window, the feature's own token counted apart from its neighbours. 0.5: top contexts are no more like each other than
like any; 1: they are all alike. It sees shared tokens alone: a feature of a meaning that many words express scores low.
"""

from typing import NamedTuple

import numpy as np
import scipy.sparse
from sklearn.feature_extraction.text import TfidfTransformer

WEIGHTS = {"context": 0.4, "unigram": 0.3, "trigram": 0.2, "entropy": 0.1}


class Complexity(NamedTuple):
    """[F] in [0, 1]: `score` without the context needed, `full` with it, NaN where it was not measured."""

    score: np.ndarray
    full: np.ndarray


def complexity(context: np.ndarray, r2: np.ndarray, entropy: np.ndarray, longest: int, vocabulary: int) -> Complexity:
    """`context` [F] tokens, NaN if not measured; `r2` [3, F]; `entropy` [F] bits. NaN where these are NaN."""
    terms = {
        "context": np.log2(context) / np.log2(longest),
        "unigram": 1 - r2[0],
        "trigram": 1 - r2[2],
        "entropy": entropy / np.log2(vocabulary),
    }
    weighted = {name: weight * np.clip(terms[name], 0, 1) for name, weight in WEIGHTS.items()}
    rest = weighted["unigram"] + weighted["trigram"] + weighted["entropy"]
    return Complexity(rest / (1 - WEIGHTS["context"]), weighted["context"] + rest)


def monosemanticity(
    features: np.ndarray, windows: np.ndarray, random_windows: np.ndarray, n_features: int
) -> np.ndarray:
    """[F], NaN with fewer than two top contexts. `windows` [C, W]: tokens of top contexts, the feature's own token
    last, sorted by feature; -1 for none; `random_windows` [C', W] those of random contexts of any feature."""
    vectors, others = _vectors(windows, random_windows)
    starts = np.searchsorted(features, np.arange(n_features + 1))
    found = np.full(n_features, np.nan)
    for feature in range(n_features):
        own = vectors[starts[feature] : starts[feature + 1]]
        if own.shape[0] > 1:
            alike = (own @ own.T).toarray()[np.triu_indices(own.shape[0], 1)]
            by_chance = np.sort((own @ others.T).toarray().ravel())
            below = np.searchsorted(by_chance, alike, "left") + np.searchsorted(by_chance, alike, "right")
            found[feature] = below.mean() / (2 * len(by_chance))
    return found


def _vectors(windows: np.ndarray, random_windows: np.ndarray) -> tuple[scipy.sparse.csr_array, scipy.sparse.csr_array]:
    """TF-IDF of both, rows of length 1; a word is a token and whether it is the feature's own."""
    both = np.concatenate([windows, random_windows]).astype(np.int64)
    is_own = np.zeros(both.shape, dtype=np.int64)
    is_own[:, -1] = 1
    words, number = np.unique(np.where(both < 0, -1, 2 * both + is_own), return_inverse=True)
    number = number.reshape(both.shape)
    row = np.repeat(np.arange(len(both)), both.shape[1])
    kept = both.ravel() >= 0
    counts = scipy.sparse.coo_array((np.ones(kept.sum()), (row[kept], number.ravel()[kept])), (len(both), len(words)))
    weighted = scipy.sparse.csr_array(TfidfTransformer().fit_transform(counts.tocsr()))
    return weighted[: len(windows)], weighted[len(windows) :]
