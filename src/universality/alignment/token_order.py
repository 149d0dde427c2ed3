"""The order in which a comparison goes through tokens: document after document, the documents in one random order.

Any prefix of it is then a random sample of documents (how MPPC moves with the number of tokens), its first half is what
partners are chosen on and the second what they are measured on, a rotation by whole documents keeps everything within
a document as it was (the null), and the tokens of a resampled unit lie next to each other (the bootstrap).
"""

from typing import NamedTuple

import numpy as np

from universality.errors import StudyError

_FEWEST_DOCUMENTS = 8


class TokenOrder(NamedTuple):
    """`rows` [T]: the row of the store at each place; `documents` [D + 1]: the place where each document begins, and T;
    `cuts` [C]: places where prefixes end, ascending, the last is T; `half`: which of the cuts ends the selection half;
    `groups` [G + 1]: where the bootstrap's units begin, and T; a group lies on one side of the half."""

    rows: np.ndarray
    documents: np.ndarray
    cuts: np.ndarray
    half: int
    groups: np.ndarray

    @property
    def n_tokens(self) -> int:
        return len(self.rows)

    @property
    def n_documents(self) -> int:
        return len(self.documents) - 1

    @property
    def first_measured_group(self) -> int:
        """The first group of the second half."""
        return int(np.searchsorted(self.groups, self.cuts[self.half]))

    def segments(self) -> np.ndarray:
        """[C + 1, 2] first place and end of each prefix, then of the second half: where moments are needed."""
        prefixes = [(0, cut) for cut in self.cuts]
        return np.array([*prefixes, (self.cuts[self.half], self.n_tokens)], dtype=np.int64)


def order_by_document(documents: np.ndarray, shares: list[float], max_groups: int, seed: int) -> TokenOrder:
    """`documents` [T] tells each row's document; `shares` are those of the tokens at which prefixes end, beside a half
    and the whole. Prefixes end where a document does. With more documents than `max_groups`, neighbours in the random
    order share a group: groups of independent documents are independent too.

    Raises StudyError if there are fewer than 8 documents.
    """
    names, number, sizes = np.unique(documents, return_inverse=True, return_counts=True)
    if len(names) < _FEWEST_DOCUMENTS:
        raise StudyError(
            f"the held-out tokens are of {len(names)} documents; halves and resamples of documents need "
            f"{_FEWEST_DOCUMENTS}: evaluate on more"
        )
    shuffled = np.random.default_rng(seed).permutation(len(names))
    place = np.empty(len(names), dtype=np.int64)
    place[shuffled] = np.arange(len(names))
    rows = np.argsort(place[number], kind="stable")
    starts = np.concatenate([[0], np.cumsum(sizes[shuffled])])
    ends = {share: int(_nearest(starts, share * len(documents))) for share in {*shares, 0.5}}
    cuts = sorted({*ends.values(), len(documents)})
    half = cuts.index(ends[0.5])
    return TokenOrder(rows, starts, np.array(cuts, dtype=np.int64), half, _groups(starts, ends[0.5], max_groups))


def _nearest(starts: np.ndarray, place: float) -> int:
    """The inner boundary of documents that is nearest to a place."""
    inner = starts[1:-1]
    return inner[np.abs(inner - place).argmin()]


def _groups(starts: np.ndarray, half: int, max_groups: int) -> np.ndarray:
    """Boundaries of groups: in each half as many documents a group as leaves at most max_groups / 2."""
    first = int(np.searchsorted(starts, half))
    bounds = []
    for low, high in ((0, first), (first, len(starts) - 1)):
        n = min(high - low, max(max_groups // 2, 1))
        bounds.append(starts[np.linspace(low, high, n + 1).round().astype(int)])
    return np.concatenate([bounds[0][:-1], bounds[1]])


def rotations(order: TokenOrder, n: int, seed: int) -> np.ndarray:
    """Places [n] by which codes of one side are rotated for a null, each a random whole number of documents, none of
    them 0: the token at place t of one side then meets the token at place (t + rotation) mod T of the other."""
    inner = order.documents[1:-1]
    return np.random.default_rng(seed).choice(inner, size=n, replace=n > len(inner))
