"""Pairs of feature sets whose shared part is known, to test what an analysis says of them."""

from typing import NamedTuple

import numpy as np
import scipy.sparse


class Planted(NamedTuple):
    """Codes of both sides [T, F], the document of each token [T], and the partner in b of each feature of a, or -1."""

    a: scipy.sparse.csr_array
    b: scipy.sparse.csr_array
    documents: np.ndarray
    partner: np.ndarray


def plant(
    rng: np.random.Generator,
    *,
    n_features: int,
    n_tokens: int,
    n_documents: int,
    shared: float,
    noise: float = 0.5,
    dropout: float = 0.1,
    cross_talk: float = 0.0,
    highest: float = 0.2,
    exponent: float = 0.7,
    topical: float = 0.5,
) -> Planted:
    """`shared`: share of the features of each side that follow a latent of the other; the rest have latents of their
    own. Latent k fires with frequency highest * k^-exponent (the order is random), in a share `topical` of the
    documents only, with exponential sizes. Each side sees its latents through log-normal noise of spread `noise` and
    misses a share `dropout` of the firings; `cross_talk` times another feature's value of the same side is added to
    each feature where that other one fires.
    """
    n_shared = round(shared * n_features)
    documents = np.arange(n_tokens) * n_documents // n_tokens
    frequency = highest * np.arange(1, n_features + 1) ** -exponent

    def latents() -> np.ndarray:
        place = rng.permutation(n_features)
        on_topic = rng.random((n_documents, n_features)) < topical
        fires = rng.random((n_tokens, n_features)) < (frequency[place] / topical) * on_topic[documents]
        return fires * rng.exponential(1.0, (n_tokens, n_features))

    def seen(z: np.ndarray) -> np.ndarray:
        x = z * rng.lognormal(0.0, noise, z.shape) * (rng.random(z.shape) >= dropout)
        return x + cross_talk * np.roll(x, 1, axis=1)

    z_a, z_b = latents(), latents()
    partner = np.full(n_features, -1)
    own, other = (rng.permutation(n_features)[:n_shared] for _ in range(2))
    z_b[:, other] = z_a[:, own]
    partner[own] = other
    a, b = (scipy.sparse.csr_array(seen(z).astype(np.float32)) for z in (z_a, z_b))
    return Planted(a, b, documents, partner)
