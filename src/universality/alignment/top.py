"""The best partners of each feature, as found in one layer of the other side, and put together over its layers.

Ties go to the partner that comes first: whatever the split into parts, the same partners in the same order.
"""

from typing import NamedTuple

import numpy as np


class Found(NamedTuple):
    """Partners of n features in one layer of the other side.

    `r` [n, m]: the largest correlations on all tokens, descending, NaN where there are fewer; `partner` [n, m]: the
    features that they are with, or -1. `prefix_r` [C - 1, n]: the largest on each prefix of the tokens. `chosen` [n]:
    the partner with the largest on the prefix that is the selection half, or -1; `heldout_r` [n]: its correlation on
    the other half. `null_r`, `null_partner` [K, n']: the largest under each rotation, of the features drawn for it.
    """

    r: np.ndarray
    partner: np.ndarray
    prefix_r: np.ndarray
    chosen: np.ndarray
    heldout_r: np.ndarray
    null_r: np.ndarray
    null_partner: np.ndarray


class Best(NamedTuple):
    """The same over all layers of the other side; `layer`, `chosen_layer`, `null_layer`: the place of the layer, or
    -1."""

    r: np.ndarray
    partner: np.ndarray
    layer: np.ndarray
    prefix_r: np.ndarray
    chosen: np.ndarray
    chosen_layer: np.ndarray
    heldout_r: np.ndarray
    null_r: np.ndarray
    null_partner: np.ndarray
    null_layer: np.ndarray


def put_together(parts: list[Found], half: int) -> Best:
    """`parts` in the order of the other side's layers; `half`: which prefix partners are chosen on."""
    n, m = parts[0].r.shape
    r, partner = (np.concatenate([getattr(p, name) for p in parts], axis=1) for name in ("r", "partner"))
    layer = np.repeat(np.arange(len(parts), dtype=np.int32), m)[None].repeat(n, axis=0)
    best = np.argsort(-_filled(r), axis=1, kind="stable")[:, :m]
    r, partner, layer = (np.take_along_axis(x, best, axis=1) for x in (r, partner, layer))
    where, chosen, heldout_r = _first_best(
        np.stack([p.prefix_r[half] for p in parts]), *(np.stack([getattr(p, k) for p in parts]) for k in _CHOSEN)
    )
    null_layer, null_r, null_partner = _first_best(
        np.stack([p.null_r for p in parts]), *(np.stack([getattr(p, k) for p in parts]) for k in _NULL)
    )
    return Best(
        r, partner, np.where(partner < 0, -1, layer), np.fmax.reduce([p.prefix_r for p in parts]),
        chosen, np.where(chosen < 0, -1, where), heldout_r, null_r, null_partner,
        np.where(null_partner < 0, -1, null_layer),
    )  # fmt: skip


_CHOSEN, _NULL = ("chosen", "heldout_r"), ("null_r", "null_partner")


def _filled(r: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(r), -np.inf, r)


def _first_best(r: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Along the first axis: the place of the largest, the first if several, and what `others` hold there."""
    place = _filled(r).argmax(axis=0)
    return place.astype(np.int32), *(np.take_along_axis(x, place[None], axis=0)[0] for x in others)
