"""The tokens that codes are of, as measures look at them: which token came before, and the n-grams that tokens end.

What precedes a token is what precedes it in its sequence, all that the model saw; at the start of a sequence there is
nothing, which counts as a token of its own.
"""

from typing import NamedTuple

import numpy as np

from universality.activations.format import TokenRows

NOTHING = -1
"""In the place of a token before the first of a sequence."""


def preceding(rows: TokenRows, n: int) -> np.ndarray:
    """The token `n` places before each row's in its sequence [T], or NOTHING. End-of-text tokens, which are no rows,
    cut what came before them off."""
    found = np.full(len(rows.tokens), NOTHING, dtype=np.int64)
    if n < len(found):
        inside = rows.positions[n:] - rows.positions[:-n] == n if n else np.ones(len(found), dtype=bool)
        found[n:][inside] = rows.tokens[: len(found) - n][inside]
    return found


class Grams(NamedTuple):
    """The n-grams, 1 to N, that tokens end, as a tree: an n-gram's parent is the one a token shorter.

    `of_token` [N, T]: which n-gram of each length a token ends, numbered so that children of one parent are neighbours,
    in the order of the parents; `first_child` [N - 1] arrays [groups + 1]: where an n-gram's children begin.
    """

    of_token: np.ndarray
    first_child: list[np.ndarray]

    def counts(self, length: int, where: np.ndarray) -> np.ndarray:
        """How many of the tokens `where` [T] each n-gram of a length ends."""
        return np.bincount(self.of_token[length - 1][where], minlength=int(self.of_token[length - 1].max()) + 1)


def grams(rows: TokenRows, longest: int) -> Grams:
    """All n-grams up to `longest` tokens."""
    vocabulary = int(rows.tokens.max()) + 2  # NOTHING is one of them
    of_token, first_child = [], []
    parents = np.zeros(len(rows.tokens), dtype=np.int64)
    for n in range(longest):
        keys, number = np.unique(parents * vocabulary + preceding(rows, n) + 1, return_inverse=True)
        if n:
            n_parents = int(parents.max()) + 1
            first_child.append(np.searchsorted(keys // vocabulary, np.arange(n_parents + 1)))
        of_token.append(number)
        parents = number
    return Grams(np.stack(of_token), first_child)
